"""`facefed serve`: the page and the API of one gallery, on this machine alone unless it is asked for otherwise."""

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

import psutil
import uvicorn

from common.errors import UserError
from common.system.certs import SERVER, names_of, read_certificate, read_web_server_pair
from common.system.processes import host_port, is_loopback, listen
from simulation.recognition.asking import Recognition
from simulation.recognition.door import Door
from simulation.recognition.gallery import open_gallery
from simulation.recognition.service import AUDIT, Desk, app_of
from simulation.recognition.verbs import Ask, model_of

LEAST_TOKEN: Final = 16  # characters
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """The flags of `facefed serve`, as typed."""

    host: str = "127.0.0.1"
    port: int = 8080
    tls: Path | None = None
    insecure: bool = False
    token_file: Path | None = None
    allowed_hosts: Sequence[str] = ()


def serve(ask: Ask, request: ServeRequest, folder: Path, out: TextIO) -> int:
    """Serve until Ctrl-C or SIGTERM.  Raises UserError: what is asked for cannot be served, or not safely."""
    _check(request)
    gallery = open_gallery(folder)
    token = _token(request.token_file)
    pair = read_web_server_pair(request.tls, request.host) if request.tls else None
    hosts = hosts_of(request)
    with_sockets = listen(request.host, request.port, "--host and --port")
    try:
        asked = Recognition.of(model_of(gallery), far=ask.far, anyway=ask.anyway)
        door = Door(app=app_of(Desk(folder=folder, asked=asked)), hosts=hosts, token=token)
        scheme = "https" if pair else "http"
        shown = next(iter(_names_of(request))) if request.host in _EVERYWHERE else request.host
        fragment = "" if request.token_file else f"#token={token}"
        out.write(f"{folder}: {len(gallery.people):,} people, {gallery.binding.words}\n")
        out.write(f"threshold {asked.threshold.threshold:.3f}: {asked.rate}\n")
        out.writelines(f"{line}\n" for line in asked.cautions)
        if request.insecure and not is_loopback(request.host):
            out.write("warning: --insecure: whoever is on the way can read the pictures, the names and the token.\n")
        out.write(f"decisions are kept in {folder / AUDIT}; pictures are not\n")
        out.write(f"open {scheme}://{host_port(shown, request.port)}/{fragment}\n")
        if request.token_file:
            out.write(f"the page asks for the token in {request.token_file}\n")
        out.flush()
        configured = uvicorn.Config(
            door,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=5,
            limit_concurrency=64,
            ssl_certfile=pair[0] if pair else None,
            ssl_keyfile=pair[1] if pair else None,
        )
        uvicorn.Server(configured).run(sockets=with_sockets)
    finally:
        for one in with_sockets:
            one.close()
    return 0


def _check(request: ServeRequest) -> None:
    """Raises UserError."""
    if not 0 < request.port < 65536:
        raise UserError(f"--port {request.port} is no port; use one from 1 to 65535, such as 8080.")
    if request.tls and request.insecure:
        raise UserError("--tls and --insecure contradict each other; leave --insecure out.")
    if not is_loopback(request.host) and not request.tls and not request.insecure:
        raise UserError(
            f"--host {request.host}: other machines would send faces in clear; give --tls DIR (a folder of `facefed"
            " certs init`), or --insecure where the network between is yours alone."
        )


def _token(path: Path | None) -> str:
    """What requests must carry: of the file, else a new one.  Raises UserError."""
    if path is None:
        return secrets.token_urlsafe(24)
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        raise UserError(
            f"--token-file {path}: cannot be read; write a token of {LEAST_TOKEN} characters there."
        ) from None
    if mode & 0o077:
        raise UserError(f"--token-file {path}: other accounts can read it (mode {mode & 0o777:04o}); chmod 600 {path}.")
    if len(text) < LEAST_TOKEN or not text.isascii() or not text.isprintable() or " " in text:
        raise UserError(
            f"--token-file {path}: write {LEAST_TOKEN} or more plain characters without blanks, on one line."
        )
    return text


def hosts_of(request: ServeRequest) -> frozenset[str]:
    """The names and addresses under which the page may be opened, lower case."""
    return frozenset(name.lower() for name in (*_LOOPBACK, *_names_of(request), *request.allowed_hosts))


def _names_of(request: ServeRequest) -> list[str]:
    """How others reach it: as the certificate has it, else the host, or every address of this machine."""
    names = names_of(read_certificate(request.tls / SERVER)) if request.tls else []
    if request.host not in _EVERYWHERE:
        return [*names, request.host]
    cards = [one for card in psutil.net_if_addrs().values() for one in card]
    own = [one.address for one in cards if one.family in (socket.AF_INET, socket.AF_INET6) and "%" not in one.address]
    return [*names, socket.gethostname(), *sorted(own)]
