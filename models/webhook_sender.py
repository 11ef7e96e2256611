"""Sends signed events to the outside, and only there.

The signature is that of Standard Webhooks, which ``client.webhooks.unwrap`` of the `openai` SDK
verifies: ``v1,`` and the base64 of HMAC-SHA256 over ``{id}.{timestamp}.{body}``.

A target is a URL that a tenant chose, so a request could be aimed at what only this machine can
reach. The name is resolved once, every address must be public (or in a network that the operator
allows), the connection goes to the address that was checked, and redirects are not followed.
"""

import asyncio
import base64
import hashlib
import hmac
import socket
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, urlsplit

import httpx

from models.errors import InvalidRequestError
from models.registry.webhooks import Outcome
from models.settings import WebhookSettings

MAX_URL = 2000
# Forms that carry an IPv4 address inside: a gateway would take the request to that one.
_CARRIERS = tuple(ip_network(each) for each in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16"))

Address = IPv4Address | IPv6Address


class ForbiddenTargetError(Exception):
    """The target is not one that events may be sent to."""


def sign(secrets: Sequence[str], event_id: str, timestamp: int, body: str) -> str:
    """Return the header ``webhook-signature``: one signature for each secret (``whsec_…``)."""
    signed = f"{event_id}.{timestamp}.{body}".encode()
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    digests = [hmac.new(key, signed, hashlib.sha256).digest() for key in keys]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


class WebhookSender:
    """Sends one event at a time to a URL.

    Args:
        settings: Which networks besides the public ones are targets, and how long one may take.
    """

    def __init__(self, settings: WebhookSettings) -> None:
        self._allowed = [ip_network(each) for each in settings.allowed_networks]
        self._seconds = settings.timeout_seconds

    def check_url(self, url: str) -> None:
        """Check what can be known of a URL without asking for its address.

        Raises:
            InvalidRequestError: it is no URL to send to (param ``url``).
        """
        try:
            parts = _parse(url)
            if (literal := _literal(parts.hostname or "")) is not None:
                self._check(parts, [literal])
            elif parts.scheme == "http" and not self._allowed:
                raise ForbiddenTargetError(
                    "http:// is for networks that the operator allows; use https://."
                )
        except ForbiddenTargetError as error:
            raise InvalidRequestError(f"url: {error}", param="url") from None

    async def send(self, url: str, event_id: str, body: str, secrets: Sequence[str]) -> Outcome:
        """Send one event; whatever goes wrong is an outcome and no error.

        Args:
            url: Where it goes.
            event_id: The same for every try, so that the receiver can drop what comes twice.
            body: JSON text.
            secrets: What signs it.
        """
        try:
            async with asyncio.timeout(self._seconds):
                return await self._send(url, event_id, body, secrets)
        except TimeoutError:
            return Outcome(error=f"No answer within {self._seconds:g} s.")
        except ForbiddenTargetError as error:
            return Outcome(error=str(error))
        except (httpx.HTTPError, OSError, UnicodeError) as error:
            return Outcome(error=f"{type(error).__name__}: {error}".rstrip(": "))

    async def _send(self, url: str, event_id: str, body: str, secrets: Sequence[str]) -> Outcome:
        parts = _parse(url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = await _resolve(host, port)
        self._check(parts, addresses)
        now = int(time.time())
        headers = {
            "host": parts.netloc,
            "content-type": "application/json",
            "user-agent": "Tunery-Webhooks/1",
            "webhook-id": event_id,
            "webhook-timestamp": str(now),
            "webhook-signature": sign(secrets, event_id, now, body),
        }
        address = addresses[0]
        shown = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
        pinned = parts._replace(netloc=f"{shown}:{port}").geturl()
        async with (
            httpx.AsyncClient(timeout=self._seconds, trust_env=False) as client,
            client.stream(
                "POST",
                pinned,
                content=body.encode(),
                headers=headers,
                extensions={"sni_hostname": host},
            ) as response,
        ):
            status = response.status_code  # the body is not read: it may be of any size
        error = None if response.is_success else f"The endpoint answered {status}."
        return Outcome(status, error)

    def _check(self, parts: SplitResult, addresses: Sequence[Address]) -> None:
        for address in addresses:
            is_allowed = any(address in network for network in self._allowed)
            if not is_allowed and not _is_public(address):
                raise ForbiddenTargetError(
                    f"{parts.hostname} is {address}, which is not public. Its network can be "
                    "allowed with TUNERY_WEBHOOKS__ALLOWED_NETWORKS."
                )
            if parts.scheme == "http" and not is_allowed:
                raise ForbiddenTargetError(
                    "http:// is for networks that the operator allows; use https://."
                )


def _parse(url: str) -> SplitResult:
    """Split a URL, or raise `ForbiddenTargetError` for what is none to send to."""
    try:
        parts = urlsplit(url)
        has_port = parts.port != 0
    except ValueError as error:
        raise ForbiddenTargetError(f"it is no URL ({error}).") from None
    if parts.scheme not in ("https", "http") or not parts.hostname or not has_port:
        raise ForbiddenTargetError("it must be like https://example.com/hooks.")
    if parts.username is not None or parts.password is not None:
        raise ForbiddenTargetError("it must hold no user name or password.")
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise ForbiddenTargetError(f"it must be at most {MAX_URL} visible ASCII characters.")
    return parts


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


async def _resolve(host: str, port: int) -> list[Address]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ip_address(str(each[4][0]).partition("%")[0]) for each in found]


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if any(address in network for network in _CARRIERS):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)
