"""The server's rounds with secure aggregation, of clients that only mask: what it adds, and what a lost answer does."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from secure_federation import secure_client, secure_federation
from tiny_federation import MANIFEST, ScriptedMailbox, enter_run, settings_with

import clients.secure_sum
import server.rounds
import server.secure_sum
from common.errors import NotEnoughClients
from server.exchange.mailbox import Waiter
from server.global_model import ServerOptimiser
from server.resume import resume
from simulation.engine.run import made_keys

FIRST = 0.25  # each number of the first model
LIMIT = 1.0  # of a change of it: four times its largest number


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch):
    enter_run(monkeypatch)


def settings_for(**values):
    usual = {"secagg__enabled": True, "federation__min_clients": 3, "federation__rounds": 1}
    return settings_with(**(usual | values))


def changes_of(number):
    """A change and a number of pictures for each of so many sites."""
    random = np.random.default_rng(number)
    changes = [random.normal(0, 0.1, MANIFEST.size).astype(np.float32) for _ in range(number)]
    return {f"site-{index:02d}": (change, 5 + index) for index, change in enumerate(changes)}


def mailbox_of(folder, sites):
    keys = made_keys(list(sites))
    return ScriptedMailbox(
        {
            node: secure_client(name, keys[name], folder, change=change, num_examples=pictures)
            for node, (name, (change, pictures)) in enumerate(sites.items(), start=100)
        }
    )


def losing(script, kind, times):
    """The same node, whose answers to so many tasks of one kind are lost."""
    lost, answers = set(), {}

    def lossy(task, message):
        number = message.metadata.message_id
        if number not in answers:
            answers[number] = script(task, message)
        if task.kind == kind and (number in lost or len(lost) < times):
            lost.add(number)
            return None
        return answers[number]

    return lossy


def quantised_mean(sites, most, adders=None):
    """The oracle: the weighted mean of integers, worked out without any of the code that masks and adds.

    most: pictures that a site counts for.  adders: how many sites were to add, where that is more than did.
    """
    step = LIMIT / ((2**31 - 1) // (adders or len(sites)))
    weighted = [change.astype(np.float64) * (min(pictures, most) / most) for change, pictures in sites.values()]
    total = sum(np.rint(one / step) for one in weighted)
    shares = sum(min(pictures, most) for _, pictures in sites.values()) / most
    return (total * step / shares).astype(np.float32)


def largest(sites):
    return max(pictures for _, pictures in sites.values())


def moved(mean):
    return np.full(MANIFEST.size, FIRST, dtype=np.float32) + mean


@pytest.mark.parametrize("number", [3, 5, 10, 30])
def test_the_model_is_the_quantised_mean_to_the_bit_whatever_the_number_of_sites(number, tmp_path):
    sites = changes_of(number)
    settings = settings_for(federation__max_weight_factor=1.2)
    federation = secure_federation(mailbox_of(tmp_path / "sites", sites), settings, tmp_path)
    outcome = federation.run()
    pictures = sorted(count for _, count in sites.values())
    most = min(pictures[-1], int(1.2 * pictures[(number - 1) // 2]))
    mean = quantised_mean(sites, most)
    assert np.array_equal(federation.model.received, moved(mean))
    assert outcome.history.at(1).metrics["val_roc_auc"] == pytest.approx(0.6, abs=0.01)
    weights = {name: min(count, most) for name, (_, count) in sites.items()}
    exact = sum(sites[name][0].astype(np.float64) * weights[name] for name in sites) / sum(weights.values())
    assert np.abs(mean - exact).max() < 1e-7


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi"])
def test_every_strategy_that_adds_takes_its_step_with_the_opened_sum(strategy, tmp_path):
    sites = changes_of(4)
    settings = settings_for(federation__strategy=strategy)
    federation = secure_federation(mailbox_of(tmp_path / "sites", sites), settings, tmp_path)
    federation.run()
    oracle = ServerOptimiser.of(settings.federation, MANIFEST, {entry.name for entry in MANIFEST.entries})
    model = np.full(MANIFEST.size, FIRST, dtype=np.float32)
    oracle.apply(model, quantised_mean(sites, largest(sites)))
    assert np.array_equal(federation.model.received, model)


@pytest.mark.parametrize("kind", ["keys", "shares", "train", "unmask"])
def test_a_site_whose_answer_is_lost_at_any_step_costs_its_change_only(kind, tmp_path):
    sites = changes_of(4)
    mailbox = mailbox_of(tmp_path / "sites", sites)
    mailbox.nodes[101] = losing(mailbox.nodes[101], kind, times=10**6)
    federation = secure_federation(mailbox, settings_for(), tmp_path)
    federation.run()
    here = {name: site for name, site in sites.items() if name != "site-01" or kind == "unmask"}
    adders = 4 if kind in ("train", "unmask") else 3
    assert np.array_equal(federation.model.received, moved(quantised_mean(here, largest(sites), adders)))


def test_a_sum_that_no_pictures_give_is_not_taken(tmp_path):
    def boasts(reply):
        sums = reply.evaluations["val"]
        closed = dataclasses.replace(sums.closed, correct=10**6)
        return dataclasses.replace(
            reply, evaluations=reply.evaluations | {"val": dataclasses.replace(sums, closed=closed)}
        )

    sites = changes_of(3)
    mailbox, keys = mailbox_of(tmp_path / "sites", sites), made_keys(list(sites))
    mailbox.nodes = {
        node: secure_client(name, keys[name], tmp_path / "sites", change=sites[name][0], spoil=boasts)
        for node, name in enumerate(sites, start=100)
    }
    federation = secure_federation(mailbox, settings_for(federation__round_attempts=1), tmp_path)
    with pytest.raises(NotEnoughClients, match=r"cannot be opened \(val-correct of all is 3000000, which no pictures"):
        federation.run()
    assert np.array_equal(federation.model.received, moved(np.zeros(MANIFEST.size, dtype=np.float32)))


def test_below_the_threshold_the_round_is_tried_again_with_fresh_keys(tmp_path):
    sites = changes_of(3)
    mailbox = mailbox_of(tmp_path / "sites", sites)
    mailbox.nodes[102] = losing(mailbox.nodes[102], "train", times=1)
    federation = secure_federation(mailbox, settings_for(), tmp_path)
    federation.run()
    attempts = [task.secure for _, task in mailbox.tasks if task.kind == "keys"]
    assert len(set(attempts)) == 3  # the round's two, and the last model's scores
    assert np.array_equal(federation.model.received, moved(quantised_mean(sites, largest(sites))))


def test_a_round_that_stays_below_the_threshold_ends_the_run_with_what_is_kept(tmp_path):
    mailbox = mailbox_of(tmp_path / "sites", changes_of(3))
    mailbox.nodes[102] = losing(mailbox.nodes[102], "train", times=10**6)
    federation = secure_federation(mailbox, settings_for(federation__round_attempts=2), tmp_path)
    with pytest.raises(NotEnoughClients, match=r"2 of 3 clients .* 3 are needed.*model of round 0 is kept"):
        federation.run()
    assert not any(task.kind == "unmask" for _, task in mailbox.tasks)  # nothing was opened


def test_whoever_answered_unmask_opens_the_same_sum_again_but_no_other(tmp_path):
    sites = changes_of(4)
    mailbox = mailbox_of(tmp_path / "sites", sites)
    for node in (101, 102):
        mailbox.nodes[node] = losing(mailbox.nodes[node], "unmask", times=1)
    federation = secure_federation(mailbox, settings_for(), tmp_path)
    federation.run()  # two answers were too few; then all four came once more
    assert torch.isfinite(torch.from_numpy(federation.model.received)).all()
    assert sum(task.kind == "train" for _, task in mailbox.tasks) == 8
    mailbox = mailbox_of(tmp_path / "others", sites)
    for node in (101, 102):
        mailbox.nodes[node] = losing(mailbox.nodes[node], "unmask", times=1)
    lost = mailbox.nodes.pop
    real = mailbox.nodes[103]

    def goes_after_the_first_sum(task, message):
        answer = real(task, message)
        if task.kind == "unmask":
            lost(103)
        return answer

    mailbox.nodes[103] = goes_after_the_first_sum
    (tmp_path / "second").mkdir()
    federation = secure_federation(mailbox, settings_for(federation__round_attempts=2), tmp_path / "second")
    with pytest.raises(NotEnoughClients, match="was summed over other sites before"):
        federation.run()


class Killed(BaseException):
    """kill -9, for what runs in this process: nothing catches it, and nothing is written after it."""


KILLS = {
    "before its attempt's number is told": (server.secure_sum, "write_sealed_json", "after"),
    "between the masked replies and unmask": (server.secure_sum.SecureAttempt, "open", "before"),
    "between unmask and the step": (server.secure_sum.SecureAttempt, "open", "after"),
    "between the step and the checkpoint": (server.rounds.Federation, "_round_is_whole", "before"),
}


def killed(monkeypatch, federation, owner, name, when, on_call):
    """Run it, and have the server die before or after its so-manieth call of a function."""
    real, calls = getattr(owner, name), []

    def dying(*arguments, **named):
        calls.append(name)
        if len(calls) == on_call:
            patched.setattr(Waiter, "do_work", lambda _self: None)  # a process that is gone saves nothing
            if when == "after":
                real(*arguments, **named)
            raise Killed
        real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying)
        with pytest.raises(Killed):
            federation.run()
    federation.record._tracked.finish("FAILED")  # so that the run can go on


def resumed(mailbox, settings, folder):
    """The federation of a new server's program over the same nodes, set to what is on disk."""
    federation = secure_federation(mailbox, settings, folder)
    if federation.checkpoints.exists():
        resume(federation)
    return federation


@pytest.mark.parametrize("on_call", [1, 2], ids=["first round", "second round"])
@pytest.mark.parametrize("kill", KILLS)
def test_a_server_that_is_killed_goes_on_to_the_same_model_to_the_bit(kill, on_call, tmp_path, monkeypatch):
    sites, settings = changes_of(4), settings_for(federation__rounds=2)
    (tmp_path / "whole").mkdir()
    whole = secure_federation(mailbox_of(tmp_path / "of-whole", sites), settings, tmp_path / "whole")
    whole.run()
    (tmp_path / "run").mkdir()
    mailbox = mailbox_of(tmp_path / "sites", sites)
    killed(monkeypatch, secure_federation(mailbox, settings, tmp_path / "run"), *KILLS[kill], on_call)
    federation = resumed(mailbox, settings, tmp_path / "run")
    assert federation.first_round <= on_call
    federation.run()
    assert np.array_equal(federation.model.received, whole.model.received)
    asked = Counter(task.secure for _, task in mailbox.tasks if task.kind == "keys")
    assert set(asked.values()) == {4}  # no number twice, to any site


def test_a_killed_server_opens_a_round_again_with_all_its_sites_only(tmp_path, monkeypatch):
    """One site is away when the server is back: both sums would tell its words, so the run ends, until it is back."""
    sites, settings = changes_of(4), settings_for(federation__round_attempts=1)
    mailbox = mailbox_of(tmp_path / "sites", sites)
    killed(
        monkeypatch,
        secure_federation(mailbox, settings, tmp_path),
        *KILLS["between the step and the checkpoint"],
        on_call=1,
    )
    away = mailbox.nodes.pop(102)
    before = [task for _, task in mailbox.tasks if task.kind == "unmask"]
    federation = resumed(mailbox, settings, tmp_path)
    with pytest.raises(NotEnoughClients, match=r"was summed over other sites before.*model of round 0 is kept"):
        federation.run()
    federation.record._tracked.finish("FAILED")
    assert len([task for _, task in mailbox.tasks if task.kind == "unmask"]) == len(before) + 3  # asked, and refused
    mailbox.nodes[102] = away
    federation = resumed(mailbox, settings, tmp_path)
    federation.run()
    assert np.array_equal(federation.model.received, moved(quantised_mean(sites, largest(sites))))


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "opened"])
def test_a_site_that_is_killed_after_it_wrote_its_choice_is_in_the_next_attempt(step, tmp_path, monkeypatch):
    """Of three, so that the attempt fails where it comes too late; what it wrote, it neither says twice nor changes."""
    sites = changes_of(3)
    mailbox = mailbox_of(tmp_path / "sites", sites)
    real_save, killed = clients.secure_sum.SecureSum._save, []

    def save(self):
        real_save(self)
        if (self.name, self._kept.step) == ("site-01", step) and not killed:
            killed.append(step)
            raise Killed

    def restarted(script):
        gone = set()  # messages that were taken and never answered

        def answers(task, message):
            if message.metadata.message_id in gone:
                return None
            try:
                return script(task, message)
            except Killed:
                gone.add(message.metadata.message_id)
                return None

        return answers

    monkeypatch.setattr(clients.secure_sum.SecureSum, "_save", save)
    mailbox.nodes[101] = restarted(mailbox.nodes[101])
    federation = secure_federation(mailbox, settings_for(), tmp_path)
    federation.run()
    assert killed == [step]
    assert np.array_equal(federation.model.received, moved(quantised_mean(sites, largest(sites))))
    attempts = {task.secure for _, task in mailbox.tasks if task.kind == "keys"}
    assert len(attempts) == 3  # the round's two, and the last model's scores
