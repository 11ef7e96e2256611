"""How a trainer process says how it ended; the Celery parent reads it: no imports here.

Every other code (a signal, 1 for an unexpected exception) means that the run was lost: the parent
classifies it and puts the job back into the queue.
"""

DONE = 0
"""The adapter is published and the job has succeeded; also a warm spare that was never used."""

FAILED = 70
"""The job has failed and its row says why; another attempt would end the same way."""

LEASE_LOST = 74
"""Another attempt owns the job; this one has written nothing since."""

DRAINED = 75
"""SIGTERM: the step was finished and a checkpoint recorded; the job can go on elsewhere."""

CANCELLED = 76
"""SIGINT: the step was finished; no checkpoint was made."""
