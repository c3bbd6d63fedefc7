"""The certificate of the page: the user's own, or one made for this run alone."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.live.addresses import local_addresses, local_names
from engine.config import PhoneConfig
from engine.errors import ConfigError
from engine.regular_files import read_regular_file, regular_file_size

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

# Clocks of phones differ; browsers refuse certificates of servers that are valid for very long.
_VALID_BEFORE = datetime.timedelta(days=1)
_VALID_FOR = datetime.timedelta(days=30)
_OWNER_ONLY = 0o600
_MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageCertificate:
    """What the server shows to phones."""

    context: ssl.SSLContext
    fingerprint: str  # SHA-256, as browsers show it: AB:CD:...
    names: tuple[str, ...]  # DNS names it is valid for
    is_self_signed: bool


def page_certificate(config: PhoneConfig, *, host: str) -> PageCertificate:
    """The configured certificate, or one that is made now and whose key is nowhere on disk after.

    Args:
        config: where the user's certificate is.
        host: the name or address that the server was given, which the certificate is valid for.

    Raises:
        ConfigError: the files cannot be read or do not fit each other.
    """
    if bool(config.certificate) != bool(config.certificate_key):
        raise ConfigError("phone.certificate and phone.certificate_key are given both or none")
    if config.certificate:
        return _from_files(Path(config.certificate), Path(config.certificate_key))
    certificate_pem, key_pem = make_self_signed(host)
    # Contexts read files only. The folder is the user's alone, and so is the key in it.
    with tempfile.TemporaryDirectory(prefix="livesfm-") as folder:
        certificate_path, key_path = Path(folder, "certificate.pem"), Path(folder, "key.pem")
        certificate_path.write_bytes(certificate_pem)
        write_secret(key_path, key_pem)
        return _load(certificate_path, key_path, certificate_pem, is_self_signed=True)


def make_self_signed(host: str) -> tuple[bytes, bytes]:
    """A certificate for ``host`` and all names and addresses of this computer, and its key (PEM).

    ECDSA on P-256, which every browser takes; browsers look at subjectAltName only (RFC 9525).
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "LiveSfM")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _VALID_BEFORE)
        .not_valid_after(now + _VALID_FOR)
    )
    certificate = _for_servers(builder, key, _alternative_names(host)).sign(key, hashes.SHA256())
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem


def write_secret(path: Path, data: bytes) -> None:
    """Writes a new file that nobody but its owner can read at any time.

    Raises:
        FileExistsError: there is such a file.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _for_servers(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
) -> x509.CertificateBuilder:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    return (
        builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=False,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _alternative_names(host: str) -> list[x509.GeneralName]:
    from cryptography import x509

    names: list[x509.GeneralName] = []
    for text in dict.fromkeys([host, *local_names()]):
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            if _is_dns_name(text):
                names.append(x509.DNSName(text))
            continue
        if not address.is_unspecified:
            names.append(x509.IPAddress(address))
    names += [x509.IPAddress(address) for address in local_addresses()]
    return list(dict.fromkeys(names))


def _is_dns_name(text: str) -> bool:
    """Whether a certificate can carry the name: ASCII, without a port or spaces."""
    return 0 < len(text) <= 253 and all(c.isascii() and (c.isalnum() or c in "-._") for c in text)


def _from_files(certificate_path: Path, key_path: Path) -> PageCertificate:
    try:
        certificate_pem = read_regular_file(certificate_path, max_bytes=_MAX_FILE_BYTES)
        regular_file_size(key_path)
        return _load(certificate_path, key_path, certificate_pem, is_self_signed=False)
    except ssl.SSLError as error:
        detail = error.reason or str(error)
        raise ConfigError(
            f"phone.certificate: {certificate_path} and {key_path} cannot be used: {detail}"
        ) from error
    except OSError as error:
        name = error.filename or f"{certificate_path} or {key_path}"
        raise ConfigError(f"phone.certificate: {name}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"phone.certificate: {certificate_path}: no certificate") from error


def _load(
    certificate_path: Path, key_path: Path, certificate_pem: bytes, *, is_self_signed: bool
) -> PageCertificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Without a password an encrypted key would be asked for on the terminal.
    context.load_cert_chain(certificate_path, key_path, password=b"")
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return PageCertificate(
        context=context,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(":").upper(),
        names=_dns_names(certificate),
        is_self_signed=is_self_signed,
    )


def _dns_names(certificate: x509.Certificate) -> tuple[str, ...]:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    return tuple(names.value.get_values_for_type(x509.DNSName))
