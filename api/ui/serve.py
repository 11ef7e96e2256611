"""The page as a part of the application: files, the login redirect, errors as pages, headers."""

from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.ui import frame, pages

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)


def install(app: FastAPI) -> None:
    """Add the pages to an application."""
    app.mount("/ui/static", frame.assets, name="static")
    app.include_router(pages.router)
    app.add_middleware(PageHeaders)
    app.add_middleware(PageCompression)

    @app.exception_handler(frame.LoginNeeded)
    async def on_login_needed(request: Request, _: frame.LoginNeeded) -> Response:
        root = request.scope.get("root_path", "")
        here = request.url.path.removeprefix(root)
        if request.url.query:
            here = f"{here}?{request.url.query}"
        return RedirectResponse(f"{root}/ui/login?next={quote(here, safe='')}", status_code=303)


class PageHeaders:
    """Adds the content security policy to what is under ``/ui``."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_page(scope):
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = POLICY
                headers["referrer-policy"] = "same-origin"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self.app(scope, receive, send_with_policy)


class PageCompression:
    """Compresses what is under ``/ui``; answers of ``/v1``, such as streams, pass as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.compressed = GZipMiddleware(app, minimum_size=1000, compresslevel=5)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and _is_page(scope)
        await (self.compressed if is_page else self.app)(scope, receive, send)


def _is_page(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == "/ui" or path.startswith("/ui/")
