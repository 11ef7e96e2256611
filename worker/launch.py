"""A trainer process, seen from the worker: spawned warm, given one job, signalled, reaped.

Every job runs in a fresh process started by ``subprocess``: a clean CUDA context, all memory
returned at the end, a crash is an exit code. The Celery parent never loads torch.
"""

import json
import signal
import subprocess
import sys

from models.settings import child_environment
from worker.job_log import LogPipe

# What a trainer has no use for must not be in its environment.
WITHHELD = ("TUNERY_BROKER__URL", "TUNERY_INFERENCE__TOKEN", "TUNERY_CLIENT__API_KEY")

# Training allocates the same large tensors in every step. By default glibc gives their pages back
# to the kernel each time and takes them anew; kept, and in huge pages, a step is a tenth faster.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
}

# The processes of a job on several devices are on one machine and need no other interface.
RENDEZVOUS = {"GLOO_SOCKET_IFNAME": "lo"}


class TrainerProcess:
    """One child; it imports torch right away and then waits for `assign`.

    Must be made by a thread that outlives it: the kernel kills the child when the thread that
    started it ends (PR_SET_PDEATHSIG), which is what a killed worker relies on.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.training.run"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=child_environment(without=WITHHELD) | ALLOCATOR | RENDEZVOUS,
            start_new_session=True,
        )
        assert self._process.stderr is not None
        self.log = LogPipe(self._process.stderr)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def assign(self, job_id: str, attempt: int) -> None:
        """Tell the child which job to run; raises ``OSError`` if it has died while waiting."""
        assert self._process.stdin is not None
        self.log.begin()
        order = json.dumps({"job_id": job_id, "attempt": attempt}) + "\n"
        self._process.stdin.write(order.encode())
        self._process.stdin.close()

    def wait(self, seconds: float) -> int | None:
        """Return the exit code (negative: the signal), or None if it still runs after `seconds`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def drain(self) -> None:
        """Ask it to save a checkpoint after the current step and to exit."""
        self._process.send_signal(signal.SIGTERM)

    def cancel(self) -> None:
        """Ask it to exit after the current step."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> int:
        """End it now, and return its exit code."""
        self._process.kill()
        return self._process.wait()
