"""Errors keep their class and their fields wherever they travel."""

import json
import pickle

import pytest

from models import errors
from models.errors import (
    CapacityError,
    InvalidRequestError,
    LeaseLostError,
    TrainingFailedError,
    TuneryError,
    error_from_dict,
)

HTTP_ERRORS = [
    (errors.InvalidRequestError, 400),
    (errors.AuthenticationError, 401),
    (errors.PermissionDeniedError, 403),
    (errors.NotFoundError, 404),
    (errors.ConflictError, 409),
    (errors.PayloadTooLargeError, 413),
    (errors.UnprocessableError, 422),
    (errors.CapacityError, 429),
    (errors.UnavailableError, 503),
]


@pytest.mark.parametrize(("cls", "status"), HTTP_ERRORS)
def test_each_class_has_one_status_and_survives_json(cls: type[TuneryError], status: int) -> None:
    sent = cls("Do this.", param="training_file", code="special", retry_after=7)
    received = error_from_dict(json.loads(json.dumps(sent.to_dict())))
    assert type(received) is cls
    assert received.status_code == status
    assert received.to_dict() == sent.to_dict()
    assert str(received) == "Do this."


@pytest.mark.parametrize(("cls", "status"), HTTP_ERRORS)
def test_defaults_make_a_whole_error_body(cls: type[TuneryError], status: int) -> None:
    body = cls("Do this.").to_dict()
    assert body["status"] == status
    assert body["code"] == cls.default_code
    assert body["type"] == cls.type
    assert body["param"] is None
    assert body["retry_after"] is None


def test_no_two_classes_share_a_status_or_a_code() -> None:
    classes = [cls for cls, _ in HTTP_ERRORS]
    assert len({cls.status_code for cls in classes}) == len(classes)
    assert len({cls.default_code for cls in classes}) == len(classes)


def test_every_class_of_the_module_is_covered() -> None:
    defined = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, TuneryError)
    }
    internal = {TuneryError, LeaseLostError, TrainingFailedError}
    assert defined == {cls for cls, _ in HTTP_ERRORS} | internal | {errors.QuotaError}


def test_a_used_up_quota_travels_as_what_it_is_a_kind_of_with_its_code() -> None:
    received = error_from_dict(errors.QuotaError("Used up.").to_dict())
    assert type(received) is CapacityError
    assert received.code == "insufficient_quota"


def test_the_sdk_retries_no_state_conflict() -> None:
    """The OpenAI SDK retries 408, 409, 429 and every 5xx."""
    assert InvalidRequestError("Already cancelled.").status_code == 400


def test_an_unknown_status_stays_an_error() -> None:
    received = error_from_dict({"status": 418, "message": "Short and stout.", "code": "teapot"})
    assert type(received) is TuneryError
    assert (received.message, received.code) == ("Short and stout.", "teapot")
    assert error_from_dict({}).message


@pytest.mark.parametrize("cls", [CapacityError, LeaseLostError, TrainingFailedError])
def test_survives_a_process_pool(cls: type[TuneryError]) -> None:
    """The last two share a status, and yet keep their class."""
    sent = cls("Full.", retry_after=3)
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is cls
    assert received.to_dict() == sent.to_dict()
