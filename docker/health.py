"""Health checks that use what they check: python health.py tracking|server|proxy|site.  Exit code 0, or 1 and a line.

tracking  writes a metric, a parameter and a file with MLflow's client and reads them back, now and then; in between it
          reads the database through the server, under the name that others use (MLflow's /health tells of neither)
server    a handshake with the SuperLink, with the certificate that the front door will see
proxy     through the door: /health, and a site's call that the SuperLink itself must refuse; Control must be 404;
          without a SuperLink the door is shut
site      its SuperNode lives, has an answer and was connected
"""

import http.client
import ssl
import sys
import time
from pathlib import Path

ANSWER_WITHIN_S = 10.0
WRITE_EVERY_S = 900.0
MLFLOW = ("127.0.0.1", 5000)
CERTIFICATES = Path("/certs/server")
FLEET, CONTROL = "/v1/fleet/pull-messages", "/v1/control/list-runs"
UNSIGNED = {401}  # the SuperLink's answer to a call without a site's key; nginx never gives it
PROTOBUF = {"Content-Type": "application/protobuf"}


class Unhealthy(Exception):
    """The line to show."""


def tracking(marker: Path = Path("/tmp/written")) -> None:  # noqa: S108 - the container's own, gone with it
    """MLflow.  Raises Unhealthy and what MLflow raises."""
    if not marker.exists() or time.time() - marker.stat().st_mtime > WRITE_EVERY_S:
        from common.runtime import go_silent

        go_silent()
        from common.tracking.doctor_write import write_and_remove

        write_and_remove(f"http://{MLFLOW[0]}:{MLFLOW[1]}")
        marker.touch()
    connection = http.client.HTTPConnection(*MLFLOW, timeout=ANSWER_WITHIN_S)
    expect(connection, "GET", "/api/2.0/mlflow/experiments/search?max_results=1", {200}, {"Host": "mlflow:5000"})


def server() -> None:
    """The SuperLink, straight.  Raises Unhealthy."""
    expect(secure("superlink", 8000), "GET", "/health", {200})


def proxy() -> None:
    """The SuperLink, through the front door.  Raises Unhealthy.

    Between runs there is none, and all is well where the door is shut: sites take it for the end of their server.
    """
    from common.processes import can_connect

    if not can_connect("superlink", 8000):
        if can_connect("localhost", 8443):
            raise Unhealthy("the door is open, and nothing is behind it")
        return
    expect(secure("localhost", 8443), "GET", "/health", {200})
    expect(secure("localhost", 8443), "POST", FLEET, UNSIGNED, PROTOBUF)
    expect(secure("localhost", 8443), "POST", CONTROL, {404}, PROTOBUF)


def site(state: Path = Path(".facefed/clients")) -> None:
    """A SuperNode.  Raises Unhealthy."""
    import psutil

    from common.processes import can_connect

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


def secure(host: str, port: int) -> http.client.HTTPSConnection:
    """A connection that trusts the federation's authority alone."""
    context = ssl.create_default_context(cafile=str(CERTIFICATES / "ca.crt"))
    return http.client.HTTPSConnection(host, port, timeout=ANSWER_WITHIN_S, context=context)


def expect(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    allowed: set[int],
    headers: dict[str, str] | None = None,
) -> None:
    """Ask once.  Raises Unhealthy where the status is another one."""
    try:
        connection.request(method, path, headers=headers or {})
        status = connection.getresponse().status
    finally:
        connection.close()
    if status not in allowed:
        raise Unhealthy(f"{method} {path} gives {status} instead of {', '.join(map(str, sorted(allowed)))}")


CHECKS = {"tracking": tracking, "server": server, "proxy": proxy, "site": site}

if __name__ == "__main__":
    try:
        CHECKS[sys.argv[1]]()
    except Exception as error:  # whatever it is, docker shows the line
        sys.stdout.write(f"{sys.argv[1]}: {error}\n")
        sys.exit(1)
