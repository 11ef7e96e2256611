"""What an engine refuses or fails at; the server turns these into HTTP errors."""


class EngineError(Exception):
    """Base class of everything that an engine raises or emits."""


class AdapterFormatError(EngineError):
    """An adapter's files break a rule of the strict reader.

    Args:
        reason: Stable code of the rule, e.g. ``"shape_mismatch"``.
        detail: What was found where, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class AdapterPoolFullError(EngineError):
    """Every adapter in memory is in use, so none can make room for another."""


class AdapterInUseError(EngineError):
    """An adapter that requests are using cannot be unloaded."""


class EngineFullError(EngineError):
    """As many sequences run and wait as the engine takes."""


class EngineClosedError(EngineError):
    """The engine was closed before the sequence ended, or before it was submitted."""


class GenerationError(EngineError):
    """One sequence broke; the others go on."""


class RequestRefusedError(EngineError):
    """The engine cannot do what a request asks for, and never will.

    Args:
        detail: What and why, for a person.
        param: The field of the request that asks for it, if known.
    """

    def __init__(self, detail: str, param: str | None = None) -> None:
        super().__init__(detail)
        self.param = param
