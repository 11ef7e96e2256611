"""The processes that train one job together, each on a device of its own: data parallelism.

Every rank holds the whole model and takes a share of each step's rows. Losses and gradients are
summed over the ranks, so that clipping and the optimizer's update are the same on all of them, and
equal to those of one process up to the order of the additions. Rank 0 is the trainer of a job as
it is without others: it alone reports, saves, publishes, and decides when to stop.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch import distributed, nn

from worker.training.objectives.base import Example
from worker.training.task import Scores, Stop

PATIENCE = timedelta(days=7)
"""How long a rank waits for the others, e.g. while rank 0 saves. A dead one is noticed at once:
its connections break, followers die with rank 0, and rank 0 watches its followers."""

_STOPS = (None, Stop.DRAIN, Stop.CANCEL)


def n_devices(device: str) -> int:
    """Return how many devices of this kind the machine has; a CPU counts by its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.device_count()
    return len(psutil.Process().cpu_affinity())


def device_of(device: str, rank: int) -> str:
    """Return what a rank computes on, where the first one has `device` or one of its kind."""
    kind = torch.device(device).type
    return f"{kind}:{rank}" if kind == "cuda" else device


class Ranks:
    """One process's view of the group; without arguments, of a group of one.

    Args:
        rank: Of this process, from 0.
        size: Number of processes.
        device: What this process computes on.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self._device = device

    @classmethod
    def join(cls, meeting: Path, rank: int, size: int, device: str) -> "Ranks":
        """Meet the other processes of this machine through the file `meeting`, made by the first.

        Raises:
            RuntimeError: they cannot be reached.
        """
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{meeting.resolve()}",
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        return cls(rank, size, device)

    def leave(self) -> None:
        """End this process's part in the group."""
        if self.size > 1:
            distributed.destroy_process_group()

    def share(self, examples: Sequence[Example]) -> list[Example]:
        """Return this rank's part of the rows of a step: longest first to whom has fewest tokens.

        It may be empty. Every row is in the share of exactly one rank.
        """
        shares: list[list[Example]] = [[] for _ in range(self.size)]
        n_tokens = [0] * self.size
        for example in sorted(examples, key=lambda example: -len(example.input_ids)):
            least = n_tokens.index(min(n_tokens))
            shares[least].append(example)
            n_tokens[least] += len(example.input_ids)
        return shares[self.rank]

    def seed_step(self, seed: int, step: int) -> None:
        """Let dropout draw other numbers on each rank, and the same ones again after a resume.

        A group of one goes on with the generators that its checkpoints hold.
        """
        if self.size > 1:
            torch.manual_seed(hash((seed, step, self.rank)) % 2**63)

    def sum_scores(self, own: Scores | None) -> Scores | None:
        """Return the sums over all ranks, or None if one of them has none.

        Args:
            own: The sums of this rank's share, with the trained tokens of all shares; None if
                its pass failed.
        """
        if self.size == 1:
            return own
        loss, n_correct = (own.loss, own.n_correct) if own else (0.0, 0)
        sums = torch.tensor(
            [loss, n_correct, own is None], dtype=torch.float64, device=self._device
        )
        distributed.all_reduce(sums)
        total, n_right, n_failed = sums.tolist()
        if own is None or n_failed:
            return None
        return Scores(total, int(n_right), own.n_trained)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks, in one exchange of float32 values.

        A rank without rows of this step contributes zeros.
        """
        if self.size == 1:
            return
        every = list(parameters)
        with torch.no_grad():
            flat = torch.cat(
                [
                    torch.zeros_like(each).view(-1) if each.grad is None else each.grad.view(-1)
                    for each in every
                ]
            )
            distributed.all_reduce(flat)
            parts = flat.split([each.numel() for each in every])
            for each, part in zip(every, parts, strict=True):
                each.grad = part.view_as(each)

    def copy_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set every parameter to what rank 0 has."""
        if self.size > 1:
            with torch.no_grad():
                for each in parameters:
                    distributed.broadcast(each, src=0)

    def copy_path(self, path: Path | None) -> Path | None:
        """Return what rank 0 gives for `path`."""
        if self.size == 1:
            return path
        box = [str(path) if path else None]
        distributed.broadcast_object_list(box, src=0, device=torch.device(self._device))
        return Path(box[0]) if box[0] else None

    def agree(self, asked: Callable[[], Stop | None]) -> Callable[[], Stop | None]:
        """Return the question whose answer, on every rank, is what rank 0 hears from `asked`."""
        if self.size == 1:
            return asked

        def agreed() -> Stop | None:
            answer = _STOPS.index(asked()) if self.rank == 0 else 0
            number = torch.tensor(answer, device=self._device)
            distributed.broadcast(number, src=0)
            return _STOPS[int(number)]

        return agreed
