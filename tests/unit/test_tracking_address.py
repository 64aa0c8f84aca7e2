"""Tracking addresses: what is accepted, what relative paths mean, and one line for what MLflow refuses."""

from pathlib import Path

import pytest

from common.errors import TrackingError
from common.redact import shown_uri, without_password
from common.tracking import address
from common.tracking.address import resolve_uri, sqlite_path


@pytest.fixture
def installed(monkeypatch):
    """The drivers that are, as far as anybody looks."""
    here: set[str] = set()
    monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: name if name in here else None)
    return here


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("sqlite:///mlflow.db", "sqlite:////base/mlflow.db"),
        ("sqlite:///sub/x.db?timeout=30", "sqlite:////base/sub/x.db?timeout=30"),
        ("sqlite:////data/x.db", "sqlite:////data/x.db"),
        (" http://127.0.0.1:5000/ ", "http://127.0.0.1:5000"),
        ("https://mlflow.example.org/tracking", "https://mlflow.example.org/tracking"),
        ("postgresql://me:secret@db/mlflow", "postgresql+psycopg2://me:secret@db/mlflow"),
        ("PostgreSQL+psycopg2://db:5433/mlflow", "postgresql+psycopg2://db:5433/mlflow"),
        ("mysql:///mlflow?unix_socket=/run/x", "mysql+pymysql:///mlflow?unix_socket=/run/x"),
        ("mysql+pymysql://me@db/mlflow", "mysql+pymysql://me@db/mlflow"),
    ],
)
def test_usable_addresses(uri, resolved, installed):
    installed |= {"psycopg2", "pymysql"}
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
        ("http://host:5000x", "no port"),
        ("http://[::1", "no host"),
        ("postgresql://me:sec/ret@host/db", "in a password write / as %2F"),
        ("mysql://host:0/db", "no port"),
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


def test_the_driver_that_is_installed(installed):
    """SQLAlchemy 2.1 takes psycopg 3 for a plain postgresql:// address, where 2.0 took psycopg2."""
    for uri, package in (
        ("postgresql://me:secret@host/db", "psycopg2-binary"), ("postgresql+psycopg://host/db", "psycopg"),
        ("mysql://me:secret@host/db", "pymysql"), ("mysql+pymysql://host/db", "pymysql"),
    ):  # fmt: skip
        with pytest.raises(TrackingError, match=f"pip install {package}") as caught:
            resolve_uri(uri, Path("/base"))
        assert "secret" not in str(caught.value)
    installed.add("psycopg2")
    assert resolve_uri("postgresql://host/db", Path("/base")) == "postgresql+psycopg2://host/db"
    installed.add("psycopg")
    assert resolve_uri("postgresql://host/db", Path("/base")) == "postgresql+psycopg://host/db"
    assert resolve_uri("postgresql+psycopg2://host/db", Path("/base")) == "postgresql+psycopg2://host/db"


@pytest.mark.parametrize(
    "uri", ["ftp://me:secret@host/x", "postgresql://me:secret/1@host/x", "postgresql://me:#secret@host:5432x/x"]
)
def test_an_error_does_not_show_the_password(uri):
    with pytest.raises(TrackingError) as caught:
        resolve_uri(uri, Path("/base"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:secret@db:5432/mlflow?x=1", "postgresql://***@db:5432/mlflow?x=1"),
        ("postgresql://db/mlflow?user=me&password=secret&x=1", "postgresql://db/mlflow?user=me&password=***&x=1"),
        ("mysql+pymysql://me:sec/ret@db/mlflow", "mysql+pymysql://***@db/mlflow"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://me:secret@host/a@b", "https://***@host/a@b"),
        ("https://host/a@b", "https://host/a@b"),
        ("sqlite:////data/x.db", "sqlite:////data/x.db"),
    ],
)
def test_what_is_shown_of_an_address(uri, shown):
    assert shown_uri(uri) == shown


def test_a_text_without_the_password():
    uri = "postgresql://me:se%2Fcret@db/mlflow?sslpassword=hidden"
    text = f"{uri}: no se/cret and no se%2Fcret, nor hidden"
    assert without_password(text, uri) == "postgresql://***@db/mlflow?sslpassword=***: no *** and no ***, nor ***"
    assert without_password("all well", "http://host") == "all well"


def test_the_file_of_a_database():
    assert sqlite_path("sqlite:////data/x.db?timeout=30") == Path("/data/x.db")
    assert sqlite_path("http://127.0.0.1:5000") is None
