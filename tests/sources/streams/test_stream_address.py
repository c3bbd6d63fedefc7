"""Addresses of streams: what FFmpeg is told, and what people are."""

from __future__ import annotations

import ssl
import sys
from typing import Any

import pytest

from adapters.sources.streams.stream_address import StreamAddress, Way, parse_stream_address
from engine.config import LiveSourcesConfig
from engine.errors import SourceError


def parse(spec: str, **config: Any) -> StreamAddress:
    return parse_stream_address(spec, config=LiveSourcesConfig(**config))


def test_rtsp_goes_by_tcp_without_sound_unless_told_otherwise() -> None:
    address = parse("rtsp://10.0.0.7:8554/live/1?channel=2")
    assert address.url == "rtsp://10.0.0.7:8554/live/1?channel=2"
    assert (address.format, address.label) == ("rtsp", "rtsp://10.0.0.7:8554/live/1")
    assert address.options["rtsp_transport"] == "tcp"
    assert address.options["allowed_media_types"] == "video"
    assert not (address.is_listening or address.is_secure)
    assert address.way is Way.FFMPEG
    assert parse("rtsp://cam/1", rtsp_transport="udp").options["rtsp_transport"] == "udp"


def test_rtmp_is_pulled_unless_it_is_to_listen() -> None:
    address = parse("rtmp://host/live/drone?token=abc")
    assert address.url == "rtmp://host/live/drone?token=abc"
    assert (address.format, address.is_listening) == ("flv", False)
    assert "listen" not in address.options
    assert address.options["rtmp_live"] == "live"


@pytest.mark.parametrize(
    ("spec", "url"),
    [
        ("rtmp://0.0.0.0:1936/live/x?listen=1", "rtmp://0.0.0.0:1936/live/x"),
        ("rtmp://127.0.0.1/live/x?listen=1", "rtmp://127.0.0.1:1935/live/x"),
        ("RTMP://[::1]/live?a=b&listen=1", "rtmp://[::1]:1935/live?a=b"),
    ],
)
def test_a_listener_binds_the_host_and_port_of_its_url(spec: str, url: str) -> None:
    address = parse(spec, open_timeout_s=7.5)
    assert address.url == url
    assert address.is_listening
    assert (address.options["listen"], address.options["timeout"]) == ("1", "8")
    assert address.label.endswith("?listen=1")


def test_listen_0_pulls() -> None:
    assert not parse("rtmp://host/live/x?listen=0").is_listening


def test_what_an_http_address_gives_is_not_told_from_its_name() -> None:
    address = parse("http://cam.local/axis-cgi/mjpg/video.cgi?resolution=640x480")
    assert (address.way, address.format) == (Way.HTTP, None)
    assert parse("https://host/clip.mp4").way is parse("http://host/x.m3u8").way is Way.HTTP
    assert address.label == "http://cam.local/axis-cgi/mjpg/video.cgi"
    assert address.url.endswith("?resolution=640x480")


def test_srt_connects_unless_it_is_to_listen() -> None:
    address = parse("srt://host:9000?streamid=a&passphrase=secret")
    assert (address.label, address.format) == ("srt://host:9000", "mpegts")
    assert (address.way, address.is_listening) == (Way.SRT, False)
    address = parse("srt://0.0.0.0:9000?mode=listener&passphrase=secret")
    assert (address.label, address.is_listening) == ("srt://0.0.0.0:9000?mode=listener", True)


def test_udp_listens_in_the_network_of_its_address_alone() -> None:
    address = parse("udp://127.0.0.1:5000")
    assert (address.way, address.is_listening) == (Way.UDP, True)
    assert (address.format, address.options["localaddr"]) == ("mpegts", "127.0.0.1")
    assert "localaddr" not in parse("udp://239.1.2.3:5000").options  # a group, in any of them
    assert "localaddr" not in parse("udp://239.1.2.3:5000?localaddr=10.0.0.7").options


@pytest.mark.parametrize("spec", ["srt://host/x", "udp://0.0.0.0"])
def test_srt_and_udp_have_no_port_of_their_own(spec: str) -> None:
    with pytest.raises(SourceError, match="which port"):
        parse(spec)


@pytest.mark.parametrize("scheme", ["rtsps", "rtmps"])
def test_servers_have_to_prove_who_they_are_unless_they_need_not(scheme: str) -> None:
    address = parse(f"{scheme}://host/x")
    assert address.is_secure
    assert address.options["tls_verify"] == "1"
    assert address.options.get("ca_file") == ssl.get_default_verify_paths().cafile
    assert parse(f"{scheme}://host/x", ca_file="own.pem").options["ca_file"] == "own.pem"
    trusting = parse(f"{scheme}://host/x", verify_certificates=False).options
    assert (trusting["tls_verify"], "ca_file" in trusting) == ("0", False)


@pytest.mark.parametrize("scheme", ["rtsp", "rtmp"])
def test_without_tls_nothing_is_said_of_certificates(scheme: str) -> None:
    assert "tls_verify" not in parse(f"{scheme}://host/x").options


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("rtsp://user:secret@host/x", "rtsp://host/x"),
        ("rtsp://user:se%40cret%2F@host:554/x", "rtsp://host:554/x"),
        ("rtsp://user:se@secret@host/x", "rtsp://host/x"),
        ("rtsp://secret@host/x", "rtsp://host/x"),
        ("http://host/x?user=a&password=secret", "http://host/x"),
        ("http://host/x#secret", "http://host/x"),
        ("rtmp://host/live/key?auth=secret&listen=1", "rtmp://host/live/key?listen=1"),
        ("rtsp://host/user=a_password=secret_channel=1.sdp", "rtsp://host/user=a_password=***"),
        ("http://host/token=secret/video", "http://host/token=***/video"),
        ("rtsp://user:secret@[fe80::1]:554/x", "rtsp://[fe80::1]:554/x"),
    ],
)
def test_a_label_holds_no_credentials_and_the_url_holds_all(spec: str, label: str) -> None:
    address = parse(spec)
    assert address.label == label
    assert "secret" not in repr(address)
    assert "se" in address.url


@pytest.mark.parametrize(
    "spec",
    [
        "rtsp://user:sec/ret@host/x",  # the host would be "user"
        "rtsp://user:12/secret@host/x",  # and its port 12
        "rtsp://user:1?secret@host/x",
        "rtsp://user:1#secret@host/x",
        "rtsp://user:secret@",
        "rtsp://user:secret@:554/x",
        "rtsp://user:secret@host:0/x",
        "rtsp://user:secret@host:99999/x",
        "rtsp://user:secret@host:port/x",
        "rtsp://user:secret@[::1/x",
        "rtsp:/user:secret@host/x",
        "rtsp:user:secret@host/x",
        "rtsp://",
        "http:///x?secret",
        "rtsp://user:secret @host/x",
        "rtsp://user:secret@host/x\r\nX-Evil: 1",
        "rtsp://user:secret@host/\x00x",
        "rtmps://user:secret@host/live?listen=1",
        "udp://@:5000?secret",
    ],
)
def test_what_is_no_address_is_refused_without_repeating_a_password(spec: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse(spec)
    assert "secret" not in str(caught.value)
    assert str(caught.value).startswith(spec.partition(":")[0])
    assert caught.value.__cause__ is None


def test_a_camera_is_named_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    address = parse("camera:2")
    assert (address.label, address.url, address.format) == ("camera:2", "/dev/video2", "v4l2")
    assert not address.options
    monkeypatch.setattr(sys, "platform", "darwin")
    assert (parse("camera:0").format, parse("camera:0").url) == ("avfoundation", "0:none")
    monkeypatch.setattr(sys, "platform", "win32")
    address = parse("camera:HD Webcam")
    assert (address.format, address.url) == ("dshow", "video=HD Webcam")
    with pytest.raises(SourceError, match="by name"):
        parse("camera:0")


def test_a_camera_is_asked_for_size_and_rate() -> None:
    options = parse("camera:0", camera_size="1280x720", camera_rate_hz=29.97).options
    assert options == {"video_size": "1280x720", "framerate": "29.97"}


@pytest.mark.parametrize("name", ["", " ", "one", "-1", "../sda", "0/../../sda", "0\n"])
def test_no_other_device_passes_for_a_camera(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(SourceError, match="camera:"):
        parse(f"camera:{name}")


@pytest.mark.parametrize("size", ["1280", "1280x", "x720", "12 80x720", "1280x720,format=x"])
def test_a_camera_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(SourceError, match="WIDTHxHEIGHT"):
        parse("camera:0", camera_size=size)
