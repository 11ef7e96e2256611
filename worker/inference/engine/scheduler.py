"""Which sequence runs next: plain bookkeeping over counts, without a tensor in sight.

The rules, each tested for every order of events:

* First come, first served, but for one exception: a sequence whose adapter finds no free slot may
  be passed by those whose adapter has one, until they have taken `overtake_tokens`. Then nobody
  passes, slots fall free as sequences end, and it is the next to get one: no adapter starves.
* Adapters of running sequences never outnumber the slots; the base model needs none.
* The cache rows of running sequences fit into `cache_tokens`, but one sequence always runs. Where
  they grow beyond, the one admitted last gives up its row and is computed again later.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler knows of a sequence."""

    ended: bool
    overtaken: int
    """Tokens of the sequences that passed this one while it waited for a slot."""

    @property
    def adapter(self) -> str | None:
        """The digest of its adapter; None for the base model."""

    @property
    def n_tokens(self) -> int:
        """Tokens that it has so far, those of its prompt included."""

    @property
    def n_left(self) -> int:
        """Tokens that it may still draw."""

    @property
    def n_pending(self) -> int:
        """Tokens that the model has yet to see; 1 once it decodes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much runs and waits at a time.

    Args:
        max_running: Sequences that run side by side.
        max_waiting: Sequences that may wait for a turn.
        n_slots: Adapters that take part at a time.
        step_tokens: Tokens that one step feeds, all sequences together.
        cache_tokens: Tokens of all cache rows together; rows are as wide as the longest.
        row_growth: Tokens by which rows grow at once.
        overtake_tokens: Tokens that may pass a sequence which waits for a slot.
        prefix_tokens: Tokens of prompts whose states are kept for prompts that begin alike.
        adapter_bytes: Memory for adapters on the host, in use or not.
    """

    max_running: int = 16
    max_waiting: int = 64
    n_slots: int = 16
    step_tokens: int = 512
    cache_tokens: int = 131_072
    row_growth: int = 256
    overtake_tokens: int = 4096
    prefix_tokens: int = 8192
    adapter_bytes: int = 4 * 1024**3


T = TypeVar("T", bound=Schedulable)


class Scheduler(Generic[T]):
    """The waiting and the running sequences; its caller holds the lock."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[T] = deque()
        self.running: list[T] = []
        self.preemptions = 0

    def n_running(self) -> int:
        # Those that ended in this step are in the list until the next one begins.
        return sum(not item.ended for item in self.running)

    def has_room(self, n: int) -> bool:
        """Whether `n` sequences more may run or wait."""
        free = self.limits.max_running - self.n_running()
        return len(self.waiting) + n <= self.limits.max_waiting + free

    def add(self, items: Iterable[T]) -> None:
        self.waiting.extend(items)

    def next_step(self) -> tuple[list[T], list[T]]:
        """Forget what ended, make room, let the next ones in.

        Returns:
            Those that gave up their row and wait again, and those that run from now on.
        """
        self.running = [item for item in self.running if not item.ended]
        self.waiting = deque(item for item in self.waiting if not item.ended)
        preempted = self._preempt()
        return preempted, [] if preempted else self._admit()

    def shares(self) -> list[tuple[T, int]]:
        """Return how many pending tokens of which prompts this step feeds, first come first.

        Sequences that decode take one token each from the step's budget; what they leave, and at
        least one token, goes to prompts.
        """
        prompts = [item for item in self.running if item.n_pending > 1 and not item.ended]
        budget = max(1, self.limits.step_tokens - (len(self.running) - len(prompts)))
        shares = []
        for item in prompts:
            share = min(item.n_pending, budget)
            if share == 0:
                break
            shares.append((item, share))
            budget -= share
        return shares

    def _preempt(self) -> list[T]:
        preempted: list[T] = []
        while len(self.running) > 1 and not self._fits(self.running, spare=0):
            preempted.append(self.running.pop())
            self.waiting.appendleft(preempted[-1])
            self.preemptions += 1
        return preempted

    def _admit(self) -> list[T]:
        admitted: list[T] = []
        passed: list[T] = []
        adapters = {item.adapter for item in self.running} - {None}
        for item in list(self.waiting):
            if len(self.running) >= self.limits.max_running:
                break
            if any(each.overtaken >= self.limits.overtake_tokens for each in passed):
                break
            # A row that grows soon after would be given up at once: ask for more than it needs.
            if self.running and not self._fits([*self.running, item], self.limits.row_growth):
                break
            if item.adapter is not None and item.adapter not in adapters:
                if len(adapters) >= self.limits.n_slots:
                    passed.append(item)
                    continue
                adapters.add(item.adapter)
            for each in passed:
                each.overtaken += item.n_pending + item.n_left
            self.waiting.remove(item)
            self.running.append(item)
            admitted.append(item)
        return admitted

    def _fits(self, items: Sequence[T], spare: int) -> bool:
        growth = self.limits.row_growth
        width = -(-(max(item.n_tokens for item in items) + spare) // growth) * growth
        return len(items) * width <= self.limits.cache_tokens
