"""The API application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from api import openapi
from api.access import ADMINISTRATION, INFERENCE, MODELS, READING, TRAINING
from api.adapters import routes as adapters
from api.batches import BatchRunner
from api.deps import ServicesDep, require_tokens
from api.errors import install_error_handlers
from api.hot import HotPaths
from api.idempotency import Idempotency
from api.keys import audit_logs, projects
from api.keys import routes as keys
from api.methods import routes as methods
from api.middleware import RequestId
from api.openai import (
    batches,
    chat,
    completions,
    encoders,
    estimates,
    files,
    fine_tuning,
    models,
    permissions,
    progress,
    samples,
    stored,
    sweeps,
    uploads,
    webhooks,
)
from api.operations import routes as operations
from api.services import Services
from api.ui import serve as page
from models.registry import base_models
from models.settings import Settings, load_settings

FORM_OVERHEAD = 64 * 1024


class Application(FastAPI):
    """FastAPI, but for what `HotPaths` answers before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._front = HotPaths(self, super().__call__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # For the pieces of a body that no layer has to see.
            scope.setdefault("state", {})["send"] = send
        await self._front(scope, receive, send)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application; `settings` come from the environment when not given."""
    settings = settings or load_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.from_settings(app.state.settings)
        await run_in_threadpool(_sync_catalog, services)
        app.state.services = services
        runner = BatchRunner(app, services)
        try:
            yield
        finally:
            await runner.aclose()
            await services.aclose()

    app = Application(
        title="Tunery",
        summary="Train adapters on your own machines and call them by name.",
        version=version("tunery"),
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.add_middleware(Idempotency)
    app.add_middleware(RequestId)
    install_error_handlers(app)
    _include_v1(app, settings)
    page.install(app)
    app.include_router(_health)
    openapi.install(app)
    return app


def _include_v1(app: FastAPI, settings: Settings) -> None:
    """Add all of ``/v1``: each group with its scopes and the largest body it takes.

    What is asked for most stands first, since routes are tried one after the other.
    """
    limits = settings.api
    groups = [
        (fine_tuning.router, TRAINING, limits.max_body_bytes),
        (chat.router, INFERENCE, limits.max_body_bytes),
        (files.router, TRAINING, limits.max_upload_bytes + FORM_OVERHEAD),
        (uploads.router, TRAINING, limits.max_part_bytes + FORM_OVERHEAD),
        (progress.router, TRAINING, limits.max_body_bytes),
        (estimates.router, TRAINING, limits.max_body_bytes),
        (samples.router, READING, limits.max_body_bytes),
        (permissions.router, ADMINISTRATION, limits.max_body_bytes),
        (models.router, MODELS, limits.max_body_bytes),
        (adapters.router, TRAINING, limits.max_upload_bytes + FORM_OVERHEAD),
        (methods.router, TRAINING, limits.max_body_bytes),
        (encoders.router, INFERENCE, limits.max_body_bytes),
        (completions.router, INFERENCE, limits.max_body_bytes),
        (operations.router, TRAINING, limits.max_body_bytes),
        (operations.operator_router, ADMINISTRATION, limits.max_body_bytes),
        (audit_logs.router, ADMINISTRATION, limits.max_body_bytes),
        (sweeps.router, TRAINING, limits.max_body_bytes),
        (stored.router, INFERENCE, limits.max_body_bytes),
        (batches.router, INFERENCE, limits.max_body_bytes),
        (webhooks.router, ADMINISTRATION, limits.max_body_bytes),
        (keys.router, ADMINISTRATION, limits.max_body_bytes),
        (projects.router, ADMINISTRATION, limits.max_body_bytes),
    ]
    for router, access, max_body_size in groups:
        # On the routes and not on the application, whose own answer would have no OpenAI body.
        needed = [Depends(access)]
        if access is INFERENCE:
            needed.append(Depends(require_tokens))
        app.include_router(router, prefix="/v1", max_body_size=max_body_size, dependencies=needed)


def _sync_catalog(services: Services) -> None:
    with services.database.write() as session:
        base_models.sync_catalog(session, services.settings.models.catalog)


_health = APIRouter(tags=["health"])


@_health.get("/healthz")
def health(services: ServicesDep) -> JSONResponse:
    """Say whether the database answers; needs no key."""
    reachable = services.database.is_reachable()
    return JSONResponse(
        {"status": "ok" if reachable else "database_unreachable"}, 200 if reachable else 503
    )
