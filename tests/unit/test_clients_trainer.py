"""The resident trainer and the way to it: exact contents, nobody else's, and no end that leaves anyone waiting."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from tiny_federation import site_settings

from clients.flower import trainer
from clients.flower.launch import ClientOptions, Launch
from clients.flower.own_lines import mark_of
from clients.flower.trainer import (
    KEY,
    LEFT_ALONE,
    SITE,
    SOCKET,
    Trainer,
    TrainerGone,
    hand_over,
    serve,
    site_from_json,
    site_to_json,
)
from common.errors import FaceFedError, UserError
from common.system.files import SOCKET_PATH_BYTES, short_private_folder

ROOT = Path(__file__).parents[2]
PAUSED = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from clients.flower import trainer
from clients.policy import DEFAULT
trainer.end_with_parent(int(sys.argv[2]))
def answer(site, content):
    print("working", flush=True)
    time.sleep(120)
trainer.serve(Path(sys.argv[1]), SimpleNamespace(policy=DEFAULT), answer)
"""


def content_of(**arrays):
    return RecordDict(
        {
            "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            "sums": MetricRecord({"whole": 3, "part": 0.1, "none": float("nan"), "list": [1.5, 2.5]}),
            "task": ConfigRecord({"text": "Zoë ✓", "yes": True, "number": -7, "empty": ""}),
        }
    )


@pytest.fixture
def meeting(tmp_path_factory):
    """A folder with a key, as flower-client makes it; its path is short enough for a socket."""
    folder = tmp_path_factory.mktemp("t")
    (folder / KEY).write_bytes(b"k" * 32)
    return folder


@pytest.fixture
def serving(meeting):
    """Start a trainer's loop in a thread: serving(answer) -> the folder."""

    def begin(answer):
        threading.Thread(target=serve, args=(meeting, site_settings("alpha", meeting), answer), daemon=True).start()
        return meeting

    return begin


def test_a_content_arrives_as_it_was_and_so_does_the_answer(serving):
    rng = np.random.default_rng(0)
    sent = content_of(
        change=rng.normal(size=70_000).astype(np.float32), counts=np.arange(6).reshape(2, 3), empty=np.zeros((0, 4))
    )
    seen = []

    def answer(site, content):
        seen.append((site.name, content))
        return content

    back = hand_over(serving(answer), sent)
    for got in (seen[0][1], back):
        assert list(got) == list(sent)
        for name, array in sent["arrays"].items():
            assert got["arrays"][name].numpy().tobytes() == array.numpy().tobytes()
            assert (got["arrays"][name].dtype, got["arrays"][name].shape) == (array.dtype, array.shape)
        assert repr(dict(got["sums"])) == repr(dict(sent["sums"]))  # NaN is not equal to itself
        assert dict(got["task"]) == dict(sent["task"])
        assert [type(value) for value in got["task"].values()] == [str, bool, int, str]
    assert seen[0][0] == "alpha"


def test_a_refusal_is_its_one_line(serving):
    assert hand_over(serving(lambda _site, _content: "alpha: no"), content_of()) == "alpha: no"


def test_what_fails_costs_one_reply_and_the_next_is_answered(serving, caplog):
    answers = iter([ValueError("broken"), content_of()])

    def answer(_site, _content):
        given = next(answers)
        if isinstance(given, Exception):
            raise given
        return given

    folder = serving(answer)
    line = hand_over(folder, content_of())
    assert line == "alpha: its trainer failed (ValueError); the client's own output says why."
    assert "facefed: alpha: the trainer failed" in caplog.text
    (row,) = (folder / "alpha" / "egress" / "unknown.jsonl").read_text().splitlines()
    assert [part["text"] for part in json.loads(row)["parts"]] == [line]
    assert isinstance(hand_over(folder, content_of()), RecordDict)


def test_another_key_is_refused_and_the_right_one_is_served_after_it(serving, tmp_path):
    folder = serving(lambda _site, content: content)
    assert isinstance(hand_over(folder, content_of()), RecordDict)
    (tmp_path / KEY).write_bytes(b"x" * 32)
    (tmp_path / SOCKET).symlink_to(folder / SOCKET)
    with pytest.raises(TrainerGone, match="does not know this client's key"):
        hand_over(tmp_path, content_of())
    assert isinstance(hand_over(folder, content_of()), RecordDict)


def test_bytes_that_are_no_message_leave_the_trainer_well(serving):
    folder = serving(lambda _site, content: content)
    hand_over(folder, content_of())  # it listens
    for nonsense in (b"\x80\x04\x95pickle", b"{}", b'{"records": 3}', b"[]", b'{"refusal": "x"}'):
        with Client(str(folder / SOCKET), family="AF_UNIX", authkey=b"k" * 32) as connection:
            connection.send_bytes(nonsense)
            assert connection.poll(10)
    assert isinstance(hand_over(folder, content_of()), RecordDict)


def test_only_this_user_reaches_the_socket(serving):
    folder = serving(lambda _site, content: content)
    hand_over(folder, content_of())
    assert stat.S_IMODE((folder / SOCKET).stat().st_mode) == 0o600


def test_without_a_trainer_there_is_one_line_after_a_while(meeting):
    with pytest.raises(TrainerGone, match="not there"):
        hand_over(meeting, content_of(), there_within_s=0.2)
    with pytest.raises(TrainerGone, match="not there"):
        hand_over(meeting / "gone", content_of(), there_within_s=60.0)


@pytest.fixture
def paused(meeting):
    """A trainer process that works for two minutes on whatever comes."""
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, str(meeting), str(os.getpid())], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_trainer_whose_client_app_goes_ends_at_once(meeting, paused):
    code = (
        "import sys; from pathlib import Path; from flwr.app import RecordDict;"
        "from clients.flower.trainer import hand_over;"
        "hand_over(Path(sys.argv[1]), RecordDict())"
    )
    waiting = subprocess.Popen([sys.executable, "-c", code, str(meeting)], cwd=ROOT)
    assert paused.stdout.readline() == "working\n"
    waiting.kill()
    waiting.wait()
    assert paused.wait(timeout=60) == LEFT_ALONE


def test_who_packs_to_join_goes_on_when_its_server_goes_until_it_is_wanted(meeting, paused):
    """The first one waits, and goes; the trainer works on; the second one comes, and the trainer ends for it."""
    lines, join = [], RecordDict({"task": ConfigRecord({"kind": "join", "run_id": "r", "server_round": 0})})

    def wait(**how):
        with contextlib.suppress(TrainerGone):
            hand_over(meeting, join, **how)

    first = threading.Thread(target=wait, kwargs={"connected": lines.append})
    first.start()
    assert paused.stdout.readline() == "working\n"
    with socket.socket(fileno=os.dup(lines[0].fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
    first.join(60)
    with pytest.raises(subprocess.TimeoutExpired):
        paused.wait(timeout=4 * trainer.LOOK_EVERY_S)
    second = threading.Thread(target=wait, kwargs={"there_within_s": 1.0})
    second.start()
    assert paused.wait(timeout=60) == LEFT_ALONE
    second.join(60)


def test_a_client_app_whose_trainer_is_killed_hears_of_it(meeting, paused):
    told = []

    def wait():
        try:
            hand_over(meeting, content_of())
        except TrainerGone as gone:
            told.append(str(gone))

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert paused.stdout.readline() == "working\n"
    paused.kill()
    waiting.join(60)
    assert told == ["the trainer went in the middle of its work; it is started again."]


def test_a_trainer_ends_with_its_flower_client(tmp_path):
    """Even where the kernel has no signal for it: the parent here is a shell that is killed."""
    code = f"import sys; sys.argv[1:] = [{str(tmp_path)!r}, '%d']\n{PAUSED}"
    (tmp_path / KEY).write_bytes(b"k" * 32)
    (tmp_path / "t.py").write_text(code.replace("'%d'", "str(__import__('os').getppid())"))
    shell = f"{sys.executable} {tmp_path / 't.py'} & echo $!; wait"
    parent = subprocess.Popen(
        ["/bin/sh", "-c", shell],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while not (tmp_path / SOCKET).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline, "the trainer lives on"
        time.sleep(0.05)


def test_what_runs_beside_the_supernode_imports_neither_torch_nor_our_data_code():
    heavy = ("torch", "PIL", "mlflow")
    modules = "clients.app, clients.flower.supernode, clients.flower.supernode"
    code = f"import sys, {modules}; print(sorted(n for n in sys.modules if n.split('.')[0] in {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_failure_has_the_code_that_the_server_knows():
    from clients.flower import trainer
    from common.protocol import wire

    assert trainer.CLIENT_FAILED == wire.CLIENT_FAILED


# ---- as flower-client has it


def test_a_site_travels_as_json():
    site = dataclasses.replace(
        site_settings("alpha", Path("/somewhere")), tracking_uri="http://me:pw@h:1", pack_workers=3
    )
    assert site_from_json(site_to_json(site)) == site


@pytest.fixture
def resident(tmp_path, monkeypatch):
    """A Trainer whose process only says that it is there."""
    (tmp_path / "alpha").mkdir()
    script = tmp_path / "stand_in.py"
    script.write_text(
        "import sys, time\nprint('facefed: not for the user')\n"
        "print(sys.argv[1] + 'here', flush=True)\ntime.sleep(120)\n"
    )
    started = []

    def start(command, **named):
        from common.system.processes import start as real

        started.append(command)
        return real([sys.executable, str(script), mark_of((Path(command[-2]) / KEY).read_bytes())], **named)

    monkeypatch.setattr("clients.flower.trainer.start", start)
    said = []
    site = dataclasses.replace(site_settings("alpha", tmp_path), tracking_uri="http://me:hunter2@h:1")
    with Trainer(site, said.append) as made:
        yield made, started, said
    assert not made.folder.exists()


def _until(look):
    deadline = time.monotonic() + 60
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_meeting_place_is_this_users_and_no_command_line_tells_what_is_in_it(resident):
    made, started, _ = resident
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE((made.folder / name).stat().st_mode) for name in (KEY, SITE)} == {0o600}
    assert json.loads((made.folder / SITE).read_text())["tracking_uri"] == "http://me:hunter2@h:1"
    options = ClientOptions(host="127.0.0.1", port=1, connect_timeout_s=1.0, once=False)
    supernode = Launch(made._site, options, print)._command(made.folder)
    assert "hunter2" not in " ".join([*started[0], *supernode])
    assert str(made.folder) in supernode


def test_a_trainer_that_ends_is_started_again(resident):
    made, started, said = resident
    _until(lambda: said == ["here\n"])
    made.keep_alive()
    assert len(started) == 1
    made._process.kill()
    made._process.wait()
    made.keep_alive()
    assert len(started) == 2
    _until(lambda: said == ["here\n", "here\n"])
    assert "here" in (made._site.state_dir / "trainer.log").read_text()


def test_a_trainer_that_ended_for_lack_of_interest_is_no_warning(resident, caplog):
    made, started, _ = resident
    made._process.kill()
    made._process.wait()
    made._process.returncode = LEFT_ALONE
    made.keep_alive()
    assert len(started) == 2
    assert caplog.text == ""
    assert trainer.LEFT_ALONE not in (0, 1, 2)


LONG = "slurm_jobdir/1355700/scratch/net/home/a-user-with-a-long-name/job.t0016/tmp-of-this-step/and-a-bit-more"


def test_a_long_tmpdir_has_no_part_in_the_socket(tmp_path, monkeypatch):
    """A batch system's may leave no room for a name in the 107 bytes that a socket's path has."""
    far = tmp_path / LONG
    far.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(far))
    folder = short_private_folder("facefed-", trainer.SOCKET)
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with Listener(str(folder / trainer.SOCKET), family="AF_UNIX"):
            pass
    finally:
        shutil.rmtree(folder)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / LONG / "too"))
    monkeypatch.setattr("common.system.files.tempfile.mkdtemp", _refuse)
    with pytest.raises(UserError, match=rf"^TMPDIR {far} has \d+ characters, .* leaves 79; .*shorter folder\.$"):
        short_private_folder("facefed-", trainer.SOCKET)


@pytest.mark.parametrize("too_long", [0, 1])
def test_the_longest_tmpdir_that_is_taken_has_room_for_the_supernodes_socket_too(too_long, monkeypatch, tmp_path):
    """Its name is longer than that of the trainer's own, in the same folder."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        room = SOCKET_PATH_BYTES - len(f"/facefed-12345678/{trainer.API}") + too_long
        place = Path(short) / ("x" * (room - len(short) - 1))
        place.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(place))
        monkeypatch.setattr(trainer, "start", _refuse)
        monkeypatch.setattr(trainer.shutil, "rmtree", lambda folder, **_: left.append(Path(folder)))
        left = []
        with pytest.raises(PermissionError):
            Trainer(site_settings("alpha", tmp_path), print).__enter__()
        monkeypatch.undo()
        [folder] = left
        shutil.rmtree(folder)
        assert (folder.parent == place) == (not too_long)
        assert len(os.fsencode(folder / trainer.API)) <= SOCKET_PATH_BYTES


def _refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise OSError('AF_UNIX path too long')", "(exit code 1); the last that {log} has of it: OSError: AF_UNIX"),
        ("import os; os.kill(os.getpid(), 9)", "(killed by signal 9, perhaps for want of memory); the last that {log}"),
    ],
)
def test_a_trainer_that_cannot_start_is_not_started_for_ever(resident, tmp_path, code, why):
    made, started, _ = resident
    (tmp_path / "stand_in.py").write_text(code)
    made._process.kill()
    with pytest.raises(FaceFedError) as caught:
        _keep_alive(made, trainer.STARTS_IN_VAIN + 1)
    log = made._site.state_dir / "trainer.log"
    assert str(caught.value).startswith(f"the trainer cannot start {why.format(log=log)}")
    assert len(started) == trainer.STARTS_IN_VAIN
    assert caught.value.exit_code == 1


def _keep_alive(made, times):
    for _ in range(times):
        made._process.wait()
        made.keep_alive()


def test_a_trainer_that_had_served_is_started_as_often_as_it_ends(resident):
    made, started, _ = resident
    for _ in range(2 * trainer.STARTS_IN_VAIN):
        (made.folder / trainer.SOCKET).touch()
        made._process.kill()
        made._process.wait()
        made.keep_alive()
    assert len(started) == 2 * trainer.STARTS_IN_VAIN + 1
