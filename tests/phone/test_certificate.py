"""The certificate of the page, and what this computer is called."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from adapters.live.addresses import lan_address, local_addresses, local_names
from adapters.phone.certificate import make_self_signed, page_certificate, write_secret
from engine.config import PhoneConfig
from engine.errors import ConfigError


def names_in(pem: bytes) -> x509.SubjectAlternativeName:
    certificate = x509.load_pem_x509_certificate(pem)
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def written(folder: Path, host: str = "127.0.0.1") -> tuple[Path, Path]:
    certificate, key = make_self_signed(host)
    (folder / "page.pem").write_bytes(certificate)
    write_secret(folder / "page.key", key)
    return folder / "page.pem", folder / "page.key"


def test_it_is_valid_for_every_address_and_name_of_this_computer() -> None:
    names = names_in(make_self_signed("0.0.0.0")[0])
    addresses = names.get_values_for_type(x509.IPAddress)
    assert set(local_addresses()) <= set(addresses)
    assert ipaddress.ip_address("0.0.0.0") not in addresses
    assert set(local_names()) <= set(names.get_values_for_type(x509.DNSName))


@pytest.mark.parametrize("host", ["192.168.77.3", "fd00::7"])
def test_it_is_valid_for_the_address_that_was_given(host: str) -> None:
    addresses = names_in(make_self_signed(host)[0]).get_values_for_type(x509.IPAddress)
    assert ipaddress.ip_address(host) in addresses


def test_it_is_valid_for_the_name_that_was_given() -> None:
    names = names_in(make_self_signed("mapper.example")[0]).get_values_for_type(x509.DNSName)
    assert names[0] == "mapper.example"


def test_it_is_for_servers_and_not_for_long() -> None:
    certificate = x509.load_pem_x509_certificate(make_self_signed("127.0.0.1")[0])
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not basic.ca
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now < certificate.not_valid_after_utc
    assert certificate.not_valid_after_utc - now < datetime.timedelta(days=90)


def test_no_two_runs_share_a_key() -> None:
    assert make_self_signed("127.0.0.1")[1] != make_self_signed("127.0.0.1")[1]


def test_a_secret_is_readable_by_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_secret(tmp_path / "key", b"secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "key", b"another")
    assert (tmp_path / "key").read_bytes() == b"secret"


def test_nothing_of_a_made_certificate_stays_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = page_certificate(PhoneConfig(), host="127.0.0.1")
    assert made.is_self_signed
    assert isinstance(made.context, ssl.SSLContext)
    assert made.context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert len(made.fingerprint.split(":")) == 32
    assert list(tmp_path.iterdir()) == []


def test_the_user_s_certificate_is_used(tmp_path: Path) -> None:
    certificate, key = written(tmp_path, "maps.example")
    config = PhoneConfig(certificate=str(certificate), certificate_key=str(key))
    used = page_certificate(config, host="0.0.0.0")
    assert not used.is_self_signed
    assert used.names[0] == "maps.example"


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    certificate, _ = written(tmp_path)
    with pytest.raises(ConfigError, match="both or none"):
        page_certificate(PhoneConfig(certificate=str(certificate)), host="127.0.0.1")


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    certificate, key = written(tmp_path)
    other = tmp_path / "other.key"
    write_secret(other, make_self_signed("127.0.0.1")[1])
    for wrong_certificate, wrong_key in (
        (certificate, other),
        (key, key),
        (certificate, tmp_path / "missing.key"),
        (tmp_path / "missing.pem", key),
    ):
        config = PhoneConfig(certificate=str(wrong_certificate), certificate_key=str(wrong_key))
        with pytest.raises(ConfigError, match=r"phone\.certificate: .*(key|pem)"):
            page_certificate(config, host="127.0.0.1")


def test_a_key_with_a_password_is_refused_and_nothing_is_asked(tmp_path: Path) -> None:
    certificate, key = written(tmp_path)
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    config = PhoneConfig(certificate=str(certificate), certificate_key=str(locked))
    with pytest.raises(ConfigError, match="locked"):
        page_certificate(config, host="127.0.0.1")


def test_this_computer_has_addresses_and_names() -> None:
    addresses = local_addresses()
    assert ipaddress.ip_address("127.0.0.1") in addresses
    assert len(set(addresses)) == len(addresses)
    assert not any(address.is_unspecified for address in addresses)
    assert "localhost" in local_names()
    assert all(name == name.lower() for name in local_names())


def test_the_address_for_phones_can_be_listened_at() -> None:
    address = lan_address()
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family) as listening:
        listening.bind((str(address), 0))
    others = [one for one in local_addresses() if not one.is_loopback]
    assert address.is_loopback == (not others)
