"""Methods of the SDK for what goes on by itself; sync and async, on both databases."""

import json
import time
from typing import Any

import openai
import pytest

from models.domain.webhooks import EVENT_TYPES
from models.settings import Settings, WebhookSettings
from tests.api.calls import batch_line
from tests.contract.conftest import Sdk
from tests.webhook_receiver import LOCAL, receiving


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhooks": WebhookSettings(allowed_networks=[LOCAL])})


def test_batches(sdk: Sdk) -> None:
    lines = b"\n".join(json.dumps(batch_line(name)).encode() for name in ("a", "b"))
    file = sdk("files.create", file=("lines.jsonl", lines), purpose="batch")
    made = sdk(
        "batches.create",
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"team": "desk"},
    )
    deadline = time.monotonic() + 30
    while (batch := sdk("batches.retrieve", made.id)).status != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    assert (batch.request_counts.completed, batch.request_counts.total) == (2, 2)
    assert (batch.model, batch.metadata, batch.usage.total_tokens) == ("base", {"team": "desk"}, 18)
    answers = [json.loads(line) for line in sdk("files.content", batch.output_file_id).iter_lines()]
    assert [answer["custom_id"] for answer in answers] == ["a", "b"]
    assert answers[0]["response"]["body"]["choices"][0]["message"]["content"] == "Hello"
    assert [each.id for each in sdk("batches.list").data] == [made.id]
    with pytest.raises(openai.BadRequestError) as caught:
        sdk("batches.cancel", made.id)
    assert caught.value.code == "batch_not_cancellable"


def test_stored(sdk: Sdk) -> None:
    messages: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    ask: dict[str, Any] = {"model": "base", "messages": messages, "store": True}
    made = sdk("chat.completions.create", **ask, metadata={"team": "desk"})
    other = sdk("chat.completions.create", **ask)
    sdk("chat.completions.create", model="base", messages=messages)
    assert sdk("chat.completions.retrieve", made.id).choices[0].message.content == "Hello"
    assert [each.id for each in sdk("chat.completions.list").data] == [made.id, other.id]
    newest = sdk("chat.completions.list", order="desc", limit=1, model="base")
    assert ([each.id for each in newest.data], newest.has_more) == ([other.id], True)
    found = sdk("chat.completions.list", metadata={"team": "desk"})
    assert [each.id for each in found.data] == [made.id]
    assert sdk("chat.completions.update", made.id, metadata={"team": "x"}).metadata == {"team": "x"}
    first = sdk("chat.completions.messages.list", made.id, limit=1)
    assert ([each.content for each in first.data], first.has_more) == (["Be kind."], True)
    rest = sdk("chat.completions.messages.list", made.id, after=first.data[0].id)
    assert ([each.role for each in rest.data], rest.has_more) == (["user"], False)
    assert sdk("chat.completions.delete", made.id).deleted
    with pytest.raises(openai.NotFoundError):
        sdk("chat.completions.retrieve", made.id)


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
