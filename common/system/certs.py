"""Certificates and keys of a federation: what server and sites check of their folders before anything is started.

    DIR/ca.crt, ca.key                  the authority; its key signs server certificates and belongs in a safe place
    DIR/server.crt, server.key          the server's certificate and key
    DIR/clients/NAME.pub                the keys that the server accepts; without the file a site is out
    DIR/NAME/ca.crt, client.key, name   what one site gets
    DIR/NAME/peers/NAME.pub             and all sites' keys, with which secure aggregation checks whose keys came

TLS proves the server to the sites; a site proves itself with its P-384 key, which Flower's SuperNode signs with.
`simulation/admin/certs.py` makes the folder.  See docs/adr/0019-certificates.md.
"""

import base64
import codecs
import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import UserError
from common.names import CLIENT_NAME
from common.secagg.keys import load_public

CA, CA_KEY, SERVER, SERVER_KEY, CLIENTS, CLIENT_KEY, NAME, PEERS = (
    "ca.crt", "ca.key", "server.crt", "server.key", "clients", "client.key", "name", "peers"
)  # fmt: skip
LOOPBACK = ("localhost", "127.0.0.1")  # the server's own connections to itself
OTHERS = 0o077  # the permissions of a file that are not its owner's


class CertificateError(UserError):
    """A certificate, a key or their folder cannot be used."""


@dataclass(frozen=True, kw_only=True)
class ServerFiles:
    """What `flower-server --tls DIR` uses, checked."""

    ca: Path
    certificate: Path
    key: Path
    clients: Path  # the folder of the accepted keys


@dataclass(frozen=True, kw_only=True)
class ClientFiles:
    """What `flower-client --tls DIR/NAME` uses, checked."""

    ca: Path
    key: Path
    fingerprint: str  # of the public key, as ssh-keygen -l shows it
    name: str = ""  # the key's, which is the site's; empty in a folder of before there were such files


def read_server_folder(folder: Path, host: str) -> ServerFiles:
    """What a server listening at `host` needs of its folder.

    Raises CertificateError: no folder of ours, a key that others can read, a certificate that is of another authority,
    of another key, not valid today, or not for that name.
    """
    certificate, key = _read_server_pair(folder, (CA, SERVER, SERVER_KEY, CLIENTS), host)
    if not accepted_keys(folder / CLIENTS):
        raise CertificateError(f"{folder / CLIENTS} holds no client's key; add one with `facefed certs add`.")
    return ServerFiles(ca=folder / CA, certificate=certificate, key=key, clients=folder / CLIENTS)


def read_web_server_pair(folder: Path, host: str) -> tuple[Path, Path]:
    """The certificate and the key of such a folder for a page that listens at `host`; no site's key is needed.

    Raises CertificateError as `read_server_folder`.
    """
    return _read_server_pair(folder, (CA, SERVER, SERVER_KEY), host)


def _read_server_pair(folder: Path, needed: Sequence[str], host: str) -> tuple[Path, Path]:
    """The certificate and the key, checked.  needed: the names that must be in the folder."""
    if (folder / CLIENT_KEY).exists():
        raise CertificateError(f"--tls {folder} is one site's folder; give the folder above it.")
    need(folder, needed, "a folder that `facefed certs init` made")
    ca, certificate = read_certificate(folder / CA), read_certificate(folder / SERVER)
    key = read_private_key(folder / SERVER_KEY)
    for path, found in ((folder / CA, ca), (folder / SERVER, certificate)):
        _check_dates(path, found)
    if key.public_key() != certificate.public_key():
        raise CertificateError(f"{folder / SERVER_KEY} is not the key of {folder / SERVER}; put the pair there.")
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise CertificateError(
            f"{folder / SERVER} was not issued by {folder / CA}: clients would refuse it; put the pair of one"
            " `facefed certs init` there."
        ) from None
    names = names_of(certificate)
    anywhere = is_ip(host) and ipaddress.ip_address(host).is_unspecified
    for name in (*LOOPBACK, *(() if anywhere else (host,))):
        if name.lower() not in (known.lower() for known in names):
            raise CertificateError(
                f"{folder / SERVER} is for {', '.join(names) or 'no name'}, not for {name}; make one that is with"
                f" `facefed certs renew {folder} --server-name {host}`."
            )
    return folder / SERVER, folder / SERVER_KEY


def read_client_folder(folder: Path) -> ClientFiles:
    """What a site needs of its folder.  Raises CertificateError."""
    if (folder / SERVER_KEY).exists() or (folder / CA_KEY).exists():
        raise CertificateError(f"--tls {folder} is the server's folder; give flower-client the site's, {folder}/NAME.")
    need(folder, (CA, CLIENT_KEY), "a site's folder that `facefed certs` made")
    _check_dates(folder / CA, read_certificate(folder / CA))
    path = folder / CLIENT_KEY
    _check_private(path)
    try:
        key = serialization.load_ssh_private_key(path.read_bytes().removeprefix(codecs.BOM_UTF8), password=None)
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{path} is not a private key of OpenSSH's format ({error}).") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise CertificateError(f"{path} is not a P-384 key; make one with `facefed certs add`.")
    name = _read_name(folder / NAME)
    return ClientFiles(ca=folder / CA, key=path, fingerprint=fingerprint(key.public_key()), name=name)


def _read_name(path: Path) -> str:
    try:
        name = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    except (OSError, ValueError):
        name = "\n"
    if name and not CLIENT_NAME.fullmatch(name):
        raise CertificateError(
            f"{path} does not hold a site's name; write the name of your key there, as its operator has it."
        )
    return name


def accepted_keys(folder: Path) -> dict[str, ec.EllipticCurvePublicKey]:
    """Name -> key of every NAME.pub, in order of names.  Raises CertificateError on one that is no P-384 key."""
    return {path.stem: read_public_key(path) for path in sorted(folder.glob("*.pub"))}


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A site's P-384 key in OpenSSH's format.  Raises CertificateError."""
    try:
        return load_public(path)
    except UserError as error:
        raise CertificateError(str(error)) from None


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA256:..., as `ssh-keygen -l` shows it."""
    digest = base64.b64encode(serialization.ssh_key_fingerprint(key, hashes.SHA256())).decode()
    return "SHA256:" + digest.rstrip("=")


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate of a PEM file.  Raises CertificateError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise CertificateError(
            f"{path} is not a PEM certificate; put back the one that `facefed certs` made."
        ) from None


def names_of(certificate: x509.Certificate) -> list[str]:
    """The host names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def is_ip(name: str) -> bool:
    """Whether it is an address rather than a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def need(folder: Path, names: Sequence[str], what: str) -> None:
    """Raises CertificateError where one of them is missing; what: the folder should be."""
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CertificateError(f"{folder} is not {what}: {missing[0]} is missing in it.")


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = dt.datetime.now(dt.UTC)
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{path} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; is this machine's"
            " clock right?"
        )
    if now > certificate.not_valid_after_utc:
        again = "init" if path.name == CA else "renew"
        raise CertificateError(
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; make a new one with"
            f" `facefed certs {again}`."
        )


def _check_private(path: Path) -> None:
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from None
    if mode & OTHERS:
        raise CertificateError(
            f"{path} can be read by others (mode {mode:04o}); make it 0600, and replace it if anyone may have seen it."
        )


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """An elliptic-curve key in PEM that its owner alone can read.  Raises CertificateError."""
    _check_private(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(
            f"{path} is not an elliptic-curve key in PEM; put back the one that `facefed certs` made."
        )
    return key
