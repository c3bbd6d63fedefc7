"""Requests to HTTP servers: redirects, passwords, parts of files, and who is not asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapters.sources.streams.http_client import HttpAnswer, HttpClient
from adapters.sources.streams.patience import Patience, StreamError
from engine.config import LiveSourcesConfig
from tests.support.http_servers import (
    Answer,
    HttpServer,
    Request,
    basic_protected,
    body,
    digest_protected,
    file_in_ranges,
    head,
    moved,
    status,
)
from tests.support.stream_servers import raw_server, self_signed
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.network

DATA = bytes(range(256)) * 100


def client_of(url: str, *, stop: threading.Event | None = None, **config: Any) -> HttpClient:
    patience = Patience(stop or threading.Event(), silence_s=HANG_S)
    return HttpClient(url, config=LiveSourcesConfig(**config), patience=patience)


def all_of(answer: HttpAnswer) -> bytes:
    with closing(answer):
        return b"".join(iter(answer.read, b""))


def chunked(data: bytes) -> Answer:
    def answer(request: Request) -> None:
        head(request, Transfer_Encoding="chunked")
        for place in range(0, len(data), 1000):
            part = data[place : place + 1000]
            request.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        request.wfile.write(b"0\r\n\r\n")

    return answer


@pytest.mark.parametrize("answer", [body(DATA), body(DATA, with_length=False), chunked(DATA)])
def test_a_body_is_whole_and_its_first_bytes_are_read_twice(answer: Answer) -> None:
    with (
        HttpServer({"/x": answer}) as server,
        closing(client_of(server.url("/x")).open()) as opened,
    ):
        begin = opened.begin()
        assert DATA.startswith(begin)
        assert len(begin) >= 16
        assert b"".join(iter(opened.read, b"")) == DATA


def test_a_body_that_breaks_off_is_no_end() -> None:
    def answer(request: Request) -> None:
        head(request, Content_Length=len(DATA))
        request.wfile.write(DATA[:500])

    with (
        HttpServer({"/x": answer}) as server,
        pytest.raises(StreamError, match="the other side ended it"),
    ):
        all_of(client_of(server.url("/x")).open())


def test_a_part_of_a_file_is_asked_for() -> None:
    with HttpServer({"/x": file_in_ranges(DATA), "/whole": body(DATA)}) as server:
        client = client_of(server.url("/x"))
        answer = client.open(begin=300, end=400)
        assert (answer.begins_at, answer.num_bytes) == (300, len(DATA))
        assert all_of(answer) == DATA[300:400]
        whole = client.open(server.url("/whole"), begin=300)
        assert (whole.begins_at, whole.num_bytes) == (0, len(DATA))
        assert all_of(whole) == DATA


@pytest.mark.parametrize("place", ["0-5/{0}", "{0}-5/6", "0-{0}/6", "0-5", "\u00b2-3/4", "-"])
def test_a_place_that_is_none_says_nothing_of_the_file(place: str) -> None:
    place = f"bytes {place.format('9' * 5000)}"
    with HttpServer({"/x": status(206, Content_Range=place)}) as server:
        answer = client_of(server.url("/x")).open()
        assert (answer.begins_at, answer.num_bytes) == (0, 0)
        answer.close()


@pytest.mark.parametrize("protected", [basic_protected, digest_protected])
def test_a_password_opens_what_it_protects_and_is_asked_for_once(
    protected: Callable[[str, str, Answer], Answer],
) -> None:
    with HttpServer({"/x": protected("me", "p@ss:word", body(DATA))}) as server:
        client = client_of(server.url("/x", user="me:p%40ss%3Aword"))
        assert all_of(client.open()) == all_of(client.open()) == DATA
        assert len(server.requests) == 3
        for wrong in ("me:other", ""):
            with pytest.raises(StreamError, match="wrong or no password") as caught:
                client_of(server.url("/x", user=wrong)).open()
            assert caught.value.loss.is_refused


@pytest.mark.parametrize("protected", [basic_protected, digest_protected])
def test_a_password_opens_every_path_of_the_server_of_its_address(
    protected: Callable[[str, str, Answer], Answer],
) -> None:
    answers = {"/a/x": moved("/y"), "/y": body(DATA)}
    with HttpServer({path: protected("me", "x", answers[path]) for path in answers}) as server:
        assert all_of(client_of(server.url("/a/x", user="me:x")).open()) == DATA


def test_a_password_goes_to_the_server_of_its_address_alone() -> None:
    with (
        HttpServer({"/y": basic_protected("me", "secret", body(DATA))}) as other,
        HttpServer({"/x": basic_protected("me", "secret", moved(other.url("/y")))}) as server,
    ):
        words = f"leads to {other.url('')}, which wants a password; only the server"
        with pytest.raises(StreamError, match=words) as caught:
            client_of(server.url("/x", user="me:secret")).open()
        assert caught.value.loss.is_refused
        assert "secret" not in str(caught.value)
        assert len(other.requests) == 1
        assert "Authorization" not in other.requests[0][1]


@pytest.mark.parametrize(
    "form",
    [
        {"algorithm": "SHA-256"},
        {"before": ['Digest realm="a", nonce="x", qop="auth", algorithm=SHA-512-256']},
        {"before": ['Digest realm="a", nonce="x", qop="auth-int"']},
        {"before": ["Digest realm", "Digest realm=, nonce=x", 'Digest realm="a"', "Basic realm=a"]},
        {"qop": "auth-int, auth"},
    ],
    ids=["SHA-256", "an algorithm", "protection", "no words of it", "ways"],
)
def test_of_the_ways_a_password_is_wanted_one_that_is_known_is_taken(form: dict[str, Any]) -> None:
    with HttpServer({"/x": digest_protected("me", "gru\u00dfwort", body(DATA), **form)}) as server:
        assert all_of(client_of(server.url("/x", user="me:gru%C3%9Fwort")).open()) == DATA


@pytest.mark.parametrize(
    "challenge",
    ["Bearer realm=x", "Digest realm", "Digest realm=,nonce=x", 'Digest realm="a"', "Digest"]
    + [f'Digest realm="a", nonce="x", {more}' for more in ('qop="auth-int"', "algorithm=MD5-sess")],
)
def test_a_password_that_is_wanted_in_an_unknown_way_is_refused(challenge: str) -> None:
    words = f"a way that is not known: '{challenge.partition(' ')[0]}'"
    with (
        HttpServer({"/x": status(401, WWW_Authenticate=challenge)}) as server,
        pytest.raises(StreamError, match=words) as caught,
    ):
        client_of(server.url("/x", user="me:secret")).open()
    assert caught.value.loss.is_refused


def test_a_redirect_without_end_and_one_with_a_body_without_end_take_no_memory() -> None:
    num_sent = 0

    def answer(request: Request) -> None:
        nonlocal num_sent
        head(request, 302, Location="/x")
        while num_sent < 500_000_000:
            num_sent += request.wfile.write(bytes(1 << 16))

    with HttpServer({"/x": answer}) as server:
        with pytest.raises(StreamError, match="redirects do not end"):
            client_of(server.url("/x")).open()
        assert len(server.requests) == 10
    assert num_sent < 100_000_000  # in the buffers of sockets


def test_https_does_not_lead_to_http(tmp_path: Path) -> None:
    certificate, context = self_signed(tmp_path)
    with HttpServer({"/y": body(DATA)}) as plain, HttpServer({}, context=context) as server:
        server.answers["/x"] = moved(plain.url("/y"))
        with pytest.raises(StreamError, match="from https to http"):
            client_of(server.url("/x"), ca_file=str(certificate)).open()
        assert not plain.requests


def test_a_certificate_is_checked_and_named_where_it_is_not_trusted(tmp_path: Path) -> None:
    certificate, context = self_signed(tmp_path)
    with HttpServer({"/x": body(DATA)}, context=context) as server:
        with pytest.raises(StreamError, match="certificate is not trusted"):
            client_of(server.url("/x")).open()
        assert all_of(client_of(server.url("/x"), ca_file=str(certificate)).open()) == DATA
        assert all_of(client_of(server.url("/x"), verify_certificates=False).open()) == DATA
        with pytest.raises(StreamError, match="no_such.pem: holds no certificates"):
            client_of(server.url("/x"), ca_file=str(tmp_path / "no_such.pem"))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"HTTP/1.1 abc\r\n\r\n", "its answer is no HTTP (BadStatusLine)"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 101 + b"\r\n", "no HTTP (HTTPException)"),
        (b"HTTP/1.1 200 OK\r\nX: " + bytes(70_000) + b"\r\n\r\n", "no HTTP (LineTooLong)"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\n\r\n", "no HTTP (ValueError)"),
        (b"HTTP/1.1 999 Odd\r\n\r\n", "the server says: 999"),
    ],
)
def test_an_answer_that_is_none_is_named(reply: bytes, words: str) -> None:
    with raw_server(reply, says_bye=True) as port, pytest.raises(StreamError) as caught:
        client_of(f"http://127.0.0.1:{port}/").open()
    assert words in str(caught.value)


def test_an_answer_without_a_status_line_is_taken_as_it_is() -> None:
    """arduino-esp32 sends some."""
    reply = b"Content-Type: multipart/x-mixed-replace; boundary=a\r\n\r\n--a\r\n"
    with raw_server(reply, says_bye=True) as port:
        answer = client_of(f"http://127.0.0.1:{port}/").open()
        assert answer.begin() == reply
        answer.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://no-such-host.invalid/", "no connection: the host's name is unknown"),
        (f"http://{'a' * 70}.example/", "no connection: there is no host of such a name"),
        ("http://127.0.0.1:1/", "no connection: Connection refused"),
    ],
)
def test_no_connection_is_told_from_an_answer(url: str, words: str) -> None:
    with pytest.raises(StreamError) as caught:
        client_of(url).open()
    assert words in str(caught.value)


def test_tls_with_a_server_that_has_none_is_named() -> None:
    with (
        raw_server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port,
        pytest.raises(StreamError, match="speaks no TLS"),
    ):
        client_of(f"https://127.0.0.1:{port}/").open()


def test_what_is_no_longer_wanted_ends_a_request_that_hangs() -> None:
    stop = threading.Event()
    with raw_server(on_connection=stop.set) as port, pytest.raises(StreamError, match="stopped"):
        client_of(f"http://127.0.0.1:{port}/", stop=stop).open()


FLOODS = {
    "answers to come": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "fields behind the end": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n",
        b"A: b\r\n",
    ),
}


@pytest.mark.parametrize("kind", FLOODS)
@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "out of time"])
def test_a_server_that_never_stops_sending_is_left_in_time(kind: str, is_stopped: bool) -> None:
    stop = threading.Event()
    patience = Patience(stop, silence_s=HANG_S)
    begin, again = FLOODS[kind]
    num_sent = 0

    def answer(request: Request) -> None:
        nonlocal num_sent
        request.wfile.write(begin)
        while num_sent < 200_000_000:
            num_sent += request.wfile.write(again * 4000)
            if num_sent < 1_000_000:
                continue
            if is_stopped:
                stop.set()
            else:
                patience.limit(0.0, too_late="out of time")

    with HttpServer({"/x": answer}) as server:
        client = HttpClient(server.url("/x"), config=LiveSourcesConfig(), patience=patience)
        with pytest.raises(StreamError, match="stopped" if is_stopped else "out of time"):
            all_of(client.open())
    assert num_sent < 100_000_000  # in the buffers of sockets
