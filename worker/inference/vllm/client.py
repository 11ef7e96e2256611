"""vLLM's HTTP endpoints, as far as an engine needs them."""

import json
import re
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import httpx

from worker.inference.engine.errors import EngineError, GenerationError, RequestRefusedError

OLDEST = (0, 32)
"""The oldest version that the endpoints were tried with."""

LOAD_SECONDS = 120.0
STALL_SECONDS = 600.0
_CONNECT_SECONDS = 10.0
_HEALTH_SECONDS = 10.0

_PARAMS = {"structured_outputs": "response_format"}
_PROBE = {"prompt": [1, 2, 3, 4], "max_tokens": 1, "temperature": 0}


class VllmError(EngineError):
    """vLLM answered with an error, or not at all.

    Args:
        detail: Its words, or what went wrong.
        status: Of its answer; None where there was none.
        param: The field at fault, by vLLM's name.
    """

    def __init__(self, detail: str, status: int | None = None, param: str | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.param = param


class VllmClient:
    """One vLLM server; belongs to one event loop.

    Args:
        url: Where it listens.
        api_key: What it asks for.
        stall_seconds: How long a stream may bring nothing.
    """

    def __init__(self, url: str, api_key: str, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(stall_seconds, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=False,  # a proxy has no business between a machine and itself
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        """Return whether it says that its engine runs."""
        try:
            response = await self._http.get("/health", timeout=_HEALTH_SECONDS)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def version(self) -> str:
        """Return its version; raises `VllmError`, also where it is older than `OLDEST`."""
        text = str((await self._json("GET", "/version")).get("version"))
        found = re.match(r"(\d+)\.(\d+)", text)
        if found is None or (int(found[1]), int(found[2])) < OLDEST:
            raise VllmError(f"vLLM is {text}; it must be at least {OLDEST[0]}.{OLDEST[1]}.")
        return text

    async def probe(self, model: str) -> Mapping[str, float]:
        """Return the log-probabilities of the likeliest tokens after a fixed prompt, by name."""
        body = {**_PROBE, "model": model, "logprobs": 5, "return_tokens_as_token_ids": True}
        answer = await self._json("POST", "/v1/completions", body)
        likeliest: Mapping[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return likeliest

    async def load(self, name: str, directory: Path) -> None:
        """Load the adapter in `directory` as `name`, which may be loaded already."""
        try:
            await self._post("/v1/load_lora_adapter", lora_name=name, lora_path=str(directory))
        except VllmError as error:
            # A load before was given up by this side only; names are digests: it is the same one.
            if "has already been loaded" not in str(error):
                raise

    async def unload(self, name: str) -> None:
        """Have `name` forgotten, which may be unknown."""
        try:
            await self._post("/v1/unload_lora_adapter", lora_name=name)
        except VllmError as error:
            if error.status != 404:
                raise

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield the events of ``/v1/completions``; closing the iterator stops the answer.

        Raises:
            RequestRefusedError: vLLM refuses the request.
            GenerationError: it fails at it, or does not answer.
        """
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _public(_error(response))
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        return
                    if line.startswith("data: "):
                        event = json.loads(data)
                        if "error" in event:
                            raise _public(_error_of(event["error"]))
                        yield event
        except httpx.HTTPError as error:
            raise GenerationError(f"vLLM does not answer ({type(error).__name__}).") from error

    async def _post(self, path: str, **body: str) -> None:
        await self._request("POST", path, body)

    async def _json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        found: dict[str, Any] = (await self._request(method, path, body)).json()
        return found

    async def _request(self, method: str, path: str, body: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, json=body, timeout=LOAD_SECONDS)
        except httpx.HTTPError as error:
            raise VllmError(f"vLLM does not answer {path} ({type(error).__name__}).") from error
        if response.status_code != 200:
            raise _error(response)
        return response


def _error(response: httpx.Response) -> VllmError:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return VllmError(f"vLLM answered {response.status_code}.", response.status_code)
    return _error_of(error, response.status_code)


def _error_of(error: Any, status: int | None = None) -> VllmError:
    if not isinstance(error, dict):
        return VllmError(f"vLLM: {error}", status)
    return VllmError(str(error.get("message")), status or error.get("code"), error.get("param"))


def _public(error: VllmError) -> EngineError:
    """Return what a request is told: that it is at fault itself, or that it was not answered."""
    if error.status not in (400, 422):
        return GenerationError(f"vLLM: {error}")
    param = error.param
    if param is None and "rammar" in str(error):
        param = "structured_outputs"
    return RequestRefusedError(f"vLLM refuses: {error}", _PARAMS.get(param or "", param))
