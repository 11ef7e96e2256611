"""The HTTP server of an API process."""

import contextlib
import gc
import socket

import typer
import uvicorn

NEW_OBJECTS = 10_000
"""Between two searches for garbage; a request makes some hundreds."""
NOT_STARTED = 3
"""Exit status, as that of ``uvicorn.run``."""


class ApiServer(uvicorn.Server):
    """Serves one application; what is loaded when it begins stays for the life of the process.

    So Python's search for garbage need not look through it again and again: that took a tenth of
    the time of creating a job.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()
        gc.set_threshold(NEW_OBJECTS)


def serve(config: uvicorn.Config) -> None:
    """Serve until the process is told to end; raises `typer.Exit` if it could not begin."""
    server = ApiServer(config)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise typer.Exit(NOT_STARTED)
