"""The front door: nginx before the SuperLink, for listeners that other machines reach.

A SuperLink's one port carries three interfaces.  The sites need Fleet; Control takes bundles to run and Runtime hands
out tasks, both from whoever reaches the port.  So the SuperLink listens on loopback and nginx lets through what the
sites need and nothing else, with limits on how much, how slowly and how often.
"""

import grp
import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from common.errors import UserError
from common.system.certs import ServerFiles
from common.system.processes import can_connect, child_environment, host_port, reached_at, start, stop

ELSEWHERE = "/usr/sbin:/usr/local/sbin:/opt/homebrew/bin"  # where nginx is when it is not on PATH
# Flower cuts what it sends into objects of at most 5 MiB; the list of a message's objects is far smaller.
LARGEST_BODY_MIB = 8
CONNECTIONS = 4096  # at once, of all addresses; two for each request, one to either side
REQUESTS_PER_ADDRESS = 64  # at once; a site has two
END_GRACE_S = 3.0

CONFIG = """\
{user}daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid nginx.pid;
error_log error.log error;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    server_tokens off;
    default_type application/octet-stream;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path none;
    uwsgi_temp_path none;
    scgi_temp_path none;

    # Bodies stay in memory, so that what is on its way is never on the disk.
    client_max_body_size {body}m;
    client_body_buffer_size {buffer}m;
    proxy_max_temp_file_size 0;
    large_client_header_buffers 4 8k;

    # Whoever says nothing, or says it slowly, is sent away.
    client_header_timeout 10s;
    client_body_timeout 20s;
    send_timeout 20s;
    keepalive_timeout 20s;
    lingering_time 2s;  # of reading on after a refusal
    lingering_timeout 1s;
    reset_timedout_connection on;
    limit_conn_zone $binary_remote_addr zone=addresses:10m;
    limit_conn addresses {requests};

    upstream superlink {{
        server {superlink};
        keepalive 16;
        keepalive_timeout 3s;  # less than the SuperLink's own 5 s: it must not hang up on a request
    }}
    server {{
        listen {listen};
{tls}
        # What arrives is what is passed on, so it is judged as it arrived: no %2e, no .., no //.
        if ($request_uri !~ "^(/v1/fleet/[a-z-]+|/health)$") {{ return 404; }}
        location / {{
            proxy_pass {scheme}://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_connect_timeout 5s;
            proxy_read_timeout 60s;
            proxy_next_upstream off;
        }}
    }}
}}
"""
TLS = """\
        ssl_certificate "{certificate}";
        ssl_certificate_key "{key}";
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_cache shared:tls:1m;
        proxy_ssl_verify on;
        proxy_ssl_trusted_certificate "{ca}";
        proxy_ssl_name localhost;
        proxy_ssl_protocols TLSv1.2 TLSv1.3;
"""


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where it is, and what is behind it."""

    host: str
    port: int
    superlink_port: int
    tls: ServerFiles | None
    superlink_host: str = "127.0.0.1"  # elsewhere only in a private network of these two, as docker/run_proxy.py has it


def find_nginx() -> str:
    """The path of nginx.  Raises UserError."""
    found = shutil.which("nginx") or shutil.which("nginx", path=ELSEWHERE)
    if not found:
        raise UserError(
            "nginx is not installed, and without it anyone who reaches this address could submit code; install it"
            " (Debian: apt install nginx-light), or put a proxy of your own before --no-front-door (docs/SECURITY.md)."
        )
    return found


def door_config(door: Door) -> str:
    """Nginx's configuration.  Raises UserError for a path that cannot stand in it."""
    tls = ""
    if door.tls:
        paths = {"certificate": door.tls.certificate, "key": door.tls.key, "ca": door.tls.ca}
        for path in paths.values():
            if set(str(path)) & set('"\\$\n'):
                raise UserError(f"--tls {path.parent}: nginx takes no path with '$', '\\' or quotes; move the folder.")
        tls = TLS.format_map(paths)
    return CONFIG.format(
        user=_user(),
        files=min(2 * CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        connections=CONNECTIONS,
        body=LARGEST_BODY_MIB,
        buffer=LARGEST_BODY_MIB + 1,
        requests=REQUESTS_PER_ADDRESS,
        superlink=host_port(door.superlink_host, door.superlink_port),
        listen=f"{host_port(door.host, door.port)}{' ssl' if door.tls else ''}",
        tls=tls,
        scheme="https" if door.tls else "http",
    )


def _user() -> str:
    """Started by root, nginx serves as nobody; its own choice of nobody's group is that of another system."""
    if os.geteuid() != 0:
        return ""
    groups = {group.gr_name for group in grp.getgrall()}
    return f"user nobody {'nogroup' if 'nogroup' in groups else 'nobody'};\n"


class FrontDoor:
    """nginx, while the block lasts."""

    def __init__(self, door: Door, folder: Path) -> None:
        """folder: of its own, for its configuration and its log."""
        self._door, self._folder = door, folder

    def __enter__(self) -> Self:
        """Start it.  Raises UserError where nginx is missing or cannot be told a path."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "nginx.conf").write_text(door_config(self._door), encoding="utf-8")
        log = self._folder / "error.log"
        with log.open("ab") as output:
            self.process: subprocess.Popen[bytes] = start(
                [find_nginx(), "-p", f"{self._folder}/", "-c", "nginx.conf", "-e", "error.log"],
                environment=child_environment(self._folder),
                output=output,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        stop(self.process, END_GRACE_S)

    def is_open(self) -> bool:
        """Whether it accepts connections."""
        return can_connect(reached_at(self._door.host), self._door.port)
