"""What computes: the Celery worker, the trainer, the inference server. Must stay free of imports."""
