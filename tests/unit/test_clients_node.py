"""The executor in the place of Flower's, and the pace of the SuperNode's loop."""

import contextlib
import inspect
import json
import os
import re
import socket
import stat
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import httpx
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from tiny_federation import site_settings

from clients.egress import UNRECORDED
from clients.flower import patches, supernode
from clients.flower.parts import Answered, Store
from clients.flower.patches import ANSWER_POLL_S, LONGEST_PAUSE_S, Pace
from clients.flower.supernode import Executor
from clients.flower.trainer import CLIENT_FAILED, KEY, Trainer, TrainerGone
from common.system.processes import child_environment, free_port, start, stop

pytestmark = pytest.mark.usefixtures("in_a_run")


class Found:
    """What AcquireTask answers."""

    def __init__(self, token=""):
        self.token = token

    def HasField(self, name):  # noqa: N802 - protobuf's name
        return name == "task" and bool(self.token)


class StandIn:
    """The SuperNode's API: hands out tokens, and keeps what is pushed."""

    def __init__(self, tokens):
        self.tokens, self.outputs, self.replies = list(tokens), [], []
        self.over = threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def AcquireTask(self, request):  # noqa: N802
        assert list(request.supported_task_types) == ["flwr-clientapp"]
        if not self.tokens:
            self.over.set()
            time.sleep(3600)
        return Found(self.tokens.pop(0))

    def SendTaskHeartbeat(self, _):  # noqa: N802
        raise httpx.ConnectError("the heart of this test does not beat")


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """executed(tokens, hand_over, pull) -> the stand-in, after an Executor took those tokens."""

    def execute(tokens, hand_over, pull=None):
        (tmp_path / KEY).write_bytes(b"k" * 32)
        stand_in = StandIn(tokens)
        request = Message(RecordDict(), 5, "train")
        monkeypatch.setattr(Executor, "_client", lambda *_: stand_in)
        monkeypatch.setattr(supernode, "pull_task_input", pull or (lambda _: (request, "context", None, None)))
        monkeypatch.setattr(supernode, "push_message", lambda _, reply, __: stand_in.replies.append(reply))
        monkeypatch.setattr(supernode, "push_task_output", lambda _, *output: stand_in.outputs.append(output))
        monkeypatch.setattr(supernode, "hand_over", hand_over)
        monkeypatch.setattr(supernode, "LOOK_EVERY_S", 0.01)
        serving = Executor(tmp_path, name="alpha", pace=Pace(), ledger=tmp_path / "egress", store=Store())
        threading.Thread(target=serving.serve, daemon=True).start()
        assert stand_in.over.wait(60)
        return stand_in

    return execute


def test_while_a_message_is_worked_on_its_heart_beats_whatever_becomes_of_a_beat(monkeypatch):
    monkeypatch.setattr(supernode, "BEAT_EVERY_S", 0.001)
    told, enough = [], threading.Event()

    def beat(_):
        told.append(threading.current_thread().name)
        if len(told) == 3:
            enough.set()
        raise httpx.ConnectError("lost")

    with supernode.beating(SimpleNamespace(SendTaskHeartbeat=beat)):
        assert enough.wait(60)
    assert "heart" not in [thread.name for thread in threading.enumerate()]
    assert len(told) >= 3


def test_the_supernode_waits_for_several_beats():
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE

    assert supernode.BEAT_EVERY_S * 5 < HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE


def test_a_message_is_answered_with_what_the_trainer_says(executed):
    told = RecordDict()
    stand_in = executed(["token"], lambda _folder, _content, _read, **_: told)
    assert [reply.content for reply in stand_in.replies] == [told]
    assert stand_in.outputs == [("context", SubStatus.COMPLETED, "")]


@pytest.mark.parametrize(
    ("answer", "said"), [("alpha: no pictures", "alpha: no pictures"), (TrainerGone("it went"), "alpha: it went")]
)
def test_a_refusal_and_a_lost_trainer_are_error_replies_at_once(executed, answer, said):
    def hand_over(_folder, _content, _read, **_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    stand_in = executed(["token"], hand_over)
    (reply,) = stand_in.replies
    assert (reply.error.code, reply.error.reason) == (CLIENT_FAILED, said)
    assert stand_in.outputs == [("context", SubStatus.COMPLETED, "")]


def test_what_is_said_in_the_trainers_place_is_in_the_ledger_first(executed, tmp_path):
    def gone(_folder, _content, _read, **_):
        raise TrainerGone("it went")

    task = {"kind": "train", "run_id": "run-1", "server_round": 3}
    request = Message(RecordDict({"task": ConfigRecord(task)}), 5, "train")
    (reply,) = executed(["token"], gone, lambda _: (request, "context", None, None)).replies
    line = json.loads((tmp_path / "egress" / "run-1.jsonl").read_text())
    assert (line["client"], line["answer_to"], line["round"]) == ("alpha", "train", 3)
    assert [part["text"] for part in line["parts"]] == [reply.error.reason] == ["alpha: it went"]


def test_where_nothing_can_be_written_down_fixed_words_leave(executed, tmp_path):
    (tmp_path / "egress").write_text("a file where the ledger's folder belongs")

    def gone(_folder, _content, _read, **_):
        raise TrainerGone("a word about this site")

    (reply,) = executed(["token"], gone).replies
    assert reply.error.reason == UNRECORDED


def test_a_message_that_cannot_be_taken_is_told_and_the_next_is_answered(executed):
    request = Message(RecordDict(), 5, "train")
    inputs = iter([RuntimeError("no message"), (request, "context", None, None)])

    def pull(_):
        given = next(inputs)
        if isinstance(given, Exception):
            raise given
        return given

    stand_in = executed(["first", "", "second"], lambda _folder, _content, _read, **_: RecordDict(), pull)
    assert [status for _, status, _ in stand_in.outputs] == [SubStatus.FAILED, SubStatus.COMPLETED]
    assert len(stand_in.replies) == 1


def test_whoever_takes_a_message_from_the_supernode_must_know_the_key(tmp_path):
    told = supernode.own_arguments(tmp_path)
    assert told[told.index("--isolation") + 1] == "process"
    assert told[told.index("--superexec-auth-secret-file") + 1] == str(tmp_path / KEY)
    assert told[told.index("--host") + 1] == "127.0.0.1"


@pytest.mark.skipif(sys.platform != "linux", reason="sockets of other processes are looked at")
def test_the_supernode_is_met_in_the_folder_and_at_no_port(tmp_path):
    """A port stood in the command line seconds before it was bound, for any account of the machine to take."""
    (tmp_path / KEY).write_bytes(b"k" * 32)
    address, last = f"127.0.0.1:{free_port()}", tmp_path / "site" / "node-id"
    command = [sys.executable, "-P", "-m", "clients.flower.supernode", tmp_path, "alpha", last]
    with (tmp_path / "log").open("wb") as log:
        started = start(
            [*map(str, command), "--insecure", "--superlink", address],
            environment=child_environment(tmp_path / "flwr"),
            output=log,
        )
    executor = Executor(tmp_path, name="alpha", pace=Pace(), ledger=tmp_path / "egress", store=Store())
    try:
        deadline, status = time.monotonic() + 120, None
        while status is None:
            ports = [one for one in psutil.Process(started.pid).net_connections("inet") if one.status == "LISTEN"]
            assert ports == []
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            if not (tmp_path / supernode.API).exists():
                time.sleep(0.05)
                continue
            try:
                executor._client().AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
            except httpx.HTTPStatusError as refused:
                status = refused.response.status_code
            except httpx.TransportError:
                time.sleep(0.05)
        assert status == 401  # it is Flower's API: it wants the key
        assert stat.S_ISSOCK((tmp_path / supernode.API).stat().st_mode)
    finally:
        executor._through._line.close()
        stop(started, 0.1)


# ---- the pace


def test_the_answer_ends_the_sleep_that_waits_for_it():
    pace = Pace()
    threading.Timer(0.05, pace.tell_done).start()
    started = time.monotonic()
    for _ in range(200):  # as Flower's loop looks; were it deaf it would take 100 s
        pace.sleep(ANSWER_POLL_S)
        if time.monotonic() - started > 0.05:
            break
    assert time.monotonic() - started < 30


def test_waiting_for_an_answer_tells_that_there_is_work():
    pace = Pace()
    pace.tell_done()
    pace.sleep(ANSWER_POLL_S)
    started = time.monotonic()
    pace.wait_for_work(60.0)
    assert time.monotonic() - started < 30
    pace.wait_for_work(0.0)  # once only: the second call waits its time and returns


def test_looks_for_messages_are_frequent_first_and_then_as_rare_as_flowers(monkeypatch):
    pace, now, slept = Pace(), [0.0], []
    pace._last_message = 0.0
    monkeypatch.setattr("clients.flower.patches.time.monotonic", lambda: now[0])
    monkeypatch.setattr("clients.flower.patches.time.sleep", slept.append)
    for now[0] in (0.0, 0.5, 10.0, 29.0, 31.0, 1e6):
        pace.sleep(3)
    assert slept == pytest.approx([0.1, 0.1, 1.0, 2.9, LONGEST_PAUSE_S, LONGEST_PAUSE_S])


def test_what_is_put_into_flowers_loop_is_what_it_uses(monkeypatch):
    """Names inside Flower that `quicken` replaces: another version may have others, and would be slow again."""
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supernode import start_client_internal

    monkeypatch.setattr(start_client_internal, "time", start_client_internal.time)
    monkeypatch.setitem(inflatable_utils.pull_objects.__kwdefaults__, "initial_backoff", 1.0)
    source = inspect.getsource(start_client_internal)
    assert source.count("time.sleep(3)") == 1
    assert source.count("time.sleep(0.5)") == 2
    assert len(re.findall(r"(?<![\w.])time\.\w+\(", source)) == 3, "the loop asks `time` for more than sleep"
    assert "pull_objects(\n                obj_ids_to_pull,\n                pull_object_fn=" in source
    patches.quicken(Pace())
    assert isinstance(start_client_internal.time, Pace)
    backoff = inspect.signature(inflatable_utils.pull_objects).parameters["initial_backoff"]
    assert backoff.default == patches.QUICK_RETRY_S


def test_the_key_is_readable_by_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_start", lambda _: None)
    trainer = Trainer(site_settings("alpha", tmp_path), lambda _: None)
    monkeypatch.setattr(Trainer, "__exit__", lambda *_: None)
    with trainer as resident:
        assert (resident.folder / KEY).stat().st_mode & 0o777 == 0o600
        assert resident.folder.stat().st_mode & 0o777 == 0o700


# ---- beats: a site that works for longer than the server waits for one answer


class AtWork:
    """A trainer whose answer is there when `finish` was called; notes who was hung up on."""

    def __init__(self):
        self.finished, self.started, self.left = threading.Event(), [], []

    def hand_over(self, _folder, content, _read, *, connected):
        self.started.append(dict(content["task"]))
        mine, theirs = socket.socketpair()
        with mine, theirs:
            connected(mine)
            while not self.finished.is_set():
                mine.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    if mine.recv(1) == b"":
                        self.left.append(content["task"]["run_id"])
                        raise TrainerGone("it was left")
        return RecordDict({"answer": ConfigRecord({"of": content["task"]["kind"]})})


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(an Executor in a site's folder, its trainer, ask), where ask(task's fields) -> the reply."""
    (tmp_path / KEY).write_bytes(b"k" * 32)
    trainer = AtWork()
    monkeypatch.setattr(supernode, "hand_over", trainer.hand_over)
    monkeypatch.setattr(supernode.beats, "SHORTEST_S", 0.02)
    executor = Executor(tmp_path, name="alpha", pace=Pace(), ledger=tmp_path / "egress", store=Store())

    def ask(message_id="m1", **values):
        plain = {"kind": "train", "run_id": "run-1", "server_round": 3, "beat_s": 0.02, "again": "", "received": ""}
        message = Message(RecordDict({"task": ConfigRecord(plain | values)}), 5, "train")
        message.metadata.__dict__["_message_id"] = message_id
        return executor._answered(message, Answered())

    return executor, trainer, ask


def lines_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "egress" / "run-1.jsonl").read_text().splitlines()]


def test_a_long_task_is_answered_by_beats_and_then_by_its_answer(site, tmp_path):
    _, trainer, ask = site
    (tmp_path / "progress.json").write_text(
        json.dumps({"done": 31, "total": 100, "seconds": 10.0, "work": "training", "time": time.time() + 60})
    )
    said = [ask(), ask("m2", again="m1", received="train 3 9 " + "a" * 64)]
    for reply in said:
        record = dict(reply.content["progress"])
        assert (record["client"], record["work"], record["percent"]) == ("alpha", "training", 31)
    trainer.finished.set()
    assert dict(ask("m3", again="m1").content["answer"]) == {"of": "train"}
    assert len(trainer.started) == 1, "the trainer was asked once"
    lines = lines_of(tmp_path)
    assert [(line["kind"], line["answer_to"], line["round"]) for line in lines] == [
        ("sent", "train", 3), ("received", "train", 3), ("sent", "train", 3)
    ]  # fmt: skip
    assert [part["name"] for part in lines[0]["parts"]] == [
        f"progress.{name}" for name in ("client", "work", "percent", "left_s", "still_s")
    ]


def test_an_answer_that_came_between_two_questions_is_kept(site):
    executor, trainer, ask = site
    ask()
    trainer.finished.set()
    assert executor._job.done.wait(30)
    assert "answer" in ask("m2", again="m1").content


def test_without_beats_wanted_the_answer_is_waited_for(site):
    _, trainer, ask = site
    threading.Timer(0.2, trainer.finished.set).start()
    assert "answer" in ask(beat_s=0.0).content


def test_another_task_ends_the_one_that_is_worked_on(site):
    """The server gave that up; were it worked on, the site would be late for the next round too."""
    _, trainer, ask = site
    ask(run_id="run-1")
    threading.Timer(0.3, trainer.finished.set).start()
    reply = ask("m2", run_id="run-2", beat_s=0.0)
    assert "answer" in reply.content
    assert trainer.left == ["run-1"]
    assert [task["run_id"] for task in trainer.started] == ["run-1", "run-2"]


def test_to_join_the_same_run_again_goes_on_with_the_packing_and_to_join_another_does_not(site):
    _, trainer, ask = site
    ask(kind="join")
    assert "progress" in ask("m2", kind="join").content
    assert len(trainer.started) == 1
    assert "progress" in ask("m3", kind="join", run_id="run-2").content
    assert [task["run_id"] for task in trainer.started] == ["run-1", "run-2"]


def test_what_a_killed_trainer_left_is_no_news(site, tmp_path):
    """Were it believed, the server would hear that the site stands still since yesterday, and give it up."""
    (tmp_path / "progress.json").write_text(
        json.dumps({"done": 31, "total": 100, "seconds": 10.0, "work": "training", "time": time.time() - 86_400})
    )
    _, _, ask = site
    assert dict(ask().content["progress"])["work"] == "working"


@pytest.mark.parametrize("again", ["m0", "m2"])
def test_a_task_that_this_process_does_not_know_is_refused_in_one_line(site, tmp_path, again):
    """A stale question, or a client that was started again; and the one at work goes on."""
    _, trainer, ask = site
    ask()
    reply = ask("m2", again=again)
    assert reply.error.reason == f"alpha: {supernode.NOT_HERE}"
    assert [part["text"] for part in lines_of(tmp_path)[-1]["parts"]] == [reply.error.reason]
    trainer.finished.set()
    assert "answer" in ask("m3", again="m1").content


def test_a_beat_that_cannot_be_written_down_does_not_leave(site, tmp_path):
    (tmp_path / "egress").write_text("a file where the ledger's folder belongs")
    _, _, ask = site
    assert ask().error.reason == UNRECORDED


def training(minutes, model):
    """A train message whose settings keep a round between its epochs so often; its model came in pieces."""
    settings = json.dumps({"training": {"checkpoint_minutes": minutes}})
    task = {"kind": "train", "run_id": "run-1", "server_round": 3, "settings": settings}
    content = RecordDict({"task": ConfigRecord(task)})
    array = Array(dtype="float32", shape=(len(model) // 4,), stype="flat", data=model)
    content["arrays"] = ArrayRecord({"shared": array})
    content["arrays"]["shared"].data = deque([model[:5], model[5:]])
    return Message(content, 5, "train")


def sent(content):
    """The model as `send_content` would send it, which gives pieces away."""
    data = content["arrays"]["shared"].data
    return b"".join(data.popleft() for _ in range(len(data))) if isinstance(data, deque) else bytes(data)


@pytest.mark.parametrize(
    ("minutes", "grows", "tries"),
    [(15.0, [True, False], 2), (15.0, [True, True, True], 4), ("off", [True], 1), (15.0, [False], 1)],
)
def test_the_next_trainer_gets_the_same_task_where_the_last_one_left_more_of_the_round(
    executed, tmp_path, minutes, grows, tries
):
    model, seen, written = bytes(range(64)), [], iter(grows)

    def hand_over(_folder, content, _read, **_):
        seen.append(sent(content))
        grew = next(written, None)
        if grew is None:
            return RecordDict()
        if grew:
            file = tmp_path / "private" / "run-1" / "midway.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            os.utime(file, (time.time() + 60 + len(seen),) * 2)
        raise TrainerGone("it went")

    request = training(minutes, model)
    (reply,) = executed(["token"], hand_over, lambda _: (request, "context", None, None)).replies

    assert seen == [model] * tries
    assert reply.has_error() == (grows != [True, True, True])
    assert not list((tmp_path / "private").glob("run-1/tmp*"))
