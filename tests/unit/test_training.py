"""The one training step: its schedule by hand, what it clips, decays and refuses, and the same bits for one seed."""

import dataclasses
import math

import pytest
import torch
from packs_in_memory import CPU, memory_pack, recogniser_for, same_bits

from common import config
from common.errors import TrainingFailed
from common.faces.batches import epoch_batches, num_batches
from common.faces.splits import Split
from common.settings import TrainingSettings
from common.strategies import proximal
from common.training import loop as training
from common.training import step as training_step
from common.training.loop import (
    Compute,
    TrainSums,
    in_epochs,
    learning_rate,
    make_optimiser,
    train_epochs,
    train_round,
    warm_up_head,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = config.from_mapping({"data": {"image_size": 32}, "training": {"batch_size": 8, "lr": 0.05}})


def run(settings=SETTINGS, *, epochs=range(1), total=2, compute=CPU, pack=None, name="alpha", steps=None, penalty=None):
    """Train a fresh recogniser; returns it and the sums. steps: separate ranges of epochs, one optimiser."""
    pack = pack or memory_pack()
    recogniser = recogniser_for(pack)
    optimiser = make_optimiser(recogniser, settings.training)
    sums = TrainSums()
    for part in steps or [epochs]:
        sums = train_epochs(
            recogniser,
            optimiser,
            pack,
            settings=settings,
            compute=compute,
            epochs=part,
            total_epochs=total,
            stream_name=name,
            penalty=penalty,
        )
    return recogniser, sums


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, 0.0),
        (0.05, 0.1),  # half of the warm-up: half of lr
        (0.1, 0.2),  # its end: lr
        (0.325, 0.2 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the cosine: cos(pi / 4)
        (0.55, 0.1),  # half of it: cos(pi / 2) = 0
        (1.0, 0.0),
    ],
)
def test_the_schedule_by_hand(progress, expected):
    assert learning_rate(TrainingSettings(lr=0.2, warmup_fraction=0.1), progress) == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_it_starts_at_the_top():
    assert learning_rate(TrainingSettings(lr=0.2, warmup_fraction=0.0), 0.0) == 0.2


def rates(monkeypatch, **arguments) -> list[float]:
    seen = []
    real = training.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", lambda *args: seen.append(real(*args)) or seen[-1])
        run(**arguments)
    return seen


def test_rounds_do_not_restart_the_schedule(monkeypatch):
    """20 pictures in batches of 8 are 3 steps an epoch; step k of 12 is at (k + 0.5) / 12 of the way."""
    whole = rates(monkeypatch, epochs=range(4), total=4)
    split = rates(monkeypatch, steps=[range(2), range(2, 3), range(3, 4)], total=4)
    assert split == whole
    assert whole == pytest.approx([learning_rate(SETTINGS.training, (k + 0.5) / 12) for k in range(12)])
    assert whole[0] < whole[1] > whole[2], "warm-up rises once"


def test_epochs_apart_are_epochs_together():
    together, _ = run(epochs=range(2))
    apart, _ = run(steps=[range(1), range(1, 2)])
    assert same_bits(together, apart)


def test_the_same_seed_gives_the_same_bits_whatever_the_global_state():
    torch.manual_seed(1)
    one, _ = run()
    torch.manual_seed(2)
    torch.rand(100)
    other, _ = run()
    assert same_bits(one, other)
    different, _ = run(config.with_value(SETTINGS, "run", "seed", 2))
    assert not same_bits(one, different)
    elsewhere, _ = run(name="beta")
    assert not same_bits(one, elsewhere)


def test_dropout_is_repeatable_too():
    pack = memory_pack()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        recogniser = recogniser_for(pack, dataclasses.replace(recogniser_settings(), dropout=0.5))
        optimiser = make_optimiser(recogniser, SETTINGS.training)
        arguments = {"settings": SETTINGS, "compute": CPU, "epochs": range(1), "total_epochs": 1, "stream_name": "a"}
        train_epochs(recogniser, optimiser, pack, **arguments)
        states.append(recogniser)
    assert same_bits(*states)


def recogniser_settings():
    from packs_in_memory import MODEL

    return MODEL


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_threads_give_equal_bits(threads):
    compute = dataclasses.replace(CPU, threads=threads)
    one, _ = run(compute=compute)
    assert torch.get_num_threads() == threads
    other, _ = run(compute=compute)
    assert same_bits(one, other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_epoch_and_step(monkeypatch, value):
    real = torch.nn.functional.cross_entropy
    calls = []

    def loss(logits, labels, **keywords):
        calls.append(1)
        return real(logits, labels, **keywords) * (value if len(calls) == 5 else 1.0)

    monkeypatch.setattr(training_step.F, "cross_entropy", loss)
    with pytest.raises(TrainingFailed, match=r"at epoch 2, step 2 of 3; lower training.lr \(now 0.05\)"):
        run(epochs=range(3), total=3)


def test_a_step_that_is_not_finite_changes_no_parameter():
    pack = memory_pack()
    recogniser = recogniser_for(pack)
    with torch.no_grad():
        recogniser.backbone.linear.weight[0, 0] = math.nan
    before = {name: p.detach().clone() for name, p in recogniser.named_parameters()}
    arguments = {"settings": SETTINGS, "compute": CPU, "epochs": range(1), "total_epochs": 1, "stream_name": "a"}
    with pytest.raises(TrainingFailed, match="epoch 1, step 1 of 3"):
        train_epochs(recogniser, make_optimiser(recogniser, SETTINGS.training), pack, **arguments)
    for name, parameter in recogniser.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_the_whole_gradient_is_clipped(monkeypatch):
    """SGD without momentum or decay: one step moves the parameters by lr * min(norm, clip_norm)."""
    base = {"momentum": 0.0, "weight_decay": 0.0, "warmup_fraction": 0.0, "batch_size": 64, "lr": 0.01}
    monkeypatch.setattr(training, "learning_rate", lambda _training, _progress: 0.01)
    moved = {}
    for clip in (0.25, 1e9):
        settings = config.from_mapping({"data": {"image_size": 32}, "training": base | {"clip_norm": clip}})
        fresh = recogniser_for(memory_pack())
        trained, sums = run(settings, total=1)
        before = dict(fresh.named_parameters())
        step = torch.cat([(p - before[name]).detach().flatten() for name, p in trained.named_parameters()])
        moved[clip] = (float(step.norm()), sums.gradient_norm_sum)
    norm = moved[1e9][1]
    assert norm > 0.25
    assert moved[0.25] == (pytest.approx(0.01 * 0.25, rel=1e-3), norm), "the norm told is that before clipping"
    assert moved[1e9][0] == pytest.approx(0.01 * norm, rel=1e-3)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_weight_decay_spares_vectors(optimiser):
    """With zero gradients only decay moves anything: w -> w * (1 - lr * decay) for matrices, vectors stay."""
    pack = memory_pack()
    recogniser = recogniser_for(pack)
    settings = TrainingSettings(optimiser=optimiser, lr=0.1, weight_decay=0.5, momentum=0.0)
    before = {name: p.detach().clone() for name, p in recogniser.named_parameters()}
    for parameter in recogniser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimiser(recogniser, settings).step()
    kinds = set()
    for name, parameter in recogniser.named_parameters():
        kinds.add(parameter.ndim > 1)
        factor = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    assert kinds == {True, False}


def test_every_parameter_is_optimised_once():
    recogniser = recogniser_for(memory_pack())
    groups = make_optimiser(recogniser, TrainingSettings()).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in recogniser.parameters())
    assert groups[0]["nesterov"]
    assert not make_optimiser(recogniser, TrainingSettings(momentum=0.0)).param_groups[0]["nesterov"]


def test_the_pull_to_the_received_model_is_the_gradient_of_the_squared_norm():
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]
    received = [w.detach().clone() for w in weights]
    pull = proximal(weights, 0.3)
    with torch.no_grad():
        weights[0].add_(torch.tensor([0.5, 1.0]))
        weights[1].sub_(2.0)
    objective = sum(0.15 * (w - r).square().sum() for w, r in zip(weights, received, strict=True))
    expected = torch.autograd.grad(objective, weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    pull()
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient + 1.0)


def test_the_penalty_is_called_each_step_before_the_step():
    calls = []
    run(penalty=lambda: calls.append(1))
    assert len(calls) == 3


def test_the_sums_count_every_picture_once_an_epoch():
    _, sums = run(epochs=range(2))
    assert (sums.num_pictures, sums.num_steps) == (40, 6)
    merged = sums.merged()
    assert merged["train_loss"] == pytest.approx(sums.loss_sum / 40)
    assert merged["train_accuracy"] == sums.correct / 40
    assert merged["gradient_norm"] == pytest.approx(sums.gradient_norm_sum / 6)
    groups = {"stem", "blocks_early", "blocks_middle", "blocks_late", "closing", "head"}
    assert sums.gradient_norm_sums.keys() == groups
    assert {name for name in merged if name.startswith("gradient_norm/")} == {f"gradient_norm/{g}" for g in groups}
    assert merged["gradient_norm/head"] == pytest.approx(sums.gradient_norm_sums["head"] / 6)
    assert all(0.0 < merged[f"gradient_norm/{group}"] < merged["gradient_norm"] for group in groups)
    assert TrainSums().merged() == {"train_loss": 0.0, "train_accuracy": 0.0, "gradient_norm": 0.0}


def test_training_learns():
    """Four people whose pictures differ from noise only: 12 epochs suffice for most of them."""
    _, first = run(total=12)
    _, last = run(steps=[range(11), range(11, 12)], total=12)
    assert last.merged()["train_loss"] < 0.5 * first.merged()["train_loss"]
    assert last.merged()["train_accuracy"] > 0.7


@pytest.mark.parametrize("train", [5, 7])
def test_batches_of_two_and_an_odd_number_of_pictures_train(train):
    """Batch normalisation cannot train on one picture, so none may be left alone."""
    settings = config.with_value(SETTINGS, "training", "batch_size", 2)
    _, sums = run(settings, pack=memory_pack(train, people=3), total=1)
    assert sums.num_pictures == 3 * train


def test_bfloat16_computes_otherwise_and_keeps_float32_parameters():
    compute = Compute(device="cpu", precision="bfloat16", memory_format="channels_last", threads=1)
    half, _ = run(compute=compute)
    full, _ = run()
    assert not same_bits(half, full)
    assert {p.dtype for p in half.parameters()} == {torch.float32}


# ---- identity vectors apart


def distances(recogniser):
    unit = torch.nn.functional.normalize(recogniser.head.weight.detach(), dim=1)
    return torch.pdist(unit)


def test_without_weight_spreadout_is_not_even_worked_out(monkeypatch):
    plain, _ = run()
    monkeypatch.setattr(training_step, "spreadout", lambda *_: pytest.fail("it costs something"))
    same, _ = run(config.with_value(SETTINGS, "training", "spreadout_margin", 2.0))
    assert same_bits(plain, same)


def test_spreadout_parts_identity_vectors_and_is_no_part_of_the_loss_told():
    """Its gradient is added, with the weight, to that of the cross-entropy, whose value alone is told."""
    wide = config.with_value(SETTINGS, "training", "spreadout_margin", 2.0)
    plain, without = run(wide, epochs=range(4), total=4)
    parted, with_it = run(config.with_value(wide, "training", "spreadout", 30.0), epochs=range(4), total=4)
    assert distances(parted).min() > distances(plain).min() + 0.01
    assert with_it.loss_sum < without.loss_sum + 40 * 4.0  # 30 x (2 - 1.6)^2 on each of 80 pictures would be more


def test_a_margin_that_all_vectors_keep_changes_no_bit():
    """Four random directions in 16 dimensions are more than 0.1 apart, and stay so."""
    tight = config.with_value(SETTINGS, "training", "spreadout_margin", 0.1)
    plain, _ = run(tight)
    same, _ = run(config.with_value(tight, "training", "spreadout", 5.0))
    assert same_bits(plain, same)


# ---- a new head, alone


def warm_up(epochs, *, seed=1, name="alpha", dropout=0.0):
    """A fresh recogniser after the warm-up, a copy of its state before, and the sums."""
    pack = memory_pack()
    recogniser = recogniser_for(pack, dataclasses.replace(recogniser_settings(), dropout=dropout))
    with torch.no_grad():  # statistics that no batch of ours has, so that one batch would move them
        for key, tensor in recogniser.backbone.state_dict().items():
            if key.endswith("running_mean"):
                tensor.fill_(0.25)
    before = {key: tensor.clone() for key, tensor in recogniser.state_dict().items()}
    settings = config.with_value(SETTINGS, "training", "head_warmup_epochs", epochs)
    settings = config.with_value(settings, "run", "seed", seed)
    sums = warm_up_head(recogniser, pack, settings=settings, compute=CPU, stream_name=name)
    return recogniser, before, sums


def test_the_head_learns_alone_and_of_the_backbone_not_one_bit_moves():
    recogniser, before, _ = warm_up(2)
    after = recogniser.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == {"head.weight"}
    assert all(parameter.requires_grad for parameter in recogniser.parameters())  # and may be trained afterwards


def test_the_warm_up_is_counted_apart():
    """20 pictures in batches of 8 are 3 steps an epoch."""
    _, _, sums = warm_up(2)
    assert (sums.num_warmup_pictures, sums.num_warmup_steps) == (40, 6)
    assert dataclasses.replace(sums, num_warmup_pictures=0, num_warmup_steps=0) == TrainSums()


def test_no_warm_up_changes_and_counts_nothing():
    recogniser, before, sums = warm_up(0)
    assert sums == TrainSums()
    assert all(torch.equal(tensor, before[key]) for key, tensor in recogniser.state_dict().items())


def test_the_warm_up_is_repeatable_whatever_the_global_state_and_depends_on_seed_and_client():
    torch.manual_seed(1)
    one, _, _ = warm_up(1, dropout=0.5)
    torch.manual_seed(2)
    assert same_bits(one, warm_up(1, dropout=0.5)[0])
    assert not same_bits(one, warm_up(1, dropout=0.5, name="beta")[0])
    assert not torch.equal(one.head.weight, warm_up(1, seed=2)[0].head.weight)


def test_the_warm_up_lowers_the_heads_loss():
    """Measured on the training pictures as they are, in evaluation mode."""

    def loss(recogniser):
        pack = memory_pack()
        chosen = pack.indices(training.Split.TRAIN)
        pictures = torch.from_numpy(pack.pictures[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        labels = torch.from_numpy(pack.training_labels[chosen])
        recogniser.eval()
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(recogniser(pictures, labels), labels))

    assert loss(warm_up(10)[0]) < 0.9 * loss(warm_up(0)[0])


def test_stale_gradients_of_the_backbone_do_not_count_in_the_clipped_norm():
    """A recogniser that was trained before still holds them."""
    fresh, _, _ = warm_up(1)
    pack = memory_pack()
    stale = recogniser_for(pack)
    with torch.no_grad():
        for key, tensor in stale.backbone.state_dict().items():
            if key.endswith("running_mean"):
                tensor.fill_(0.25)
    for parameter in stale.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    settings = config.with_value(SETTINGS, "training", "head_warmup_epochs", 1)
    warm_up_head(stale, pack, settings=settings, compute=CPU, stream_name="alpha")
    assert torch.equal(stale.head.weight, fresh.head.weight)


def test_a_warm_up_that_diverges_says_where(monkeypatch):
    monkeypatch.setattr(training_step.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * math.nan)
    with pytest.raises(TrainingFailed, match=r"at epoch 1 of the head's warm-up, step 1; lower training.lr"):
        warm_up(1)


def test_steps_that_end_in_the_middle_of_an_epoch_go_on_with_its_other_pictures():
    assert in_epochs(range(4, 11), 5) == [(0, range(4, 5)), (1, range(5)), (2, range(1))]
    assert in_epochs(range(5, 7), 5) == [(1, range(2))]
    pack = memory_pack(7)
    settings = config.with_value(SETTINGS, "federation", "local_steps", 3)
    per_epoch = num_batches(len(pack.indices(Split.TRAIN)), settings.training.batch_size)
    assert per_epoch % 3 > 0  # so a round ends within an epoch

    def labels(epoch, steps=None):
        batches = epoch_batches(pack, settings, device="cpu", stream_name="a", epoch=epoch, steps=steps)
        return [batch.labels.tolist() for batch in batches]

    whole = labels(0)
    assert labels(0, range(3, per_epoch)) == whole[3:]
    assert labels(0, range(3)) == whole[:3]


def test_a_round_of_steps_is_so_many_and_the_rate_falls_over_all_of_them():
    pack, rates = memory_pack(7), []
    settings = config.with_values(SETTINGS, {"federation.local_steps": 2, "federation.rounds": 3})
    recogniser = recogniser_for(pack)
    optimiser = make_optimiser(recogniser, settings.training)
    for number in (1, 2, 3):
        sums = train_round(
            recogniser, optimiser, pack, settings=settings, compute=CPU, server_round=number, stream_name="a"
        )
        assert sums.num_steps == 2
        rates.append(sums.lr_last)
    assert rates == [pytest.approx(learning_rate(settings.training, (k + 0.5) / 6)) for k in (1, 3, 5)]
