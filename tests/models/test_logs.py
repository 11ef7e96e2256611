"""Logs: one JSON object a line, that nobody can forge and that tells no secret."""

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from models.logs import configure_logging


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged in a test; the configuration before it comes back afterwards."""
    root = logging.getLogger()
    handlers, level, config = root.handlers, root.level, structlog.get_config()
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging("INFO", "test")
    yield stream
    root.handlers, root.level = handlers, level
    structlog.configure(**config)
    structlog.contextvars.clear_contextvars()


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_both_kinds_of_loggers_write_the_same_form(written: io.StringIO) -> None:
    structlog.get_logger("ours").info("event", number=1)
    logging.getLogger("theirs").warning("said %s", "so")
    ours, theirs = lines(written)
    assert (ours["event"], ours["number"], ours["level"]) == ("event", 1, "info")
    assert (theirs["event"], theirs["logger"], theirs["process"]) == ("said so", "theirs", "test")


def test_lines_of_every_thread_say_of_which_process_they_are(written: io.StringIO) -> None:
    thread = threading.Thread(target=structlog.get_logger("ours").info, args=("event",))
    thread.start()
    thread.join()
    logging.getLogger("theirs").info("event")
    assert [line["process"] for line in lines(written)] == ["test", "test"]


def test_what_is_below_the_level_is_not_written(written: io.StringIO) -> None:
    logging.getLogger().setLevel("WARNING")
    structlog.get_logger("ours").info("event")
    structlog.get_logger("ours").warning("other")
    assert [line["event"] for line in lines(written)] == ["other"]


def test_text_from_outside_cannot_begin_a_line(written: io.StringIO) -> None:
    structlog.get_logger("ours").info("request", path='/x\r\n{"event": "forged"}\x1b[2J')
    assert [line["event"] for line in lines(written)] == ["request"]
    assert "\x1b" not in written.getvalue()


@pytest.mark.parametrize("logger", [structlog.get_logger("ours"), logging.getLogger("theirs")])
def test_a_traceback_names_the_place_and_no_value(written: io.StringIO, logger: Any) -> None:
    key = "-".join(["sk", "tunery", "canary"])
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logger.exception("unexpected")
    assert "broken" in written.getvalue()
    assert "test_logs.py" in written.getvalue()
    assert key not in written.getvalue()
