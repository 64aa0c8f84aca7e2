"""`facefed tracking serve`: what it refuses, whom its server answers, and a real server from start to end."""

import base64
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.errors import EXIT_INTERRUPTED, FaceFedError, UserError
from common.system.processes import free_port, start
from common.tracking import address
from simulation.admin import tracking_server as serve
from simulation.admin.tracking_server import EVERYWHERE, ServeOptions, ServerPlan, plan_server

ROOT = Path(__file__).resolve().parents[2]


def refused(base: Path, environment: dict[str, str] | None = None, **options: object) -> str:
    with pytest.raises(UserError) as seen:
        plan_server(ServeOptions(**{"port": free_port(), **options}), environment or {}, base)
    assert "\n" not in str(seen.value)
    return str(seen.value)


# -- whom it answers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_rules():
    """MLflow's own matching, as the oracle."""
    from mlflow.server import security_utils

    return security_utils


def test_a_loopback_server_answers_to_this_machine_only(mlflow_rules):
    hosts = serve.allowed_hosts("127.0.0.1", ())
    answered = {name: mlflow_rules.is_allowed_host_header(hosts, name) for name in (
        "localhost:5000", "localhost", "127.0.0.1:5000", "[::1]:5000", "[::1]",
        "mlflow:5000", "10.0.0.7:5000", "10.evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80",
    )}  # fmt: skip
    assert [name for name, yes in answered.items() if yes] == [
        "localhost:5000", "localhost", "127.0.0.1:5000", "[::1]:5000", "[::1]",
    ]  # fmt: skip


def test_names_for_other_machines_and_containers(mlflow_rules, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "GPU1.lab.example")
    hosts = serve.allowed_hosts(EVERYWHERE[0], ["mlflow", "*.lab.example", "proxy.example:443"])
    own_address = next(
        one.address for card in psutil.net_if_addrs().values() for one in card if one.family == socket.AF_INET
    )
    good = ("mlflow:5000", "mlflow", "gpu1:80", "gpu1.lab.example:5000", "a.lab.example:1", "proxy.example:443")
    bad = ("proxy.example:444", "mlflow.evil.example", "evil.example:5000", "10.evil.example", "lab.example")
    for name in (*good, f"{own_address}:5000", "localhost:5000"):
        assert mlflow_rules.is_allowed_host_header(hosts, name), name
    for name in bad:
        assert not mlflow_rules.is_allowed_host_header(hosts, name), name


def test_the_servers_own_pages_may_ask_under_each_name(mlflow_rules):
    """MLflow answers 403 to its own page's POST when the page was opened under a name that is not localhost."""
    origins = serve.allowed_origins(serve.allowed_hosts("127.0.0.1", ["mlflow"]))
    blocked = mlflow_rules.should_block_cors_request
    assert blocked("http://mlflow:5000", "POST", []) is True
    for page in ("http://mlflow:5000", "https://mlflow", "http://localhost:5000"):
        assert blocked(page, "POST", origins) is False
    for page in ("http://evil.example", "http://mlflow.evil.example:5000"):
        assert blocked(page, "POST", origins) is True


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_a_port_in_use_or_none(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f":{port} cannot be used (Address already in use)" in refused(tmp_path, port=port)
    assert "--port 70000 is no port" in refused(tmp_path, port=70000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("backend", "fragment"),
    [
        ("file:./mlruns", "is a file store, which MLflow refuses"),
        ("./mlruns", "is a folder, which MLflow no longer writes to"),
        ("postgresql", "names no database; write postgresql://USER"),
        ("http://127.0.0.1:5000", "is a server already"),
        ("oracle://host/db", "unknown scheme 'oracle'"),
    ],
)
def test_a_backend_that_is_none(backend, fragment, tmp_path):
    assert fragment in refused(tmp_path, backend=backend)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "--artifacts: " in refused(tmp_path, artifacts="file/below")
    assert "--backend: " in refused(tmp_path, backend="sqlite:///file/below/mlflow.db")
    assert "is no sqlite database" in refused(tmp_path, backend="sqlite:///file")
    assert "unknown kind 'gs'" in refused(tmp_path, artifacts="gs://bucket")


def test_a_database_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(address, "with_driver", lambda uri: uri)
    line = refused(tmp_path, backend=f"postgresql://me:secret@127.0.0.1:{free_port()}/runs")
    assert "nothing answers at 127.0.0.1:" in line
    assert "secret" not in line


def test_an_odd_name(tmp_path):
    assert "is no host" in refused(tmp_path, allowed_hosts=["http://mlflow"])


# -- the line ----------------------------------------------------------------------------------------------------------


def test_the_line_and_what_the_server_inherits(tmp_path):
    """A variable of the user's could move what was checked; no password stands in the line that others can read."""
    given = {"PATH": "/bin", "MLFLOW_STATIC_PREFIX": "/x", "MLFLOW_S3_ENDPOINT_URL": "http://s3", "DO_NOT_TRACK": "1"}
    plan = plan_server(ServeOptions(port=free_port()), given, tmp_path)
    database = tmp_path / "mlflow.db"
    assert plan.environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{database}"
    assert not any("sqlite" in word for word in plan.command)
    assert "MLFLOW_STATIC_PREFIX" not in plan.environment
    assert plan.environment["MLFLOW_S3_ENDPOINT_URL"] == "http://s3"
    assert plan.environment["MLFLOW_DISABLE_TELEMETRY"] == plan.environment["DO_NOT_TRACK"] == "true"
    assert plan.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert plan.command[plan.command.index("--artifacts-destination") + 1] == str(tmp_path / "mlartifacts")
    assert plan.command[-2:] == ("--app-name", "basic-auth")
    assert not any("warning" in note for note in plan.notes)
    for host in ("127.0.0.1", EVERYWHERE[0]):  # loopback is every account's of this machine
        open_to_all = plan_server(ServeOptions(port=plan.port, host=host, auth=False), given, tmp_path)
        assert "basic-auth" not in open_to_all.command
        [line] = [note for note in open_to_all.notes if "--no-auth" in note]
        assert "can read, change and delete each run and model" in line


def test_the_secrets_of_auth(tmp_path, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda _name: None)
    assert "pip install Flask-WTF; or give --no-auth" in refused(tmp_path)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    variables, note = serve.auth_variables(tmp_path / "auth", {})
    again, _ = serve.auth_variables(tmp_path / "auth", {})
    assert variables == again
    password = variables["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert len(password) >= 12
    assert password not in note
    kept = tmp_path / "auth/secrets.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    login = tmp_path / "auth/login.env"
    assert stat.S_IMODE(login.stat().st_mode) == 0o600
    assert f"source {login}" in note
    ask = f"source {login} && printf '%s %s' $MLFLOW_TRACKING_USERNAME $MLFLOW_TRACKING_PASSWORD"
    assert subprocess.check_output(["bash", "-c", ask], text=True) == f"admin {password}"
    own, note = serve.auth_variables(tmp_path / "auth", {"MLFLOW_AUTH_ADMIN_PASSWORD": "chosen by the user"})
    assert own["MLFLOW_AUTH_ADMIN_PASSWORD"] == "chosen by the user"
    assert not login.exists()
    assert "chosen" not in note
    with pytest.raises(UserError, match="shorter than 12"):
        serve.auth_variables(tmp_path / "auth", {"MLFLOW_AUTH_ADMIN_PASSWORD": "short"})
    kept.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        serve.auth_variables(tmp_path / "auth", {})


# -- the server's life -------------------------------------------------------------------------------------------------


def test_a_server_that_ends_by_itself(tmp_path):
    code = "import sys; print('ERROR: cannot open sqlite:///x'); sys.exit(3)"
    plan = ServerPlan(
        command=(sys.executable, "-c", code),
        environment={**os.environ, "MLFLOW_BACKEND_STORE_URI": "postgresql://me:secret@host/db"},
        host="127.0.0.1",
        port=free_port(),
        address="http://127.0.0.1:9",
        log=tmp_path / "log",
        notes=(),
    )
    plan.log.write_text("ERROR: of another day\n")
    with pytest.raises(FaceFedError, match="ended by itself: ERROR: cannot open sqlite:///x") as seen:
        serve.serve(plan, is_stopped=lambda: False, on_ready=lambda: None)
    assert seen.value.exit_code == 1


class Served:
    """The program with a real server, started as a user does."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "simulation.cli", "tracking", "serve", "--port", str(self.port), *arguments]
        self.output = folder / "output.txt"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
        deadline = time.monotonic() + 280
        while "healthy:" not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.2)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def status(self, method: str, path: str, body: str = '{"max_results": 1}', **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body=body, headers={"Content-Type": "application/json"} | headers)
        status = connection.getresponse().status
        connection.close()
        return status

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        for process in [psutil.Process(self.process.pid), *self.children] if self.process.poll() is None else []:
            process.kill()
        self.process.wait()

    def attacks(self) -> dict[str, int]:
        """What another account tries: to register a model of its own and to make it the champion; and each answer."""
        model, registered = {"name": "m"}, "/api/2.0/mlflow/registered-models"
        version = {"name": "m", "source": "s3://elsewhere/model"}
        tried = {
            "register": ("POST", f"{registered}/create", model),
            "version": ("POST", "/api/2.0/mlflow/model-versions/create", version),
            "champion": ("POST", f"{registered}/alias", {**model, "alias": "champion", "version": "1"}),
            "replace": ("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/models/m-1/artifacts/MLmodel", {}),
        }
        return {what: self.status(method, path, json.dumps(body)) for what, (method, path, body) in tried.items()}


@pytest.fixture
def served(tmp_path):
    program = Served(tmp_path, "--allowed-hosts", "mlflow,gpu1.example.org")
    yield program
    program.kill()


def test_without_a_password_anybody_puts_a_champion_in_its_place(tmp_path):
    """The control of the attack that the next test sees refused."""
    program = Served(tmp_path, "--no-auth")
    try:
        assert program.attacks() == dict.fromkeys(("register", "version", "champion", "replace"), 200)
        assert "warning: --no-auth: every account of this machine" in program.text
        assert not (tmp_path / "mlflow-auth").exists()
    finally:
        program.kill()


def test_a_real_server_from_start_to_end(served, tmp_path):
    """Healthy, answers to its names only, keeps runs and files where it said, and leaves no process."""
    search = "/ajax-api/2.0/mlflow/experiments/search"
    assert served.status("POST", search) == 401
    assert served.attacks() == dict.fromkeys(("register", "version", "champion", "replace"), 401)
    lines = (tmp_path / "mlflow-auth" / "login.env").read_text().splitlines()
    login = dict(line.removeprefix("export ").split("=", 1) for line in lines)
    password = login["MLFLOW_TRACKING_PASSWORD"]
    assert password not in served.text
    assert not [one for child in served.children for one in child.cmdline() if password in one]
    basic = {"Authorization": f"Basic {base64.b64encode(f'admin:{password}'.encode()).decode()}"}
    for host in (f"localhost:{served.port}", "mlflow:5000", "gpu1.example.org"):
        assert served.status("POST", search, Host=host, Origin=f"http://{host}", **basic) == 200
    assert served.status("POST", search, Host="evil.example") == 403
    assert served.status("POST", search, Host="mlflow", Origin="http://evil.example") == 403

    doctor = subprocess.run(
        [sys.executable, "-m", "simulation.cli", "tracking", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{served.port}", **login},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    for line in (
        "server's version: MLflow 3.17",
        "names that are not the server's are refused",
        "write test: a metric",
    ):
        assert line in doctor.stdout
    assert f"runs and models: sqlite:///{tmp_path}/mlflow.db" in served.text
    assert (tmp_path / "mlflow.db").stat().st_size > 100_000
    assert not (tmp_path / "mlruns").exists()  # the file went through the server, into mlartifacts
    assert not [path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]  # and was deleted there

    assert served.end(signal.SIGTERM) == EXIT_INTERRUPTED
    assert not [child for child in served.children if child.is_running()]
    assert len(served.children) == 2
    assert not serve.is_healthy("127.0.0.1", served.port)
    assert "Traceback" not in served.text


def test_a_stopped_start_leaves_nothing(tmp_path):
    """Ctrl-C while the server is still starting."""
    seen = []

    def start_and_note(*arguments, **options):
        seen.append(start(*arguments, **options))
        return seen[0]

    plan = ServerPlan(
        command=(sys.executable, "-c", "import time; time.sleep(100)"),
        environment=dict(os.environ),
        host="127.0.0.1",
        port=free_port(),
        address="http://127.0.0.1:9",
        log=tmp_path / "log",
        notes=(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "start", start_and_note)
        began = time.monotonic()
        serve.serve(plan, is_stopped=lambda: time.monotonic() > began + 0.5, on_ready=lambda: pytest.fail("not ready"))
    assert seen[0].returncode is not None


@pytest.mark.parametrize(
    ("given", "variable", "backend"),
    [
        ((), "", "sqlite"),
        ((), "postgresql://me:secret@host/db", "postgresql://me:secret@host/db"),
        (("--backend", "sqlite:///mine.db"), "postgresql://me:secret@host/db", "sqlite:///mine.db"),
    ],
)
def test_a_database_may_be_named_where_nobody_reads_its_password(monkeypatch, capsys, given, variable, backend):
    """The flag wins over the variable, which is MLflow's own."""
    from simulation.cli import main

    def plan(options, *_):
        raise UserError(f"asked for {options.backend}")

    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", variable)
    monkeypatch.setattr(serve, "plan_server", plan)
    assert main(["tracking", "serve", *given]) == 2
    assert capsys.readouterr().err == f"facefed: asked for {backend}\n"
