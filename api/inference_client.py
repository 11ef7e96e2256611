"""The API's side of the contract in ``models.domain.generation``."""

from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import orjson
from pydantic import ValidationError

from models.domain.base import JsonObject
from models.domain.encoding import EncodeAnswer, EncodeRequest
from models.domain.generation import (
    AdapterRef,
    Failed,
    Finished,
    GenerateEvent,
    GenerateRequest,
    PreviewRequest,
    generate_event,
)
from models.errors import TuneryError, UnavailableError, error_from_dict

CONNECT_SECONDS = 5.0
READ_SECONDS = 300.0


class InferenceClient:
    """Talks to inference servers; connections are reused.

    Args:
        token: The secret that API and inference servers share.
    """

    def __init__(self, token: str) -> None:
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    async def generate(
        self, url: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Yield the events of one request; closing the generator aborts it on the server.

        Raises:
            TuneryError: what the server answered, at the first event or in mid-stream.
            UnavailableError: the server cannot be reached, or the stream broke off.
        """
        try:
            async with self._client.stream(
                "POST", f"{url}/generate", json=request.model_dump(mode="json")
            ) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for line in _lines(response):
                    event = generate_event.validate_json(line)
                    if isinstance(event, Failed):
                        raise error_from_dict(event.error)
                    yield event
                    if isinstance(event, Finished):
                        return
        except (httpx.HTTPError, ValidationError) as error:
            raise _lost(type(error).__name__) from error
        raise _lost("the stream ended early")

    async def preview(self, url: str, request: PreviewRequest) -> JsonObject:
        """Return rows as the server's base model sees them.

        Raises:
            TuneryError: what the server answered.
            UnavailableError: it cannot be reached, or answers in no known form.
        """
        try:
            response = await self._client.post(
                f"{url}/preview", json=request.model_dump(mode="json")
            )
        except httpx.HTTPError as error:
            raise _lost(type(error).__name__) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        body: JsonObject = response.json()
        return body

    async def encode(self, url: str, request: EncodeRequest) -> EncodeAnswer:
        """Return what an encoder says of some texts; raises as `preview` does."""
        try:
            response = await self._client.post(
                f"{url}/encode", json=request.model_dump(mode="json")
            )
            if response.status_code != 200:
                raise _refusal(response.status_code, response.content)
            return EncodeAnswer.model_validate_json(response.content)
        except (httpx.HTTPError, ValidationError) as error:
            raise _lost(type(error).__name__) from error

    async def warm(self, url: str, adapter: AdapterRef) -> None:
        """Have a server load an adapter, which it refuses unless every tensor fits its base.

        Raises:
            TuneryError: what the server answered.
            UnavailableError: it cannot be reached.
        """
        try:
            response = await self._client.post(f"{url}/warm", json=adapter.model_dump(mode="json"))
        except httpx.HTTPError as error:
            raise _lost(type(error).__name__) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)

    async def aclose(self) -> None:
        await self._client.aclose()


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield lines that are not empty; httpx's own also end at U+2028, which JSON text may hold."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line:
                yield line
    if rest:
        yield rest


def _refusal(status: int, body: bytes) -> TuneryError:
    if status in (401, 403):  # our own secret: the caller's key is fine
        return UnavailableError(
            "The inference server refuses this service's token. Give both the same "
            "TUNERY_INFERENCE__TOKEN.",
            code="inference_server_refused",
        )
    try:
        return error_from_dict(orjson.loads(body)["error"])
    except (ValueError, KeyError, TypeError, AttributeError):  # not the body of our contract
        return _lost(f"it answered {status}")


def _lost(reason: str) -> UnavailableError:
    return UnavailableError(
        f"The connection to the inference server was lost ({reason}). Send the request again.",
        code="inference_server_lost",
        retry_after=2,
    )
