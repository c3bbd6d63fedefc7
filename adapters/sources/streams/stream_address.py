"""Addresses of live streams and cameras, as FFmpeg needs them."""

from __future__ import annotations

import ipaddress
import math
import re
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from engine.errors import SourceError

if TYPE_CHECKING:
    from engine.config import LiveSourcesConfig

STREAM_SCHEMES = frozenset(
    {"rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "srt", "udp", "camera"}
)

_SECURE_SCHEMES = frozenset({"rtsps", "rtmps", "https"})
_PORTS = {"rtsp": 554, "rtsps": 322, "rtmp": 1935, "rtmps": 443, "http": 80, "https": 443}
# Streams say in their first bytes what they carry; FFmpeg's own 5 s of looking would be 5 s of lag.
SHORT_LOOK = {"probesize": "500000", "analyzeduration": "500000"}  # bytes; us
_CAMERA_SIZE = re.compile(r"[1-9][0-9]{1,4}x[1-9][0-9]{1,4}")
_BLANK = re.compile(r"[\x00-\x20\x7f]")
_SECRET_IN_PATH = re.compile(r"((?:pass|pwd|token|key|secret|auth)\w*=)[^/&;]+", re.IGNORECASE)


class Way(StrEnum):
    """How a stream is come by."""

    FFMPEG = "ffmpeg"  # which opens the address itself
    HTTP = "http"  # asked for here; the answer says what it is
    RTMP_PUSH = "rtmp_push"  # others push it to us
    UDP = "udp"  # datagrams that others send to us
    SRT = "srt"  # by a program, where FFmpeg as it is here does not know it


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamAddress:
    """What is opened."""

    label: str  # for humans: without user, password and query
    url: str = field(repr=False)  # with credentials
    format: str | None = None  # FFmpeg's name; None: it finds out
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    way: Way = Way.FFMPEG
    is_listening: bool = False  # others send to us
    max_wait_s: float = 0.0  # for them, before FFmpeg says that nobody came
    is_secure: bool = False  # TLS

    @property
    def scheme(self) -> str:
        """The scheme of the URL, in lower case."""
        return urlsplit(self.url).scheme

    @property
    def host(self) -> str:
        """Where to connect to, or to listen; "": nowhere, as of a camera."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """Of the host; 0: none."""
        return urlsplit(self.url).port or _PORTS.get(self.scheme, 0)

    def listening_at(self, netloc: str) -> StreamAddress:
        """The same with another host and port to listen at."""
        return replace(self, url=urlsplit(self.url)._replace(netloc=netloc).geturl())


def place_of_push(spec: str) -> tuple[str, int] | None:
    """Host and port at which a source waits for a push by RTMP; None where it is no such source."""
    try:
        parts = urlsplit(spec)
        if parts.scheme == "rtmp" and parts.hostname and _is_push(parts):
            return parts.hostname, parts.port or _PORTS["rtmp"]
    except ValueError:  # it is no address, which is reported when it is opened
        pass
    return None


def _is_push(parts: SplitResult) -> bool:
    query = parse_qsl(parts.query, keep_blank_values=True)
    return dict(query).get("listen", "0") not in {"", "0"}


def parse_stream_address(spec: str, *, config: LiveSourcesConfig) -> StreamAddress:
    """Reads ``rtsp(s)://``, ``rtmp(s)://``, ``http(s)://``, ``srt://``, ``udp://``, ``camera:N``.

    ``rtmp://HOST[:PORT]/PATH?listen=1``, ``srt://HOST:PORT?mode=listener`` and ``udp://HOST:PORT``
    wait for others to send, on the address of HOST; of ``udp``, that may be a multicast group.

    Raises:
        SourceError: it is no such address; the message holds no credentials.
    """
    scheme = spec.partition(":")[0].lower()
    if scheme == "camera":
        return _camera(spec.partition(":")[2], config=config)
    parts = _split(spec)
    label = _label(parts)
    if scheme in {"http", "https"}:
        return StreamAddress(
            label=label,
            url=spec,
            way=Way.HTTP,
            is_secure=scheme == "https",
        )
    if scheme in {"srt", "udp"}:
        return _transport_stream(parts, label=label, config=config)
    if scheme in {"rtmp", "rtmps"}:
        return _rtmp(parts, label=label, config=config)
    transport = {"rtsp_transport": config.rtsp_transport} if scheme == "rtsp" else {}
    return StreamAddress(
        label=label,
        url=spec,
        format="rtsp",
        options={
            **transport,
            **SHORT_LOOK,
            **_secured(scheme, config),
            "allowed_media_types": "video",
        },
        is_secure=scheme == "rtsps",
    )


def _split(spec: str) -> SplitResult:
    """The parts of a URL that FFmpeg and we read alike."""
    scheme = spec.partition(":")[0]
    if _BLANK.search(spec):
        raise SourceError(f"{scheme}: blanks or control characters in the address")
    try:
        parts = urlsplit(spec)
        host = parts.hostname
    except ValueError:
        host = None  # the error may quote a password
    if not host or not spec[len(scheme) :].startswith("://"):
        raise SourceError(
            f"{scheme}: no address of a stream: expected {scheme}://[USER:PASSWORD@]HOST[:PORT]/PATH"
            ", what is special in a password written as %40 for @, %2F for /, %3F for ?"
        )
    if not _has_port_or_none(parts):
        raise SourceError(
            f"{scheme}: behind the host stands no port, which is a number up to 65535"
        )
    if "@" in spec.partition("://")[2][len(parts.netloc) :]:
        # Half a password may stand before that sign, and the wrong host.
        raise SourceError(
            f"{scheme}: an @ behind the host: write it as %40, and in a password / as %2F and ? as "
            "%3F"
        )
    return parts


def _has_port_or_none(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False


def _label(parts: SplitResult) -> str:
    place = parts.netloc.rpartition("@")[2]
    path = _SECRET_IN_PATH.sub(r"\1***", parts.path)  # some cameras want the password there
    return f"{parts.scheme}://{place}{path}"


def _rtmp(parts: SplitResult, *, label: str, config: LiveSourcesConfig) -> StreamAddress:
    query = parse_qsl(parts.query, keep_blank_values=True)
    is_listening = _is_push(parts)
    is_secure = parts.scheme == "rtmps"
    options = {**SHORT_LOOK, **_secured(parts.scheme, config)}
    if not is_listening:
        options["rtmp_live"] = "live"
        return StreamAddress(
            label=label, url=parts.geturl(), format="flv", options=options, is_secure=is_secure
        )
    if is_secure:
        raise SourceError(f"{label}: listening for a push works by rtmp:// only")
    # FFmpeg's own time-out, which counts whole seconds, covers the waiting alone, so that whoever
    # comes at the last moment has time for the handshake.
    max_wait_s = math.ceil(config.open_timeout_s)
    netloc = parts.netloc if parts.port is not None else f"{parts.netloc}:{_PORTS['rtmp']}"
    others = urlencode([(name, value) for name, value in query if name != "listen"])
    return StreamAddress(
        label=f"{label}?listen=1",
        url=parts._replace(netloc=netloc, query=others).geturl(),
        format="flv",
        options={**options, "listen": "1", "timeout": str(max_wait_s)},
        way=Way.RTMP_PUSH,
        is_listening=True,
        max_wait_s=max_wait_s,
    )


def _transport_stream(
    parts: SplitResult, *, label: str, config: LiveSourcesConfig
) -> StreamAddress:
    """MPEG-TS by SRT, or in UDP datagrams."""
    if parts.port is None:
        raise SourceError(f"{label}: which port? {parts.scheme}://HOST:PORT")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    options = dict(SHORT_LOOK)
    if parts.scheme == "srt":
        is_listening = query.get("mode") == "listener"
        label += "?mode=listener" if is_listening else ""
    else:
        is_listening = True
        options |= {"overrun_nonfatal": "1"}  # what comes too fast is lost, not the stream
        # FFmpeg would listen in all networks otherwise.
        if not is_multicast(parts.hostname or "") and "localaddr" not in query:
            options["localaddr"] = parts.hostname or ""
    return StreamAddress(
        label=label,
        url=parts.geturl(),
        format="mpegts",
        options=options,
        way=Way(parts.scheme),
        is_listening=is_listening,
        max_wait_s=math.ceil(config.open_timeout_s) if is_listening else 0.0,
    )


def is_multicast(host: str) -> bool:
    """Whether a host is a group that receives together."""
    try:
        return ipaddress.ip_address(host).is_multicast
    except ValueError:
        return False


def _secured(scheme: str, config: LiveSourcesConfig) -> dict[str, str]:
    """How TLS is done; FFmpeg checks nothing of its own accord and knows no certificates."""
    if scheme not in _SECURE_SCHEMES:
        return {}
    if not config.verify_certificates:
        return {"tls_verify": "0"}
    signers = config.ca_file or ssl.get_default_verify_paths().cafile
    return {"tls_verify": "1", **({"ca_file": signers} if signers else {})}


def _camera(name: str, *, config: LiveSourcesConfig) -> StreamAddress:
    """A camera of this computer, by number; where the system knows names, also by name."""
    if not name.isprintable() or not name.strip():
        raise SourceError("camera: which one? camera:0 is the first")
    if config.camera_size and not _CAMERA_SIZE.fullmatch(config.camera_size):
        raise SourceError(
            f"live_sources.camera_size={config.camera_size!r}: expected WIDTHxHEIGHT such as"
            " 1280x720"
        )
    device_format, url = _device(name)
    options = {}
    if config.camera_size:
        options["video_size"] = config.camera_size
    if config.camera_rate_hz:
        options["framerate"] = f"{config.camera_rate_hz:g}"
    return StreamAddress(label=f"camera:{name}", url=url, format=device_format, options=options)


def _device(name: str) -> tuple[str, str]:
    """FFmpeg's device format and its address of a camera."""
    if sys.platform == "darwin":
        return "avfoundation", f"{name}:none"  # no microphone
    if sys.platform == "win32":
        if name.isdecimal():
            raise SourceError(f"camera:{name}: Windows knows cameras by name: camera:NAME")
        return "dshow", f"video={name}"
    if not name.isdecimal():
        raise SourceError(f"camera:{name}: expected a number: camera:0 is /dev/video0")
    return "v4l2", f"/dev/video{name}"
