"""Keys and certificates: an authority and a server certificate for testing, and a key pair for each site."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

DAYS = 365


@dataclass(frozen=True)
class Authority:
    """A certificate authority for testing: whoever trusts `certificate` trusts what `key` signs."""

    certificate: bytes
    key: ec.EllipticCurvePrivateKey
    name: x509.Name


def authority() -> Authority:
    """A new authority, valid for a year."""
    key, name = ec.generate_private_key(ec.SECP384R1()), _name("fedtri test authority")
    builder = _builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return Authority(builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM), key, name)


def server(signed_by: Authority, hosts: Sequence[str]) -> tuple[bytes, bytes]:
    """(certificate, private key) in PEM for a server that is reached under these names and addresses."""
    key = ec.generate_private_key(ec.SECP384R1())
    builder = (
        _builder(_name(hosts[0]), signed_by.name, key)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    certificate = builder.sign(signed_by.key, hashes.SHA384()).public_bytes(Encoding.PEM)
    return certificate, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pair() -> tuple[bytes, bytes]:
    """(private, public) key of a site in OpenSSH's format, as Flower's SuperNode authentication reads them."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=DAYS))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
