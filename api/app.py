"""The API application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from api.adapters import routes as adapters
from api.deps import ServicesDep
from api.errors import install_error_handlers
from api.keys import routes as keys
from api.middleware import RequestId
from api.openai import chat, estimates, files, fine_tuning, models, progress, uploads
from api.services import Services
from api.ui import serve as page
from models.registry import base_models
from models.settings import Settings, load_settings

FORM_OVERHEAD = 64 * 1024


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application; `settings` come from the environment when not given."""
    settings = settings or load_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.from_settings(settings)
        await run_in_threadpool(_sync_catalog, services)
        app.state.services = services
        try:
            yield
        finally:
            await services.aclose()

    app = FastAPI(
        title="Tunery",
        summary="Train adapters on your own machines and call them by name.",
        version=version("tunery"),
        lifespan=lifespan,
    )
    app.add_middleware(RequestId)
    install_error_handlers(app)
    # On the routes and not on the application, whose own answer would have no OpenAI body.
    v1 = APIRouter(prefix="/v1")
    v1.include_router(files.router, max_body_size=settings.api.max_upload_bytes + FORM_OVERHEAD)
    v1.include_router(uploads.router, max_body_size=settings.api.max_part_bytes + FORM_OVERHEAD)
    for module in (fine_tuning, progress, estimates, models, chat):
        v1.include_router(module.router, max_body_size=settings.api.max_body_bytes)
    v1.include_router(adapters.router, max_body_size=settings.api.max_body_bytes)
    v1.include_router(keys.router, max_body_size=settings.api.max_body_bytes)
    app.include_router(v1)
    page.install(app)
    app.include_router(_health)
    return app


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
