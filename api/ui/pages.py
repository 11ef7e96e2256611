"""The pages under ``/ui``. They render what ``/v1`` answers; every change is a call of ``/v1``."""

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response

from api import page_session
from api.deps import ReadSession
from api.ui import data_pages, job_pages, operation_pages, texts
from api.ui.frame import PageDep, PageRoute, language_of, render
from models.domain.access import Scope, allows
from models.errors import AuthenticationError, NotFoundError
from models.registry import tenancy

router = APIRouter(prefix="/ui", include_in_schema=False, route_class=PageRoute)


@router.get("/login")
def login_page(request: Request, next: str = "/ui/jobs") -> Response:
    return render(request, "login.html", next=next)


@router.post("/session")
def log_in(
    request: Request,
    session: ReadSession,
    key: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "/ui/jobs",
) -> Response:
    """Exchange a key for the page's cookie, and go where the person wanted to."""
    t = texts.translator(language_of(request))
    try:
        found = tenancy.authenticate(session, key.strip())
    except AuthenticationError:
        failed = t("That key is not valid.")
        return render(request, "login.html", status=401, next=next, failed=failed)
    if not allows(found.scopes, Scope.READ):
        failed = t("This key may not read; the page needs one that may.")
        return render(request, "login.html", status=403, next=next, failed=failed)
    root = request.scope.get("root_path", "")
    # A path of our own and nothing else, so that a link cannot send people elsewhere.
    target = next if next.startswith("/ui/") else "/ui/jobs"
    response = RedirectResponse(root + target, status_code=303)
    response.set_cookie(
        page_session.COOKIE,
        page_session.make_cookie(found),
        max_age=page_session.SECONDS,
        path=f"{root}/",
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout")
def log_out(request: Request) -> Response:
    root = request.scope.get("root_path", "")
    response = RedirectResponse(f"{root}/ui/login", status_code=303)
    response.delete_cookie(page_session.COOKIE, path=f"{root}/")
    return response


@router.get("")
@router.get("/")
def home(request: Request) -> Response:
    return RedirectResponse(f"{request.scope.get('root_path', '')}/ui/jobs", status_code=303)


for part in (job_pages, data_pages, operation_pages):
    router.include_router(part.router)


@router.get("/{path:path}")
def no_such_page(path: str, page: PageDep) -> Response:
    raise NotFoundError(f"There is no page /ui/{path[:200]}.", code="unknown_url")
