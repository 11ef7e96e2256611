"""What computes: the Celery worker, the trainer, the inference server. Stays free of imports."""
