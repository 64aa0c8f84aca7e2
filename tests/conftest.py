"""Fixtures for every test: the real faces beside the checkout, and silence towards the outside."""

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Threads that wait for others of their program sleep: while they spin, all other tests wait for a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent


def skip_or_fail(reason: str) -> None:
    """Skip a test that lacks something; in CI, where everything is set up, that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI has what this test needs, yet: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_faces() -> Path:
    """The folder of real photographs in the official layouts that developers and CI have beside the checkout."""
    folder = ROOT.parent / "shared" / "faces"
    if not folder.is_dir():
        skip_or_fail(f"the real faces are not here ({folder.name} beside the checkout)")
    return folder


@pytest.fixture(scope="session")
def tables_once(tmp_path_factory):
    """MLflow's tables are made once for this process, and then copied: its migrations take seconds each time."""
    import sqlalchemy
    from mlflow.store.db import utils
    from mlflow.store.model_registry import sqlalchemy_store

    make, made = utils._initialize_tables, tmp_path_factory.mktemp("tables") / "made.db"

    def copied(engine: sqlalchemy.Engine) -> None:
        if engine.dialect.name != "sqlite":
            make(engine)
            return
        if not made.exists():
            first = sqlalchemy.create_engine(f"sqlite:///{made}")
            make(first)
            first.dispose()
        with contextlib.closing(sqlite3.connect(made)) as source, engine.connect() as into:
            source.backup(into.connection.dbapi_connection)

    with pytest.MonkeyPatch.context() as patch:
        for module in (utils, sqlalchemy_store):
            patch.setattr(module, "_initialize_tables", copied)
        yield


@pytest.fixture(scope="module")
def silent_mlflow(tables_once):  # noqa: ARG001 - for what it does
    """The environment that our programs give MLflow: silent outside, and soon done with a server that is away."""
    from common.system.runtime import PATIENCE, SILENCE

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SILENCE, **PATIENCE}.items():
            patch.setenv(name, value)
        yield patch


@pytest.fixture(scope="module")
def one_thread():
    """Torch computes with one thread in all of a file, whose sums are the same on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_a_run(monkeypatch):
    """Let Flower's Message be made outside a run."""
    from tests.tiny_federation import enter_run

    enter_run(monkeypatch)


@pytest.fixture(autouse=True)
def _own_logging():
    """What a program run in this process sets up for its log goes with the test: its stream will be closed."""
    logger = logging.getLogger("facefed")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
