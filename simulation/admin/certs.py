"""Makes, adds to and renews the folder of certificates and keys whose layout `common/system/certs.py` tells."""

import datetime as dt
import ipaddress
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.names import CLIENT_NAME, NAME_RULE, look_alike
from common.system.certs import (
    CA,
    CA_KEY,
    CLIENT_KEY,
    CLIENTS,
    LOOPBACK,
    NAME,
    PEERS,
    SERVER,
    SERVER_KEY,
    CertificateError,
    accepted_keys,
    is_ip,
    names_of,
    need,
    read_certificate,
    read_private_key,
    read_public_key,
)
from common.system.files import write_bytes, write_new

CA_DAYS, SERVER_DAYS = 3650, 397
CLOCKS_DIFFER = dt.timedelta(hours=1)  # a certificate is valid from so long before it was made
REVOKED = "revoked"  # the folder where such keys are kept
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*", re.IGNORECASE)


def make_folder(
    folder: Path, server_names: Sequence[str], clients: Sequence[str], own_keys: Mapping[str, Path] | None = None
) -> None:
    """Make a new folder with everything in it, in one step.  Raises CertificateError, also where it is not empty.

    own_keys: the public keys of sites that made theirs themselves (`make_own_key`), by name.
    """
    names, own_keys = _names(server_names), own_keys or {}
    for name in (*clients, *own_keys):
        _check_client_name(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CertificateError(
            f"{folder} is not empty, and nothing is overwritten; take a new folder, or `facefed certs add` for one"
            " more site."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # 0700
    try:
        authority = _new_authority(aside)
        _new_server(aside, names, authority)
        (aside / CLIENTS).mkdir(mode=0o700)
        for name in clients:
            add_client(aside, name)
        for name, public in own_keys.items():
            add_client(aside, name, public)
        aside.replace(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def add_client(folder: Path, name: str, own_key: Path | None = None) -> None:
    """One more site: DIR/NAME for it, DIR/clients/NAME.pub for the server and the other sites' folders.

    own_key: the public key of a site that made its own; DIR/NAME holds no key then.  Raises CertificateError.
    """
    _check_client_name(name)
    need(folder, (CA, CLIENTS), "a folder that `facefed certs init` made")
    public, own = folder / CLIENTS / f"{name}.pub", folder / name
    for path in (public, own):
        if path.exists():
            raise CertificateError(
                f"{path} is there already, and nothing is overwritten; choose another name, or revoke the site and"
                f" move {own} away first."
            )
    for known in sorted(path.stem for path in (folder / CLIENTS).glob("*.pub")):
        if look_alike(name, known):
            raise CertificateError(f"the name {name!r} looks like {known!r}, whose key is accepted; choose another.")
    given = read_public_key(own_key) if own_key else None
    for known, key in accepted_keys(folder / CLIENTS).items():
        if key == given:
            raise CertificateError(f"{own_key} is the key of {known!r}, which is accepted; each site needs its own.")
    own.mkdir(mode=0o700)
    public_key = given or _new_key(own)
    write_new(own / NAME, f"{name}\n".encode(), 0o644)
    write_new(own / CA, (folder / CA).read_bytes(), 0o644)
    write_new(public, _public_text(public_key, name), 0o644)
    _hand_out_peers(folder)


def make_own_key(folder: Path, name: str) -> Path:
    """A site's folder with a key that it makes itself, so that nobody else ever had it.  Returns the public key's file.

    The file goes to the operator, who answers with `ca.crt` and `peers` for this folder.  Raises CertificateError.
    """
    _check_client_name(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CertificateError(f"{folder} is not empty, and nothing is overwritten; take a new folder.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    public = _public_text(_new_key(folder), name)
    write_new(folder / NAME, f"{name}\n".encode(), 0o644)
    return write_new(folder / f"{name}.pub", public, 0o644)


def _new_key(own: Path) -> ec.EllipticCurvePublicKey:
    """A new key in a site's folder.  OpenSSH's format is what flower-supernode reads."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    write_new(own / CLIENT_KEY, key.private_bytes(*form), 0o600)
    return key.public_key()


def _public_text(key: ec.EllipticCurvePublicKey, name: str) -> bytes:
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return text + f" {name.replace(' ', '_')}\n".encode()


def _hand_out_peers(folder: Path) -> None:
    """The accepted keys, and no other, into `peers` of each accepted site's folder that is still here."""
    keys = {path.name: path.read_bytes() for path in sorted((folder / CLIENTS).glob("*.pub"))}
    for own in (folder / name.removesuffix(".pub") for name in keys):
        if not own.is_dir():
            continue
        peers = own / PEERS
        peers.mkdir(mode=0o700, exist_ok=True)
        for path in peers.glob("*.pub"):
            if path.name not in keys:
                path.unlink()
        for name, content in keys.items():
            if not (peers / name).exists() or (peers / name).read_bytes() != content:
                write_bytes(peers / name, content, 0o644)


def revoke_client(folder: Path, name: str) -> Path:
    """Take a site's key from those accepted; a running server turns it out within seconds.  Returns the file's place.

    The key is kept under `revoked/`, so that it is known which it was.  Raises CertificateError.
    """
    need(folder, (CLIENTS,), "a folder that `facefed certs init` made")
    public = folder / CLIENTS / f"{name}.pub"
    if not public.is_file():
        known = ", ".join(sorted(path.stem for path in (folder / CLIENTS).glob("*.pub"))) or "none"
        raise CertificateError(f"{public} does not exist, so {name} is not accepted anyway; accepted are: {known}.")
    kept = folder / REVOKED
    kept.mkdir(mode=0o700, exist_ok=True)
    place = kept / f"{name}.{_stamp()}.pub"
    public.rename(place)
    _hand_out_peers(folder)
    return place


def renew_server(folder: Path, server_names: Sequence[str]) -> Sequence[str]:
    """A new server certificate and key by the same authority; the former are kept beside them.  Returns its names.

    server_names: instead of those in the present certificate.  Raises CertificateError.
    """
    need(folder, (CA, CA_KEY, SERVER, SERVER_KEY), "the folder that holds the authority's key")
    authority = read_certificate(folder / CA), read_private_key(folder / CA_KEY)
    names = _names(server_names) if server_names else names_of(read_certificate(folder / SERVER))
    for name in (SERVER, SERVER_KEY):
        former = folder / name
        former.rename(former.with_name(f"{former.stem}.{_stamp()}{former.suffix}"))
    _new_server(folder, names, authority)
    return names


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _stamp() -> str:
    return _now().strftime("%Y%m%dT%H%M%S%f")


def _names(given: Sequence[str]) -> list[str]:
    for name in given:
        if not (is_ip(name) or HOST_NAME.fullmatch(name)):
            raise CertificateError(
                f"--server-name {name}: give the host name or IP address that clients connect to, without a port,"
                " for example fl.example.org."
            )
    return list(dict.fromkeys([*given, *LOOPBACK]))


def _check_client_name(name: str) -> None:
    if not CLIENT_NAME.fullmatch(name):
        raise CertificateError(f"a client's name {name!r}: use {NAME_RULE}.")
    if name in (CA, CA_KEY, SERVER, SERVER_KEY, CLIENTS, REVOKED):
        raise CertificateError(f"a client cannot be named {name!r}: a file of the folder has that name.")


_Authority = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _new_authority(folder: Path) -> _Authority:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FaceFed federation")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write_pair(folder / CA, certificate, folder / CA_KEY, key)
    return certificate, key


def _new_server(folder: Path, names: Sequence[str], authority: _Authority) -> None:
    ca, ca_key = authority
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    alternatives: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address(name)) if is_ip(name) else x509.DNSName(name) for name in names
    ]
    certificate = (
        _builder(subject, ca.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )  # fmt: skip
    _write_pair(folder / SERVER, certificate, folder / SERVER_KEY, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = _now()
    return x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - CLOCKS_DIFFER,
        not_valid_after=now + dt.timedelta(days=days),
    )


def _write_pair(path: Path, certificate: x509.Certificate, key_path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    write_new(key_path, key.private_bytes(*form), 0o600)
    write_new(path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
