"""Where a round's seconds go: each moment in one phase, at the server and at each client."""

import itertools
import json
import time

import pytest
from tiny_federation import MANIFEST, ScriptedMailbox, client, enter_run, federation_over, reply_to, settings_with

from common.protocol.wire import Task
from server.exchange.clock import PHASES, RoundClock, TimeBudget


def test_a_lap_belongs_to_the_phase_named_at_its_end():
    clock = RoundClock(now=iter([0.0, 2.0, 5.0, 6.0, 10.0]).__next__)
    clock.lap("wait")
    clock.lap("receive")
    clock.lap("wait")
    clock.lap("log")
    assert clock.metrics() == {
        "time/round_seconds": 10.0, "time/wait_seconds": 3.0, "time/send_seconds": 0.0, "time/receive_seconds": 3.0,
        "time/aggregate_seconds": 0.0, "time/evaluate_seconds": 0.0, "time/checkpoint_seconds": 0.0,
        "time/log_seconds": 4.0,
    }  # fmt: skip


def test_an_answer_is_timed_from_the_sending():
    clock = RoundClock(now=itertools.count(0.0).__next__)  # a second a look
    clock.lap("wait")
    clock.sent()  # at 2
    clock.lap("wait")
    clock.answered("alpha")  # at 4
    assert clock.answer_seconds("alpha") == 2.0
    assert clock.metrics()["time/send_seconds"] == 1.0


class SlowMailbox(ScriptedMailbox):
    """After joining: 0.05 s to send, 0.1 s to pull a reply that is there, and each is there at the sixth look."""

    looks = 0

    def _is_slow(self):
        return self.tasks and self.tasks[-1][1].kind == "train"

    def send(self, messages):
        sent = super().send(messages)
        time.sleep(0.05 if self._is_slow() else 0.0)
        return sent

    def receive(self, message_id, deadline=None):
        if self._is_slow():
            self.looks += 1
            if self.looks % 6:
                return None
            time.sleep(0.1)
        return super().receive(message_id, deadline)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """The second of two rounds of two slow clients, and its spool: run -> metric -> value at step 2."""
    folder = tmp_path_factory.mktemp("slow")
    nodes = {1: client("alpha", lambda task: reply_to(task)), 2: client("beta")}
    with pytest.MonkeyPatch.context() as patch:
        enter_run(patch)
        settings = settings_with(federation__rounds=2, federation__round_timeout_s=60.0)
        federation = federation_over(SlowMailbox(nodes), settings, folder / "run")
        federation.run()
    logged = {}
    for line in (folder / "run" / "spool.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("step") == 2 and "key" in row:
            logged.setdefault(row["run"], {})[row["key"]] = row["value"]
    return logged


def test_the_phases_of_a_round_add_up_to_it(slow):
    phases = [slow[""][f"time/{phase}_seconds"] for phase in PHASES]
    assert sum(phases) == pytest.approx(slow[""]["time/round_seconds"])
    assert min(phases) >= 0.0
    assert slow[""]["time/log_seconds"] > 0.0
    assert slow[""]["time/checkpoint_seconds"] > 0.0


def test_pulling_a_reply_is_no_waiting_and_looking_for_it_is(slow):
    """Five looks in vain with pauses of 10 ms for each of two clients; what is left to do fills some of them."""
    assert slow[""]["time/send_seconds"] >= 0.05
    assert slow[""]["time/receive_seconds"] >= 0.2
    assert slow[""]["time/wait_seconds"] >= 0.1


def test_a_client_has_its_own_phases_and_bytes(slow):
    """The scripted replies say one second for each phase, five in all: more than the round took, so no wait is left."""
    for name in ("alpha", "beta"):
        own = slow[name]
        assert [own[f"time/{phase}_seconds"] for phase in ("receive", "evaluate", "train", "send")] == [1.0] * 4
        assert own["time/wait_seconds"] == 0.0
        assert own["bytes/down"] == MANIFEST.num_bytes
    assert slow[""]["bytes/up"] == slow["alpha"]["bytes/up"] + slow["beta"]["bytes/up"]
    assert slow[""]["bytes/down"] == 2 * MANIFEST.num_bytes


def test_a_clients_wait_is_what_its_own_clock_does_not_tell(tmp_path, monkeypatch):
    enter_run(monkeypatch)

    def answer(task):
        reply = reply_to(task)
        quick = {name: 0.01 if name == "seconds" or name.endswith("_seconds") else 1.0 for name in reply.train}
        return reply.__class__(**{**vars(reply), "train": quick})

    mailbox = SlowMailbox({1: client("alpha", answer), 2: client("beta", answer)})
    settings = settings_with(federation__rounds=1, federation__round_timeout_s=60.0)
    federation = federation_over(mailbox, settings, tmp_path / "run")
    federation.run()
    waits = {name: rows[1]["time/wait_seconds"] for name, rows in federation.history.client_rows().items()}
    assert 0.05 <= waits["alpha"] < waits["beta"]  # replies are taken in the order of names


@pytest.mark.parametrize("splits", ["val", "val test"])
def test_the_bytes_of_a_reply_are_those_of_its_arrays(tmp_path, splits):
    """Pairs and twins [2, 8192], folds [10, 2, 1024], confusion [2, 2], all in a byte: 53,252 bytes for each split."""
    federation = federation_over(ScriptedMailbox({}), settings_with(), tmp_path / "run")
    federation.clock.answered("alpha")
    reply = reply_to(Task(kind="train", run_id="r", server_round=1, settings="", splits=splits))
    counts = (2 * 8192 * 2 + 10 * 2 * 1024 + 4) * len(splits.split())
    assert federation._costs("alpha", reply, secure=None)["bytes/up"] == MANIFEST.num_bytes + counts
    federation.record._tracked.finish("KILLED")


def test_work_that_may_take_a_twentieth_of_the_time_waits_for_it():
    now = [0.0]
    budget = TimeBudget(0.05, lambda: now[0])
    assert budget.affords(), "the first time"
    with budget:
        now[0] = 0.5
    for now[0], affords in ((0.5, False), (10.4, False), (10.6, True)):
        assert budget.affords() == affords
    with budget:
        now[0] += 0.01  # it cost less this time
    now[0] += 0.25
    assert budget.affords()
