"""The processes of an embedded service: started in order, restarted when they die, all stopped.

Children get PR_SET_PDEATHSIG, so that not even ``kill -9`` of the supervisor leaves one behind.
They must be started by the main thread, which lives as long as the process.
"""

import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from models.processes import die_with_parent
from models.settings import child_environment

RESTART_SECONDS = (1, 2, 4, 8, 16, 30)
STEADY_SECONDS = 60


class Child:
    """One process of the service and its log file.

    Args:
        grace_seconds: Time between asking it to stop and killing it.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        log_file: Path,
        grace_seconds: float = 15,
    ) -> None:
        self.name = name
        self.grace_seconds = grace_seconds
        self.log_file = log_file
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._n_restarts = 0
        self._restart_at: float | None = None

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=child_environment(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the supervisor only, which stops in order
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        self._started_at = time.monotonic()
        self._restart_at = None

    @property
    def exit_code(self) -> int | None:
        """The status of a process that has ended, None while it runs."""
        return None if self._process is None else self._process.poll()

    def tend(self) -> str | None:
        """Restart the process if it has died, not too often; return a sentence when it did die."""
        if self._restart_at is not None:
            if time.monotonic() >= self._restart_at:
                self.start()
            return None
        exit_code = self.exit_code
        if exit_code is None:
            return None
        if time.monotonic() - self._started_at > STEADY_SECONDS:
            self._n_restarts = 0
        pause = RESTART_SECONDS[min(self._n_restarts, len(RESTART_SECONDS) - 1)]
        self._n_restarts += 1
        self._restart_at = time.monotonic() + pause
        return (
            f"{self.name} ended with status {exit_code}; it is started again in {pause} s. "
            f"Its log: {self.log_file}"
        )

    def stop(self, is_impatient: Callable[[], bool]) -> None:
        """End the process: SIGTERM, then SIGKILL after the grace time or when asked to hurry."""
        self._restart_at = None
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        deadline = time.monotonic() + self.grace_seconds
        while self._process.poll() is None:
            if time.monotonic() > deadline or is_impatient():
                self._process.kill()
                self._process.wait()
                return
            time.sleep(0.05)
