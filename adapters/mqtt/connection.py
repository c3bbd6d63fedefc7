"""MQTT connections: a broker's address, credentials and TLS, and reconnecting when it breaks."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from adapters.install_advice import missing_package
from adapters.live.backoff import Backoff
from engine.config import Config, LiveSourcesConfig, MqttConfig
from engine.errors import ConfigError, EngineError
from engine.types import SourceState

if TYPE_CHECKING:
    import aiomqtt
    from paho.mqtt.properties import Properties

PASSWORD_VARIABLE = "LIVESFM_MQTT_PASSWORD"  # of the environment

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_MAX_TOPIC_BYTES = 65_535  # MQTT 5, section 1.5.4
_KEEPALIVE_S = 10  # a link that died without a word is noticed after one to two of these

# Reason codes (MQTT 5, table 3.2.2) after which trying again is useless; paho gives those of 3.1.1
# the same numbers.
_HOPELESS_CODES = {
    134: "bad user name or password",
    135: "not authorized",
    138: "banned",
    140: "bad authentication method",
}
_FIRST_REFUSAL_CODE = 128  # MQTT 5, section 2.4
_UNSUPPORTED_VERSION_CODE = 132
_BROKEN_CODES = {7, 128}  # what paho says when a connection ends without a word

logger = logging.getLogger(__name__)

Use = Callable[["aiomqtt.Client"], Awaitable[None]]
ReportState = Callable[[SourceState, str], None]


class MqttRefusal(EngineError):
    """A broker refuses a request for good; trying again is useless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttAddress:
    """A broker, a topic on it, and a user."""

    is_secure: bool  # TLS
    host: str
    port: int
    topic: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> MqttAddress:
        """Reads ``mqtt(s)://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC``; what is special is %-encoded.

        Raises:
            ValueError: it is none; the message holds no credentials.
        """
        scheme, _, rest = text.partition("://")
        if scheme.lower() not in _DEFAULT_PORTS:
            raise ValueError("expected mqtt://HOST/TOPIC or mqtts://HOST/TOPIC")
        authority, _, topic = rest.partition("/")
        try:
            parts = urlsplit(f"//{authority}")
            host, port = parts.hostname or "", parts.port
            host.encode("idna")
        except ValueError:
            raise ValueError("the host or the port is none") from None  # it may quote a password
        if not host or port == 0 or "?" in authority or "#" in authority:
            raise ValueError("no host, or no port")
        if parts.password is not None and not parts.username:
            raise ValueError("a password without a user")
        return cls(
            is_secure=scheme.lower() == "mqtts",
            host=host,
            port=_DEFAULT_PORTS[scheme.lower()] if port is None else port,
            topic=checked_topic(unquote(topic)),
            user=unquote(parts.username) if parts.username else None,
            password=None if parts.password is None else unquote(parts.password),
        )

    @property
    def broker(self) -> str:
        """The broker without credentials, for humans."""
        scheme = "mqtts" if self.is_secure else "mqtt"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[scheme] else f":{self.port}"
        return f"{scheme}://{host}{port}"

    @property
    def label(self) -> str:
        """The whole address without credentials, for humans."""
        return f"{self.broker}/{self.topic}"

    @property
    def secret(self) -> str | None:
        """The password: the address's own, or for a user the one in the environment."""
        if self.password is not None or self.user is None:
            return self.password
        return os.environ.get(PASSWORD_VARIABLE)


def checked_topic(topic: str) -> str:
    """A topic or a filter of topics (MQTT 5, section 4.7), as it is.

    Raises:
        ValueError: it is none.
    """
    if not topic:
        raise ValueError("no topic")
    if len(topic.encode()) > _MAX_TOPIC_BYTES or re.search(r"[\x00-\x1f\x7f-\x9f]", topic):
        raise ValueError("the topic is too long or holds control characters")
    levels = topic.split("/")
    is_wild = [level for level in levels if "+" in level or "#" in level]
    if any(len(level) > 1 for level in is_wild) or "#" in levels[:-1]:
        raise ValueError("in a topic, + stands for a whole level and # for all that follow, last")
    return topic


def tls_context(config: MqttConfig) -> ssl.SSLContext:
    """The TLS context: trusted certificates, and the client's own.

    Raises:
        ConfigError: a file cannot be read, or is none of its kind.
    """
    key = "mqtt.ca_file"
    if config.client_key and not config.client_certificate:
        raise ConfigError("mqtt.client_key: needs mqtt.client_certificate")
    try:
        context = ssl.create_default_context(cafile=config.ca_file or None)
        if config.client_certificate:
            key = "mqtt.client_certificate"
            context.load_cert_chain(config.client_certificate, config.client_key or None)
    except (OSError, ValueError) as error:
        why = "it holds none" if isinstance(error, ssl.SSLError) else error
        raise ConfigError(f"{key}: cannot be used: {why}") from error
    return context


class MqttLink:
    """Makes connections to one broker. For one event loop.

    MQTT 5, or 3.1.1 where the broker does not support it.
    """

    def __init__(self, address: MqttAddress, *, config: Config, receiver: bool = False) -> None:
        """Prepares connections.

        Args:
            address: where, and as whom.
            config: how connections are secured and tried again.
            receiver: the broker keeps back messages that are far beyond
                ``live_sources.max_payload_mb`` (MQTT 5).

        Raises:
            AdapterUnavailableError: a package is missing.
            ConfigError: a file of certificates cannot be used.
        """
        try:
            import aiomqtt  # noqa: F401 - whether it is there
        except ImportError as error:
            raise missing_package("MQTT", package="aiomqtt", extra="mqtt") from error
        self.address = address
        self.live: LiveSourcesConfig = config.live_sources
        self._tls = tls_context(config.mqtt) if address.is_secure else None
        self._max_packet_bytes = 2 * 10**6 * self.live.max_payload_mb if receiver else None
        self._speaks_version5 = True

    def client(
        self,
        *,
        will: aiomqtt.Will | None = None,
        queue_type: type[asyncio.Queue[aiomqtt.Message]] | None = None,
        max_queued_incoming: int | None = None,
    ) -> AbstractAsyncContextManager[aiomqtt.Client]:
        """A connection to be entered once."""
        import aiomqtt

        version = aiomqtt.ProtocolVersion
        return aiomqtt.Client(
            self.address.host,
            self.address.port,
            username=self.address.user,
            password=self.address.secret,
            identifier=f"livesfm-{secrets.token_hex(6)}",
            protocol=version.V5 if self._speaks_version5 else version.V311,
            properties=self._connect_properties(),
            tls_context=self._tls,
            will=will,
            queue_type=queue_type,
            max_queued_incoming_messages=max_queued_incoming,
            timeout=self.live.open_timeout_s,
            keepalive=_KEEPALIVE_S,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            logger=_silent_logger(),  # what matters of it comes as an error, too
        )

    def _connect_properties(self) -> Properties | None:
        if not self._speaks_version5 or self._max_packet_bytes is None:
            return None
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = min(self._max_packet_bytes, 2**28 - 1)
        return properties

    def downgrade(self, error: aiomqtt.MqttError) -> bool:
        """Whether a failed connection calls for the older protocol, which is used from now on."""
        if self._speaks_version5 and _code_of(error) == _UNSUPPORTED_VERSION_CODE:
            self._speaks_version5 = False
            return True
        return False


def is_refusal(code: object) -> bool:
    """Whether a reason code refuses a subscription."""
    value = getattr(code, "value", code)
    return isinstance(value, int) and value >= _FIRST_REFUSAL_CODE


def _silent_logger() -> logging.Logger:
    silent = logger.getChild("client")
    silent.setLevel(logging.CRITICAL + 1)
    return silent


async def keep_connected(
    link: MqttLink,
    use: Use,
    *,
    report: ReportState,
    client: Callable[[], AbstractAsyncContextManager[aiomqtt.Client]],
) -> None:
    """Connects and uses the connection until ``use`` returns or trying again is useless.

    What breaks is tried again after ``live_sources.retry_first_s``, doubled each time up to
    ``retry_max_s``, shortened at random so that many clients of one broker do not come at once.

    Args:
        link: of the connection.
        use: does its work on a connection, and reports CONNECTED when it is ready;
            ``MqttRefusal`` ends it all.
        report: gets LOST once each time that the broker goes away, and REFUSED as the last state.
        client: makes a connection of the link.
    """
    import aiomqtt

    backoff = Backoff(first_s=link.live.retry_first_s, max_s=link.live.retry_max_s)
    outage = _Outage(link, report)
    is_done = False
    while not is_done:
        connected_at_s = math.inf
        try:
            async with client() as connection:
                connected_at_s = time.monotonic()
                outage.is_lost = False
                await use(connection)
                is_done = True
        except MqttRefusal as refusal:
            report(SourceState.REFUSED, str(refusal))
            return
        except aiomqtt.MqttError as error:
            if is_done or link.downgrade(error):
                continue
            if hopeless := _hopeless(error):
                report(SourceState.REFUSED, hopeless)
                return
            outage.lost(error)
            if time.monotonic() - connected_at_s > link.live.retry_max_s:
                backoff.reset()  # else it broke at once, and may do so again
            await asyncio.sleep(backoff.next_wait_s())


class _Outage:
    """Reports a broker that went away once, and logs further tries only."""

    def __init__(self, link: MqttLink, report: ReportState) -> None:
        self._link = link
        self._report = report
        self.is_lost = False

    def lost(self, error: aiomqtt.MqttError) -> None:
        detail = _in_words(error, self._link)
        if not self.is_lost:
            self._report(SourceState.LOST, f"{detail}; trying again")
        else:
            logger.debug("%s: %s", self._link.address.broker, detail)
        self.is_lost = True


def _code_of(error: BaseException) -> int | None:
    """The reason code of a connection that the broker refused, as MQTT 5 counts."""
    import aiomqtt

    if not isinstance(error, aiomqtt.exceptions.MqttCodeError):
        return None
    code = getattr(error.rc, "value", error.rc)
    return code if isinstance(code, int) else None


def _hopeless(error: aiomqtt.MqttError) -> str | None:
    """Why trying again is useless; None when it is not."""
    import aiomqtt

    code = _code_of(error)
    if isinstance(error, aiomqtt.exceptions.MqttConnectError) and code in _HOPELESS_CODES:
        return f"the broker refuses: {_HOPELESS_CODES[code]}"
    cause = _cause_of(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not trusted: {cause.verify_message}; see mqtt.ca_file"
    return None


def _in_words(error: aiomqtt.MqttError, link: MqttLink) -> str:
    cause = _cause_of(error)
    if _is_unanswered(error):
        hint = "; does it want a client certificate?" if link.address.is_secure else ""
        return f"the broker gives no answer{hint}"
    if isinstance(cause, ssl.SSLError):
        return f"the broker speaks no TLS: {cause.reason or cause}"
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    if cause is not None and _code_of(cause) in _BROKEN_CODES:
        return "the connection broke"
    return str(cause or error)


def _is_unanswered(error: aiomqtt.MqttError) -> bool:
    return str(error) == "Operation timed out"  # aiomqtt's word for what took too long


def _cause_of(error: BaseException) -> BaseException | None:
    """The error that aiomqtt wrapped; it hides the chain, which is still there."""
    return error.__cause__ or error.__context__
