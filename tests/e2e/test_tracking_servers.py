"""Tracking against real servers: PostgreSQL, MariaDB and sqlite, behind HTTP and directly, with passwords and S3.

Three servers, started once: one over PostgreSQL with its artifacts in an S3 store, one over MariaDB, and one over
sqlite that asks for a password and listens everywhere.  Both databases got a run directly before their server began.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import tracked_record as record
from champions import assert_crowned_unless_held_back
from databases import PASSWORD, USER
from programs import BIN, assert_one_line, free_port
from tracking_deployment import DIRECT, Server, deployed, quiet

from common.errors import TrackingError
from common.tracking.address import resolve_uri
from common.tracking.spool import SENT_NAME
from simulation.admin.tracking_server import ServeOptions, plan_server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
]

SERVED = "facial_recognition_served"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with quiet(), deployed(tmp_path_factory.mktemp("deployment")) as opened:
        yield opened


def client_of(uri: str):
    """MLflow's own."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


# -- a database without a server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_a_record_goes_into_a_database_without_a_server(deployment, database):
    """A password stands in PGPASSWORD or an option file, and artifacts lie beside the run's folder."""
    uri = resolve_uri(deployment.own_address[database], deployment.folder)
    run_id = record.assert_whole(client_of(uri), DIRECT, f"from_{database}")
    [kept] = (deployment.folder / "runs" / "mlruns" / DIRECT / run_id).rglob("roc.png")
    assert kept.read_bytes() == record.PICTURE
    assert [path.name for path in (deployment.folder / f"from_{database}_cwd").iterdir()] == ["output"]


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_a_server_over_it_afterwards_shows_all_of_it(deployment, database):
    """Numbers and files, on the machine where the files are."""
    server = {"postgresql": deployment.over_postgresql, "mariadb": deployment.over_mariadb}[database]
    run_id = record.assert_whole(client_of(server.uri), DIRECT, f"from_{database}")
    page = f"{server.uri}/get-artifact?path=plots/roc.png&run_uuid={run_id}"  # what the user interface asks for
    with urllib.request.urlopen(page, timeout=60) as answer:  # noqa: S310
        assert answer.read() == record.PICTURE


# -- through a server --------------------------------------------------------------------------------------------------


def test_a_record_through_a_server_over_postgresql_with_artifacts_in_s3(deployment, tmp_path):
    """Everything; the files and the model go through the server, which alone knows the store's key."""
    run = record.write(deployment.over_postgresql.uri, tmp_path / "in_s3", SERVED)
    client = client_of(deployment.over_postgresql.uri)
    assert record.assert_whole(client, SERVED, "in_s3") == run.mlflow_run_id
    assert client.get_run(run.mlflow_run_id).info.artifact_uri.startswith("mlflow-artifacts:/")
    objects = deployment.store.objects()
    assert all(key.startswith("facefed/") for key in objects)
    [picture] = [
        content for key, content in objects.items() if key.endswith(f"{run.mlflow_run_id}/artifacts/plots/roc.png")
    ]
    assert picture == record.PICTURE
    assert {Path(key).name for key in objects if "/models/" in key} >= {"MLmodel", "model.pt2"}
    _assert_loads(deployment.over_postgresql, "in_s3_local")


def test_a_record_through_a_server_over_mariadb(deployment, tmp_path):
    run = record.write(deployment.over_mariadb.uri, tmp_path / "in_mariadb", SERVED)
    record.assert_whole(client_of(deployment.over_mariadb.uri), SERVED, "in_mariadb")
    [kept] = (deployment.over_mariadb.program.cwd / "mlartifacts").rglob(f"{run.mlflow_run_id}/artifacts/plots/roc.png")
    assert kept.read_bytes() == record.PICTURE
    _assert_loads(deployment.over_mariadb, "in_mariadb_local")


def _assert_loads(server: Server, name: str) -> None:
    """The registered model comes back through the server, and computes the same."""
    import mlflow.pytorch

    before = mlflow.get_tracking_uri()
    with patch.dict(os.environ):  # MLflow writes both addresses there too, for the processes that other tests start
        mlflow.set_tracking_uri(server.uri)
        mlflow.set_registry_uri(server.uri)
        try:
            loaded = mlflow.pytorch.load_model(f"models:/{name}@champion")
        finally:
            mlflow.set_tracking_uri(before)
            mlflow.set_registry_uri("")
    pictures = torch.linspace(-1, 1, 3 * 3 * record.IMAGE_SIZE**2).reshape(3, 3, record.IMAGE_SIZE, -1)
    torch.testing.assert_close(loaded(pictures), record.model()(pictures))


def test_a_whole_training_through_a_server(deployment, faces, programs):
    """The program itself, in a process and a folder of its own."""
    ended = programs.run(
        "facefed", "train", "local", "--client", "celeba", "--data-dir", faces.celeba, "--epochs", 2, *faces.small,
        *faces.cache, "--tracking-uri", deployment.over_mariadb.uri,
    )  # fmt: skip
    assert ended.code == 0, ended
    assert ended.err == ""
    client = client_of(deployment.over_mariadb.uri)
    [run] = client.search_runs([client.get_experiment_by_name("facial_recognition_local_celeba").experiment_id])
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train_loss")] == [1, 2]
    assert {"config.toml", "plots", "metrics.json"} <= {one.path for one in client.list_artifacts(run.info.run_id)}
    assert_crowned_unless_held_back(client, "celeba_cnn_local")
    assert not [path.name for path in programs.cwd.iterdir() if path.name.startswith("ml")]


# -- passwords ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def login(deployment, monkeypatch):
    """Puts the administrator's name and a password, of the server's own making, where MLflow's clients look."""
    made = json.loads((deployment.with_password.program.cwd / "mlflow-auth" / "secrets.json").read_text())

    def put(password: str = made["MLFLOW_AUTH_ADMIN_PASSWORD"]) -> str:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        return password

    return put


def test_a_record_through_a_server_that_asks_for_a_password(deployment, login, tmp_path):
    login()
    record.write(deployment.with_password.uri, tmp_path / "known", SERVED)
    record.assert_whole(client_of(deployment.with_password.uri), SERVED, "known")
    _assert_loads(deployment.with_password, "known_local")


def test_without_the_password_training_goes_on_and_sync_brings_everything(deployment, login, tmp_path, caplog):
    runs = {}
    for name, password in (("stranger", ""), ("mistaken", "not the password")):
        if password:
            login(password)
        with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
            caplog.clear()
            run = runs[name] = record.begin(deployment.with_password.uri, tmp_path / name, SERVED)
            record.log_steps(run, range(record.STEPS))
            record.log_rest(run, registers=False)
            run.finish("FINISHED")
        assert ["cannot be used now" in line for line in caplog.messages] == [True, False], caplog.messages
        assert "authenticated" in caplog.messages[0]
        assert "are not at" in caplog.messages[1]
    right = login()
    synced = subprocess.run(
        [BIN / "facefed", "tracking", "sync", *(run.folder for run in runs.values())],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (synced.returncode, synced.stderr) == (0, "")
    assert right not in synced.stdout
    for name in runs:
        record.assert_whole(client_of(deployment.with_password.uri), SERVED, name, registers=False)


# -- whom it answers ---------------------------------------------------------------------------------------------------


def test_a_client_is_answered_under_the_servers_names_only(deployment, login, monkeypatch):
    """MLflow's own client, for which every name leads to this machine."""
    from mlflow.exceptions import MlflowException

    login()
    ask = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _name, *rest, **more: ask("127.0.0.1", *rest, **more))
    for name in ("localhost", "127.0.0.1", socket.gethostname(), "mlflow"):
        found = client_of(f"http://{name}:{deployment.with_password.port}").search_experiments(max_results=1)
        assert len(found) == 1, name
    for name in ("evil.example", "mlflow.evil.example"):
        with pytest.raises(MlflowException, match="403"):
            client_of(f"http://{name}:{deployment.with_password.port}").search_experiments(max_results=1)


# -- a database that dies ----------------------------------------------------------------------------------------------


def test_a_database_that_dies_under_its_server_costs_nothing(deployment, tmp_path, caplog):
    """One run goes through the server, which lives on and answers with errors; another is the database's own client."""
    server, direct = deployment.over_postgresql.uri, deployment.own_address["postgresql"]
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        through = record.begin(server, tmp_path / "through_server", SERVED)
        alone = record.begin(direct, tmp_path / "alone", DIRECT)
        for run in (through, alone):
            record.log_steps(run, range(50))
            _wait_until_sent(run)
        deployment.postgresql.stop(signal.SIGQUIT)  # without goodbye
        assert _status(f"{server}/health") == 200
        assert _status(f"{server}/api/2.0/mlflow/experiments/get?experiment_id=0") in (500, 503)
        began = time.monotonic()
        for run in (through, alone):
            record.log_steps(run, range(50, record.STEPS))
        assert time.monotonic() - began < 20.0
        for run in (through, alone):
            assert not run.flush(120.0)
            record.log_rest(run, registers=False)
        deployment.postgresql.start()
        for run in (through, alone):
            _wait_until_sent(run)
            run.finish("FINISHED")
    record.assert_whole(client_of(server), SERVED, "through_server", registers=False)
    record.assert_whole(client_of(server), DIRECT, "alone", registers=False)
    away = [line for line in caplog.messages if "cannot be used now" in line]
    again = [line for line in caplog.messages if "takes records again" in line]
    assert (len(away), len(again)) == (2, 2), caplog.messages
    assert {one.name.partition(".")[0] for one in caplog.records} == {"facefed"}  # MLflow tells 60 lines each time
    assert PASSWORD not in caplog.text


def _wait_until_sent(run) -> None:
    deadline = time.monotonic() + 200.0
    while not run.flush(5.0):
        assert time.monotonic() < deadline, "the server did not get everything"
        time.sleep(0.1)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


# -- what is wrong or secret -------------------------------------------------------------------------------------------


def test_no_password_is_shown_in_any_output_log_or_command_line(deployment):
    """Of all three servers; only the line that was typed here holds MariaDB's."""
    made = json.loads((deployment.with_password.program.cwd / "mlflow-auth" / "secrets.json").read_text()).values()
    for server in (deployment.over_postgresql, deployment.over_mariadb, deployment.with_password):
        processes = [one for one in server.program.processes() if one.pid != server.program.process.pid]
        assert len(processes) >= 2
        told = "\n".join([server.shown, *(" ".join(one.cmdline()) for one in processes)])
        for secret in (PASSWORD, *made, *deployment.store.variables.values()):
            assert secret not in told or secret == deployment.store.variables["AWS_DEFAULT_REGION"], server
        assert "***@" in server.shown or server is deployment.with_password


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_a_database_that_refuses_is_one_line_without_the_password(deployment, database, tmp_path, monkeypatch):
    monkeypatch.delenv("PGPASSWORD")
    real = getattr(deployment, database)
    for uri, fragment in (
        (real.uri(database="none"), "none"),
        (real.uri(user=f"{USER}:wrong-{PASSWORD}"), "password"),
        (real.uri(user=f"nobody:{PASSWORD}"), "nobody"),
    ):
        with pytest.raises(TrackingError, match="cannot be opened") as refused:
            plan_server(ServeOptions(port=free_port(), backend=uri), {}, tmp_path)
        line = str(refused.value)
        assert fragment in line.lower()
        assert "\n" not in line
        assert PASSWORD not in line
    assert list(tmp_path.iterdir()) == []


def test_the_program_refuses_with_exit_code_2(deployment, programs):
    serve = "facefed", "tracking", "serve", "--port"
    wrong = programs.run(*serve, free_port(), "--backend", deployment.mariadb.uri(database="none"))
    assert_one_line(wrong, "facefed", "mysql+pymysql://***@127.0.0.1", "'none'")
    taken = programs.run(*serve, deployment.over_mariadb.port)
    assert_one_line(taken, "facefed", "Address already in use")


def test_a_run_goes_on_beside_a_database_that_refuses_it(deployment, tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("PGPASSWORD")
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        run = record.begin(deployment.postgresql.uri(user=f"{USER}:wrong-{PASSWORD}"), tmp_path / "refused", DIRECT)
        record.log_steps(run, range(5))
        run.finish("FINISHED")
    assert ["cannot be used now" in line for line in caplog.messages] == [True, False]
    assert "password authentication failed" in caplog.messages[0]
    kept = [path.read_text() for path in (run.folder / "spool.jsonl", run.folder / SENT_NAME)]
    assert PASSWORD not in "".join([caplog.text, *kept])


def test_an_experiment_of_a_server_is_not_filled_past_it(deployment, tmp_path, caplog):
    """Its artifacts can be reached through the server only; `sync` there brings everything, once."""
    client = client_of(deployment.over_mariadb.uri)
    client.create_experiment("behind a server")
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        run = record.begin(deployment.mariadb.uri(), tmp_path / "past", "behind a server")
        record.log_steps(run, range(record.STEPS))
        record.log_rest(run, registers=False)
        run.finish("FINISHED")
    assert "keeps its artifacts behind an MLflow server; give that server's address" in caplog.messages[0]
    assert PASSWORD not in caplog.text
    from common.tracking.sync import sync_run

    sync_run(run.folder, deployment.over_mariadb.uri)
    record.assert_whole(client, "behind a server", "past", registers=False)
