"""One client's part of a round: what may leave, what is repeatable, and what each strategy adds."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from tiny_federation import NUM_TRAINING_PICTURES, settings_with, task_for, tiny_workplace

from clients.local_update import evaluate_global, join, open_client_state, train
from clients.private_state import save_private
from clients.site import OF_RUN, OF_SITE
from common.errors import CheckpointError, ReplyRefused, TrainingFailed
from common.protocol import wire
from common.protocol.codec import decode
from common.protocol.parameters import flatten
from common.protocol.wire import TRAIN_FIELDS
from common.training.loop import TrainSums, make_optimiser

pytestmark = pytest.mark.usefixtures("in_a_run")

# Sixteen bytes that nothing else in a reply has; positive, since variances are among what is marked.
MARKER = np.float32([1.2345671, 0.7654321, 3.1415901, 2.7182801])
NORMALISATIONS = pytest.mark.parametrize("normalisation", ["shared", "private"])


def workplace_in(folder, **values):
    state = tiny_workplace(settings_with(**values), folder)
    return state, flatten(state.recogniser.state_dict(), state.manifest)


def task_of(state, **values):
    return task_for(state.manifest, state.settings, **values)


def on_the_wire(reply):
    """The whole content of the reply as the bytes of the objects that Flower sends."""
    return b"".join(one.deflate() for one in get_all_nested_objects(wire.reply_content(reply)).values())


def first_bytes(tensor):
    return tensor.detach().reshape(-1)[:4].numpy().tobytes()


def timeless(reply):
    """The reply without the seconds that it took."""
    return (
        reply.num_examples,
        {name: value for name, value in reply.train.items() if "seconds" not in name},
        {split: (sums.numbers(), sums.pairs.tobytes()) for split, sums in reply.evaluations.items()},
        None if reply.change is None else reply.change.data,
    )


# ---- what leaves


@NORMALISATIONS
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_marker_in_every_private_tensor_is_not_in_the_bytes_of_the_reply(tmp_path, normalisation, kind):
    """Weights and biases that are private are frozen here, so the marker stays in them while the rest is trained."""
    state, shared = workplace_in(tmp_path, model__normalisation=normalisation)
    tensors = state.recogniser.state_dict()
    for name, parameter in state.recogniser.named_parameters():
        parameter.requires_grad_(name not in state.private)
    for name in state.private:
        tensors[name].copy_(torch.from_numpy(np.resize(MARKER, tensors[name].shape)))
    optimiser = make_optimiser(state.recogniser, state.settings.training)
    save_private(state.state_folder("run-1"), 0, state.recogniser, optimiser, state.private)
    reply = (train if kind == "train" else evaluate_global)(state, task_of(state, kind=kind), shared)
    sent = on_the_wire(reply)
    assert MARKER.tobytes() == first_bytes(tensors["head.weight"])  # it was there to the end
    if kind == "train":
        assert np.any(decode(reply.change))
        kept = next((tmp_path / "alpha" / "private" / "run-1").glob("round-000001*")).read_bytes()
        assert MARKER.tobytes() in kept  # and this search finds it where it may be
    for number in MARKER:
        assert number.tobytes() not in sent


@NORMALISATIONS
def test_the_change_is_exactly_as_long_as_the_shared_parameters(tmp_path, normalisation):
    """float32 of the shared names; nothing fits beside them."""
    state, shared = workplace_in(tmp_path, model__normalisation=normalisation)
    tensors = state.recogniser.state_dict()
    before = {name: tensors[name].clone() for name in state.private}
    reply = train(state, task_of(state), shared)
    num_shared = sum(t.numel() for name, t in tensors.items() if t.is_floating_point() and name not in state.private)
    content = wire.reply_content(reply)
    assert reply.change.nbytes == state.manifest.num_bytes == 4 * num_shared
    assert len(content["arrays"]["change"].data) == 4 * num_shared
    assert set(content["arrays"]) == {"change", "val-counts", "test-counts"}
    sent = on_the_wire(reply)
    assert first_bytes(torch.from_numpy(decode(reply.change))) in sent
    for name in state.private:
        assert first_bytes(tensors[name]) not in sent, name
        assert first_bytes(tensors[name] - before[name]) not in sent, name


def test_the_reply_counts_what_was_done(tmp_path):
    """24 pictures in batches of 8 are 3 steps an epoch."""
    state, shared = workplace_in(tmp_path, federation__local_epochs=2)
    reply = train(state, task_of(state), shared)
    assert reply.num_examples == NUM_TRAINING_PICTURES
    assert set(reply.train) == set(TRAIN_FIELDS)
    assert (reply.train["num_pictures"], reply.train["num_steps"]) == (2 * NUM_TRAINING_PICTURES, 6)
    assert reply.evaluations["val"].closed.num_examples == 6
    assert reply.evaluations["test"].pairs.sum(1).tolist() == [9, 27]  # 3 people of 3: 3 * 3 and 3 * 9 pairs


def test_joining_tells_counts_and_digests_only(tmp_path, monkeypatch):
    state, _ = workplace_in(tmp_path)
    monkeypatch.setattr("clients.packs.open_pack", lambda *_, **__: state.pack)
    told = vars(join(state.site, state.settings))
    assert (told["num_people"], told["num_pictures"], told["num_training_people"]) == (12, 54, 6)
    assert told["num_training_pictures"] == NUM_TRAINING_PICTURES
    assert not [value for value in told.values() if str(tmp_path) in str(value) or "alpha-" in str(value)]


@pytest.mark.parametrize(("limit", "compiled"), [(1.0, True), (0.6, False)])
def test_a_site_that_watches_gradients_says_that_it_does_not_compile(tmp_path, monkeypatch, limit, compiled):
    state, _ = workplace_in(tmp_path, training__compile="on")
    monkeypatch.setattr("clients.local_update.open_site_pack", lambda *_a, **_k: state.pack)
    site = dataclasses.replace(state.site, policy=dataclasses.replace(state.site.policy, max_person_share=limit))
    assert join(site, state.settings).compiled == compiled


# ---- what is repeatable


def head_of(site, **values):
    """The first weights of the head of a run at a site, as the client builds them."""
    settings = settings_with(**values)
    return open_client_state(site, settings).recogniser.head.identity_vectors.detach().clone()


def test_a_heads_first_weights_come_of_the_sites_secret_and_of_no_seed_that_a_server_knows(tmp_path, monkeypatch):
    place, _ = workplace_in(tmp_path)
    monkeypatch.setattr("clients.run_state.open_site_pack", lambda *_a, **_k: place.pack)
    sites = {seed: dataclasses.replace(place.site, seed=seed) for seed in (OF_SITE, OF_RUN, 1, 2)}
    heads = {seed: head_of(site) for seed, site in sites.items()}
    assert torch.equal(heads[OF_SITE], head_of(sites[OF_SITE]))  # a restarted site has the same again
    assert torch.equal(heads[OF_RUN], heads[1])  # --site-seed gives a simulation's, whose run.seed is 1
    assert not torch.equal(heads[1], heads[2])
    assert not torch.equal(heads[OF_SITE], heads[1])
    elsewhere = dataclasses.replace(sites[OF_SITE], cache_dir=tmp_path / "other")
    assert not torch.equal(heads[OF_SITE], head_of(elsewhere))
    assert not torch.equal(heads[OF_SITE], head_of(sites[OF_SITE], run__seed=3))


def test_a_policy_bounds_the_pairs_of_a_person_behind_each_score_and_says_so(tmp_path, monkeypatch, caplog):
    state, model = workplace_in(tmp_path)
    monkeypatch.setattr("clients.local_update.open_site_pack", lambda *_a, **_k: state.pack)
    site = dataclasses.replace(state.site, policy=dataclasses.replace(state.site.policy, max_person_pairs=12))
    bounded = dataclasses.replace(state, site=site)
    with caplog.at_level("INFO", logger="facefed.client"):
        joined = join(site, state.settings)
    assert "alpha: one person is in 11 of val's pairs at most, bounded by max_person_pairs = 12" in caplog.text
    whole = join(state.site, state.settings)
    assert joined.num_scored_pairs < joined.num_pairs == whole.num_scored_pairs
    assert joined.test_pairs != whole.test_pairs
    assert joined.val_people != whole.val_people
    scored = train(bounded, task_of(state), model).evaluations
    assert sum(int(sums.pairs.sum()) for sums in scored.values()) == joined.num_scored_pairs


@NORMALISATIONS
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_repeated_round_gives_the_same_bytes(tmp_path, normalisation, optimiser):
    """The same process repeats round 1, then 2; another process repeats 2 from the disk."""
    values = {"model__normalisation": normalisation, "training__optimiser": optimiser, "model__dropout": 0.2}
    state, shared = workplace_in(tmp_path, **values)
    one, two = task_of(state), task_of(state, server_round=2)
    first = timeless(train(state, one, shared))
    assert timeless(train(state, one, shared)) == first
    second = timeless(train(state, two, shared))
    assert second != first
    assert timeless(train(state, two, shared)) == second
    other, _ = workplace_in(tmp_path, **values)
    assert timeless(train(other, two, shared)) == second


def test_a_failed_round_leaves_nothing_behind(tmp_path):
    state, shared = workplace_in(tmp_path)
    with pytest.raises(TrainingFailed, match="the loss is nan"):
        train(state, task_of(state), np.full_like(shared, 1e30))
    again = timeless(train(state, task_of(state), shared))
    other, _ = workplace_in(tmp_path / "elsewhere")
    assert again == timeless(train(other, task_of(other), shared))


def test_a_client_whose_state_was_lost_goes_on_with_a_fresh_head(tmp_path):
    """Whether the process that answers is new, or still holds a head from before: the bytes are the same."""
    resident, shared = workplace_in(tmp_path / "a")
    train(resident, task_of(resident), shared)
    shutil.rmtree(resident.state_folder("run-1"))
    newcomer, _ = workplace_in(tmp_path / "b")
    task = task_of(resident, server_round=2)
    assert timeless(train(resident, task, shared)) == timeless(train(newcomer, task, shared))

    shutil.rmtree(resident.state_folder("run-1"))
    asked = task_of(resident, kind="evaluate", server_round=2)
    fresh, _ = workplace_in(tmp_path / "c")
    assert timeless(evaluate_global(resident, asked, shared)) == timeless(evaluate_global(fresh, asked, shared))


def test_the_kept_states_are_the_best_and_the_last_three(tmp_path):
    """Three: the server may have died before it wrote the round's checkpoint, and repeats the round before, too."""
    state, shared = workplace_in(tmp_path, federation__rounds=6)
    for number in range(1, 7):
        train(state, task_of(state, server_round=number, best_round=2 if number > 3 else 0), shared)
    kept = sorted(int(path.stem[-6:]) for path in state.state_folder("run-1").glob("round-*"))
    assert kept == [2, 4, 5, 6]


def test_of_a_run_that_is_over_the_best_and_the_last_two_states_stay_and_the_rest_is_told_of(tmp_path, caplog):
    caplog.set_level("INFO", logger="facefed.client")
    state, shared = workplace_in(tmp_path, federation__rounds=6)
    for number in range(1, 7):
        train(state, task_of(state, server_round=number, best_round=2 if number > 3 else 0), shared)
    folder = state.state_folder("run-1")
    size = next(folder.glob("round-*")).stat().st_size
    evaluate_global(state, task_of(state, kind="evaluate", server_round=6), shared)
    assert len(list(folder.glob("round-*"))) == 4
    asked = task_of(state, kind="evaluate", server_round=2, last=True)
    first = evaluate_global(state, asked, shared)
    assert sorted(int(path.stem[-6:]) for path in folder.glob("round-*")) == [2, 5, 6]
    assert f"1 private states ({size / 1e6:.0f} MB) removed" in caplog.text
    assert timeless(evaluate_global(state, asked, shared)) == timeless(first)


def test_a_first_round_that_is_repeated_begins_with_the_state_that_no_file_has(tmp_path):
    state, shared = workplace_in(tmp_path)
    first = train(state, task_of(state), shared)
    train(state, task_of(state, server_round=2), shared)
    assert [path.stem[-6:] for path in sorted(state.state_folder("run-1").glob("round-*"))] == ["000001", "000002"]
    assert timeless(train(state, task_of(state), shared)) == timeless(first)


def test_a_state_of_another_run_is_not_touched(tmp_path):
    state, shared = workplace_in(tmp_path)
    train(state, task_of(state), shared)
    kept = {path: path.read_bytes() for path in state.state_folder("run-1").glob("round-*")}
    train(state, task_of(state, run_id="run-2"), shared)
    assert {path: path.read_bytes() for path in state.state_folder("run-1").glob("round-*")} == kept


def test_evaluating_changes_nothing(tmp_path):
    state, shared = workplace_in(tmp_path)
    train(state, task_of(state), shared)
    asked = task_of(state, kind="evaluate", server_round=1)
    first = evaluate_global(state, asked, shared)
    assert timeless(first) == timeless(evaluate_global(state, asked, shared))
    assert (first.change, dict(first.train)) == (None, {})
    assert flatten(state.recogniser.state_dict(), state.manifest).tobytes() == shared.tobytes()


# ---- what each strategy adds


def test_fedprox_with_mu_0_is_fedavg_bit_for_bit_and_with_more_is_not(tmp_path):
    changes = {}
    for strategy, mu in (("fedavg", 0.7), ("fedprox", 0.0), ("fedprox", 0.7)):
        state, shared = workplace_in(
            tmp_path / f"{strategy}-{mu}", federation__strategy=strategy, federation__proximal_mu=mu
        )
        changes[strategy, mu] = train(state, task_of(state), shared)
    assert timeless(changes["fedprox", 0.0]) == timeless(changes["fedavg", 0.7])
    pulled, free = decode(changes["fedprox", 0.7].change), decode(changes["fedavg", 0.7].change)
    assert pulled.tobytes() != free.tobytes()


def test_the_proximal_term_holds_the_model_near_the_received_one_and_spares_the_head(tmp_path, monkeypatch):
    """It is given the trainable shared parameters: no head, no buffer, and with private normalisation no scale."""
    for normalisation in ("shared", "private"):
        given = []
        monkeypatch.setattr("common.strategies.proximal", lambda p, mu, given=given: given.append((p, mu)))
        state, shared = workplace_in(
            tmp_path / normalisation,
            federation__strategy="fedprox",
            federation__proximal_mu=0.3,
            model__normalisation=normalisation,
        )
        train(state, task_of(state), shared)
        [(parameters, mu)] = given
        named = {id(p): name for name, p in state.recogniser.named_parameters()}
        assert mu == 0.3
        assert {named[id(p)] for p in parameters} == set(named.values()) - set(state.private)


@pytest.mark.parametrize("manifest", ["", "0" * 64])
def test_a_model_of_another_layout_is_refused(tmp_path, manifest):
    state, shared = workplace_in(tmp_path)
    with pytest.raises(ReplyRefused, match="is not this client's"):
        train(state, task_of(state, manifest=manifest), shared)
    with pytest.raises(ReplyRefused, match="is not this client's"):
        train(state, task_of(state), None)


@pytest.mark.parametrize("shape", [(1,), (7,), ()])
def test_a_buffer_of_another_length_is_refused(tmp_path, shape):
    state, _ = workplace_in(tmp_path)
    with pytest.raises(CheckpointError, match="is not this model's"):
        train(state, task_of(state), np.zeros(shape, dtype=np.float32))


# ---- a new head, alone


def test_a_new_head_is_warmed_up_once_and_counted_apart(tmp_path):
    """24 pictures in batches of 8 are 3 steps an epoch; round 2 finds the head that round 1 left."""
    state, shared = workplace_in(tmp_path, training__head_warmup_epochs=2)
    first = train(state, task_of(state), shared).train
    second = train(state, task_of(state, server_round=2), shared).train
    counts = ("num_pictures", "num_steps", "num_warmup_pictures", "num_warmup_steps")
    assert [first[name] for name in counts] == [24, 3, 48, 6]
    assert [second[name] for name in counts] == [24, 3, 0, 0]
    assert first["warmup_seconds"] > 0.0


def test_a_repeated_first_round_warms_up_again_and_a_late_client_too(tmp_path):
    """Else the same round would leave another head, according to how often it was asked for."""
    state, shared = workplace_in(tmp_path / "a", training__head_warmup_epochs=1)
    first = timeless(train(state, task_of(state), shared))
    assert timeless(train(state, task_of(state), shared)) == first
    late, _ = workplace_in(tmp_path / "b", training__head_warmup_epochs=1)
    reply = train(late, task_of(late, server_round=2), shared)
    assert reply.train["num_warmup_pictures"] == NUM_TRAINING_PICTURES
    assert timeless(train(late, task_of(late, server_round=2), shared)) == timeless(reply)


def test_the_received_model_is_scored_with_the_head_that_came_before_the_warm_up(tmp_path):
    """Its figures are then the same with and without, and what follows is not."""
    replies = []
    for epochs in (0, 3):
        state, shared = workplace_in(tmp_path / str(epochs), training__head_warmup_epochs=epochs)
        replies.append(train(state, task_of(state), shared))
    without, with_it = replies
    assert timeless(without)[2] == timeless(with_it)[2]
    assert without.change.data != with_it.change.data
    assert without.train["num_warmup_pictures"] == 0


def test_private_normalisation_does_not_move_in_the_warm_up(tmp_path, monkeypatch):
    """What trains afterwards is left out here, so the state that is kept is that of the warm-up."""
    monkeypatch.setattr("clients.local_update.train_round", lambda *_, **__: TrainSums())
    state, shared = workplace_in(tmp_path, training__head_warmup_epochs=1, model__normalisation="private")
    tensors = state.recogniser.state_dict()
    fresh = {name: tensors[name].clone() for name in state.private}
    train(state, task_of(state), shared)
    moved = {name for name in state.private if not torch.equal(tensors[name], fresh[name])}
    assert moved == {"head.weight"}
    assert flatten(tensors, state.manifest).tobytes() == shared.tobytes()
