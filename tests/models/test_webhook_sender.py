"""Events reach who asked for them, signed, and nothing that only this machine can reach."""

import asyncio
import socket
import time

import pytest
from openai import InvalidWebhookSignatureError, OpenAI

from models.errors import InvalidRequestError
from models.registry.webhooks import Outcome, new_secret
from models.settings import WebhookSettings
from models.webhook_sender import WebhookSender, sign
from tests.webhook_receiver import LOCAL, Receiver, receiving

SECRET = new_secret()
BODY = '{"id": "evt_1", "type": "batch.completed", "data": {"id": "batch_1"}}'
CLOSED = WebhookSender(WebhookSettings())
OPEN = WebhookSender(WebhookSettings(allowed_networks=[LOCAL], timeout_seconds=5))


def send(sender: WebhookSender, url: str, *secrets: str) -> Outcome:
    return asyncio.run(sender.send(url, "evt_1", BODY, secrets or (SECRET,)))


def test_the_sdk_accepts_the_signature_and_refuses_another() -> None:
    client = OpenAI(api_key="none")
    with receiving() as receiver:
        assert send(OPEN, f"{receiver.url}/hooks?a=b", SECRET, new_secret()).is_delivered
        [(headers, body)] = receiver.received
    event = client.webhooks.unwrap(body, headers, secret=SECRET)
    assert (event.type, event.id) == ("batch.completed", "evt_1")
    assert headers["host"] == receiver.url.removeprefix("http://")
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers, secret=SECRET)
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=new_secret())


def test_the_signature_is_that_of_the_standard() -> None:
    """The example of the Standard Webhooks specification's own test suite."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = '{"test": 2432232314}'
    signature = sign([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "10.1.2.3",
        "192.168.0.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "2130706433",
        "0x7f000001",
        "127.1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "[fc00::1]",
    ],
)
def test_what_is_not_public_is_never_asked(host: str) -> None:
    outcome = send(CLOSED, f"https://{host}:9/x")
    assert outcome.status_code is None
    assert "not public" in str(outcome.error)


def test_a_name_is_judged_by_all_its_addresses_when_it_is_used() -> None:
    with receiving() as receiver:
        port = receiver.url.rpartition(":")[2]
        assert "not public" in str(send(CLOSED, f"https://localhost:{port}/").error)
        assert receiver.received == []
        only_v4 = WebhookSender(WebhookSettings(allowed_networks=[LOCAL, "::1/128"]))
        assert send(only_v4, f"http://localhost:{port}/").error is None or receiver.received == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.com/", "must be like"),
        ("https:///x", "must be like"),
        ("https://u:p@example.com/", "user name"),
        ("https://example.com:99999/", "no URL"),
        ("https://example.com/\u00e4", "visible ASCII"),
        ("https://example.com/" + "x" * 2000, "visible ASCII"),
        ("https://[::1", "no URL"),
        ("http://example.com/", "http://"),
        ("https://10.0.0.1/", "not public"),
    ],
)
def test_a_bad_url_is_refused_at_once(url: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        CLOSED.check_url(url)
    assert caught.value.param == "url"


def test_redirects_are_not_followed_and_failures_are_outcomes() -> None:
    receiver: Receiver
    with receiving() as receiver:
        receiver.answers = [302, 500]
        assert send(OPEN, receiver.url) == Outcome(302, "The endpoint answered 302.")
        assert send(OPEN, receiver.url) == Outcome(500, "The endpoint answered 500.")
        assert len(receiver.received) == 2
    gone = send(OPEN, receiver.url)
    assert gone.status_code is None
    assert "ConnectError" in str(gone.error)


def test_a_silent_endpoint_takes_no_longer_than_allowed() -> None:
    quick = WebhookSender(WebhookSettings(allowed_networks=[LOCAL], timeout_seconds=0.2))
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, says nothing
        started = time.monotonic()
        outcome = send(quick, f"http://127.0.0.1:{server.getsockname()[1]}/")
    assert outcome.status_code is None
    assert time.monotonic() - started < 10
