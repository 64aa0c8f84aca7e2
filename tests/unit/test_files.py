"""Files: replaced whole, a lock that tells another process from a file system without locks, seals, lines of JSON."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from clients.state_folder import state_folder_held
from common.errors import CheckpointError, TrackingError, UserError
from common.system import files
from common.system.files import InUse, append_line, lock, read_lines, read_sealed_json, replacing, write_sealed_json
from common.tracking.spool import Spool
from server.locks import run_held

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
HELD = (errno.EWOULDBLOCK, errno.EACCES)
HOLDS = """
import sys
from pathlib import Path
from common.system.files import lock
with Path(sys.argv[1]).open("w") as file:
    lock(file)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def flock_that_fails(monkeypatch, number):
    """The file system answers every call for a lock with that error."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "flock", fail)
        yield


def client_at(folder, said):
    """What every client does on a site of that folder first."""
    with state_folder_held(folder, "alpha", say=said.append):
        pass


def test_another_process_has_the_lock_until_it_is_dead(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "lock")]
    with (tmp_path / "lock").open("w") as file:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(InUse):
                lock(file)
            with pytest.raises(InUse):
                lock(file, within_s=0.2)
            other.kill()
        assert lock(file, within_s=5.0) is None
        with (tmp_path / "lock").open("w") as again, pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", HELD)
def test_what_another_holds_is_refused_by_everybody_with_the_line_that_says_so(tmp_path, monkeypatch, number):
    said = []
    monkeypatch.setattr("common.tracking.spool.LOCK_WITHIN_S", 0.0)
    with flock_that_fails(monkeypatch, number):
        with pytest.raises(UserError, match="is in use by another client; give each a name of its own"):
            client_at(tmp_path, said)
        with pytest.raises(UserError, match="another flower-server is at work on that run"), run_held(tmp_path):
            pass
        with pytest.raises(TrackingError, match="is in use by a run or a `facefed tracking sync`"):
            Spool(tmp_path / "run")
    assert said == []


@pytest.mark.parametrize("number", WITHOUT_LOCKS)
def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch, caplog, number):
    """Each goes on, with one line that says so."""
    said, why = [], os.strerror(number)
    with caplog.at_level(logging.WARNING), flock_that_fails(monkeypatch, number):
        client_at(tmp_path, said)
        with run_held(tmp_path):
            pass
        Spool(tmp_path / "run").close()
    assert len(said) == 1
    assert f"cannot be locked ([Errno {number}] {why}); see to it yourself" in said[0]
    assert len(caplog.messages) == 2
    for line, place in zip(caplog.messages, (tmp_path / "lock", tmp_path / "run"), strict=True):
        assert f"{place} cannot be locked ([Errno {number}] {why}); see to it yourself" in line


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    for content in ("old", "new"):
        with replacing(path) as aside:
            aside.write_text(content)
    with pytest.raises(TypeError, match="a bytes-like object is required"):
        files.write_parts(path, [b"half", "no bytes"])
    assert path.read_text() == "new"
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_what_shall_survive_a_power_cut_is_brought_to_the_disk_before_its_name(tmp_path, monkeypatch):
    steps, real = [], files.bring_to_disk

    def noted(path):
        real(path)
        steps.append((path.name, sorted(one.name for one in tmp_path.iterdir())))

    monkeypatch.setattr(files, "bring_to_disk", noted)
    files.write_bytes(tmp_path / "file", b"x")
    aside = f".file.{os.getpid()}.tmp"
    assert steps == [(aside, [aside]), (tmp_path.name, ["file"])]


def test_the_seal_of_json_is_the_digest_that_earlier_states_have(tmp_path):
    value = {"b": [1, 2.5], "a": {"x": None}}
    write_sealed_json(tmp_path / "s.json", value)
    written = json.loads((tmp_path / "s.json").read_text())
    assert written.pop("seal") == hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    assert written == value == read_sealed_json(tmp_path / "s.json")
    (tmp_path / "s.json").write_text((tmp_path / "s.json").read_text().replace("2.5", "2.6"))
    with pytest.raises(CheckpointError, match=r"s\.json is damaged: its content is not what was written"):
        read_sealed_json(tmp_path / "s.json")
    (tmp_path / "s.json").write_text(json.dumps(value))  # from before there were seals
    assert read_sealed_json(tmp_path / "s.json") == value


def test_lines_tell_where_they_are_and_what_is_wrong_with_them(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\n\n[2]\n{"n"\n{"n": 3}')
    lines = list(read_lines(path))
    assert [line.record for line in lines] == [{"n": 1}, None, None, None, {"n": 3}]
    assert [line.damage for line in lines] == ["", "", "is no record", "is no JSON", ""]
    assert [line.is_whole for line in lines] == [True] * 4 + [False]
    assert [(line.begin, line.end) for line in lines] == [(0, 9), (9, 10), (10, 14), (14, 19), (19, 27)]
    assert list(read_lines(path, lines[3].begin)) == lines[3:]
    path.write_bytes(b'{"n": 3')
    assert next(read_lines(path)).damage == "is cut: whoever wrote it was stopped"
    append_line(path, {"n": 4}, synced=True)
    assert [line.record for line in read_lines(path)] == [None, {"n": 4}]
