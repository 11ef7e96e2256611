"""What a project may use."""

from typing import Annotated

from pydantic import Field, StrictInt

from models.domain.base import Parameters

_Count = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
_Amount = Annotated[StrictInt, Field(ge=0, le=2**53)]
Rate = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]


class KeyRates(Parameters):
    """The limits of one key; None leaves it to the key's project, and then to the settings."""

    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None


class ProjectLimits(Parameters):
    """The limits of a project; None does not bind.

    Attributes:
        share: Weight beside other projects that wait for the same workers.
        max_bytes: Bytes of files and of uploads that have begun.
        max_waiting_jobs: Jobs that are not running and have not ended, paused ones included.
        max_running_jobs: Jobs that run at the same time; more wait.
        tokens_per_day: Tokens served and trained on a day (UTC).
        device_hours_per_month: Hours of training on a device (a GPU, or a process where there is
            none) in a calendar month (UTC).
        requests_per_minute: Requests of each key that has no limit of its own.
        tokens_per_minute: Tokens served to each such key.
    """

    share: Annotated[float, Field(ge=0.01, le=100, strict=True)] = 1.0
    max_bytes: _Amount | None = None
    max_waiting_jobs: _Count | None = None
    max_running_jobs: _Count | None = None
    tokens_per_day: _Amount | None = None
    device_hours_per_month: Annotated[float, Field(ge=0, le=1e9, strict=True)] | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
