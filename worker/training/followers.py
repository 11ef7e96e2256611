"""The other processes of a job on several devices, started and watched by its trainer, rank 0.

They are plain children of the trainer and not of ``torchrun``, whose agent would stand between the
worker and the trainer: it answers SIGTERM by ending the ranks, where a job must save first, and
hides the exit code by which the worker tells how a job ended. What it restarts, a new attempt does.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from models.errors import TrainingFailedError
from worker.training.model import set_threads
from worker.training.publish import RunIdentity
from worker.training.ranks import Ranks, device_of, n_devices

log = structlog.get_logger(__name__)

GRACE_SECONDS = 10.0
"""Time in which rank 0 may find by itself what has ended a follower, and record it."""
LOST = 1
"""Exit code of a rank 0 that has lost a follower: the job goes back to the queue."""


@contextmanager
def gathered(run: RunIdentity, device: str, scratch: Path, slots: int) -> Iterator[Ranks]:
    """Start the followers that `run` needs, meet them, and see them off at the end.

    Args:
        run: Says how many devices.
        device: What rank 0 computes on.
        scratch: Directory of the attempt.
        slots: Jobs that share this machine's cores.

    Raises:
        TrainingFailedError: the machine has fewer devices (``devices_unavailable``).
    """
    size = run.spec.num_devices
    if size == 1:
        yield Ranks()
        return
    present = n_devices(device)
    if size > present:
        raise TrainingFailedError(
            f"num_devices is {size}; the worker has {present} devices. Ask for fewer.",
            param="num_devices",
            code="devices_unavailable",
        )
    set_threads(slots * size)
    meeting = scratch / "meeting"
    followers = Followers(run.job_id, run.attempt, size, meeting)
    log.info("followers_started", pids=followers.pids)
    try:
        ranks = Ranks.join(meeting, 0, size, device_of(device, 0))
        try:
            yield ranks
        finally:
            ranks.leave()
    finally:
        followers.dismiss()


class Followers:
    """Ranks 1 to `size` - 1 of a job, which die with this process, and it with any of them.

    Must be made by a thread that outlives them (PR_SET_PDEATHSIG).

    Args:
        job_id: The job.
        attempt: The fencing token.
        size: Number of processes, this one included.
        meeting: The file by which they find each other (`Ranks.join`).
    """

    def __init__(self, job_id: str, attempt: int, size: int, meeting: Path) -> None:
        self._ended = threading.Event()
        arguments = ["--job", job_id, "--attempt", str(attempt), "--size", str(size)]
        arguments += ["--meeting", str(meeting), "--parent", str(os.getpid())]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "worker.training.follow", *arguments, "--rank", str(rank)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            for rank in range(1, size)
        ]
        for process in self._processes:
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def dismiss(self) -> None:
        """Stop watching, and end those that still run."""
        self._ended.set()
        for process in self._processes:
            process.kill()
            process.wait()

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        exit_code = process.wait()
        if self._ended.wait(GRACE_SECONDS):
            return
        # Rank 0 may be waiting inside an exchange that nothing else can interrupt.
        log.error("follower_lost", pid=process.pid, exit_code=exit_code)
        os._exit(LOST)
