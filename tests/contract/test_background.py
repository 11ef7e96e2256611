"""Methods of the SDK for what goes on by itself: webhooks; sync and async, on both databases."""

from typing import Any

import pytest

from models.domain.webhooks import EVENT_TYPES
from models.settings import Settings, WebhookSettings
from tests.contract.conftest import Sdk
from tests.webhook_receiver import LOCAL, receiving


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhooks": WebhookSettings(allowed_networks=[LOCAL])})


def test_webhooks(sdk: Sdk) -> None:
    types: Any = ["fine_tuning.job.succeeded", "batch.completed"]
    with receiving() as receiver:
        made = sdk("webhooks.create", name="mine", url=receiver.url, event_types=types)
        assert made.event_types == types
        assert made.signing_secret.startswith("whsec_")
        assert (
            sdk("webhooks.retrieve", made.id).signing_secret_hint[-4:] == made.signing_secret[-4:]
        )
        assert sdk("webhooks.update", made.id, name="ours").name == "ours"
        assert [each.id for each in sdk("webhooks.list").data] == [made.id]
        assert tuple(sdk("webhooks.event_types.list").data) == EVENT_TYPES
        rotated = sdk("webhooks.rotate_secret", made.id, keep_old_secret_active_for_24_hours=True)
        assert sdk("webhooks.test", made.id, event_type="batch.completed").status_code == 204
        [(headers, body)] = receiver.received
    for secret in (made.signing_secret, rotated.signing_secret):
        sdk("webhooks.verify_signature", body, headers, secret=secret)
        event = sdk("webhooks.unwrap", body, headers, secret=secret)
        assert event.type == "batch.completed"
    assert sdk("webhooks.delete", made.id).deleted
    assert sdk("webhooks.list").data == []
