"""The server of an API process."""

import asyncio
import gc
import socket

import pytest
import typer
import uvicorn
from fastapi import FastAPI

from api.cli import server


def test_what_is_loaded_at_the_start_is_not_looked_through_again() -> None:
    async def main() -> int:
        config = uvicorn.Config(FastAPI(), port=0, log_config=None)
        config.load()
        made = server.ApiServer(config)
        made.lifespan = config.lifespan_class(config)
        await made.startup()
        try:
            return gc.get_freeze_count()
        finally:
            await made.shutdown()

    before = gc.get_threshold()
    try:
        assert asyncio.run(main()) > 10_000
        assert gc.get_threshold()[0] == server.NEW_OBJECTS
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_a_port_that_is_taken_ends_the_process_with_a_status() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = uvicorn.Config(FastAPI(), port=taken.getsockname()[1], log_config=None)
        with pytest.raises((typer.Exit, SystemExit)):
            server.serve(config)
