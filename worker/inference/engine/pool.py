"""Adapters in host memory: least recently used go first, those in use never."""

from collections import OrderedDict
from dataclasses import dataclass, field
from threading import RLock
from types import TracebackType
from typing import Self
from weakref import WeakSet

from worker.inference.engine.errors import (
    AdapterFormatError,
    AdapterInUseError,
    AdapterPoolFullError,
)
from worker.inference.engine.weights import AdapterWeights


@dataclass(slots=True)
class _Resident:
    weights: AdapterWeights
    references: int = 0
    leases: "WeakSet[AdapterLease]" = field(default_factory=WeakSet)


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
    """Adapters by digest, `max_bytes` in all, with reference counts; safe from every thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        # A collected lease may drop out of its set while this thread holds the lock.
        self._lock = RLock()
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self.evictions = 0
        """Adapters that made room for others so far."""

    def acquire(self, digest: str) -> AdapterLease | None:
        """Return a lease on a resident adapter, or None where it is not resident."""
        with self._lock:
            resident = self._residents.get(digest)
            return None if resident is None else self._lease(resident)

    def admit(self, weights: AdapterWeights) -> AdapterLease:
        """Make an adapter resident, in place of idle ones, least recently used first.

        Raises:
            AdapterFormatError: it would not fit even alone.
            AdapterPoolFullError: too much of the pool is in use.
        """
        with self._lock:
            resident = self._residents.get(weights.digest)
            if resident is None:
                n_bytes = weights.n_bytes
                self._make_room(n_bytes)
                resident = self._residents[weights.digest] = _Resident(weights)
                self._n_bytes += n_bytes
            return self._lease(resident)

    def remove(self, digest: str) -> int:
        """Forget an idle adapter and return the bytes that this frees; 0 where there is none.

        Raises:
            AdapterInUseError: leases on it are out.
        """
        with self._lock:
            resident = self._residents.get(digest)
            if resident is None:
                return 0
            if resident.references:
                raise AdapterInUseError(f"{resident.references} leases on {digest} are out.")
            return self._forget(digest)

    def share(self, lease: AdapterLease) -> AdapterLease:
        with self._lock:
            if not lease._held:
                raise ValueError("The lease was already released.")
            return self._lease(self._residents[lease.weights.digest])

    def give_back(self, lease: AdapterLease) -> None:
        with self._lock:
            if lease._held:
                lease._held = False
                resident = self._residents[lease.weights.digest]
                resident.references -= 1
                resident.leases.discard(lease)

    def audit(self) -> dict[str, int]:
        """Give back what was lost: leases that nobody holds any more and nobody released.

        Returns:
            How many of which adapter; a number here is a mistake in the code that took the lease.
        """
        with self._lock:
            lost = {}
            for digest, resident in self._residents.items():
                if n_lost := resident.references - len(resident.leases):
                    lost[digest] = n_lost
                    resident.references -= n_lost
            return lost

    def references(self) -> dict[str, int]:
        with self._lock:
            return {digest: entry.references for digest, entry in self._residents.items()}

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    def _lease(self, resident: _Resident) -> AdapterLease:
        resident.references += 1
        self._residents.move_to_end(resident.weights.digest)
        lease = AdapterLease(self, resident.weights)
        resident.leases.add(lease)
        return lease

    def make_room(self, n_bytes: int) -> list[str]:
        """Forget idle adapters until `n_bytes` more fit; return which, in that order.

        Raises:
            AdapterFormatError, AdapterPoolFullError: as `admit`.
        """
        with self._lock:
            return self._make_room(n_bytes)

    def _make_room(self, n_bytes: int) -> list[str]:
        if n_bytes > self._max_bytes:
            raise AdapterFormatError(
                "too_large", f"it takes {n_bytes} bytes of memory, of {self._max_bytes} in all"
            )
        idle = [digest for digest, entry in self._residents.items() if entry.references == 0]
        in_use = self._n_bytes - sum(self._residents[each].weights.n_bytes for each in idle)
        if in_use + n_bytes > self._max_bytes:
            raise AdapterPoolFullError(
                f"{in_use} of {self._max_bytes} bytes for adapters are in use; {n_bytes} are asked."
            )
        forgotten = []
        while self._n_bytes + n_bytes > self._max_bytes:
            forgotten.append(idle.pop(0))
            self._forget(forgotten[-1])
            self.evictions += 1
        return forgotten

    def _forget(self, digest: str) -> int:
        n_bytes = self._residents.pop(digest).weights.n_bytes
        self._n_bytes -= n_bytes
        return n_bytes
