"""`make docker-test`: build, then whole federations in containers, undisturbed and with what may happen to one.

python -m tests.docker.run [--keep]

Needs a Docker engine (DOCKER_HOST says which) and docker-compose.  Each part is a line on standard output with the
seconds it took; the first that fails ends the test with exit code 1.
"""

import argparse
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

from tests.docker.points import Tracking, check_points
from tests.docker.project import Project, docker

ROUNDS = 20
SMALL = (
    f"--rounds {ROUNDS} --set model.backbone=cnn --set data.image_size=32 --set model.embedding_size=32"
    " --set training.precision=float32 --set training.memory_format=contiguous --set training.batch_size=8"
)
BUILT = {"FACEFED_IMAGE": "facefed:0.1.0", "FACEFED_POSTGRES_IMAGE": "facefed-postgres:0.1.0"}
SHA = r"model SHA-256 ([0-9a-f]{64})"
CUT_S = 60.0
KILL_SERVER = """
import os, signal
for pid in filter(str.isdigit, os.listdir('/proc')):
    words = open(f'/proc/{pid}/cmdline', 'rb').read().split(b'\\0')
    if any(word.endswith(b'/flower-server') for word in words[:2]):
        os.kill(int(pid), signal.SIGKILL)
"""
REACHES = """
import socket
for host, port in {places!r}:
    try:
        socket.create_connection((host, port), timeout=3).close()
        print(host)
    except OSError:
        pass
"""


class Test:
    """The parts, in their order; each leaves volumes to the next."""

    def __init__(self, project: Project, tracking: Tracking) -> None:
        self.project, self.tracking, self.sha256 = project, tracking, ""

    def build(self) -> str:
        """Build the images, and give them names that another build does not take from this test."""
        self.project.compose("--profile", "postgres", "build")
        sizes = []
        for variable, built in BUILT.items():
            own = f"{built.partition(':')[0]}:{self.project.name}"
            docker("tag", built, own)
            self.project.variables[variable] = own
            sizes.append(f"{own} {int(docker('image', 'inspect', '--format', '{{.Size}}', own)) / 1e9:.2f} GB")
        return ", ".join(sizes)

    def undisturbed(self) -> str:
        """A federation, from nothing to exit code 0."""
        self._up()
        self.project.wait_for("server", "joined: celeba")
        self._check_reach()
        words = self._over()
        self.sha256 = words[0]
        return f"model {self.sha256[:12]}, {words[1]}"

    def _check_reach(self) -> None:
        """While the server runs: a site reaches the proxy alone, and the SuperLink is reached by the proxy alone."""
        places = [("proxy", 8443), ("superlink", 8000), ("server", 8000), ("mlflow", 5000)]
        code = REACHES.format(places=places)
        names = ("celeba", "mlflow", "proxy")
        with ThreadPoolExecutor(len(names)) as at_once:  # the door is shut when the run is over, seconds later
            said = at_once.map(lambda name: self.project.execute(name, code), names)
            reached = {name: what.split() for name, what in zip(names, said, strict=True)}
        assert reached["celeba"] == ["proxy"], reached
        assert reached["mlflow"] == ["mlflow"], reached
        assert reached["proxy"] == ["proxy", "superlink", "server"], reached

    def closed_doors(self) -> str:
        """What is published, and which keys a site can read."""
        published = {
            service: self.project.look(service, "NetworkSettings.Ports")
            for service in ("proxy", "mlflow-port", "mlflow", "celeba")
        }
        assert "0.0.0.0" in published["proxy"], published  # noqa: S104 - looked for
        assert "127.0.0.1" in published["mlflow-port"], published
        assert "0.0.0.0" not in "".join(published[name] for name in published if name != "proxy"), published  # noqa: S104
        assert self.project.execute("celeba", "import os; print(os.listdir('/certs/celeba'))").count(".key") == 1
        assert self.project.execute("celeba", "import os; print(os.listdir('/certs/vggface2'))").strip() == "[]"
        return "two ports published, one of them on this machine only; a site sees its own key alone"

    def not_again(self) -> str:
        """The restart policy leaves a finished run alone."""
        time.sleep(20)
        assert self.project.look("server", "State.Status") == "exited"
        assert self._number_of_runs() == 1
        return "exited (0) 20 s later, 1 run"

    def killed_servers(self) -> str:
        """`docker kill` and a start by hand; then a crash that the restart policy answers."""
        self._up()
        self.project.wait_for("server", "round 3 of")
        docker("kill", self.project.container("server"))
        self.project.compose("up", "-d")
        self.project.wait_for("server", "is unfinished and goes on")
        self.project.wait_for("server", "round 7 of")
        # Detached: the container ends with its program, and takes along whatever else runs in it.
        docker("exec", "--detach", self.project.container("server"), "python", "-P", "-c", KILL_SERVER)
        self.project.until(lambda: self.project.look("server", "RestartCount") == "1", "it is started again")
        sha256, points = self._over()
        assert sha256 == self.sha256, (sha256, self.sha256)
        return f"resumed twice, the same model {sha256[:12]}, {points}"

    def everything(self) -> str:
        """A client killed, a client cut off for a minute, the server killed, all taken down and started again."""
        project = self.project
        self._up()
        project.wait_for("server", "round 2 of")
        docker("kill", project.container("celeba"))
        time.sleep(10)
        project.compose("up", "-d", "celeba")
        project.wait_for("server", "round 4 of")
        docker("network", "disconnect", project.network("vggface2"), project.container("vggface2"))
        time.sleep(CUT_S)
        docker("network", "connect", project.network("vggface2"), project.container("vggface2"))
        project.wait_for("server", "round 7 of")
        docker("kill", project.container("server"))
        project.compose("down", "--timeout", "60")
        self._up()
        project.wait_for("server", "is unfinished and goes on")
        sha256, points = self._over()
        same = "the same model" if sha256 == self.sha256 else f"another model, {sha256[:12]}"
        return f"exit code 0, {same}, {points}"

    def profiles(self) -> str:
        """A third site, with twins, and MLflow on PostgreSQL, whose password is nowhere but in its volume."""
        project = self.project
        project.compose("down", "--timeout", "60")
        project.variables |= {"FACEFED_OPTIONS": f"{SMALL} --min-clients 3"}
        self._up("--profile", "postgres", "--profile", "twins")
        _, points = self._over(sites=("celeba", "twins", "vggface2"))
        password = project.read("database-key", "cut -d: -f5 /volume/pgpass").strip()
        assert len(password) >= 32, "no password"
        shown = docker("inspect", project.container("mlflow"), project.container("postgres"))
        assert password not in shown + project.log("mlflow") + project.log("postgres"), "the password is shown"
        assert "runs and models: postgresql" in project.log("mlflow"), project.log("mlflow")
        return f"3 sites, {points}"

    def _up(self, *profiles: str) -> None:
        self.project.begin()
        self.project.compose(*profiles, "up", "-d")

    def _number_of_runs(self) -> int:
        return len(self.project.read("runs", "ls /volume/runs").split())

    def _over(self, sites: Collection[str] = ("celeba", "vggface2")) -> tuple[str, str]:
        """The server ends with 0; the model's SHA-256 and what MLflow has."""
        code = self.project.ended()
        assert code == 0, f"exit code {code}\n{self.project.log('server')}"
        newest = max(self.project.read("runs", "ls /volume/runs").split())
        recorded = self.project.points(newest)
        runs = self.tracking.runs(newest)
        assert sorted(runs) == ["", *sites], list(runs)  # however often the run was begun
        return self.project.wait_for("server", SHA), check_points(self.tracking, runs, recorded, ROUNDS)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(keep: str) -> int:
    """Returns the exit code.  keep: "volumes" leaves everything for a look, "nothing" removes it."""
    port = free_port()
    variables = {
        "MLFLOW_PORT": str(port),
        "FACEFED_PORT": str(free_port()),
        "PEOPLE": "12",
        "PICTURES": "8",
        "FACEFED_OPTIONS": SMALL,
    }
    project = Project(f"facefed-test-{secrets.token_hex(3)}", variables)
    test = Test(project, Tracking(port, lambda: project.read("tracking-key", "cat /volume/password")))
    parts: list[Callable[[], str]] = [
        test.build, test.undisturbed, test.not_again, test.closed_doors, test.killed_servers, test.everything,
        test.profiles,
    ]  # fmt: skip
    sys.stdout.write(f"project {project.name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    try:
        for part in parts:
            began = time.monotonic()
            try:
                told = part()
            except AssertionError as error:
                sys.stdout.write(f"FAILED  {part.__name__}: {error}\n")
                return 1
            sys.stdout.write(f"ok  {time.monotonic() - began:6.0f} s  {part.__name__}: {told}\n")
            sys.stdout.flush()
    finally:
        if keep != "volumes":
            project.close()
            for variable in BUILT.keys() & variables.keys():
                docker("rmi", "--no-prune", variables[variable])
    sys.stdout.write("all well\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="docker-test", description="Whole federations in containers.")
    parser.add_argument("--keep", action="store_true", help="leave containers and volumes for a look")
    sys.exit(main("volumes" if parser.parse_args().keep else "nothing"))
