"""A server that speaks vLLM's endpoints as vLLM 0.32.0 does, with a tiny model of ours behind it.

Requests and answers were copied from a real one, which `make test-vllm` compares us with.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.worker.inference.tiny import END, decode_bytes
from worker.inference.engine.engine import BatchingEngine, Engine, Request
from worker.inference.engine.errors import AdapterFormatError, EngineError
from worker.inference.engine.params import Sampling, TokenEvent, TokenLogprobs
from worker.inference.engine.pool import AdapterLease

KEY = "key-of-the-fake"

Send = Callable[[Any], None]


class FakeVllm:
    """Endpoints over `engine`; a test may set what goes wrong.

    It is also its own process: `stop` breaks all connections.
    """

    def __init__(self, engine: BatchingEngine, *, max_rank: int) -> None:
        self.engine = engine
        self.is_alive = True
        self.health = 200
        self.status = 200
        """Of completions; anything but 200 is an error."""
        self.break_after: int | None = None
        """Tokens after which streams end with an error."""
        self.seconds_a_token = 0.0
        self.ignores_adapters = False
        self.bodies: list[dict[str, Any]] = []
        self.calls: list[tuple[str, str]] = []
        """Of loads and unloads: the path and the adapter's name."""
        self._max_rank = max_rank
        self._leases: dict[str, AdapterLease] = {}
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self.is_alive:
            self.is_alive = False
            self._http.shutdown()
            self._http.server_close()
            self.engine.close()

    def load(self, name: str, path: Path) -> tuple[int, Any]:
        if name in self._leases:
            return _error(400, f"The lora adapter '{name}' has already been loaded. If you want …")
        config = json.loads((path / "adapter_config.json").read_text())
        if config["r"] > self._max_rank:
            rank = f"LoRA rank {config['r']} is greater than max_lora_rank {self._max_rank}."
            return _error(500, f"Call to add_lora method failed: Worker failed with error '{rank}'")
        try:
            self._leases[name] = self.engine.load(name, path)
        except AdapterFormatError as error:
            return _error(500, f"Call to add_lora method failed: {error}")
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, Any]:
        if name not in self._leases:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        self._leases.pop(name).release()
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def request(self, body: Mapping[str, Any]) -> Request:
        sampling = Sampling(
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body.get("top_p", 1.0),
            top_k=body.get("top_k", 0),
            min_p=body.get("min_p", 0.0),
            presence_penalty=body.get("presence_penalty", 0.0),
            frequency_penalty=body.get("frequency_penalty", 0.0),
            repetition_penalty=body.get("repetition_penalty", 1.0),
            logit_bias={int(token): bias for token, bias in body.get("logit_bias", {}).items()},
            seed=body.get("seed"),
            logprobs=body.get("logprobs", 0),
            ignore_eos=body.get("ignore_eos", False),
        )
        lease = None if self.ignores_adapters else self._leases.get(body["model"])
        scores = body.get("echo", False)
        return Request(tuple(body["prompt"]), sampling, lease=lease, scores_prompt=scores)

    def answer(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream, the last one with the usage."""
        request = self.request(body)
        events: queue.SimpleQueue[TokenEvent | EngineError] = queue.SimpleQueue()
        ticket = self.engine.submit(request, lambda _, event: events.put(event))
        drawn: list[int] = []
        try:
            while True:
                event = events.get(timeout=60)
                if isinstance(event, EngineError):
                    yield _error(500, str(event))[1]
                    return
                time.sleep(self.seconds_a_token)
                if self.break_after is not None and len(drawn) >= self.break_after:
                    yield _error(500, "EngineCore encountered an issue.")[1]
                    return
                tokens = [each.token for each in event.logprobs]
                reason: str | None = event.finish_reason
                if reason and event.n_tokens > len(drawn) + len(tokens):
                    tokens.append(END)  # vLLM tells of the end token too
                drawn += tokens
                text = decode_bytes(drawn)
                if any(stop in text for stop in body.get("stop", [])):
                    reason = "stop"
                yield _chunk(body, request, event, tokens, reason)
                if reason is not None:
                    details = {"cached_tokens": event.n_cached}
                    yield {"choices": [], "usage": {"prompt_tokens_details": details}}
                    return
        finally:
            ticket.abort()


def _chunk(
    body: Mapping[str, Any],
    request: Request,
    event: TokenEvent,
    tokens: list[int],
    reason: str | None,
) -> dict[str, Any]:
    logprobs = None
    if "logprobs" in body:
        scored: list[TokenLogprobs | None] = []
        if event.prompt_logprobs:
            scored = [None, *event.prompt_logprobs]
        scored += event.logprobs
        scored += [TokenLogprobs(END, 0.0)] * (len(tokens) - len(event.logprobs))
        names = [request.prompt[0] if each is None else each.token for each in scored]
        logprobs = {
            "tokens": [f"token_id:{token}" for token in names],
            "token_logprobs": [None if each is None else each.logprob for each in scored],
            "top_logprobs": [None if each is None else _top(each) for each in scored],
        }
    choice = {"index": 0, "text": "…", "token_ids": tokens, "finish_reason": reason}
    return {"choices": [{**choice, "logprobs": logprobs}]}


def _top(each: TokenLogprobs) -> dict[str, float]:
    # The token itself first, as vLLM has it.
    return {f"token_id:{token}": value for token, value in [(each.token, each.logprob), *each.top]}


def _error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "…", "param": None, "code": status}}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVllm
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/version":
            self._reply(200, {"version": "0.32.0"})
        else:
            self._reply(self.fake.health, "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self._reply(401, {"error": "Unauthorized"})
        elif self.path == "/v1/completions":
            self._complete(body)
        else:
            self.fake.calls.append((self.path, body["lora_name"]))
            if self.path == "/v1/load_lora_adapter":
                self._reply(*self.fake.load(body["lora_name"], Path(body["lora_path"])))
            else:
                self._reply(*self.fake.unload(body["lora_name"]))

    def _complete(self, body: dict[str, Any]) -> None:
        self.fake.bodies.append(body)
        if self.fake.status != 200:
            return self._reply(*_error(self.fake.status, "It was asked to fail."))
        if body["model"] not in ("base", *self.fake._leases):
            return self._reply(*_error(404, f"The model `{body['model']}` does not exist."))
        events = self.fake.answer({**body})
        if not body.get("stream"):
            return self._reply(200, next(events))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        with _closing(events):
            try:
                for event in events:
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")
            except (BrokenPipeError, ConnectionResetError):
                pass  # the other side has heard enough
        self.close_connection = True

    def _reply(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def _closing(events: Iterator[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        events.close()  # type: ignore[attr-defined]


def references(engine: Engine) -> int:
    return sum(engine.stats().references.values())
