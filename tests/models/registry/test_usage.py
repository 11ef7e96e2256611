"""Usage adds up by day, key and model, whoever writes it at the same time."""

from concurrent.futures import ThreadPoolExecutor

from models.db import Database
from models.registry import tenancy, usage
from models.registry.usage import Used, User


def test_concurrent_amounts_add_up(database: Database) -> None:
    with database.write() as session:
        project = tenancy.default_project(session).id
    first, second = User(project, "key_a", "base"), User(project, None, "base")

    def write(n: int) -> None:
        with database.write() as session:
            amounts = [(first, Used(requests=1, prompt_tokens=n)), (second, Used(trained_tokens=2))]
            usage.add(session, amounts if n % 2 else reversed(amounts))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(20)))
    with database.read() as session:
        day = usage.today(session)
        rows = usage.by_day(session, [project], day - 1, day)
        found = [(row.key_id, row.requests, row.prompt_tokens, row.trained_tokens) for row in rows]
        assert found == [("", 0, 0, 40), ("key_a", 20, 190, 0)]
        assert usage.by_day(session, [project], day + 1, day + 2) == []
        assert usage.total(session, project, day).tokens == 230
        assert usage.total(session, "proj_none", day) == Used()
