"""What every page has: its templates, who is logged in, errors as pages, lists."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlencode

from fastapi import Depends, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.templating import Jinja2Templates

from api import page_session
from api.deps import MAX_TEXT, ReadSession
from api.page_session import PageSession
from api.ui import filters, texts, vendor
from api.ui.assets import Assets
from models.domain.access import Scope, allows
from models.errors import TuneryError
from models.registry.page import Cursor


class PageRoute(APIRoute):
    """A route whose errors are pages as well."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except TuneryError as error:
                return render(request, "error.html", status=error.status_code, error=error)

        return handle


HERE = Path(__file__).parent
PAGE_ROWS = 50
assets = Assets(HERE / "static")
templates = Jinja2Templates(HERE / "templates")
templates.env.trim_blocks = templates.env.lstrip_blocks = True
templates.env.filters |= filters.ALL
templates.env.globals["missing_files"] = vendor.missing
templates.env.globals["version"] = version("tunery")

DEFAULT_SMOOTHING = 0.9
THEMES = ("system", "light", "dark")
Choice = TypeVar("Choice", bound=str)


class LoginNeeded(Exception):
    """A page was asked for without a session; the application leads to the login."""


def page_of(request: Request, session: ReadSession) -> PageSession:
    found = page_session.read_cookie(session, request.cookies.get(page_session.COOKIE, ""))
    if found is None:
        raise LoginNeeded
    request.state.page = found
    return found


PageDep = Annotated[PageSession, Depends(page_of)]


def language_of(request: Request) -> str:
    """Return the language that was chosen in the settings, else the browser's."""
    chosen = request.cookies.get("tunery_language", "")
    if chosen in texts.languages():
        return chosen
    return texts.choose(request.headers.get("accept-language", ""))


def smoothing_of(request: Request) -> float:
    """Return how much curves are smoothed at first, as the settings say."""
    try:
        chosen = float(request.cookies.get("tunery_smoothing", ""))
    except ValueError:
        return DEFAULT_SMOOTHING
    return chosen if 0 <= chosen <= 0.99 else DEFAULT_SMOOTHING


def render(
    request: Request, name: str, page: PageSession | None = None, status: int = 200, **values: Any
) -> Response:
    """Render a template with what every page has."""
    root = request.scope.get("root_path", "")
    language = language_of(request)
    # An error that a page meets is shown to whom the page was for.
    page = page or getattr(request.state, "page", None)
    everywhere = {
        "root": root,
        "asset": lambda path: f"{root}/ui/static/{assets.url(path)}",
        "csrf": page.csrf if page else "",
        "key_name": page.key.name if page else "",
        "may": lambda scope: bool(page and allows(page.key.scopes, Scope(scope))),
        "language": language,
        "t": texts.translator(language),
        "script_texts": texts.of_scripts(language),
        "theme": one_of_or_first(request.cookies.get("tunery_theme", ""), THEMES),
        "smoothing": smoothing_of(request),
        "here": request.url.path.removeprefix(root),
    }
    return templates.TemplateResponse(request, name, everywhere | values, status_code=status)


@dataclass(frozen=True, slots=True)
class Listing:
    """How a list is asked for in the address: a text, an order, a place."""

    query: dict[str, str]
    sorts: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.query.get("q", "")[:MAX_TEXT]

    @property
    def sort(self) -> str:
        asked = self.query.get("sort", "")
        return asked if asked in self.sorts else self.sorts[0]

    @property
    def order(self) -> Literal["asc", "desc"]:
        # Times begin with the newest, names with the first.
        usual = "desc" if self.sort in ("created_at", "bytes") else "asc"
        asked = self.query.get("order", usual)
        return "asc" if asked == "asc" else "desc"

    def cursor(self) -> Cursor:
        return Cursor(self.query.get("after") or None, PAGE_ROWS, self.order)

    def url(self, **changes: str) -> str:
        """Return this list's address with other values; an empty one is left out."""
        left_out = {} if "after" in changes else {"after": ""}
        values = self.query | left_out | changes
        return "?" + urlencode({name: value for name, value in values.items() if value})

    def url_by(self, name: str) -> str:
        """Return the address of the list by a column, the other way round if it is so already."""
        other = "asc" if self.order == "desc" else "desc"
        return self.url(sort=name, order=other if name == self.sort else "")


def listing(request: Request, *sorts: str) -> Listing:
    """Return how the list of a page is asked for; the first of `sorts` is the usual one."""
    return Listing(dict(request.query_params), sorts)


def one_of_or_first(value: str, choices: tuple[str, ...]) -> str:
    return value if value in choices else choices[0]


def one_of(value: str, choices: tuple[Choice, ...]) -> Choice:
    """Return `value` as one of the literals that it is known to be."""
    return next(each for each in choices if each == value)
