"""vLLM as a process of its own, from another virtual environment: started, watched, stopped."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence

import structlog

from models.errors import UnavailableError

STOP_SECONDS = 15.0
"""How long it may take to stop by itself."""

_TAIL_LINES = 20

logger = structlog.get_logger(__name__)


class VllmProcess:
    """One ``vllm serve`` with all that it starts; its output goes into the log.

    Must be made by a thread that outlives it: it is stopped when that thread ends.

    Args:
        command: The program and its arguments.
        environment: What it finds in its environment.

    Raises:
        UnavailableError: there is no such program.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        program = shutil.which(command[0])
        if program is None:
            raise UnavailableError(
                f"TUNERY_INFERENCE__VLLM_COMMAND is {command[0]!r}, which is no program that can "
                "be run. Install vLLM in a virtual environment of its own and give the path of its "
                "'vllm' command.",
                code="vllm_missing",
            )
        tied = [sys.executable, "-m", "worker.inference.vllm.tied", str(os.getpid())]
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._process = subprocess.Popen(
            [*tied, program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="vllm-log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the first process and of the group of all."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        """Return the end of its output; waits for it where the process has ended."""
        if not self.is_alive:
            self._reader.join(1)
        return "\n".join(self._tail)

    def stop(self) -> None:
        """End it and all that it has started; returns when they are gone."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for raw in lines:
                line = raw.decode(errors="replace").rstrip()
                self._tail.append(line)
                logger.info("vllm", line=line)
