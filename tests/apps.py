"""One application for many tests: to make its routes ready takes longer than most tests do."""

from fastapi import FastAPI

from api.app import create_app
from models.settings import Settings

_apps: dict[str, FastAPI] = {}


def app_for(settings: Settings) -> FastAPI:
    """Return an application, kept from the last test with these limits; not for two at a time."""
    app = _apps.setdefault(settings.api.model_dump_json(), create_app(settings))
    app.state.settings = settings
    return app
