"""Tracking addresses: what is accepted, what relative paths mean, and one line for what MLflow refuses."""

from pathlib import Path

import pytest

from common.errors import TrackingError
from common.tracking.address import resolve_uri, shown_uri, sqlite_path


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("sqlite:///mlflow.db", "sqlite:////base/mlflow.db"),
        ("sqlite:///sub/x.db?timeout=30", "sqlite:////base/sub/x.db?timeout=30"),
        ("sqlite:////data/x.db", "sqlite:////data/x.db"),
        (" http://127.0.0.1:5000/ ", "http://127.0.0.1:5000"),
        ("https://mlflow.example.org/tracking", "https://mlflow.example.org/tracking"),
        ("postgresql://me:secret@db/mlflow", "postgresql://me:secret@db/mlflow"),
        ("mysql+pymysql://me@db/mlflow", "mysql+pymysql://me@db/mlflow"),
    ],
)
def test_usable_addresses(uri, resolved):
    assert resolve_uri(uri, Path("/base")) == resolved


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("./mlruns", "folder"),
        ("mlruns", "folder"),
        ("/var/mlruns", "folder"),
        ("file:./mlruns", "file store"),
        ("file:///var/mlruns", "file store"),
        ("FILE:/x", "file store"),
        ("ftp://host/x", "unknown scheme"),
        ("databricks://profile", "unknown scheme"),
        ("http:5000", "no host"),
        ("http://", "no host"),
        ("sqlite://", "no database file"),
        ("sqlite:///:memory:", "no database file"),
        ("  ", "empty"),
    ],
)
def test_unusable_addresses_get_one_line_that_says_what_to_use(uri, word):
    with pytest.raises(TrackingError) as caught:
        resolve_uri(uri, Path("/base"))
    line = str(caught.value)
    assert word in line
    assert "sqlite:///mlflow.db" in line
    assert "http://127.0.0.1:5000" in line
    assert "\n" not in line


def test_a_folder_is_no_database(tmp_path):
    with pytest.raises(TrackingError, match=r"mlflow\.db"):
        resolve_uri(f"sqlite:///{tmp_path}", Path("/base"))


def test_an_error_does_not_show_the_password():
    with pytest.raises(TrackingError) as caught:
        resolve_uri("ftp://me:secret@host/x", Path("/base"))
    assert "secret" not in str(caught.value)
    assert shown_uri("postgresql://me:secret@db:5432/mlflow?x=1") == "postgresql://***@db:5432/mlflow?x=1"
    assert shown_uri("http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    assert shown_uri("sqlite:////data/x.db") == "sqlite:////data/x.db"


def test_the_file_of_a_database():
    assert sqlite_path("sqlite:////data/x.db?timeout=30") == Path("/data/x.db")
    assert sqlite_path("http://127.0.0.1:5000") is None
