"""The command line's HTTP client: where the service is, how it answers, how errors read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson

from api.cli.home import Home
from models.domain.base import JsonObject
from models.errors import AuthenticationError, TuneryError, UnavailableError, error_from_dict
from models.settings import ClientSettings

TIMEOUT = httpx.Timeout(600, connect=5)


class Client:
    """Calls ``/v1`` with a key; raises the service's own errors.

    Args:
        url: Address of the service, without ``/v1``.
        key: Bearer key.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=f"{self.url}/v1",
            headers={"authorization": f"Bearer {key}"},
            timeout=TIMEOUT,
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> JsonObject:
        return self._json("GET", path, params=query)

    def post(self, path: str, body: JsonObject | None = None) -> JsonObject:
        return self._json("POST", path, json=body)

    def delete(self, path: str) -> JsonObject:
        return self._json("DELETE", path)

    def upload(self, file: Path) -> JsonObject:
        """Upload a training file, streamed from disk."""
        return self.send_file("/files", file, {"purpose": "fine-tune"})

    def send_file(self, path: str, file: Path, fields: dict[str, str]) -> JsonObject:
        """Send a form with a file, which is streamed from disk."""
        with file.open("rb") as content:
            return self._json("POST", path, files={"file": (file.name, content)}, data=fields)

    def download(self, path: str, target: Path) -> int:
        """Write the bytes at `path` to a new file and return how many; half a file is not left."""
        n_bytes = 0
        try:
            with self._errors(), self._http.stream("GET", path) as response:
                if response.status_code != 200:
                    response.read()
                    raise _error(response)
                with target.open("xb") as out:
                    for chunk in response.iter_bytes():
                        n_bytes += out.write(chunk)
        except UnavailableError:
            target.unlink(missing_ok=True)
            raise
        return n_bytes

    def stream(self, path: str, body: JsonObject) -> Iterator[JsonObject]:
        """Yield the server-sent events of a streamed answer; raises an error event as an error."""
        with self._errors(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _error(response)
            for line in _lines(response.iter_bytes()):
                data = line.removeprefix(b"data: ")
                if not line.startswith(b"data: ") or data == b"[DONE]":
                    continue
                event = orjson.loads(data)
                if "error" in event:
                    raise error_from_dict(event["error"])
                yield event

    def _json(self, method: str, path: str, **options: Any) -> JsonObject:
        with self._errors():
            response = self._http.request(method, path, **options)
        if response.status_code >= 400:
            raise _error(response)
        body: JsonObject = response.json()
        return body

    def _errors(self) -> "_TransportErrors":
        return _TransportErrors(self.url)


class _TransportErrors:
    """Turns a failing connection into a sentence that says what to do."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.HTTPError):
            raise UnavailableError(
                f"No service answers at {self._url} ({type(error).__name__}). Start one with "
                "'tunery up', or name another with --url."
            ) from error


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut at line feeds alone: httpx's own lines also end at U+2028, which a text may contain."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)
    if rest:
        yield rest


def _error(response: httpx.Response) -> TuneryError:
    try:
        body = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return UnavailableError(f"The service answered {response.status_code} without a reason.")
    return error_from_dict({**body, "status": response.status_code})


def connect(settings: ClientSettings, home: Path | None) -> Client:
    """Return a client for the service in `home`, or for the one that the settings name.

    Raises:
        UnavailableError: no service is known.
        AuthenticationError: no key is known.
    """
    place = Home(home or settings.home)
    url = settings.url
    if url is None or home is not None:
        running = place.running()
        if running is None:
            raise UnavailableError(
                f"No service is up in {place.path}. Start one with "
                f"'tunery up --home {place.path}', or set "
                "TUNERY_CLIENT__URL and TUNERY_CLIENT__API_KEY."
            )
        url = running.url
    given = settings.api_key.get_secret_value() if settings.api_key and home is None else None
    key = given or place.read_key()
    if key is None:
        raise AuthenticationError(
            f"No API key: none in {place.key_file}, and TUNERY_CLIENT__API_KEY is not set."
        )
    return Client(url, key)
