"""Adapters in memory: least recently used go first, those in use never."""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Self

from worker.inference.engine.errors import AdapterPoolFullError
from worker.inference.engine.params import AdapterWeights


@dataclass(slots=True)
class _Resident:
    weights: AdapterWeights
    references: int = 0


class AdapterLease:
    """The right to use one adapter; given back exactly once, however often `release` is called."""

    def __init__(self, pool: "AdapterPool", weights: AdapterWeights) -> None:
        self.weights = weights
        self._pool = pool
        self._held = True

    def share(self) -> "AdapterLease":
        """Return another lease on the same adapter, to be released on its own."""
        return self._pool.share(self)

    def release(self) -> None:
        self._pool.give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class AdapterPool:
    """At most `max_adapters` adapters by digest, with reference counts; safe from every thread."""

    def __init__(self, max_adapters: int) -> None:
        self._max_adapters = max_adapters
        self._lock = Lock()
        self._residents: OrderedDict[str, _Resident] = OrderedDict()

    def acquire(self, digest: str) -> AdapterLease | None:
        """Return a lease on a resident adapter, or None where it is not resident."""
        with self._lock:
            resident = self._residents.get(digest)
            return None if resident is None else self._lease(resident)

    def admit(self, weights: AdapterWeights) -> AdapterLease:
        """Make an adapter resident, in place of the least recently used idle one if need be.

        Raises:
            AdapterPoolFullError: the pool is full and all of it is in use.
        """
        with self._lock:
            resident = self._residents.get(weights.digest)
            if resident is None:
                if len(self._residents) >= self._max_adapters:
                    self._evict()
                resident = self._residents[weights.digest] = _Resident(weights)
            return self._lease(resident)

    def share(self, lease: AdapterLease) -> AdapterLease:
        with self._lock:
            if not lease._held:
                raise ValueError("The lease was already released.")
            return self._lease(self._residents[lease.weights.digest])

    def give_back(self, lease: AdapterLease) -> None:
        with self._lock:
            if lease._held:
                lease._held = False
                self._residents[lease.weights.digest].references -= 1

    def references(self) -> dict[str, int]:
        with self._lock:
            return {digest: entry.references for digest, entry in self._residents.items()}

    def _lease(self, resident: _Resident) -> AdapterLease:
        resident.references += 1
        self._residents.move_to_end(resident.weights.digest)
        return AdapterLease(self, resident.weights)

    def _evict(self) -> None:
        for digest, resident in self._residents.items():
            if resident.references == 0:
                del self._residents[digest]
                return
        raise AdapterPoolFullError(f"All {self._max_adapters} adapters in memory are in use.")
