"""Typed rows; importing this package registers every table on ``Base.metadata``."""

from models.tables.base import Base, new_id, ordered_id
from models.tables.base_model import BaseModel, BaseProbe
from models.tables.batch import Batch, BatchResult
from models.tables.file import File, Upload, UploadPart
from models.tables.idempotency import IdempotencyKey
from models.tables.inference_server import InferenceServer
from models.tables.job import Event, Job, JobAttempt, JobLogPart
from models.tables.merge import Merge
from models.tables.operations import Usage, Worker
from models.tables.result import Adapter, Checkpoint, Metric
from models.tables.stored_completion import StoredCompletion
from models.tables.sweep import Sweep, SweepJob
from models.tables.tenancy import (
    ApiKey,
    AuditLog,
    CheckpointPermission,
    Organization,
    Project,
)
from models.tables.webhook import WebhookDelivery, WebhookEndpoint

__all__ = [
    "Adapter",
    "ApiKey",
    "AuditLog",
    "Base",
    "BaseModel",
    "BaseProbe",
    "Batch",
    "BatchResult",
    "Checkpoint",
    "CheckpointPermission",
    "Event",
    "File",
    "IdempotencyKey",
    "InferenceServer",
    "Job",
    "JobAttempt",
    "JobLogPart",
    "Merge",
    "Metric",
    "Organization",
    "Project",
    "StoredCompletion",
    "Sweep",
    "SweepJob",
    "Upload",
    "UploadPart",
    "Usage",
    "WebhookDelivery",
    "WebhookEndpoint",
    "Worker",
    "new_id",
    "ordered_id",
]
