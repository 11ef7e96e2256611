"""The doorbell: an empty Celery message after a commit that says "look in the database".

The row is the truth. A bell that is lost, late or doubled changes nothing but the delay, because
every worker also looks by itself every few seconds; so publishing never fails a request.
"""

import threading

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy.orm import Session

from models.db import after_commit
from models.settings import BrokerSettings

RING_TASK = "tunery.ring"
QUEUE = "tunery"
PUBLISH_SECONDS = 1.0
QUIET_SECONDS = 0.1
"""After a ring, so long it is quiet: what comes meanwhile is one ring."""
CLOSE_SECONDS = 5.0

log = structlog.get_logger(__name__)


def make_celery(settings: BrokerSettings) -> Celery:
    """Return the Celery application that both the API (as a client) and the worker use.

    The options follow the reliability specification, section 1.2: no result backend, JSON only, no
    prefetching, nothing that is cancelled because a connection was lost.
    """
    app = Celery("tunery", broker=settings.url.get_secret_value(), set_as_current=False)
    app.conf.update(
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_acks_late=False,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": settings.key_prefix,
            "socket_timeout": 10,
            "socket_connect_timeout": PUBLISH_SECONDS,
            "socket_keepalive": not settings.url.get_secret_value().startswith("redis+socket"),
            "health_check_interval": 25,
            # Of publishing alone (the consumer goes on for ever): one more try, then give up.
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 0.2,
        },
    )
    return app


class Bell:
    """Rings the workers."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ring(self) -> None:
        """Publish one empty message; a broker that is down is logged and otherwise ignored."""
        try:
            self._app.send_task(RING_TASK, retry=False, expires=60)
        except (OperationalError, ConnectionError, TimeoutError) as error:
            log.warning("bell_not_rung", error=str(error))

    def ring_after_commit(self, session: Session) -> None:
        """Ring once the session's transaction is committed; nothing happens if it rolls back."""
        after_commit(session, RING_TASK, self.ring_soon)

    def ring_soon(self) -> None:
        """Have a thread of this process ring: nobody waits for the broker, many make one."""
        self._wanted.set()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="bell", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wanted.wait()
            self._wanted.clear()
            self.ring()
            self._closed.wait(QUIET_SECONDS)
        if self._wanted.is_set():
            self.ring()

    def close(self) -> None:
        """Ring what is still to be rung, and end."""
        self._closed.set()
        if self._thread is not None:
            self._wanted.set()
            self._thread.join(CLOSE_SECONDS)
