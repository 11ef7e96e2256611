"""``python -m worker``: run a Celery worker."""

from worker.app import main

main()
