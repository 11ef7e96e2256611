"""Runs batches: reads their files, asks the application itself line by line, writes the answers.

A line is a request to this very application, made inside the process: whatever an endpoint checks,
resolves and counts, it does for a batch as for a caller. Every process of the API runs batches;
a lease in the database says which process has which batch.
"""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import httpx
import orjson
import structlog
from fastapi.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from api import actions, batch_lines
from api.batch_lines import Line
from api.deps import INTERNAL_CALLER, Caller, caller_of
from api.services import Services
from models.domain import access
from models.domain.base import JsonObject
from models.domain.status import BatchStatus
from models.errors import LeaseLostError, NotFoundError
from models.registry import batches, files
from models.registry.batches import Answer
from models.storage import ObjectNotFoundError, fetch_file
from models.tables import Batch, new_id

_Result = TypeVar("_Result")

log = structlog.get_logger(__name__)

POLL_SECONDS = 2.0
FLUSH_SECONDS = 0.5
"""Answers of so many seconds may be asked for again after a crash."""
LEASE_SECONDS = 20.0
MAX_BATCHES = 4
ROWS = 500
AGAIN = frozenset({408, 429, 503})
"""Answers that say "later": such a line is asked again until the batch's window ends."""
MAX_ERRORS_IN_A_ROW = 3
MAX_WAIT_SECONDS = 30.0


async def _in_thread(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Run what blocks in a thread; also when cancelled, wait until the thread has let go."""
    work = asyncio.ensure_future(run_in_threadpool(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # nobody asks for it any more
        raise


class BatchRunner:
    """The batches of this process.

    Args:
        app: The application that answers the lines.
        services: Its services; the setting ``api.batch_requests`` says how many lines are under
            way at a time, over all batches.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services
        self._width = services.settings.api.batch_requests
        self._slots = asyncio.Semaphore(self._width)
        self._running: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._look()) if self._width else None

    async def aclose(self) -> None:
        """Stop; what is not done is left to the next process."""
        tasks = [*self._running, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            try:
                while len(self._running) < MAX_BATCHES and (batch := await self._claim()):
                    task = asyncio.create_task(self._run(batch))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
                    task.add_done_callback(lambda _: self._services.batch_wake.call())
            except Exception:
                log.exception("batches_not_claimed")
            await self._services.batch_wake.wait(POLL_SECONDS)

    async def _claim(self) -> Batch | None:
        def claim() -> Batch | None:
            with self._services.database.read() as session:
                if not batches.has_waiting(session):
                    return None
            with self._services.database.write() as session:
                return batches.claim(session, LEASE_SECONDS)

        return await _in_thread(claim)

    async def _run(self, batch: Batch) -> None:
        with structlog.contextvars.bound_contextvars(batch_id=batch.id, attempt=batch.attempt):
            log.info("batch_taken", status=batch.status)
            try:
                with tempfile.TemporaryDirectory(prefix="tunery-batch-") as folder:
                    run = _Run(self._app, self._services, self._slots, batch, Path(folder))
                    await run.to_the_end(self._width)
            except LeaseLostError:
                log.info("batch_given_up")
            except asyncio.CancelledError:
                await _in_thread(self._release, batch)
                raise
            except Exception:
                log.exception("batch_interrupted")  # its lease ends, and it is taken again

    def _release(self, batch: Batch) -> None:
        with self._services.database.write() as session:
            batches.release(session, batch.id, batch.attempt)


@dataclass
class _Run:
    """One attempt at one batch."""

    app: ASGIApp
    services: Services
    slots: asyncio.Semaphore
    batch: Batch
    folder: Path
    _answers: list[Answer] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def _path(self) -> Path:
        return self.folder / "input"

    @cached_property
    def _caller(self) -> Caller:
        """Whose requests the lines are: the key's, with its limits of tokens."""
        return caller_of(self.services, self.batch.key_id, (access.Scope.INFER,))

    async def to_the_end(self, width: int) -> None:
        """Bring the batch from whatever state it is in to its end. Raises `LeaseLostError`."""
        keeper = asyncio.create_task(self._keep())
        try:
            found = await _in_thread(self._fetch)
            if self.batch.status == BatchStatus.VALIDATING:
                await _in_thread(self._validate, found)
            if self.batch.status == BatchStatus.IN_PROGRESS and found:
                await self._answer_all(width, keeper)
            self._ended.set()
            await keeper
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if self.batch.status != BatchStatus.FAILED:
            await _in_thread(self._finish, found)

    def _fetch(self) -> bool:
        """Copy the input file here; False if it is gone."""
        assert self._caller  # looked up here, in a thread
        try:
            with self.services.database.read() as session:
                file = files.get(session, self.batch.project_id, self.batch.input_file_id)
            fetch_file(self.services.store, file.object_key, self._path, sha256=file.sha256)
        except (NotFoundError, ObjectNotFoundError, ValueError) as error:
            log.warning("batch_input_lost", error=str(error))
            return False
        return True

    def _validate(self, found: bool) -> None:
        """Check the input, and start or fail the batch; its status here is the new one."""
        if found:
            checked = batch_lines.check(self._path, self.batch.endpoint)
        else:
            checked = batch_lines.missing_file()
        with self.services.database.write() as session:
            if checked.errors:
                batches.fail(session, self.batch, checked.errors)
            else:
                batches.start(session, self.batch, checked.n_requests, checked.model)
            self.batch = session.get_one(Batch, self.batch.id, populate_existing=True)

    async def _keep(self) -> None:
        """Write answers, renew the lease, and see whether the batch is to stop."""
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), FLUSH_SECONDS)
            # Asked before answers are taken: some may have come while the last ones were written.
            is_last = self._ended.is_set()
            taken, self._answers = self._answers, []
            standing = await _in_thread(self._flush, taken)
            if standing.status == BatchStatus.CANCELLING or standing.is_expired:
                self._stop.set()

    def _flush(self, taken: list[Answer]) -> batches.Standing:
        with self.services.database.write() as session:
            if taken:
                batches.record(session, self.batch.id, self.batch.attempt, taken)
            return batches.renew(session, self.batch.id, self.batch.attempt, LEASE_SECONDS)

    async def _answer_all(self, width: int, keeper: "asyncio.Task[None]") -> None:
        """Ask for every line without an answer, `width` at a time, until done or told to stop."""
        done = await _in_thread(self._done_lines)
        lines = (line for line in batch_lines.read(self._path) if line.number not in done)
        transport = httpx.ASGITransport(self._as_caller, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://batch") as client:

            async def ask_all() -> None:
                async with asyncio.TaskGroup() as group:
                    for _ in range(width):
                        group.create_task(self._ask_from(lines, client))

            asking = asyncio.create_task(ask_all())
            stopping = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait({asking, stopping, keeper}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                asking.cancel()
                stopping.cancel()
                [outcome, _] = await asyncio.gather(asking, stopping, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome

    def _done_lines(self) -> set[int]:
        with self.services.database.read() as session:
            return batches.done_lines(session, self.batch.id)

    async def _ask_from(self, lines: Iterator[Line], client: httpx.AsyncClient) -> None:
        for line in lines:  # shared by all askers: each takes the next
            answer = await self._ask(line, client)
            self._answers.append(answer)

    async def _ask(self, line: Line, client: httpx.AsyncClient) -> Answer:
        """Ask for one line until there is an answer that stands."""
        body = orjson.dumps(line.body)
        n_errors = 0
        wait = 1.0
        while True:
            async with self.slots:
                response = await client.post(
                    self.batch.endpoint, content=body, headers={"content-type": "application/json"}
                )
            if response.status_code not in AGAIN:
                n_errors += response.status_code >= 500
                if response.status_code < 500 or n_errors == MAX_ERRORS_IN_A_ROW:
                    return _answer(line, response)
            pause = float(response.headers.get("retry-after", wait))
            await asyncio.sleep(min(pause, MAX_WAIT_SECONDS))
            wait = min(2 * wait, MAX_WAIT_SECONDS)

    async def _as_caller(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, INTERNAL_CALLER: self._caller}, receive, send)

    def _finish(self, found: bool) -> None:
        """Write the files and end the batch."""
        with self.services.database.write() as session:
            batch = batches.conclude(session, self.batch)
        if batch.status == BatchStatus.CANCELLING:
            target = BatchStatus.CANCELLED
        else:
            is_whole = batch.n_completed + batch.n_failed == batch.n_total
            target = BatchStatus.COMPLETED if is_whole else BatchStatus.EXPIRED
        outputs = {"output": self._rows(failed=False), "error": self._rows(failed=True)}
        if found and batch.n_total:
            outputs["error"] = chain(outputs["error"], self._unasked(target))
        stored = {
            kind: actions.store_content(self.services, content, limit=None)
            for kind, lines in outputs.items()
            if (content := _text(lines)) is not None
        }
        with actions.adding(self.services, *(each.key for each in stored.values())) as session:
            names: dict[str, str | None] = {}
            for kind, each in stored.items():
                upload = actions.Upload((), f"{batch.id}_{kind}.jsonl", files.BATCH_OUTPUT)
                file = actions.add_file(session, self.services, self._caller, upload, each)
                names[f"{kind}_file_id"] = file.id
            batches.end(session, batch, target, **names)
        log.info("batch_ended", status=target)

    def _rows(self, *, failed: bool) -> Iterator[JsonObject]:
        after = 0
        while True:
            with self.services.database.read() as session:
                rows = batches.outputs(
                    session, self.batch.id, failed=failed, after=after, limit=ROWS
                )
            if not rows:
                return
            yield from (output for _, output in rows)
            after = rows[-1][0]

    def _unasked(self, target: BatchStatus) -> Iterator[JsonObject]:
        """Yield what the error file says of lines that were not asked for."""
        done = self._done_lines()
        why = f"This request was not carried out: the batch was {target}."
        error = {"code": f"batch_{target}", "message": why}
        for line in batch_lines.read(self._path):
            if line.number not in done:
                yield _output(line) | {"error": error}


def _output(line: Line) -> JsonObject:
    return {
        "id": new_id("batch_req_"),
        "custom_id": line.custom_id,
        "response": None,
        "error": None,
    }


def _answer(line: Line, response: httpx.Response) -> Answer:
    body: Any = orjson.loads(response.content)
    usage = body.get("usage") or {}
    said = {
        "status_code": response.status_code,
        "request_id": response.headers.get("x-request-id", ""),
        "body": body,
    }
    return Answer(
        line.number,
        failed=response.status_code != 200,
        output=_output(line) | {"response": said},
        input_tokens=usage.get("prompt_tokens") or 0,
        output_tokens=usage.get("completion_tokens") or 0,
    )


def _text(lines: Iterator[JsonObject]) -> Iterator[bytes] | None:
    """Return JSON lines, or None if there is none: an empty file is no file."""
    first = next(lines, None)
    if first is None:
        return None
    return (orjson.dumps(line) + b"\n" for line in chain([first], lines))
