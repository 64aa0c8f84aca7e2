"""Federations whose masked changes are lanes of 16 bits: what these lack is sent later, once, whatever is lost."""

import json
from typing import Any

import numpy as np
import pytest
from secure_federation import secure_mailbox
from tiny_federation import enter_tiny_federation, settings_with

import clients.message_handler
import clients.run_state
import clients.secure_sum
import server.rounds
import server.secure_sum
from clients.masked_reply import MaskedReply
from clients.private_state import load_residue
from common.errors import ReplyRefused
from common.protocol.secure_vector import Layout
from common.system.checkpoints import read_tensors
from server.app import Surroundings, federate
from server.exchange.mailbox import Waiter

NAMES = ("alpha", "beta", "gamma")
ROUNDS = 3
LANES = {"federation__upload_codec": "int8"}


class Killed(BaseException):
    """kill -9, for what runs in this process."""


class Run:
    """One federation in this process; what its sites put in words, and what these lacked, is kept by site and round."""

    def __init__(self, folder, tamper=lambda _name, _task, reply: reply, **values):
        self.folder, self.lost, self.opened, self.words = folder, {}, {}, {}
        self.carried: list[tuple[str, int, bool]] = []
        usual = {"secagg__enabled": True, "federation__rounds": ROUNDS, "federation__min_clients": 3}
        self.settings = settings_with(**(usual | {"federation__join_timeout_s": 20.0} | values))
        self.mailbox = secure_mailbox(NAMES, folder / "sites", tamper)
        (folder / "run-1").mkdir(parents=True)

    def go(self) -> dict[str, Any]:
        """Run it, or go on with it; returns its summary."""
        clients.message_handler._workplaces.clear()
        run = self.folder / "run-1"
        with pytest.MonkeyPatch.context() as patch:
            self._watch(patch)
            around = Surroundings(
                run_folder=run, stopped=lambda: False, all_nodes_are_here=lambda: False, git_commit="none"
            )
            federate(self.settings, self.mailbox, around)
        outcome = json.loads((run / "outcome.json").read_text())
        assert outcome == {"exit_code": 0, "line": ""}
        return json.loads((run / "metrics.json").read_text())

    def model(self, number):
        """[size] float32, of the checkpoint after that round."""
        tensors, _ = read_tensors(self.folder / "run-1" / "checkpoints" / f"round-{number:06d}.safetensors")
        return np.concatenate([tensors[name].numpy().reshape(-1) for name in sorted(tensors)])

    def _watch(self, patch):
        def code(reply, change):
            lost = real_code(reply, change)
            self.lost[reply._secure.name, reply._task.server_round] = lost
            return lost

        def load(folder, number, size):
            residue = load_residue(folder, number, size)
            name = folder.parent.parent.name
            self.carried.append((name, number, np.array_equal(residue, self.lost.get((name, number), 0.0 * residue))))
            return residue

        def masked(vector, kept, own, adverts, context, *, lanes):
            self.words.setdefault(context.attempt, []).append(vector.copy())
            return real_masked(vector, kept, own, adverts, context, lanes=lanes)

        def unmask(total, secrets, keys, adverts, context, *, lanes):
            real_unmask(total, secrets, keys, adverts, context, lanes=lanes)
            self.opened[context.attempt] = (total.copy(), lanes)

        real_code, real_masked, real_unmask = MaskedReply.code, clients.secure_sum.masked, server.secure_sum.unmask
        patch.setattr(MaskedReply, "code", code)
        patch.setattr(clients.run_state, "load_residue", load)
        patch.setattr(clients.secure_sum, "masked", masked)
        patch.setattr(server.secure_sum, "unmask", unmask)


@pytest.fixture(autouse=True)
def tiny_packs(monkeypatch):
    enter_tiny_federation(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to, and its summary."""
    with pytest.MonkeyPatch.context() as patch:
        enter_tiny_federation(patch)
        run = Run(tmp_path_factory.mktemp("whole"), **LANES)
        return run, run.go()


def test_the_opened_sums_are_those_of_the_sites_lanes_to_the_bit_from_the_second_round_on(whole):
    run, summary = whole
    assert summary["refused_replies"] == 0
    assert [run.opened[attempt][1] > 0 for attempt in (1, 2, 3, 4)] == [False, True, True, False]
    for attempt, (total, lanes) in run.opened.items():
        pairs = np.sum([words[:lanes].view(np.uint16) for words in run.words[attempt]], axis=0, dtype=np.uint16)
        assert np.array_equal(total[:lanes].view(np.uint16), pairs)
        rest = np.sum([words[lanes:] for words in run.words[attempt]], axis=0, dtype=np.uint32)
        assert np.array_equal(total[lanes:], rest)
    size = len(next(iter(run.lost.values())))
    assert len(run.opened[1][0]) - len(run.opened[2][0]) >= size // 2  # the change in half as many words


def test_what_a_rounds_words_lacked_is_in_the_next_ones(whole):
    run, _ = whole
    assert sorted((name, number) for name, number, _ in run.carried) == sorted(
        (name, number) for name in NAMES for number in (-1, 1, 2)
    )
    assert all(is_what_was_lost for _, _, is_what_was_lost in run.carried)
    assert all(np.abs(run.lost[name, 3]).max() > 1e-7 for name in NAMES)


def test_the_model_stays_near_that_of_32_bits(whole, tmp_path):
    """Within a few thousandths of what the third round moved it."""
    run, summary = whole
    words = Run(tmp_path)
    other = words.go()
    moved = np.linalg.norm(words.model(ROUNDS).astype(float) - words.model(ROUNDS - 1))
    apart = np.linalg.norm(words.model(ROUNDS).astype(float) - run.model(ROUNDS))
    assert 0.0 < apart < 0.005 * moved  # 0.0005
    assert summary["best"]["roc_auc"] == pytest.approx(other["best"]["roc_auc"], abs=0.01)


def test_what_is_lost_on_the_way_is_sent_once(whole, tmp_path, monkeypatch):
    """beta's second reply never arrives, and it is killed before its third leaves, with its state after it on the disk.

    Of three all must answer, so each round is tried again: to the bits of the run that nothing happened to.
    """
    gone, killed, real = [], [], MaskedReply.of

    def tamper(name, task, reply):
        if (name, task.kind, task.server_round) == ("beta", "train", 2) and not gone:
            gone.append(reply)
            return None
        return reply

    def of(masked, reply):
        if (masked._secure.name, masked._task.server_round) == ("beta", 3) and reply.change is not None and not killed:
            killed.append(masked)
            clients.message_handler._workplaces.clear()
            raise ReplyRefused("the site is gone")
        return real(masked, reply)

    monkeypatch.setattr(MaskedReply, "of", of)
    run = Run(tmp_path, tamper, **LANES)
    summary = run.go()
    assert (len(gone), len(killed)) == (1, 1)
    assert summary["model_sha256"] == whole[1]["model_sha256"]
    for number in (1, 2):
        assert [one for one in run.carried if one[1] == number] == [(name, number, True) for name in (*NAMES, *NAMES)]


def test_a_server_that_is_killed_goes_on_in_the_same_steps(whole, tmp_path, monkeypatch):
    """After the second round's step, so that its newest checkpoint is the first round's."""
    real, calls = server.rounds.Federation._round_is_whole, []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            patch.setattr(Waiter, "do_work", lambda _self: None)
            raise Killed
        real(*arguments)

    run = Run(tmp_path, **LANES)
    with monkeypatch.context() as patch:
        patch.setattr(server.rounds.Federation, "_round_is_whole", dying)
        with pytest.raises(Killed):
            run.go()
    (tmp_path / "run-1" / "outcome.json").unlink(missing_ok=True)
    assert run.go()["model_sha256"] == whole[1]["model_sha256"]


def test_a_huge_change_is_cut_counted_and_told(tmp_path, monkeypatch):
    """All of one site's second change is beyond the range."""
    real = Layout.in_words

    def huge(layout, change, received, share):
        if layout.shifts and not told:
            told.append(share)
            change = np.full_like(change, 1e3)
        return real(layout, change, received, share)

    told: list[float] = []
    monkeypatch.setattr(Layout, "in_words", huge)
    run = Run(tmp_path, **LANES, federation__rounds=2)
    run.go()
    size = len(run.lost["alpha", 1])
    lines = [json.loads(line) for line in (tmp_path / "run-1" / "events.jsonl").read_text().splitlines()]
    warnings = [line["line"] for line in lines if "too large for secure aggregation" in line.get("line", "")]
    assert len(warnings) == 1
    assert f"round 2: {size:,} elements" in warnings[0]
    assert "what is left of it goes with the next round's" in warnings[0]
