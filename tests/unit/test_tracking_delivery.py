"""What one server is sent: refusals that last and that pass, and where an experiment's artifacts go."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode

from common.errors import TrackingError
from common.tracking import delivery as delivery_module
from common.tracking.delivery import Delivery, experiment_id
from common.tracking.spool import Sent

POSTGRESQL = "postgresql+psycopg2://me:secret@host/runs"


def refusal(code: str) -> MlflowException:
    return MlflowException("(pymysql.err.InterfaceError) (0, '')", error_code=ErrorCode.Value(code))


class Client:
    """As much of MLflow's client as is asked for; refuses the first calls with the given error codes."""

    def __init__(self, *codes, location="mlflow-artifacts:/1"):
        self._codes, self.location, self.stage = list(codes), location, "active"
        self.points, self.made = [], []

    def log_batch(self, _run_id, *, metrics=(), **_more):
        if self._codes:
            raise refusal(self._codes.pop(0))
        self.points += [(metric.key, metric.step) for metric in metrics]

    def get_run(self, _run_id):
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"))

    def get_experiment_by_name(self, name):
        if not self.made and self.location is None:
            return None
        location = self.made[0][1] if self.made else self.location
        return SimpleNamespace(experiment_id="7", name=name, lifecycle_stage=self.stage, artifact_location=location)

    def create_experiment(self, name, artifact_location):
        self.made.append((name, artifact_location))
        if self._codes:
            raise refusal(self._codes.pop(0))


@pytest.fixture
def deliver(tmp_path, monkeypatch):
    """Sends points by a client and returns those that it took."""

    def send(client, count):
        monkeypatch.setattr(delivery_module, "open_client", lambda _uri: client)
        sent = Sent(run_key="k", run_ids={"": "r"})
        entries = [{"run": "", "key": "loss", "value": 1.0, "step": step, "time_ms": 1} for step in range(count)]
        Delivery("http://host", tmp_path, sent).send(entries)
        return client.points

    return send


def test_a_connection_that_broke_in_the_servers_hands_loses_no_point(deliver, caplog):
    """MLflow says BAD_REQUEST of any trouble of its database that SQLAlchemy does not call operational."""
    assert deliver(Client("BAD_REQUEST"), 1) == [("loss", 0)]
    assert not caplog.records


def test_what_is_refused_twice_is_refused_for_good(deliver, caplog):
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        assert deliver(Client(*["BAD_REQUEST"] * 4), 2) == [("loss", 1)]  # both together twice, then the first twice
    assert [line.partition(" (")[0] for line in caplog.messages] == ["Tracking: MLflow takes no metric 'loss'"]


def test_what_passes_stops_the_sending(deliver):
    with pytest.raises(MlflowException):
        deliver(Client("TEMPORARILY_UNAVAILABLE"), 1)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("http://host:5000", None),
        ("sqlite:////data/x.db", "file:///data/mlruns/fed"),
        (POSTGRESQL, "file:///home/runs/mlruns/fed"),
        ("mysql+pymysql://host/runs", "file:///home/runs/mlruns/fed"),
    ],
)
def test_where_a_new_experiment_keeps_its_artifacts(uri, place):
    client = Client(location=None)
    assert experiment_id(client, uri, "fed", Path("/home/runs")) == "7"
    assert client.made == [("fed", place)]


def test_an_experiment_that_another_process_makes_at_the_same_moment(tmp_path):
    assert experiment_id(Client("RESOURCE_ALREADY_EXISTS", location=None), POSTGRESQL, "fed", tmp_path) == "7"
    with pytest.raises(MlflowException):
        experiment_id(Client("INTERNAL_ERROR", location=None), POSTGRESQL, "fed", tmp_path)


def test_an_experiment_that_cannot_be_used_is_one_line(tmp_path):
    behind = Client(location="mlflow-artifacts:/7")
    assert experiment_id(behind, "http://host", "fed", tmp_path) == "7"
    with pytest.raises(TrackingError, match=r"'fed' of .* behind an MLflow server; give that") as caught:
        experiment_id(behind, POSTGRESQL, "fed", tmp_path)
    assert "secret" not in str(caught.value)
    behind.stage = "deleted"
    with pytest.raises(TrackingError, match="was deleted; bring it back with `mlflow experiments restore -x 7`"):
        experiment_id(behind, "http://host", "fed", tmp_path)


def test_a_database_is_asked_before_mlflow_is(monkeypatch, tmp_path):
    def refuse(uri):
        raise TrackingError(uri)

    monkeypatch.setattr(delivery_module, "check_database", refuse)
    for uri in ("http://host", f"sqlite:///{tmp_path}/x.db"):
        delivery_module.open_client(uri)
    with pytest.raises(TrackingError, match="runs"):
        delivery_module.open_client(POSTGRESQL)
