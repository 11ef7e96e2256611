"""A body for each operation that takes JSON, for the OpenAPI document."""

from models.domain.base import JsonObject

_MESSAGES = [{"role": "user", "content": "When does the harbour office open?"}]
_TUNED = "ft:smollm2-135m-instruct:local:support:7p4lurel"
_JOB: JsonObject = {
    "model": "smollm2-135m-instruct",
    "training_file": "file-abc123",
    "validation_file": "file-def456",
    "suffix": "support",
    "seed": 7,
    "metadata": {"team": "desk"},
    "method": {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}},
    },
    "peft": {"type": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"},
    "precision": {"type": "nf4", "double_quant": True},
    "objective": {"type": "sft"},
    "optimizer": {"type": "adamw", "learning_rate": 0.0002},
    "max_seq_length": 2048,
    "packing": True,
    "on_error": "fail",
    "on_overlong": "error",
    "early_stopping": {"patience": 3},
    "priority": 0,
    "num_devices": 1,
}

EXAMPLES: dict[str, JsonObject] = {
    "/v1/fine_tuning/jobs": _JOB,
    "/v1/fine_tuning/estimate": _JOB,
    "/v1/fine_tuning/jobs/{job_id}/samples": {"limit": 3, "max_tokens": 80},
    "/v1/fine_tuning/checkpoints/{model}/permissions": {"project_ids": ["proj_abc123"]},
    "/v1/adapters/{model}/serve": {"merged": True},
    "/v1/sweeps": {
        "name": "ranks",
        "job": {"model": "smollm2-135m-instruct", "training_file": "file-abc123"},
        "grid": {"peft.r": [4, 8, 16]},
    },
    "/v1/chat/completions": {"model": _TUNED, "messages": _MESSAGES, "temperature": 0},
    "/v1/chat/completions/{completion_id}": {"metadata": {"team": "desk"}},
    "/v1/completions": {"model": _TUNED, "prompt": "The harbour office", "max_tokens": 16},
    "/v1/embeddings": {"model": "all-minilm-l6-v2", "input": ["a text", "another"]},
    "/v1/fill_mask": {"model": "all-minilm-l6-v2", "input": "The harbour is [MASK]."},
    "/v1/classify": {"model": "ft:all-minilm-l6-v2:local:topics:7p4lurel", "input": "a text"},
    "/v1/files/{file_id}/lint": {"shape": "chat"},
    "/v1/uploads": {
        "bytes": 1_000_000,
        "filename": "rows.jsonl",
        "mime_type": "text/jsonl",
        "purpose": "fine-tune",
    },
    "/v1/uploads/{upload_id}/complete": {"part_ids": ["part_abc123", "part_def456"]},
    "/v1/batches": {
        "input_file_id": "file-abc123",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    },
    "/v1/webhook_endpoints": {
        "name": "ours",
        "url": "https://example.com/hooks",
        "event_types": ["fine_tuning.job.succeeded"],
    },
    "/v1/webhook_endpoints/{webhook_endpoint_id}": {"name": "renamed"},
    "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": {
        "keep_old_secret_active_for_24_hours": True
    },
    "/v1/webhook_endpoints/{webhook_endpoint_id}/test": {"event_type": "batch.completed"},
    "/v1/api_keys": {"name": "ci", "scopes": ["read", "infer"], "requests_per_minute": 600},
    "/v1/projects": {"name": "team", "organization": "acme", "limits": {"max_running_jobs": 2}},
    "/v1/projects/{project_id}": {"limits": {"tokens_per_day": 1_000_000}},
    "/v1/projects/{project_id}/api_keys": {"name": "ci", "scopes": ["train"]},
}
