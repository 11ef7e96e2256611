"""The directory of an embedded service: who else looks into it sees whole files."""

import os
from pathlib import Path
from threading import Thread

from api.cli.home import Home


def test_who_looks_while_a_service_announces_itself_sees_all_of_it_or_nothing(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path)
    seen: set[object] = set()
    is_over = False

    def look() -> None:
        while not is_over:
            try:
                found = home.running()
            except ValueError as error:  # half a file
                seen.add(type(error))
            else:
                seen.add(None if found is None else (found.url, found.pid))

    looking = Thread(target=look)
    looking.start()
    for _ in range(300):
        with home.announced("http://127.0.0.1:1"):
            pass
    with home.announced("http://127.0.0.1:1"):
        is_over = True
        looking.join()
        assert home.running() is not None
    assert home.running() is None
    assert seen <= {None, ("http://127.0.0.1:1", os.getpid())}
