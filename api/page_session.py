"""Logging in to the page: a signed cookie that names an API key, and a token against forgery.

The cookie holds the key's id, an end, and a signature made with what the database keeps of the key.
So any replica can check it, no secret is added, and a key that is revoked logs its pages out. The
key itself is never stored in the browser.
"""

import base64
import hmac
import time
from dataclasses import dataclass

from fastapi import Request
from sqlalchemy.orm import Session

from models.errors import PermissionDeniedError
from models.registry import tenancy
from models.tables import ApiKey

COOKIE = "tunery_session"
CSRF_HEADER = "x-tunery-csrf"
SECONDS = 14 * 24 * 3600


@dataclass(frozen=True, slots=True)
class PageSession:
    """Who is logged in; `csrf` must come back in `CSRF_HEADER` with every change."""

    key: ApiKey
    csrf: str


def make_cookie(key: ApiKey, now: float | None = None) -> str:
    """Return the value of the cookie for a key."""
    end = str(int((time.time() if now is None else now) + SECONDS))
    return f"{key.id}.{end}.{_sign(key, 'session', end)}"


def read_cookie(session: Session, value: str) -> PageSession | None:
    """Return who a cookie stands for, or None: forged, too old, or of a revoked key."""
    key_id, _, rest = value.partition(".")
    end, _, signature = rest.partition(".")
    if not end.isdigit() or int(end) < time.time():
        return None
    key = tenancy.active_key(session, key_id)
    if key is None or not hmac.compare_digest(signature, _sign(key, "session", end)):
        return None
    return PageSession(key, _sign(key, "csrf", end))


def require_own_page(request: Request, session: PageSession) -> None:
    """Make sure that a change was asked for by our own page and by no other site.

    Raises:
        PermissionDeniedError: it comes from another origin, or without the page's token.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site = request.headers.get("sec-fetch-site", "same-origin")
    token = request.headers.get(CSRF_HEADER, "")
    if site != "same-origin" or not hmac.compare_digest(token, session.csrf):
        raise PermissionDeniedError(
            "This change was not asked for by the page itself. Reload the page and try again.",
            code="csrf_failed",
        )


def _sign(key: ApiKey, purpose: str, end: str) -> str:
    message = f"{purpose}:{key.id}:{end}".encode()
    digest = hmac.digest(key.secret_sha256.encode(), message, "sha256")
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
