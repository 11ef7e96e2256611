"""A trainer process, seen from the worker: spawned warm, given its work, signalled, reaped.

One job has it for itself, or several over one base model have a `Seat` each in it. It is fresh and
started by ``subprocess``: a clean CUDA context, all memory returned at the end, a crash is an exit
code. The Celery parent never loads torch.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from pydantic import JsonValue

from models.registry.job_runs import LastBase
from models.settings import child_environment
from worker.heap import LARGE_BYTES
from worker.job_log import LogPipe
from worker.training import exit_codes

# What a trainer has no use for must not be in its environment.
WITHHELD = ("TUNERY_BROKER__URL", "TUNERY_INFERENCE__TOKEN", "TUNERY_CLIENT__API_KEY")

# Training allocates the same large tensors in every step. By default glibc gives their pages back
# to the kernel each time and takes them anew; kept, and in huge pages, a step is a tenth faster.
MEMORY_ENVIRONMENT = {
    # One arena: what a waiting trainer's preparations gave back is there for its job.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1",
    "MALLOC_MMAP_THRESHOLD_": str(LARGE_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    # Torch and oneDNN each keep a kernel for every shape of a product, 0.6 MB in both, up to 1,024
    # by default. A pass of another number of tokens brings about 50, and needs no older ones.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "384",
    "LRU_CACHE_CAPACITY": "384",
}

UNTOLD = 1
"""Exit code of a job whose process has ended well without a word about it."""

# The processes of a job on several devices are on one machine and need no other interface.
RENDEZVOUS = {"GLOO_SOCKET_IFNAME": "lo"}


class TrainerProcess:
    """One child; it imports torch right away, loads a base model, and then waits for `assign`.

    Args:
        base: What its job will probably be of; nothing is loaded if omitted.

    Must be made by a thread that outlives it: the kernel kills the child when the thread that
    started it ends (PR_SET_PDEATHSIG), which is what a killed worker relies on.
    """

    def __init__(self, base: LastBase | None = None) -> None:
        command = [sys.executable, "-m", "worker.training.run", "--parent", str(os.getpid())]
        if base is not None:
            command += ["--base", base.name, "--precision", base.precision.model_dump_json()]
            command += ["--peft", json.dumps(base.peft)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(without=WITHHELD) | MEMORY_ENVIRONMENT | RENDEZVOUS,
            start_new_session=True,
        )
        assert self._process.stderr is not None
        self.log = LogPipe(self._process.stderr)
        self._seats: dict[str, Seat] = {}
        self._writing = threading.Lock()
        threading.Thread(target=self._read, name="trainer-ends", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def assign(self, job_id: str, attempt: int) -> None:
        """Tell the child which job to run; raises ``OSError`` if it has died while waiting."""
        assert self._process.stdin is not None
        self.log.begin(job_id)
        self.send({"job_id": job_id, "attempt": attempt})
        self._process.stdin.close()

    def seats(self, orders: Sequence[tuple[str, int]]) -> "list[Seat]":
        """Give the child several jobs, with their attempts, at once; return a seat for each.

        A child that has died while waiting is found by the seats.
        """
        for job_id, _ in orders:
            self.log.begin(job_id)
        seats = [Seat(self, job_id) for job_id, _ in orders]
        self._seats = {seat.job_id: seat for seat in seats}
        with contextlib.suppress(OSError):
            self.send([{"job_id": job_id, "attempt": attempt} for job_id, attempt in orders])
        if not self.is_alive:
            self._close_seats()
        return seats

    def send(self, message: JsonValue) -> None:
        """Write a line to the child; raises ``OSError`` if it has died."""
        assert self._process.stdin is not None
        with self._writing:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        """Tell the seats which of their jobs have ended, and of the end of the process."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.startswith(b'{"job_id"'):
                    end = json.loads(line)
                    self._seats[end["job_id"]].end(int(end["exit_code"]))
        self._process.wait()
        self._close_seats()

    def _close_seats(self) -> None:
        # A job whose end was not told is lost, whatever the process says of itself.
        for seat in self._seats.values():
            seat.end(self._process.wait() or UNTOLD)

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

    def abandon(self) -> int:
        """End it since its job belongs to another attempt; return its exit code."""
        return self.kill()


class Seat:
    """One of several jobs of a trainer process, seen as if it had the process for itself."""

    def __init__(self, process: TrainerProcess, job_id: str) -> None:
        self.job_id = job_id
        self.log = process.log
        self._process = process
        self._exit_code: int | None = None
        self._ended = threading.Event()

    @property
    def pid(self) -> int:
        return self._process.pid

    def assign(self, job_id: str, attempt: int) -> None:
        """Do nothing: the process got its jobs all at once (`TrainerProcess.seats`)."""

    def end(self, exit_code: int) -> None:
        """Take how the job ended; the first word counts."""
        if not self._ended.is_set():
            self._exit_code = exit_code
            self._ended.set()

    def wait(self, seconds: float) -> int | None:
        """Return how the job ended, as an exit code, or None if it still runs after `seconds`."""
        self._ended.wait(seconds)
        return self._exit_code

    def drain(self) -> None:
        """Ask for a checkpoint of this job after its current step, and for its end."""
        self._ask("drain")

    def cancel(self) -> None:
        """Ask for the end of this job after its current step."""
        self._ask("cancel")

    def _ask(self, wish: str) -> None:
        # A process that has died cannot be asked; `wait` tells of it.
        with contextlib.suppress(OSError):
            self._process.send({"job_id": self.job_id, "stop": wish})

    def kill(self) -> int:
        """End the process, and with it the other jobs, which go on from their checkpoints."""
        self._process.kill()
        self._ended.wait()
        assert self._exit_code is not None
        return self._exit_code

    def abandon(self) -> int:
        """Have the trainer drop this job, which belongs to another attempt, and no other.

        Whatever it still writes for the job is refused, since its attempt is an older one.
        """
        self.cancel()
        return exit_codes.LEASE_LOST
