"""Where a run is looked at: the command, then the address of its page; no password."""

import pytest

from common import config
from common.settings import Settings
from common.tracking.page import run_page, tracking_line
from common.tracking.spool import Sent, save_sent

RUN = "0123456789abcdef0123456789abcdef"


def tracked(**values):
    settings = Settings()
    for key, value in values.items():
        settings = config.with_value(settings, "tracking", key, value)
    return settings


@pytest.fixture
def taken(tmp_path):
    """A run's folder, once MLflow at an address has the run."""

    def at(uri):
        (tmp_path / "spool.jsonl").touch()
        save_sent(tmp_path, Sent(uri=uri, run_ids={"": RUN, "celeba": "other"}, experiment_id="12"))
        return tmp_path

    return at


def test_without_mlflow_the_spool_is_the_record(tmp_path):
    assert tracking_line(tracked(enabled=False), tmp_path) == "off; the record is spool.jsonl in the run folder"


def test_a_servers_address_opens_the_run_itself_and_shows_no_password(taken):
    uri = "http://***@host:5000"
    settings = tracked(uri="http://me:secret@host:5000")
    assert settings.tracking.uri == uri
    page = f"http://host:5000/#/experiments/12/runs/{RUN}"
    assert tracking_line(settings, taken(uri)).splitlines() == [uri, f"this run: {page}"]


def test_a_database_needs_a_server_first(taken, monkeypatch):
    uri = "sqlite:////there/mlflow.db"
    lines = tracking_line(tracked(uri=uri), taken(uri)).splitlines()
    page = f"http://127.0.0.1:5000/#/experiments/12/runs/{RUN}"
    assert lines == [uri, f"to look: facefed tracking serve --backend {uri}", f"this run, then: {page}"]
    assert max(map(len, lines)) <= 120
    monkeypatch.chdir(taken(uri))
    own = f"sqlite:///{taken(uri)}/mlflow.db"
    assert tracking_line(tracked(uri=own), taken(own)).splitlines()[1] == "to look: facefed tracking serve"


def test_a_run_that_mlflow_has_not_taken_has_no_page(tmp_path):
    assert run_page("http://host:5000", tmp_path) == ""
    assert tracking_line(tracked(uri="http://host:5000"), tmp_path) == "http://host:5000"
