"""SRT by the program ``ffmpeg``, where FFmpeg as PyAV brings it does not know the protocol.

The address, which may hold a passphrase, goes to the program's standard input, in a script of
FFmpeg's concat demuxer: the command line can be read by everybody on this computer.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from adapters.bound_process import bound_to_this_process
from adapters.sources.streams.patience import Patience, StreamError
from adapters.sources.streams.stream_address import StreamAddress, Way
from engine.errors import SourceError

if TYPE_CHECKING:
    from engine.config import LiveSourcesConfig

_PROGRAM = "ffmpeg"
_PROBE_S = 10.0
_NEEDED = (
    f"neither FFmpeg as PyAV brings it nor a program {_PROGRAM} on PATH knows SRT; Debian's and"
    " Homebrew's package ffmpeg does (apt install ffmpeg, brew install ffmpeg)"
)


def choose_srt(address: StreamAddress) -> StreamAddress:
    """The address as it can be opened here: by FFmpeg itself, or else by a program.

    Raises:
        SourceError: neither knows SRT.
    """
    if _ffmpeg_knows_srt():
        return replace(address, way=Way.FFMPEG)
    if not _program_knows_srt():
        raise SourceError(f"{address.label}: {_NEEDED}")
    return address


def srt_in_words() -> tuple[bool, str]:
    """Whether SRT can be received here, and by what, or what it needs."""
    if _ffmpeg_knows_srt():
        return True, "by FFmpeg as PyAV has it"
    if _program_knows_srt():
        return True, f"by the program {shutil.which(_PROGRAM)}"
    return False, _NEEDED


def _ffmpeg_knows_srt() -> bool:
    import av

    try:
        av.open("srt:", timeout=1e-3).close()
    except av.error.ProtocolNotFoundError:
        return False
    except (av.error.FFmpegError, OSError):  # it is no whole address
        pass
    return True


def _program_knows_srt() -> bool:
    path = shutil.which(_PROGRAM)
    if path is None:
        return False
    try:
        listed = subprocess.run(
            [path, "-hide_banner", "-protocols"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return b"srt" in listed.stdout.partition(b"Output:")[0].split()


class SrtProgram:
    """The program, and its output (MPEG-TS) as a file that PyAV reads. Ends with the context."""

    def __init__(
        self, address: StreamAddress, *, config: LiveSourcesConfig, stop: threading.Event
    ) -> None:
        """Prepares it.

        Args:
            address: where it connects to or listens.
            config: time-outs.
            stop: nobody wants more.
        """
        self.name = "srt"
        self._address = address
        self._config = config
        self._stop = stop
        self._patience = Patience(stop, silence_s=config.read_timeout_s)
        self._has_begun = self._has_failed = False

    def __enter__(self) -> SrtProgram:
        quoted = self._address.url.replace("'", "'\\''")
        script = f"ffconcat version 1.0\nfile '{quoted}'\n".encode()
        self._process = subprocess.Popen(
            [*bound_to_this_process([shutil.which(_PROGRAM) or _PROGRAM]), "-hide_banner"]
            + ["-loglevel", "quiet"]
            + ["-protocol_whitelist", "pipe,fd,srt,udp", "-f", "concat", "-safe", "0"]
            + ["-i", "pipe:0", "-map", "0:v:0", "-codec", "copy", "-flush_packets", "1"]
            + ["-f", "mpegts", "pipe:1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._output = self._process.stdout
        try:
            with self._process.stdin as stdin:
                stdin.write(script)
        except BaseException:
            self.__exit__()
            raise
        if self._address.is_listening:
            self._patience.silence_s = math.inf  # whoever may come is waited for without end
        else:
            too_late = f"no connection: {self._nothing()}"
            self._patience.limit(self._config.open_timeout_s, too_late=too_late)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()

    def seekable(self) -> bool:
        """It is not."""
        return False

    def read(self, num_bytes: int) -> bytes:
        """What has come, at most so many bytes.

        Raises:
            StreamError: nothing more comes; once, because PyAV prints all but the first.
        """
        if self._has_failed:
            return b""
        try:
            return self._read(num_bytes)
        except StreamError:
            self._has_failed = True
            raise

    def _read(self, num_bytes: int) -> bytes:
        self._patience.wait_for(self._output.fileno())
        data = os.read(self._output.fileno(), num_bytes)
        if not self._has_begun:
            if not data:
                raise StreamError(f"no connection: {self._nothing()}")
            self._has_begun = True
            self._patience.silence_s = self._config.read_timeout_s
            timeout_s = self._config.open_timeout_s
            self._patience.limit(
                timeout_s, too_late=f"connected, but no video within {timeout_s:g} s"
            )
        return data

    def stream_begins(self) -> None:
        """A stream has been found: from here on only silence is limited."""
        self._patience.unlimit()

    def _nothing(self) -> str:
        if self._address.is_listening:
            return "whoever connected sent no video, or has another passphrase"
        return "no SRT server answers there, or passphrase or streamid are not its own"
