"""Lists are read along an index: no page scans a table or sorts it, on either database."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.orm import Session

from models.db import Database
from models.registry import adapters, audit, checkpoints, events, files, jobs, tenancy
from models.registry.page import Cursor, Page
from models.tables import Adapter, AuditLog, Checkpoint, Event, File, Job

N_ROWS = 3000
N_PROJECTS = 10
SPEC = {"model": "base"}


def rows(**values: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [
        {
            "created_at": float(n // 10),  # many at the same moment
            **{name: value(n) for name, value in values.items()},
        }
        for n in range(N_ROWS)
    ]


def always(value: Any) -> Callable[[int], Any]:
    return lambda _: value


def numbered(prefix: str) -> Callable[[int], str]:
    return lambda n: f"{prefix}{n:05}"


def _add_to_first_job(session: Session) -> None:
    of_first = {"job_id": always("ftjob-00000")}
    session.execute(
        insert(Event),
        rows(
            id=numbered("ftevent-"),
            sequence=lambda n: n + 1,
            level=always("info"),
            type=always("message"),
            message=always("x"),
            **of_first,
        ),
    )
    session.execute(
        insert(Checkpoint),
        rows(
            id=numbered("ftckpt-"),
            attempt=always(1),
            step=lambda n: n + 1,
            name=numbered("ft:ckpt:"),
            object_prefix=always("x"),
            adapter_digest=always("d"),
            base_fingerprint=always("f"),
            metrics=always({}),
            **of_first,
        ),
    )


@pytest.fixture
def project(database: Database) -> str:
    """One of ten projects with a tenth of the rows; job 0 has all events and checkpoints."""
    with database.write() as session:
        owners = [tenancy.create_project(session, f"p{n}").id for n in range(N_PROJECTS)]

        def owner(n: int) -> str:
            return owners[n % N_PROJECTS]

        session.execute(
            insert(Job),
            rows(
                id=numbered("ftjob-"),
                project_id=owner,
                status=always("succeeded"),
                base_model=always("base"),
                training_file=always("file-x"),
                spec=always(SPEC),
            ),
        )
        session.execute(
            insert(File),
            rows(
                id=numbered("file-"),
                project_id=owner,
                purpose=always("fine-tune"),
                filename=always("x"),
                bytes=always(1),
                sha256=numbered(""),
                object_key=numbered("key"),
            ),
        )
        session.execute(
            insert(Adapter),
            rows(
                name=numbered("ft:"),
                project_id=owner,
                base_model=always("base"),
                digest=numbered(""),
                bytes=always(1),
                manifest=always({}),
            ),
        )
        session.execute(
            insert(AuditLog),
            rows(
                id=numbered("audit_log-"),
                project_id=owner,
                type=always("file.created"),
                object_id=always("file-x"),
            ),
        )
        _add_to_first_job(session)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    return owners[0]


@contextmanager
def statements(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """Collect what is sent to the database."""
    sent: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    yield sent
    event.remove(database.engine, "before_cursor_execute", note)


def plan(database: Database, statement: str, parameters: Any) -> str:
    is_sqlite = database.engine.dialect.name == "sqlite"
    explain = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
    with database.engine.connect() as connection:
        rows = connection.exec_driver_sql(f"{explain} {statement}", parameters).all()
    return "\n".join(str(row[-1]) for row in rows)


LISTS: dict[str, Callable[[Session, str, Cursor], Page[Any]]] = {
    "jobs": jobs.list_page,
    "files": files.list_page,
    "adapters": adapters.list_page,
    "audit_logs": audit.list_page,
    "events": lambda session, _, cursor: events.list_page(session, "ftjob-00000", cursor),
    "checkpoints": lambda session, _, cursor: checkpoints.list_page(session, "ftjob-00000", cursor),
}


def test_every_page_of_every_list_follows_an_index(database: Database, project: str) -> None:
    for name, list_page in LISTS.items():
        with database.read() as session:
            first = list_page(session, project, Cursor(limit=20))
            last = first.rows[-1]
            cursor = Cursor(after=last.name if name == "adapters" else last.id, limit=20)
            with statements(database) as sent:
                second = list_page(session, project, cursor)
        keys = [getattr(row, "name" if name == "adapters" else "id") for row in first.rows]
        keys += [getattr(row, "name" if name == "adapters" else "id") for row in second.rows]
        assert len(keys) == len(set(keys)) == 40
        assert keys == sorted(keys, reverse=True)
        for statement, parameters in sent:
            found = plan(database, statement, parameters)
            assert "Seq Scan" not in found, (name, found)
            assert f"SCAN {name}" not in found, (name, found)
            if "ORDER BY" in statement:
                # PostgreSQL may sort what shares the first key: of events and checkpoints, one row.
                assert "Sort  (" not in found.replace("Incremental Sort  (", ""), (name, found)
                assert "TEMP B-TREE" not in found, (name, found)
