"""``phone://HOST:PORT``: a page that a phone opens and that sends what its camera sees."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import time
from importlib.util import find_spec
from urllib.parse import urlsplit

from adapters.install_advice import missing_package
from adapters.live.addresses import lan_address
from adapters.live.deadline import GiveUpDeadline
from adapters.live.listening import refuse_taken_address
from adapters.phone.certificate import PageCertificate, page_certificate
from adapters.phone.feedback_view import FeedbackChannel, FeedbackView
from adapters.phone.phone_session import PhoneContext
from adapters.phone.server import TOKEN_KEY, PhoneServer
from adapters.phone.sessions import Sessions
from adapters.phone.static_files import read_static_files
from engine.config import Config
from engine.errors import SourceError
from engine.ports import ArrivalSink, FrameIds, View
from engine.types import Arrival, Received, SourceInfo, SourceNotice, SourceState

DEFAULT_PORT = 8443
_EVERYWHERE = "0.0.0.0"  # noqa: S104 - phones are other computers


def open_phone_source(spec: str, *, config: Config, next_frame_id: FrameIds) -> PhoneSource:
    """Prepares the page that ``phone://HOST:PORT`` stands for; nothing listens yet.

    Args:
        spec: an address or a name of this computer and a port, 8443 where there is none; all its
            addresses where there is no host, or 0.0.0.0.
        config: the resolved configuration.
        next_frame_id: the run's counter of frame ids; called on the thread that decodes.

    Raises:
        AdapterUnavailableError: a package is missing.
        ConfigError: the configured certificate cannot be used.
        SourceError: the spec is none, or nothing can listen there.
    """
    host, port = parse_phone_spec(spec)
    for package in ("aiohttp", "cryptography", "segno"):
        if find_spec(package) is None:
            raise missing_package("phone://", package=package, extra="phone")
    refuse_taken_address(host, port, label=f"phone://{host}:{port}")
    import aiohttp.web  # noqa: F401 - loading it on the event loop would hold that up

    certificate = page_certificate(config.phone, host=host)
    return PhoneSource(
        (host, port), config=config, certificate=certificate, next_frame_id=next_frame_id
    )


def parse_phone_spec(spec: str) -> tuple[str, int]:
    """Host and port of ``phone://HOST:PORT``.

    Raises:
        SourceError: it says something else.
    """
    wanted = "expected phone://HOST:PORT, such as phone://0.0.0.0:8443"
    try:
        parts = urlsplit(spec)
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError as error:
        raise SourceError(f"phone: {error}; {wanted}") from error
    if parts.scheme.lower() != "phone" or not parts.path.strip("/") == "" or port == 0:
        raise SourceError(f"phone: {wanted}")
    if parts.username is not None or parts.query or parts.fragment:
        # Not repeated: it may hold a password.
        raise SourceError(f"phone: takes no user and no options; {wanted}")
    return parts.hostname or _EVERYWHERE, port


def qr_code_text(url: str) -> str:
    """A QR code of half blocks that phones read from dark and bright terminals alike."""
    import segno

    drawn = io.StringIO()
    segno.make(url, error="l", micro=False).terminal(drawn, compact=True, border=2)
    return drawn.getvalue().rstrip("\n")


class PhoneSource:
    """Phones as cameras: each phone, and each size of its pictures, is one.

    The server runs while ``receive`` does.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        config: Config,
        certificate: PageCertificate,
        next_frame_id: FrameIds,
    ) -> None:
        """Prepares the server.

        Args:
            address: host and port to listen at.
            config: the resolved configuration.
            certificate: shown to phones.
            next_frame_id: the run's counter of frame ids.
        """
        self._address = address
        label = f"phone://{_in_url(address[0])}:{address[1]}"
        self.info = SourceInfo(label=label, is_live=True, is_sequence=True, num_frames=None)
        self._config = config
        self._certificate = certificate
        self._next_frame_id = next_frame_id
        self._feedback = FeedbackChannel(source=label)
        self._sessions = Sessions(max_sessions=config.phone.max_phones, clock=time.monotonic)
        self._files = read_static_files(config.phone)
        self._server: PhoneServer | None = None

    @property
    def url(self) -> str:
        """What a phone has to open; holds the secret that lets it in."""
        return f"https://{_in_url(self._reachable_host())}:{self._address[1]}/?{self._query}"

    @property
    def _query(self) -> str:
        return f"{TOKEN_KEY}={self._sessions.secret}"

    def invitation(self) -> str:
        """Lines for the terminal: what to open on a phone, as a QR code too."""
        lines = ["Scan this with the phone's camera, or open the address below.", ""]
        lines += [qr_code_text(self.url), "", f"  {self.url}", ""]
        if self._certificate.is_self_signed:
            lines += [
                "The browser warns once, since nobody but this computer signed the certificate.",
                f"SHA-256 {self._certificate.fingerprint}",
                "",
            ]
        return "\n".join(lines)

    def feedback_view(self) -> View:
        """A view that shows phones how the run goes."""
        return FeedbackView(self._feedback)

    async def receive(self, sink: ArrivalSink) -> None:
        """Serves the page and receives what phones send, until no picture came for too long.

        Raises:
            SourceError: the address cannot be listened at.
        """
        give_up_after_s = self._config.live_sources.give_up_after_s
        deadline = GiveUpDeadline(give_up_after_s)

        def put(item: Received) -> None:
            if isinstance(item, Arrival):
                deadline.restart()
            sink(item)

        self._server = server = self._make_server(put)
        try:
            await self._start(server)
            sink(self._notice(SourceState.CONNECTED, "the page is open; no phone yet"))
            if not await deadline.outlasts(_without_end()):
                sink(self._notice(SourceState.ENDED, f"no picture for {give_up_after_s:g} s"))
        finally:
            await server.stop()

    def _make_server(self, sink: ArrivalSink) -> PhoneServer:
        return PhoneServer(
            address=self._address,
            certificate=self._certificate,
            sessions=self._sessions,
            files=self._files,
            context=PhoneContext(
                label=self.info.label,
                config=self._config,
                next_frame_id=self._next_frame_id,
                sink=sink,
                feedback=self._feedback,
            ),
        )

    async def _start(self, server: PhoneServer) -> None:
        try:
            await server.start()
        except OSError as error:
            detail = error.strerror or str(error)
            raise SourceError(f"{self.info.label}: cannot listen there: {detail}") from error

    def _notice(self, state: SourceState, detail: str) -> SourceNotice:
        return SourceNotice(source=self.info.label, state=state, detail=detail)

    def _reachable_host(self) -> str:
        """What phones call this computer."""
        host = self._address[0]
        try:
            is_everywhere = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            return host
        if not is_everywhere:
            return host
        names = [name for name in self._certificate.names if "*" not in name]
        if names and not self._certificate.is_self_signed:
            return names[0]  # a signed certificate is valid for its names only
        return str(lan_address())


async def _without_end() -> None:
    await asyncio.Event().wait()


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
