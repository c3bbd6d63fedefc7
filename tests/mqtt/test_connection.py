"""Connections to MQTT brokers: addresses, TLS, which errors end it and which are tried again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import aiomqtt
import pytest

from adapters.install_advice import how_to_install
from adapters.mqtt.connection import (
    PASSWORD_VARIABLE,
    MqttAddress,
    MqttLink,
    MqttRefusal,
    keep_connected,
    tls_context,
)
from engine.config import Config, MqttConfig
from engine.errors import AdapterUnavailableError, ConfigError
from engine.types import SourceState
from tests.support.mqtt_broker import (
    PASSWORD,
    USER,
    Certificates,
    free_port,
    make_certificates,
    mqtt_config,
    password_options,
    running_broker,
)
from tests.support.waiting import HANG_S, until

# paho leaves the socket of a handshake that failed to the garbage collector.
LEFT_OPEN = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

News = list[tuple[SourceState, str]]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


async def return_at_once(client: aiomqtt.Client) -> None:
    del client


class OftenEnoughError(Exception):
    """No connection is made any more."""


class Tries:
    """Makes a link's connections, so many at most, and counts them."""

    def __init__(self, link: MqttLink, *, max_tries: int = 1_000) -> None:
        self.num = 0
        self._link = link
        self._max_tries = max_tries

    def __call__(self) -> AbstractAsyncContextManager[aiomqtt.Client]:
        if self.num == self._max_tries:
            raise OftenEnoughError
        self.num += 1
        return self._link.client()


def connect(
    address: str,
    *,
    config: Config | None = None,
    use: Callable[[aiomqtt.Client], Awaitable[None]] = return_at_once,
    max_tries: int = 1_000,
) -> News:
    """The news of a connection until it is not tried any more, by itself or for having to stop."""
    news: News = []
    link = MqttLink(MqttAddress.parse(address), config=config or mqtt_config())

    def report(state: SourceState, detail: str) -> None:
        news.append((state, detail))

    async def try_it() -> None:
        try:
            async with asyncio.timeout(HANG_S):
                client = Tries(link, max_tries=max_tries)
                await keep_connected(link, use, report=report, client=client)
        except OftenEnoughError:
            news.append((SourceState.ENDED, "tried often enough"))

    asyncio.run(try_it())
    return news


# -- addresses ------------------------------------------------------------------------------------


def test_an_address_has_a_broker_a_topic_and_who_asks() -> None:
    address = MqttAddress.parse("mqtts://pi%40lot:a%2Fb%3A@broker.local:9999/sfm/+/frame")
    assert address == MqttAddress(
        is_secure=True,
        host="broker.local",
        port=9999,
        topic="sfm/+/frame",
        user="pi@lot",
        password="a/b:",
    )
    assert address.label == "mqtts://broker.local:9999/sfm/+/frame"
    assert "a/b" not in repr(address)


@pytest.mark.parametrize(
    ("text", "host", "port", "label"),
    [
        ("mqtt://h/t", "h", 1883, "mqtt://h/t"),
        ("MQTTS://h/t", "h", 8883, "mqtts://h/t"),
        ("mqtt://h:8883/t", "h", 8883, "mqtt://h:8883/t"),
        ("mqtt://[::1]:5/t", "::1", 5, "mqtt://[::1]:5/t"),
        ("mqtt://h/site/#", "h", 1883, "mqtt://h/site/#"),
        ("mqtt://h/what?/a%20b", "h", 1883, "mqtt://h/what?/a b"),
    ],
)
def test_ports_hosts_and_topics_are_as_written(text: str, host: str, port: int, label: str) -> None:
    address = MqttAddress.parse(text)
    assert (address.host, address.port, address.label) == (host, port, label)


@pytest.mark.parametrize(
    "text",
    [
        "http://h/t",
        "mqtt:h/t",
        "mqtt:///t",
        "mqtt://h",
        "mqtt://h/",
        "mqtt://h:0/t",
        "mqtt://h:99999/t",
        "mqtt://h:hunter2/t",
        "mqtt://[::1/t",
        "mqtt://a..b/t",
        "mqtt://:hunter2@h/t",
        "mqtt://u:hunter2@/t",
        "mqtt://h/a/#/b",
        "mqtt://h/a+/b",
        "mqtt://h/a%00b",
        "mqtt://u:hunter2@h/" + "x" * 70_000,
    ],
)
def test_what_is_no_address_is_refused_without_showing_the_password(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        MqttAddress.parse(text)
    assert "hunter2" not in str(refusal.value)


def test_a_users_password_comes_from_the_environment_where_the_address_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "from outside")
    assert MqttAddress.parse("mqtt://u@h/t").secret == "from outside"
    assert MqttAddress.parse("mqtt://u:own@h/t").secret == "own"
    assert MqttAddress.parse("mqtt://h/t").secret is None  # nobody's password
    monkeypatch.delenv(PASSWORD_VARIABLE)
    assert MqttAddress.parse("mqtt://u@h/t").secret is None


# -- TLS ------------------------------------------------------------------------------------------


def test_files_of_certificates_that_cannot_be_used_are_refused_by_their_key(
    tmp_path: Path, certificates: Certificates
) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for settings, key in (
        ({"ca_file": str(tmp_path / "missing.pem")}, "mqtt.ca_file"),
        ({"ca_file": str(tmp_path / "empty.pem")}, "mqtt.ca_file"),
        ({"client_certificate": str(tmp_path / "missing.pem")}, "mqtt.client_certificate"),
        ({"client_certificate": str(certificates.client)}, "mqtt.client_certificate"),
        ({"client_key": str(certificates.client_key)}, "mqtt.client_key"),
    ):
        with pytest.raises(ConfigError, match=key):
            tls_context(MqttConfig.model_validate(settings))


@pytest.mark.network
def test_tls_with_a_password_connects(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    config = mqtt_config(f"mqtt.ca_file={certificates.authority}")
    options = [*certificates.options(), *password_options(tmp_path)]
    with running_broker(tmp_path, *options) as broker:
        assert connect(f"mqtts://{USER}@127.0.0.1:{broker.port}/t", config=config) == []


@pytest.mark.network
@LEFT_OPEN
def test_a_certificate_that_nobody_vouches_for_ends_it_with_one_line(
    tmp_path: Path, certificates: Certificates
) -> None:
    with running_broker(tmp_path, *certificates.options(), "allow_anonymous true") as broker:
        [(state, detail)] = connect(f"mqtts://127.0.0.1:{broker.port}/t")
    assert state is SourceState.REFUSED
    assert "not trusted" in detail
    assert "mqtt.ca_file" in detail


@pytest.mark.network
def test_a_broker_that_asks_for_a_client_certificate_gets_it(
    tmp_path: Path, certificates: Certificates
) -> None:
    trusting = [f"mqtt.ca_file={certificates.authority}"]
    showing = [
        f"mqtt.client_certificate={certificates.client}",
        f"mqtt.client_key={certificates.client_key}",
    ]
    options = [*certificates.options(asks_client=True), "allow_anonymous true"]
    with running_broker(tmp_path, *options) as broker:
        address = f"mqtts://127.0.0.1:{broker.port}/t"
        assert connect(address, config=mqtt_config(*trusting, *showing)) == []
        hurried = mqtt_config(*trusting, "live_sources.open_timeout_s=0.5")
        news = connect(address, config=hurried, max_tries=2)
    assert [state for state, _ in news] == [SourceState.LOST, SourceState.ENDED]
    assert "client certificate" in news[0][1]


@pytest.mark.network
@LEFT_OPEN
def test_a_broker_without_tls_is_reported_once_and_tried_again(
    tmp_path: Path, certificates: Certificates
) -> None:
    config = mqtt_config(f"mqtt.ca_file={certificates.authority}")
    with running_broker(tmp_path) as broker:
        news = connect(f"mqtts://127.0.0.1:{broker.port}/t", config=config, max_tries=3)
    assert [state for state, _ in news] == [SourceState.LOST, SourceState.ENDED]


# -- trying again, or not -------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize("who", [f"{USER}:wrong@", "stranger:x@", ""])
def test_wrong_credentials_end_it_with_one_line_that_does_not_hold_them(
    tmp_path: Path, who: str
) -> None:
    with running_broker(tmp_path, *password_options(tmp_path)) as broker:
        [(state, detail)] = connect(f"mqtt://{who}127.0.0.1:{broker.port}/t")
    assert state is SourceState.REFUSED
    assert detail == "the broker refuses: not authorized"


@pytest.mark.network
def test_an_absent_broker_is_reported_once_and_found_when_it_starts(tmp_path: Path) -> None:
    port = free_port()
    news: News = []
    link = MqttLink(MqttAddress.parse(f"mqtt://127.0.0.1:{port}/t"), config=mqtt_config())
    tries = Tries(link)

    async def start_late() -> None:
        trying = asyncio.create_task(
            keep_connected(
                link,
                return_at_once,
                report=lambda state, detail: news.append((state, detail)),
                client=tries,
            )
        )
        await until(lambda: tries.num >= 4)
        with running_broker(tmp_path, port=port):
            async with asyncio.timeout(HANG_S):
                await trying

    asyncio.run(start_late())
    assert news == [(SourceState.LOST, "Connection refused; trying again")]


@pytest.mark.network
def test_what_a_broker_does_not_allow_ends_it(tmp_path: Path) -> None:
    async def refuse(client: aiomqtt.Client) -> None:
        del client
        raise MqttRefusal("not this topic")

    with running_broker(tmp_path) as broker:
        [(state, detail)] = connect(f"mqtt://127.0.0.1:{broker.port}/t", use=refuse)
    assert (state, detail) == (
        SourceState.REFUSED,
        "not this topic",
    )


@pytest.mark.network
def test_a_connection_that_breaks_is_made_again(tmp_path: Path) -> None:
    with running_broker(tmp_path) as broker:
        num_uses = 0

        async def use(client: aiomqtt.Client) -> None:
            nonlocal num_uses
            num_uses += 1
            if num_uses == 1:
                broker.kill()
                broker.start()
                async for _ in client.messages:
                    pass

        news = connect(f"mqtt://127.0.0.1:{broker.port}/t", use=use)
    assert num_uses == 2
    assert news == [(SourceState.LOST, "the connection broke; trying again")]


@asynccontextmanager
async def old_broker(answers: dict[int, bytes]) -> AsyncIterator[tuple[int, list[int]]]:
    """Answers connections by their protocol level only; gives its port and the levels seen."""
    levels: list[int] = []
    writers: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readexactly(2)  # short enough for one byte of length
        body = await reader.readexactly(head[1])
        levels.append(body[6])
        writers.append(writer)
        writer.write(answers.get(body[6], b""))

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], levels
        for writer in writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


ACCEPTED_311 = b"\x20\x02\x00\x00"


@pytest.mark.network
@pytest.mark.parametrize("refusal", [b"\x20\x02\x00\x01", b"\x20\x03\x00\x84\x00"])
def test_a_broker_that_knows_no_mqtt_5_gets_3_1_1(refusal: bytes) -> None:
    async def connect_to_old() -> tuple[News, list[int]]:
        news: News = []
        async with old_broker({5: refusal, 4: ACCEPTED_311}) as (port, levels):
            link = MqttLink(MqttAddress.parse(f"mqtt://127.0.0.1:{port}/t"), config=mqtt_config())
            async with asyncio.timeout(HANG_S):
                for _ in range(2):
                    await keep_connected(
                        link,
                        return_at_once,
                        report=lambda state, detail: news.append((state, detail)),
                        client=link.client,
                    )
            return news, levels

    assert asyncio.run(connect_to_old()) == ([], [5, 4, 4])


@pytest.mark.network
def test_a_broker_that_accepts_connections_and_says_nothing_is_reported_and_tried_again() -> None:
    async def connect_to_mute() -> News:
        news: News = []
        config = mqtt_config("live_sources.open_timeout_s=0.3")
        async with old_broker({}) as (port, _):
            link = MqttLink(MqttAddress.parse(f"mqtt://127.0.0.1:{port}/t"), config=config)
            with pytest.raises(OftenEnoughError):
                async with asyncio.timeout(HANG_S):
                    await keep_connected(
                        link,
                        return_at_once,
                        report=lambda state, detail: news.append((state, detail)),
                        client=Tries(link, max_tries=2),
                    )
        return news

    [(state, detail)] = asyncio.run(connect_to_mute())
    assert state is SourceState.LOST
    assert "no answer" in detail


def test_waits_grow_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(delay: float) -> None:
        waits.append(delay)
        if len(waits) == 8:
            raise asyncio.CancelledError
        await real_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    link = MqttLink(
        MqttAddress.parse(f"mqtt://127.0.0.1:{free_port()}/t"),
        config=mqtt_config("live_sources.retry_first_s=0.5", "live_sources.retry_max_s=4.0"),
    )
    connecting = keep_connected(link, return_at_once, report=lambda *_: None, client=link.client)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(connecting)
    longest = [0.5, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    assert all(0.5 * most <= wait <= most for wait, most in zip(waits, longest, strict=True))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiomqtt", None)
    with pytest.raises(AdapterUnavailableError, match=re.escape(how_to_install("mqtt"))):
        MqttLink(MqttAddress.parse("mqtt://h/t"), config=mqtt_config())


@pytest.mark.network
def test_what_the_library_says_of_broken_connections_stays_out_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), running_broker(tmp_path) as broker:
        port = broker.port
        broker.kill()
        connect(f"mqtt://127.0.0.1:{port}/t", max_tries=2)
    assert not caplog.records
