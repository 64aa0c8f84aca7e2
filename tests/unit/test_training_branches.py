"""Training with the branches of DCAL: learned weights, partners from a stream of their own, triplets."""

import dataclasses

import numpy as np
import pytest
import torch
from packs_in_memory import CPU, MODEL, memory_pack, recogniser_for, same_bits

from common import config
from common.faces.batches import NO_TWIN
from common.faces.splits import Split
from common.models.dcal import random_partners
from common.models.recogniser import Recogniser
from common.settings import ModelSettings
from common.training import loop as training
from common.training import step as training_step
from common.training.evaluation import embed
from common.training.loop import TrainSums, make_optimiser, train_epochs, warm_up_head

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = config.from_mapping({"data": {"image_size": 32}, "training": {"batch_size": 8, "lr": 0.02}})
DCAL = dataclasses.replace(
    MODEL, backbone="vit_tiny", patch_size=8, depth=2, width=0.125, attention="dcal", glca_fraction=0.3
)


def run(
    model: ModelSettings = DCAL,
    *,
    epochs: int = 1,
    choose_partners=random_partners,
    recogniser: Recogniser | None = None,
    **values,
) -> tuple[Recogniser, TrainSums]:
    settings = SETTINGS
    for name, value in values.items():
        settings = config.with_value(settings, "training", name, value)
    pack = memory_pack()
    recogniser = recogniser or recogniser_for(pack, model)
    sums = train_epochs(
        recogniser,
        make_optimiser(recogniser, settings.training),
        pack,
        settings=settings,
        compute=CPU,
        epochs=range(epochs),
        total_epochs=max(epochs, 2),
        stream_name="alpha",
        choose_partners=choose_partners,
    )
    return recogniser, sums


def test_every_parameter_learns_the_loss_weights_too():
    trained, _ = run()
    fresh = recogniser_for(memory_pack(), DCAL)
    before = dict(fresh.named_parameters())
    assert [name for name, p in trained.named_parameters() if torch.equal(p, before[name])] == []
    assert {name for name in before if name.startswith("loss_weights.")} == {
        "loss_weights.sa",
        "loss_weights.glca",
        "loss_weights.pwca",
    }


def test_each_branch_lowers_its_loss_and_is_told_apart():
    first, last = run(epochs=1)[1].merged(), run(epochs=16)[1].merged()
    names = {"train_loss", "train_loss_glca", "train_loss_pwca"}
    assert names <= first.keys()
    assert all(last[name] < first[name] for name in names)  # a mean over sixteen epochs against the first
    assert first["gradient_norm/glca"] > 0.0
    plain = run(dataclasses.replace(DCAL, attention="sa"))[1].merged()
    assert {name for name in plain if name.startswith("train_loss")} == {"train_loss"}
    assert "gradient_norm/glca" not in plain


def test_what_is_minimised_is_the_papers_formula(monkeypatch):
    """One step of plain gradient descent moves w_i by -lr * 0.5 * (1 - exp(-w_i) L_i), from 0."""
    monkeypatch.setattr(training, "learning_rate", lambda *_: 0.001)
    trained, sums = run(momentum=0.0, batch_size=64)
    losses = {"sa": sums.loss_sum, **sums.branch_loss_sums}
    assert losses.keys() == {"sa", "glca", "pwca"}
    for name, weight in trained.loss_weights.items():
        expected = -0.001 * 0.5 * (1.0 - losses[name] / sums.num_pictures)
        assert weight.item() == pytest.approx(expected, rel=1e-4)


def test_with_adam_the_loss_weights_get_to_their_losses_within_a_short_run():
    """At the network's rate of 0.001 they would move by 0.02 in these steps; the minimum is at the loss's logarithm."""
    trained, sums = run(epochs=20, optimiser="adamw", lr=0.001, warmup_fraction=0.0)
    for name, weight in trained.loss_weights.items():
        loss = sums.branch_loss_sums.get(name, sums.loss_sum) / sums.num_pictures
        assert abs(weight.item() - np.log(loss)) < 0.5, name  # the loss is a mean over all epochs
    assert trained.loss_weights["sa"].item() > 0.2


def test_loss_weights_do_not_count_in_the_norm_that_is_clipped():
    recogniser = recogniser_for(memory_pack(), DCAL)
    every = {name for name, _ in recogniser.named_parameters()}
    held = {id(p) for _, p in recogniser.network_parameters()}
    assert {name for name, p in recogniser.named_parameters() if id(p) not in held} == {
        name for name in every if name.startswith("loss_weights.")
    }


def test_the_same_seed_gives_the_same_bits_whatever_the_global_state():
    torch.manual_seed(1)
    one, _ = run(epochs=2)
    torch.manual_seed(2)
    assert same_bits(one, run(epochs=2)[0])


def drawn(epochs: int, seed: int = 1) -> list[list[int]]:
    seen = []

    def spy(labels, stream):
        seen.append(random_partners(labels, stream))
        return seen[-1]

    settings, pack = config.with_value(SETTINGS, "run", "seed", seed), memory_pack()
    recogniser = recogniser_for(pack, DCAL)
    optimiser = make_optimiser(recogniser, settings.training)
    for epoch in range(epochs):  # apart, as rounds are
        train_epochs(
            recogniser, optimiser, pack, settings=settings, compute=CPU, epochs=range(epoch, epoch + 1),
            total_epochs=epochs, stream_name="alpha", choose_partners=spy,
        )  # fmt: skip
    return [partners.tolist() for partners in seen]


def test_partners_differ_between_epochs_and_repeat_between_runs():
    """Once the sampler seeded itself anew, and every epoch had the same pairs. 20 pictures are 3 batches an epoch."""
    twice = drawn(2)
    assert len(twice) == 6
    assert twice[:3] != twice[3:]
    assert drawn(2) == twice
    assert drawn(1) == twice[:3]
    assert drawn(1, seed=2) != twice[:3]


def test_the_caller_may_choose_the_partners():
    own = run(choose_partners=lambda labels, _: torch.arange(len(labels)))[1]
    assert own.branch_loss_sums["pwca"] == pytest.approx(own.loss_sum, rel=1e-4)
    assert run()[1].branch_loss_sums["pwca"] != pytest.approx(own.loss_sum, rel=1e-3)


def twins_pack():
    """memory_pack's people in families of two."""
    pack = memory_pack()
    return dataclasses.replace(pack, family=np.arange(len(pack.people)) // 2)


def partners_in_training(monkeypatch, partner: str) -> list[tuple[training.Batch, list[int]]]:
    """Each batch of twins, and who PWCA's partners were in it."""
    seen, batches, plain = [], [], training.epoch_batches
    pack, settings = twins_pack(), config.with_value(SETTINGS, "twins", "partner", partner)
    recogniser = recogniser_for(pack, DCAL)
    embeddings = recogniser.branch_embeddings

    def spy(pictures, partners=None):
        seen.append(partners.tolist())
        return embeddings(pictures, partners)

    def kept(*arguments, **named):
        for batch in plain(*arguments, **named):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(recogniser, "branch_embeddings", spy)
    monkeypatch.setattr(training, "epoch_batches", kept)
    train_epochs(
        recogniser, make_optimiser(recogniser, settings.training), pack, settings=settings, compute=CPU,
        epochs=range(1), total_epochs=2, stream_name="alpha",
    )  # fmt: skip
    return list(zip(batches, seen, strict=True))


def test_families_train_in_batches_of_pairs_and_the_partner_may_be_the_twin(monkeypatch):
    pack = twins_pack()
    family = pack.family[pack.person[pack.indices(Split.TRAIN)]]
    label_family = dict(zip(pack.training_labels[pack.indices(Split.TRAIN)].tolist(), family.tolist(), strict=True))
    found = partners_in_training(monkeypatch, "twin")
    with_twin = 0
    for batch, partners in found:
        assert batch.twins is not None
        for own, other, twin in zip(range(len(partners)), partners, batch.twins.tolist(), strict=True):
            assert other != own
            if twin != NO_TWIN:
                with_twin += 1
                assert other == twin
                one, two = int(batch.labels[own]), int(batch.labels[other])
                assert one != two
                assert label_family[one] == label_family[two]
    assert with_twin > 0
    monkeypatch.undo()
    assert any(partners != batch.twins.tolist() for batch, partners in partners_in_training(monkeypatch, "random"))


def test_positions_and_class_token_are_spared_from_decay():
    groups = make_optimiser(recogniser_for(memory_pack(), DCAL), SETTINGS.training).param_groups
    decayed = {tuple(p.shape) for p in groups[0]["params"]}
    spared = {tuple(p.shape) for p in groups[1]["params"]}
    assert (1, 17, 24) in spared - decayed  # 16 patches and the class token
    assert (1, 1, 24) in spared - decayed


@pytest.mark.parametrize("attention", ["sa", "glca"])
def test_without_pwca_no_partner_is_drawn(attention):
    model = dataclasses.replace(DCAL, attention=attention)
    _, sums = run(model, choose_partners=lambda *_: pytest.fail("it costs something"))
    assert sums.num_steps > 0
    assert "pwca" not in sums.branch_loss_sums


def test_accuracy_is_that_of_self_attention():
    """Pictures whose GLCA head knows nothing are counted as right by the other head."""
    recogniser, _ = run(epochs=16)
    with torch.no_grad():
        recogniser.glca_head.weight.copy_(-recogniser.glca_head.weight)
    assert run(recogniser=recogniser, lr=1e-9)[1].merged()["train_accuracy"] > 0.5


def test_a_new_client_warms_up_both_heads_and_nothing_else():
    settings = config.with_value(SETTINGS, "training", "head_warmup_epochs", 1)
    recogniser, fresh = recogniser_for(memory_pack(), DCAL), recogniser_for(memory_pack(), DCAL)
    warm_up_head(recogniser, memory_pack(), settings=settings, compute=CPU, stream_name="alpha")
    before = fresh.state_dict()
    moved = {name for name, tensor in recogniser.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.weight", "glca_head.weight"}


def test_a_closed_set_without_pictures_is_evaluated_as_with_other_backbones():
    """Its embeddings are none, of the right size."""
    recogniser = recogniser_for(memory_pack(), DCAL)
    found = embed(recogniser, memory_pack(), np.array([], dtype=np.int64), CPU)
    assert found.shape == (0, DCAL.embedding_size)


# ---- triplets


def test_without_weight_triplets_are_not_even_worked_out(monkeypatch):
    plain, _ = run(MODEL)
    monkeypatch.setattr(training_step, "batch_hard_triplet", lambda *_: pytest.fail("it costs something"))
    same, _ = run(MODEL)
    assert same_bits(plain, same)


@pytest.mark.parametrize("model", [MODEL, DCAL], ids=["cnn", "dcal"])
def test_triplets_bring_people_together_in_every_branch_and_are_no_part_of_the_loss_told(model, monkeypatch):
    real, seen = training_step.batch_hard_triplet, []
    monkeypatch.setattr(training_step, "batch_hard_triplet", lambda *args: seen.append(real(*args)) or seen[-1])
    plain, without = run(model)
    assert seen == []
    changed, with_it = run(model, triplet=5.0)
    num_branches = len(changed.branches)
    assert len(seen) == 3 * num_branches
    assert max(loss.item() for loss in seen) > 0.0
    assert not same_bits(plain, changed)
    assert with_it.loss_sum < without.loss_sum + 20 * 1.0  # 5 x (0.3 + a distance) on each of 20 pictures is more


def test_a_batch_of_strangers_has_no_triplets_and_changes_no_bit():
    """Three people with one picture each: nobody has a positive."""

    def trained(**values):
        pack = memory_pack(1, people=3)
        recogniser, settings = recogniser_for(pack), SETTINGS
        for name, value in values.items():
            settings = config.with_value(settings, "training", name, value)
        train_epochs(
            recogniser, make_optimiser(recogniser, settings.training), pack, settings=settings, compute=CPU,
            epochs=range(1), total_epochs=1, stream_name="alpha",
        )  # fmt: skip
        return recogniser

    assert same_bits(trained(), trained(triplet=5.0))
