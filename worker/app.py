"""The Celery worker: rung by empty messages, it starts and stops the dispatcher's threads."""

from typing import Any

from celery import Celery, signals

from models.broker import QUEUE, RING_TASK, make_celery
from models.logs import configure_logging
from models.settings import Settings, load_settings
from worker.dispatcher import Dispatcher


def create_worker_app(settings: Settings) -> Celery:
    """Return the Celery application: one task, and the dispatcher on the worker's signals."""
    app = make_celery(settings.broker)
    dispatcher = Dispatcher(settings)

    @app.task(name=RING_TASK, ignore_result=True, acks_late=False)
    def ring() -> None:
        dispatcher.ring()

    @signals.setup_logging.connect(weak=False)
    def keep_logging(**_: Any) -> None:
        """Celery sets the level of all loggers to its own where nobody listens to this."""

    # Started before the broker answers: work in the database does not wait for it.
    @signals.worker_init.connect(weak=False)
    def start(**_: Any) -> None:
        dispatcher.start()

    @signals.worker_shutting_down.connect(weak=False)
    def stop(**_: Any) -> None:
        dispatcher.stop()

    @signals.worker_shutdown.connect(weak=False)
    def join(**_: Any) -> None:
        dispatcher.stop()
        dispatcher.join()

    return app


def main() -> None:
    """Run a worker until SIGTERM or SIGINT: one thread for bells, the dispatcher's for the work."""
    settings = load_settings()
    configure_logging(settings.log_level, "worker")
    app = create_worker_app(settings)
    app.worker_main(
        [
            "--quiet",
            "worker",
            "--pool=threads",
            "--concurrency=1",
            f"--queues={QUEUE}",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
        ]
    )
