"""Business errors: one class per HTTP status, rendered once at the edge.

Every error carries what an OpenAI error body needs (``message``, ``type``, ``param``, ``code``), so
any layer can raise it without knowing HTTP. Errors cross process boundaries (trainer, inference
server), so they convert to and from a plain dictionary.
"""

from typing import Any, ClassVar


class TuneryError(Exception):
    """A failure with a status, a stable code, and a sentence that says what to do.

    Args:
        message: One sentence for the person at the keyboard.
        param: The request field at fault, e.g. ``"training_file"``.
        code: Stable machine-readable code; the class default when omitted.
        retry_after: Seconds after which trying again makes sense (429, 503).
    """

    status_code: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuilt, (type(self), self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form; `error_from_dict` turns it into the class of its status."""
        return {
            "status": self.status_code,
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            "retry_after": self.retry_after,
        }


class InvalidRequestError(TuneryError):
    """The request itself is at fault, or the object's state does not allow it (400).

    State conflicts are 400 and not 409, because the OpenAI SDK retries every 409.
    """

    status_code = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class AuthenticationError(TuneryError):
    """No key, an unknown key or a revoked key (401)."""

    status_code = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class PermissionDeniedError(TuneryError):
    """The key is valid but lacks the scope (403)."""

    status_code = 403
    type = "permission_error"
    default_code = "insufficient_permissions"


class NotFoundError(TuneryError):
    """The object does not exist, or belongs to another project (404)."""

    status_code = 404
    type = "not_found_error"
    default_code = "not_found"


class ConflictError(TuneryError):
    """Two valid things do not fit each other, e.g. an adapter and another base model (409)."""

    status_code = 409
    type = "invalid_request_error"
    default_code = "conflict"


class PayloadTooLargeError(TuneryError):
    """The body exceeds a limit (413)."""

    status_code = 413
    type = "invalid_request_error"
    default_code = "file_too_large"


class UnprocessableError(TuneryError):
    """The object exists but cannot be used, e.g. an adapter that does not load (422)."""

    status_code = 422
    type = "invalid_request_error"
    default_code = "unprocessable"


class CapacityError(TuneryError):
    """Everything that could answer is full (429)."""

    status_code = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class QuotaError(CapacityError):
    """What the project may use is used up; asking again soon does not help (429)."""

    default_code = "insufficient_quota"


class UnavailableError(TuneryError):
    """A part that is needed is not there right now; trying again later makes sense (503)."""

    status_code = 503
    default_code = "service_unavailable"


class LeaseLostError(TuneryError):
    """A worker wrote with an attempt number that is no longer the job's: it must stop at once."""

    default_code = "lease_lost"


class TrainingFailedError(TuneryError):
    """A training run cannot end well and another attempt would end the same way."""

    default_code = "training_failed"


_BY_STATUS: dict[int, type[TuneryError]] = {
    cls.status_code: cls
    for cls in (
        InvalidRequestError,
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        ConflictError,
        PayloadTooLargeError,
        UnprocessableError,
        CapacityError,
        UnavailableError,
    )
}


def error_from_dict(data: dict[str, Any]) -> TuneryError:
    """Rebuild an error from `to_dict`; an unknown status gives a plain `TuneryError`."""
    return _rebuilt(_BY_STATUS.get(int(data.get("status", 500)), TuneryError), data)


def _rebuilt(cls: type[TuneryError], data: dict[str, Any]) -> TuneryError:
    return cls(
        str(data.get("message", "Unknown error.")),
        param=data.get("param"),
        code=data.get("code"),
        retry_after=data.get("retry_after"),
    )
