"""Workers and usage as objects of the API."""

from collections.abc import Sequence
from itertools import groupby
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from models.domain.base import JsonObject
from models.registry import workers
from models.registry.usage import DAY_SECONDS, Used
from models.registry.workers import Busy, slot_owner
from models.tables import InferenceServer, Usage, Worker


def workers_body(session: Session, project_id: str) -> list[JsonObject]:
    """Return the workers that live, those that were lost lately, and the inference servers."""
    busy = workers.busy_slots(session)
    found = [
        worker_body(each, busy, project_id, "draining" if each.draining else "online")
        for each in workers.alive(session)
    ]
    # What a lost worker was doing belongs to another one by now.
    found += [worker_body(each, {}, project_id, "offline") for each in workers.lost(session)]
    return found + [server_body(each) for each in workers.servers(session)]


def worker_body(
    worker: Worker, busy: dict[str, Busy], project_id: str, status: str = "online"
) -> JsonObject:
    """Return a worker; of a slot that another project's job holds, only that it is busy."""
    return {
        "id": worker.id,
        "object": "worker",
        "kind": "training",
        "status": status,
        "host": worker.host,
        "pid": worker.pid,
        "version": worker.version,
        "started_at": int(worker.created_at),
        "seen_at": int(worker.seen_at),
        "slots": [
            _slot_body(index, busy.get(slot_owner(worker.id, index)), project_id)
            for index in range(worker.slots)
        ],
        "devices": worker.devices,
        "memory": {
            "total": worker.memory_total,
            "available": worker.memory_available,
            "used": worker.memory_used,
        },
    }


def _slot_body(index: int, busy: Busy | None, project_id: str) -> JsonObject:
    own = busy if busy is not None and busy.project_id == project_id else None
    return {
        "index": index,
        "status": "idle" if busy is None else "busy",
        "job_id": own and own.job_id,
        "step": own and own.step,
        "total_steps": own and own.total_steps,
    }


def server_body(server: InferenceServer) -> JsonObject:
    return {
        "id": server.id,
        "object": "worker",
        "kind": "inference",
        "status": "online",
        "host": urlsplit(server.url).hostname,
        "base_model": server.base_model,
        "precision": server.precision,
        "started_at": int(server.created_at),
    }


def usage_buckets(rows: Sequence[Usage], group_by: Sequence[str]) -> list[JsonObject]:
    """Return one bucket for each day that has usage, in it one result for each group."""
    return [
        {
            "object": "bucket",
            "start_time": day * DAY_SECONDS,
            "end_time": (day + 1) * DAY_SECONDS,
            "results": _results(list(of_day), group_by),
        }
        for day, of_day in groupby(rows, lambda row: row.day)
    ]


def _results(rows: list[Usage], group_by: Sequence[str]) -> list[JsonObject]:
    sums: dict[tuple[str | None, str | None, str | None], Used] = {}
    for row in rows:
        project_id = row.project_id if "project_id" in group_by else None
        model = row.model if "model" in group_by else None
        key_id = (row.key_id or None) if "api_key_id" in group_by else None
        total = sums.setdefault((project_id, model, key_id), Used())
        total += Used(
            row.requests,
            row.prompt_tokens,
            row.completion_tokens,
            row.trained_tokens,
            row.device_seconds,
        )
    return [
        {
            "object": "usage.result",
            "project_id": project_id,
            "model": model,
            "api_key_id": key_id,
            "num_model_requests": used.requests,
            "input_tokens": used.prompt_tokens,
            "output_tokens": used.completion_tokens,
            "trained_tokens": used.trained_tokens,
            "device_seconds": round(used.device_seconds, 3),
        }
        for (project_id, model, key_id), used in sums.items()
    ]
