"""Health checks that use what they check: python health.py tracking|relay|server|proxy|site.  Exit code 0, or 1 and a
line.

tracking  writes a metric, a parameter and a file with MLflow's client and reads them back, now and then; in between it
          reads the database through the server, under the name that others use (MLflow's /health tells of neither)
relay     MLflow's /health, through it
server    a handshake with the SuperLink, with the certificate that the front door will see
proxy     through the door: /health, and a site's call that the SuperLink itself must refuse; Control must be 404;
          without a SuperLink the door is shut
site      its SuperNode lives, has an answer and was connected
"""

import base64
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ANSWER_WITHIN_S = 10.0
WRITE_EVERY_S = 900.0
MLFLOW, SUPERLINK, DOOR = ("127.0.0.1", 5000), ("superlink", 8000), ("localhost", 8443)
CERTIFICATES = Path("/certs/server")
PASSWORD = Path("/tracking-key/password")
FLEET, CONTROL = "/v1/fleet/pull-messages", "/v1/control/list-runs"
UNSIGNED = {401}  # the SuperLink's answer to a call without a site's key; nginx never gives it
PROTOBUF = {"Content-Type": "application/protobuf"}


class Unhealthy(Exception):
    """The line to show."""


def tracking(marker: Path = Path("/tmp/written")) -> None:  # noqa: S108 - the container's own, gone with it
    """MLflow, as its administrator.  Raises Unhealthy and what MLflow raises."""
    user, password = "admin", PASSWORD.read_text(encoding="utf-8").strip()
    if not marker.exists() or time.time() - marker.stat().st_mtime > WRITE_EVERY_S:
        from common.system.runtime import go_silent

        go_silent()
        from simulation.admin.doctor import write_and_remove

        os.environ |= {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
        write_and_remove(f"http://{MLFLOW[0]}:{MLFLOW[1]}")
        marker.touch()
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    basic = base64.b64encode(f"{user}:{password}".encode()).decode()
    expect(MLFLOW, "GET", path, {200}, {"Host": "mlflow:5000", "Authorization": f"Basic {basic}"}, ca=None)


def relay() -> None:
    """MLflow's published port.  Raises Unhealthy."""
    expect(MLFLOW, "GET", "/health", {200}, ca=None)


def server() -> None:
    """The SuperLink, straight.  Raises Unhealthy."""
    expect(SUPERLINK, "GET", "/health", {200})


def proxy() -> None:
    """The SuperLink, through the front door.  Raises Unhealthy.

    Between runs there is none, and all is well where the door is shut: sites take it for the end of their server.
    """
    from common.system.processes import can_connect

    if not can_connect(*SUPERLINK):
        if can_connect(*DOOR):
            raise Unhealthy("the door is open, and nothing is behind it")
        return
    expect(DOOR, "GET", "/health", {200})
    expect(DOOR, "POST", FLEET, UNSIGNED, PROTOBUF)
    expect(DOOR, "POST", CONTROL, {404}, PROTOBUF)


def site(state: Path = Path(".facefed/clients")) -> None:
    """A SuperNode.  Raises Unhealthy."""
    import psutil

    from common.system.processes import can_connect

    for process in psutil.process_iter(["cmdline", "create_time"]):
        words = process.info["cmdline"] or []
        if "clients.flower.supernode" in words:
            at = words.index("clients.flower.supernode")
            name, port = words[at + 2], int(words[at + 3])
            node = state / name / "node-id"
            if not can_connect("127.0.0.1", port):
                raise Unhealthy(f"the SuperNode of {name} does not answer")
            if not node.exists() or node.stat().st_mtime < process.info["create_time"]:
                raise Unhealthy(f"the SuperNode of {name} is not connected yet")
            return
    raise Unhealthy("no SuperNode; is there a server?")


def expect(
    where: tuple[str, int],
    method: str,
    path: str,
    allowed: set[int],
    headers: Mapping[str, str] | None = None,
    ca: Path | None = CERTIFICATES / "ca.crt",
) -> None:
    """Ask once; only the federation's authority is trusted.  Raises Unhealthy for another status, httpx's errors."""
    from common.system.processes import status_of

    status = status_of(*where, path, method=method, ca=ca, headers=headers, timeout_s=ANSWER_WITHIN_S)
    if status not in allowed:
        raise Unhealthy(f"{method} {path} gives {status} instead of {', '.join(map(str, sorted(allowed)))}")


CHECKS = {"tracking": tracking, "relay": relay, "server": server, "proxy": proxy, "site": site}

if __name__ == "__main__":
    try:
        CHECKS[sys.argv[1]]()
    except Exception as error:  # whatever it is, docker shows the line
        sys.stdout.write(f"{sys.argv[1]}: {error}\n")
        sys.exit(1)
