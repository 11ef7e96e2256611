"""A small HTTP/1.1 client for load: little of its own time, one connection for each stream."""

import asyncio
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Load:
    """What came of a load: requests, how many a second, and seconds that a request took."""

    n_requests: int
    requests_per_s: float
    p50_s: float
    p99_s: float


def percentile(values: list[float], percent: float) -> float:
    """Return the nearest-rank percentile of `values`."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def request(method: str, path: str, key: str, body: bytes = b"") -> bytes:
    """Return a whole request as bytes."""
    head = f"{method} {path} HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {key}\r\n"
    if body:
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


async def load(url: str, sent: bytes, seconds: float, n_streams: int) -> Load:
    """Send requests for `seconds`, `n_streams` at a time, each after the answer to the last.

    Raises:
        RuntimeError: an answer is no 200.
    """
    place = urlsplit(url)
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def stream() -> None:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        while (started := time.perf_counter()) < end:
            writer.write(sent)
            head = await reader.readuntil(HEAD_END)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            times.append(time.perf_counter() - started)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(n_streams)))
    elapsed = time.perf_counter() - started
    return Load(len(times), len(times) / elapsed, percentile(times, 50), percentile(times, 99))
