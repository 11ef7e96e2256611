"""The directory of an embedded service: everything that `tunery up` keeps, and where to find it."""

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.errors import ConflictError

MAX_SOCKET_PATH = 100  # the kernel takes 107 bytes


@dataclass(frozen=True, slots=True)
class Running:
    """The address of a service that is up."""

    url: str
    pid: int


class Home:
    """Paths below one directory. Made with mode 0700, since it holds a key and people's data."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("logs", "valkey"):
            (self.path / name).mkdir(exist_ok=True)

    @property
    def key_file(self) -> Path:
        return self.path / "key"

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.path / 'tunery.db'}"

    @property
    def _running_file(self) -> Path:
        return self.path / "service.json"

    def log_file(self, process: str) -> Path:
        return self.path / "logs" / f"{process}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for one service; raises `ConflictError` if another holds it."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConflictError(
                    f"A service is running in {self.path} already. Stop it, or choose another "
                    "directory with --home."
                ) from None
            yield

    @contextmanager
    def socket_directory(self) -> Iterator[Path]:
        """A directory (0700) for the broker's socket; a short one if this path is too long."""
        if len(str(self.path / "valkey" / "valkey.sock")) <= MAX_SOCKET_PATH:
            (self.path / "valkey").chmod(0o700)
            yield self.path / "valkey"
            return
        with tempfile.TemporaryDirectory(prefix="tunery-") as short:
            yield Path(short)

    def write_key(self, secret: str) -> None:
        """Store the first key, readable by the owner only."""
        descriptor = os.open(self.key_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secret + "\n")

    def read_key(self) -> str | None:
        return self.key_file.read_text().strip() if self.key_file.is_file() else None

    @contextmanager
    def announced(self, url: str) -> Iterator[None]:
        """Tell other commands where the service is, as long as the block lasts."""
        written = self._running_file.with_suffix(".new")
        written.write_text(json.dumps({"url": url, "pid": os.getpid()}))
        written.replace(self._running_file)  # whoever reads it meanwhile gets all of it or nothing
        try:
            yield
        finally:
            self._running_file.unlink(missing_ok=True)

    def running(self) -> Running | None:
        """Return the address of the service in this directory, or None if none is up."""
        try:
            found = Running(**json.loads(self._running_file.read_text()))
        except FileNotFoundError:
            return None
        return found if Path(f"/proc/{found.pid}").exists() or not Path("/proc").exists() else None

    def environment(self, broker_url: str, port: int) -> dict[str, str]:
        """Return the settings of the embedded service's processes, as environment variables."""
        return {
            "TUNERY_DATABASE__URL": self.database_url,
            "TUNERY_BROKER__URL": broker_url,
            "TUNERY_STORAGE__URL": f"file:{self.path / 'objects'}",
            "TUNERY_API__HOST": "127.0.0.1",
            "TUNERY_API__PORT": str(port),
            "TUNERY_WORKER__SCRATCH_DIR": str(self.path / "scratch"),
            "TUNERY_INFERENCE__HOST": "127.0.0.1",
            "TUNERY_INFERENCE__PORT": "0",
            "TUNERY_INFERENCE__TOKEN": secrets.token_urlsafe(32),
            "TUNERY_INFERENCE__ADAPTER_CACHE_DIR": str(self.path / "adapter-cache"),
        }
