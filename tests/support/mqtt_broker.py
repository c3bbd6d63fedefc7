"""A mosquitto of one's own on loopback, with certificates, and programs that publish on it."""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt
import cv2
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from engine.config import Config, load_config
from tests.support.waiting import HANG_S, block_until

USER, PASSWORD = "pilot", "s3cret/word"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass(kw_only=True)
class Broker:
    """A broker that can be killed and started again on its port."""

    folder: Path
    port: int = field(default_factory=free_port)
    options: Sequence[str] = ("allow_anonymous true",)
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        config = self.folder / "mosquitto.conf"
        lines = [f"listener {self.port} 127.0.0.1", "persistence false", "user root"]
        config.write_text("\n".join([*lines, *self.options]) + "\n")
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        assert program is not None
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen([program, "-c", str(config)], stdout=log, stderr=log)
        self._wait_until_it_listens()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self.kill()

    def _wait_until_it_listens(self) -> None:
        block_until(self._answers, what=f"the broker of {self.folder / 'mosquitto.log'}")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "mosquitto.log").read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except OSError:
            return False
        return True


@contextmanager
def running_broker(folder: Path, *options: str, port: int | None = None) -> Iterator[Broker]:
    """A broker for the duration of a test, which is skipped where mosquitto is missing."""
    if shutil.which("mosquitto") is None and shutil.which("mosquitto", path="/usr/sbin") is None:
        pytest.skip("the broker mosquitto is not installed")
    chosen = options or ("allow_anonymous true",)
    broker = Broker(folder=folder, options=chosen, port=port or free_port())
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


def password_options(folder: Path) -> list[str]:
    """Options of a broker that knows one user."""
    file = folder / "passwords"
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    subprocess.run(
        ["mosquitto_passwd", "-b", "-c", str(file), USER, PASSWORD], check=True, timeout=HANG_S
    )
    return ["allow_anonymous false", f"password_file {file}"]


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """A private authority and what it has signed, as files."""

    authority: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path

    def options(self, *, asks_client: bool = False) -> list[str]:
        """Options of a broker that shows its certificate."""
        lines = [
            f"cafile {self.authority}",
            f"certfile {self.server}",
            f"keyfile {self.server_key}",
        ]
        return [*lines, "require_certificate true"] if asks_client else lines

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.authority))


def make_certificates(folder: Path) -> Certificates:
    """Certificates for 127.0.0.1 that are good for a day."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority = _signed("authority", key=key, issuer="authority", issuer_key=key, is_authority=True)
    made: dict[str, Path] = {"authority": _written(folder / "authority.pem", authority)}
    for name in ("server", "client"):
        own_key = ec.generate_private_key(ec.SECP256R1())
        certificate = _signed(name, key=own_key, issuer="authority", issuer_key=key)
        made[name] = _written(folder / f"{name}.pem", certificate)
        made[f"{name}_key"] = folder / f"{name}.key"
        made[f"{name}_key"].write_bytes(
            own_key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
    return Certificates(**made)


def _signed(
    name: str,
    *,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    is_authority: bool = False,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    common_name = x509.oid.NameOID.COMMON_NAME
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(common_name, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(common_name, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([loopback]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def _written(path: Path, certificate: x509.Certificate) -> Path:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


def mqtt_config(*settings: str) -> Config:
    """A configuration that is quick to try again."""
    quick = ("live_sources.retry_first_s=0.05", "live_sources.retry_max_s=0.2")
    return load_config(settings=[*quick, *settings])


def jpeg(width: int = 96, height: int = 80, *, shade: int = 100) -> bytes:
    return _encoded(".jpg", width, height, shade)


def png(width: int = 96, height: int = 80, *, shade: int = 100) -> bytes:
    return _encoded(".png", width, height, shade)


def _encoded(suffix: str, width: int, height: int, shade: int) -> bytes:
    _, buffer = cv2.imencode(suffix, np.full((height, width, 3), shade, np.uint8))
    return bytes(buffer.tobytes())


def user_properties(**values: str) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.UserProperty = list(values.items())
    return properties


def client_of(broker: Broker, **options: Any) -> aiomqtt.Client:
    """A client of the test's own, speaking MQTT 5."""
    return aiomqtt.Client(
        "127.0.0.1", broker.port, protocol=aiomqtt.ProtocolVersion.V5, timeout=HANG_S, **options
    )


async def publish(broker: Broker, *messages: tuple[str, bytes], **options: Any) -> None:
    """Publishes messages one after the other; the broker has them when this returns."""
    async with client_of(broker) as client:
        for topic, payload in messages:
            await client.publish(topic, payload, qos=1, **options)
