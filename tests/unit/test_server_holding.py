"""Two servers at one run or one database, and databases that are none: one line, before anything is started."""

import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager

import pytest

from common.errors import UserError
from server.locks import database_held, run_held

HOLDS = """
import sys
from pathlib import Path
from server import locks
with getattr(locks, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_holds(what, path):
    """Another process that holds it while the block lasts, and is killed."""
    command = [sys.executable, "-c", HOLDS, what, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield
        other.kill()


def refused(hold, path):
    with pytest.raises(UserError) as found, hold(path):
        pass
    assert "\n" not in str(found.value)
    return str(found.value)


def database(path, table):
    with closing(sqlite3.connect(path)) as made:
        made.execute(f"create table {table} (x)")
        made.commit()
    return path


@pytest.mark.parametrize(
    ("what", "hold", "said"),
    [
        ("run_held", run_held, "another flower-server is at work on that run"),
        ("database_held", database_held, "is in use by another flower-server"),
    ],
)
def test_what_another_server_holds_is_refused_until_it_is_dead(tmp_path, what, hold, said):
    place = tmp_path if hold is run_held else tmp_path / "state.db"
    with another_holds(what, place):
        assert said in refused(hold, place)
    with hold(place):
        pass


def test_a_database_that_another_program_has_locked(tmp_path):
    path = database(tmp_path / "state.db", "node")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "is locked by another program" in refused(database_held, path)
        other.execute("ROLLBACK")
        with database_held(path):
            other.execute("insert into node values (1)")  # it is only looked at


def test_what_is_no_database_of_a_superlink(tmp_path):
    assert "is a folder" in refused(database_held, tmp_path)
    assert "there is no folder" in refused(database_held, tmp_path / "nowhere" / "state.db")
    (tmp_path / "text").write_text("nothing of SQLite's, and long enough to be looked at" * 9)
    assert "is no SQLite database" in refused(database_held, tmp_path / "text")
    assert "is another program's database" in refused(database_held, database(tmp_path / "mlflow.db", "experiments"))
    (tmp_path / "new.db").touch()
    with database_held(tmp_path / "new.db"):
        pass
