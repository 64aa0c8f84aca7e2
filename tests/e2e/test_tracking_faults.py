"""Tracking against a real MLflow server that dies, freezes, refuses or has no room: each point once, nothing waits.

`python -m bench.tracking` plays the same with the full figures.
"""

import pytest

from bench.mlflow_server import MlflowServer
from bench.tracked_points import assert_exactly_once, begin, log
from bench.tracking_faults import Faults, assert_true_times, survive_server, survive_trainer, wait_until_sent

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
    pytest.mark.usefixtures("silent_mlflow"),
]


@pytest.fixture(scope="module")
def migrated(tmp_path_factory, with_tables):
    """A database with MLflow's tables."""
    return with_tables(tmp_path_factory.mktemp("migrated"))


@pytest.fixture
def server(migrated, tmp_path):
    made = MlflowServer(tmp_path / "server", migrated)
    yield made
    made.kill()


def test_a_server_that_is_late_dies_twice_and_freezes_loses_and_doubles_nothing(server, tmp_path, caplog):
    faults = Faults(num_steps=200, num_kills=2, freeze_s=5.0, pause_s=0.01, seed=0)
    survived = survive_server(server, tmp_path / "run", faults)
    assert survived.num_points == 10 * (200 + 2 * 500)
    # Whatever waits gives the processor back itself; in which calls other programs took it is no matter of ours.
    alone = sorted(call.seconds for call in survived.frozen if not call.is_preempted)
    assert len(alone) > 100
    assert alone[len(alone) * 99 // 100] < 1e-3
    ours = [record.getMessage() for record in caplog.records if record.name == "facefed.tracking"]
    away = ["cannot be used now" in line for line in ours]
    assert away == [True, False] * (len(ours) // 2), ours  # one when it goes, one when it is well again
    assert 2 * 3 <= len(ours) <= 2 * 4  # late, killed twice, and frozen if this machine is slow
    assert all("takes records again" in line for line in ours[1::2]), ours


def test_a_trainer_that_is_killed_and_goes_on_loses_and_doubles_nothing(server, tmp_path):
    server.start()
    server.wait()
    assert survive_trainer(server, tmp_path / "run", num_steps=200, num_kills=2) == 2000


def test_a_wrong_allowed_host_and_a_store_without_room_cost_a_warning_each(server, tmp_path, caplog):
    server.start(hosts="elsewhere.example")
    server.wait()  # /health is green all the while
    folder = tmp_path / "run"
    run = begin(server.uri, folder)
    log(run, range(10))
    assert not run.flush(60.0)
    server.kill()
    server.artifacts.rmdir()
    server.artifacts.write_text("no folder", encoding="utf-8")  # every upload gets 500
    server.start()
    server.wait()
    run.log_text("kept", "notes/kept.txt")
    log(run, range(10, 20))
    while server.points(run.mlflow_run_id or "none").total() < 200:
        assert not run.flush(10.0)  # the metrics are there, the file is not
    server.artifacts.unlink()
    wait_until_sent(run)
    run.finish("FINISHED")
    assert assert_exactly_once(server, run.mlflow_run_id, folder, 20) == 200
    assert_true_times(server, run.mlflow_run_id, folder, "FINISHED")
    assert server.artifact(run.mlflow_run_id, "notes/kept.txt") == b"kept"
    ours = [record.getMessage() for record in caplog.records if record.name == "facefed.tracking"]
    expected = (
        "cannot be used now (",
        "takes records again",
        "takes records, but 1 of the run's files not",
        "files again",
    )
    assert [part in line for part, line in zip(expected, ours, strict=True)] == [True] * 4, ours
    assert "403" in ours[0]
