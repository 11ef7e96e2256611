"""Many readers of one stream of server-sent events, at little cost of the reading side.

One thread, one ``epoll``, plain sockets: what arrives is kept with its time, and looked at when
all has arrived. A client that took long for each reader would be measured itself.
"""

import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

EVENT_END = b"\n\n"
AT_ONCE = 50
"""Connections that are opened before the first of them is looked at."""

PAUSE_SECONDS = 0.001
"""Between two looks, so that the server does not spend its time on waking this process for each
piece; a piece is noted that much too late at most."""


@dataclass(slots=True)
class Reader:
    """A connection and what came of it: pieces and when each was read, by `time.time`."""

    socket: socket.socket
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def arrivals(self, mark: bytes) -> dict[int, float]:
        """Return when each event was whole whose text has `mark` and then a number."""
        found: dict[int, float] = {}
        rest = b""
        for now, piece in self.pieces:
            *whole, rest = (rest + piece).split(EVENT_END)
            for event in whole:
                _, is_wanted, after = event.partition(mark)
                if is_wanted:
                    found[int(after.split(b" ", 1)[0])] = now
        return found


class Crowd:
    """`n_readers` connections that have all sent `request` and had the first part of an answer.

    Raises:
        RuntimeError: an answer is no 200.
    """

    def __init__(self, url: str, request: bytes, n_readers: int) -> None:
        place = urlsplit(url)
        self._epoll = select.epoll()
        self._readers: dict[int, Reader] = {}
        for start in range(0, n_readers, AT_ONCE):
            for _ in range(min(AT_ONCE, n_readers - start)):
                made = socket.create_connection((place.hostname, place.port))
                made.setblocking(False)
                made.sendall(request)
                self._readers[made.fileno()] = Reader(made)
                self._epoll.register(made, select.EPOLLIN)
            while not all(reader.pieces for reader in self._readers.values()):
                self.listen(0.02)
        for reader in self._readers.values():
            if not reader.pieces[0][1].startswith(b"HTTP/1.1 200"):
                raise RuntimeError(reader.pieces[0][1].decode())

    def listen(self, seconds: float, is_enough: Callable[[int], bool] = lambda n: False) -> int:
        """Read what comes within some seconds, or until enough pieces have come; how many did."""
        end = time.monotonic() + seconds
        n_pieces = 0
        readers, poll, now = self._readers, self._epoll.poll, time.time
        while (left := end - time.monotonic()) > 0 and not is_enough(n_pieces):
            for number, _ in poll(left):
                reader = readers[number]
                piece = reader.socket.recv(4096)
                if not piece:
                    raise RuntimeError("The server closed a stream.")
                reader.pieces.append((now(), piece))
                n_pieces += 1
            time.sleep(PAUSE_SECONDS)
        return n_pieces

    def leave(self) -> list[Reader]:
        """Close all connections; return what they had read."""
        for reader in self._readers.values():
            reader.socket.close()
        self._epoll.close()
        return list(self._readers.values())


@dataclass(frozen=True, slots=True)
class Written:
    """When an event was about to be committed, and when it had been, by `time.time`."""

    before_s: float
    after_s: float


@dataclass(frozen=True, slots=True)
class Lag:
    """Of one event: seconds from just before its commit to its end, and to the readers."""

    commit_s: float
    readers_s: list[float]


def lags(readers: list[Reader], written: list[Written], mark: bytes) -> list[Lag]:
    """Return how long each event took to each reader, the fastest first.

    Raises:
        RuntimeError: a reader has missed an event.
    """
    found: list[list[float]] = [[] for _ in written]
    for reader in readers:
        arrivals = reader.arrivals(mark)
        if len(arrivals) != len(written):
            raise RuntimeError(f"A reader had {len(arrivals)} of {len(written)} events.")
        for number, event in enumerate(written):
            found[number].append(arrivals[number] - event.before_s)
    return [
        Lag(event.after_s - event.before_s, sorted(all_of_it))
        for event, all_of_it in zip(written, found, strict=True)
    ]
