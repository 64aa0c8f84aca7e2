"""One step under hard conditions: parts of a batch, no memory, no compiler, float16, activations worked out again."""

import copy
import dataclasses
import logging

import pytest
import torch
from packs_in_memory import CPU, MODEL, SIDE, memory_pack, same_bits

from common import config
from common.errors import TrainingFailed
from common.faces.batches import NO_TWIN, Batch
from common.models.recogniser import build_recogniser
from common.settings import ModelSettings, TrainingSettings
from common.training import compute as computing
from common.training import loop as training
from common.training import step as training_step
from common.training.loop import TrainSums, train_epochs
from common.training.optimiser import flat, make_optimiser, settle
from common.training.step import Stepper, in_parts, is_halved

SETTINGS = config.from_mapping({"data": {"image_size": SIDE}, "training": {"batch_size": 8, "lr": 0.05}})
TRAINING = SETTINGS.training
RESNET = dataclasses.replace(MODEL, backbone="resnet18", width=0.125)
VIT = dataclasses.replace(MODEL, backbone="vit_tiny", patch_size=8, depth=2, width=0.125)


pytestmark = pytest.mark.usefixtures("one_thread")


def fresh(model: ModelSettings = MODEL):
    return build_recogniser(model, num_people=4, image_size=SIDE, backbone_seed=1, head_seed=2).train()


def some_batch(size: int = 8, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    pictures = torch.rand(size, 3, SIDE, SIDE, generator=random) * 2 - 1
    return Batch(pictures, torch.arange(size) % 4, None)


def stepper(recogniser, *, compute=CPU, **values) -> Stepper:
    wanted = dataclasses.replace(TRAINING, **values)
    return Stepper(
        recogniser=recogniser, optimiser=make_optimiser(recogniser, wanted), training=wanted, compute=compute
    )


def train(recogniser, settings=SETTINGS, *, compute=CPU, epochs=range(1)) -> TrainSums:
    return train_epochs(
        recogniser,
        make_optimiser(recogniser, settings.training),
        memory_pack(),
        settings=settings,
        compute=compute,
        epochs=epochs,
        total_epochs=2,
        stream_name="alpha",
    )


def gradients(recogniser) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in recogniser.named_parameters() if p.grad is not None}


def without_statistics(recogniser):
    """Batch normalisation by gathered statistics, so that a part of a batch is treated as the whole is."""
    for module in recogniser.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return recogniser


# ---- parts of a batch


@pytest.mark.parametrize("accumulate", [2, 3, 4])
@pytest.mark.parametrize("model", [MODEL, VIT], ids=["cnn", "vit"])
def test_the_gradient_of_parts_is_that_of_the_whole_batch(accumulate, model):
    """With normalisation that does not look at the batch; parts of 3, 3 and 2 pictures weigh by their number."""
    told = {}
    for number in (1, accumulate):
        recogniser = without_statistics(fresh(model))
        told[number] = stepper(recogniser, accumulate=number, clip_norm=1e9).step(some_batch(), where="here")
        told[number] = told[number], gradients(recogniser)
    (whole, expected), (parts, found) = told[1], told[accumulate]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3)
    assert parts.losses["sa"] == pytest.approx(whole.losses["sa"], rel=1e-5)
    assert parts.correct == whole.correct
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)


@pytest.mark.parametrize(("size", "number", "sizes"), [(8, 3, [3, 3, 2]), (5, 4, [3, 2]), (3, 2, [3]), (2, 9, [2])])
def test_no_part_is_a_single_picture(size, number, sizes):
    parts = in_parts(some_batch(size), number)
    assert [len(part.labels) for part in parts] == sizes
    assert torch.equal(torch.cat([part.pictures for part in parts]), some_batch(size).pictures)


def test_a_twin_in_another_part_is_none():
    batch = some_batch(6)._replace(twins=torch.tensor([1, 0, 5, NO_TWIN, 0, 4]))
    parts = in_parts(batch, 2)
    assert [part.twins.tolist() for part in parts] == [[1, 0, NO_TWIN], [NO_TWIN, NO_TWIN, 1]]


def test_parts_make_no_more_steps_and_take_the_same_pictures():
    sums = [train(fresh(), config.with_value(SETTINGS, "training", "accumulate", number)) for number in (1, 2)]
    assert (sums[0].num_steps, sums[0].num_pictures) == (sums[1].num_steps, sums[1].num_pictures) == (3, 20)


# ---- activations worked out again


@pytest.mark.parametrize("model", [MODEL, RESNET, VIT], ids=["cnn", "resnet", "vit"])
def test_what_is_worked_out_again_changes_no_bit(model):
    """Gradients, parameters, running statistics and their counters, with dropout too."""
    model = dataclasses.replace(model, dropout=0.5)
    plain, thrifty = fresh(model), fresh(model)
    names = list(thrifty.state_dict())
    train(plain)
    train(thrifty, config.with_value(SETTINGS, "training", "activation_checkpointing", value=True))
    assert same_bits(plain, thrifty)
    assert list(thrifty.state_dict()) == names
    assert all("forward" not in vars(module) for module in thrifty.modules())


def test_less_is_kept_for_the_backward_pass():
    """Counted where autograd keeps it: what the eight residual blocks hold is more than half of all."""

    def kept_bytes(settings) -> int:
        recogniser, seen = fresh(RESNET), {}
        steps = stepper(recogniser)

        def pack(tensor):
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            training_step.activation_checkpointing(recogniser, settings),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            steps.recogniser.branch_embeddings(some_batch().pictures)
        return sum(seen.values()) - 4 * sum(p.numel() for p in recogniser.parameters())

    whole = kept_bytes(TRAINING)
    assert kept_bytes(dataclasses.replace(TRAINING, activation_checkpointing=True)) < 0.5 * whole


def test_a_vit_with_branches_works_out_the_mlps_again():
    recogniser = fresh(dataclasses.replace(VIT, attention="dcal", glca_fraction=0.3))
    blocks = [*recogniser.backbone.trunk.blocks, recogniser.backbone.glca.block]
    assert recogniser.backbone.units == [block.mlp for block in blocks]


# ---- no memory


def out_of_memory(monkeypatch, *, calls: set[int]):
    """The passes of these numbers (from 0) find no memory, after the forward pass has changed statistics."""
    made = []
    real = training_step.eager

    def network(recogniser, pictures, partners):
        made.append(len(pictures))
        found = real(recogniser, pictures, partners)
        if len(made) - 1 in calls:
            torch.rand(3)  # dropout would have drawn too
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    monkeypatch.setattr(training_step, "eager", network)
    return made


def test_out_of_memory_halves_the_batch_and_nothing_else(monkeypatch, caplog):
    """The result is that of a run which computed in two parts from that step on, bit for bit."""
    model = dataclasses.replace(MODEL, dropout=0.5)
    halved, expected = fresh(model), fresh(model)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "facefed.training"):
        made = out_of_memory(patch, calls={0})
        sums = train(halved)
        assert made[:3] == [7, 4, 3]  # 20 pictures are batches of 7, 7 and 6; each is then halved
        assert made[3:] == [4, 3, 3, 3]
    train(expected, config.with_value(SETTINGS, "training", "accumulate", 2))
    assert same_bits(halved, expected)
    assert sums.num_halvings == 1
    assert sums.merged()["num_halvings"] == 1.0
    assert [record.message for record in caplog.records] == [
        "out of memory on cpu at epoch 1, step 1 of 3: each batch is now computed in 2 parts"
    ]
    assert is_halved(halved)
    assert not is_halved(expected)
    assert train(halved).num_halvings == 0  # the next round begins with halves


@pytest.mark.parametrize("call", [1, 2])
def test_the_second_time_it_is_an_error_and_no_parameter_has_moved(monkeypatch, call):
    """Also when a part of the batch was done already."""
    recogniser = fresh()
    before = copy.deepcopy(recogniser.state_dict())
    out_of_memory(monkeypatch, calls={0, call})
    expected = (
        "cpu is out of memory at here, with each batch in 2 parts; lower training.batch_size (now 8) or"
        " data.image_size, raise training.accumulate (now 1), or set training.activation_checkpointing = true."
    )
    with pytest.raises(TrainingFailed) as caught:
        stepper(recogniser).step(some_batch(), where="here")
    assert str(caught.value) == expected
    assert all(torch.equal(tensor, before[name]) for name, tensor in recogniser.state_dict().items())


def test_a_batch_too_small_to_halve_is_an_error_at_once(monkeypatch):
    out_of_memory(monkeypatch, calls={0})
    with pytest.raises(TrainingFailed, match="out of memory at here, with each batch in 1 parts"):
        stepper(fresh()).step(some_batch(3), where="here")


# ---- the compiler


@pytest.fixture
def _compiler(monkeypatch):
    monkeypatch.setattr(computing, "_gave_up", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler")
def test_compiling_leaves_names_and_copies_of_the_model_alone(monkeypatch):
    """By dynamo and autograd's own graph, without the C++ compiler, which takes a minute."""
    network = torch.compile(computing.eager, backend="aot_eager")
    monkeypatch.setattr(training_step, "compiled", lambda: network)
    recogniser, plain = fresh(), fresh()
    names = list(recogniser.state_dict())
    train(recogniser, compute=dataclasses.replace(CPU, compiled=True))
    assert not computing.is_given_up()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    train(plain)
    assert list(recogniser.state_dict()) == names
    assert not any("_orig_mod" in name for name in names)
    copy.deepcopy(recogniser)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(recogniser.state_dict()[name], tensor, atol=1e-3, rtol=1e-2)


@pytest.mark.usefixtures("_compiler")
def test_without_a_compiler_it_goes_on_eagerly_with_one_warning(monkeypatch, caplog):
    """The failed pass had changed statistics; the result is that of a run that never tried."""
    calls = []

    def network(recogniser, pictures, partners):
        calls.append(1)
        computing.eager(recogniser, pictures, partners)
        raise RuntimeError("CppCompileError: no C++ compiler\nlong story")

    monkeypatch.setattr(training_step, "compiled", lambda: network)
    recogniser, plain = fresh(), fresh()
    with caplog.at_level(logging.WARNING, "facefed.training"):
        train(recogniser, compute=dataclasses.replace(CPU, compiled=True))
    train(plain)
    assert same_bits(recogniser, plain)
    assert len(calls) == 1
    assert [record.message for record in caplog.records] == [
        "torch.compile failed, so this process computes without it: CppCompileError: no C++ compiler"
    ]


def test_other_errors_are_not_taken_for_the_compilers(monkeypatch):
    def network(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(training_step, "eager", network)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(fresh())


# ---- float16


def test_float16_scales_its_losses_and_tells_of_them_without_the_scale():
    told = {}
    for name in ("float32", "float16"):
        recogniser = fresh()
        steps = stepper(recogniser, compute=dataclasses.replace(CPU, precision=name))
        told[name] = steps.step(some_batch(), where="here")
        assert not same_bits(recogniser, fresh())
        assert {p.dtype for p in recogniser.parameters()} == {torch.float32}
        assert steps._scaler.get_scale() == (training_step.FIRST_LOSS_SCALE if name == "float16" else 1.0)
    assert told["float16"].losses["sa"] == pytest.approx(told["float32"].losses["sa"], rel=0.01)
    assert told["float16"].gradient_norm == pytest.approx(told["float32"].gradient_norm, rel=0.05)


def test_the_scale_lasts_from_epoch_to_epoch(monkeypatch):
    seen = []
    real = training.loss_scaler
    monkeypatch.setattr(training, "loss_scaler", lambda compute: seen.append(real(compute)) or seen[-1])
    train(fresh(), compute=dataclasses.replace(CPU, precision="float16"), epochs=range(2))
    assert len(seen) == 1
    assert seen[0].state_dict()["_growth_tracker"] == 6  # three steps an epoch, none of which overflowed


def test_an_overflow_of_float16_takes_no_step_and_halves_the_scale():
    recogniser = fresh()
    before = copy.deepcopy(dict(recogniser.named_parameters()))
    steps = stepper(recogniser, compute=dataclasses.replace(CPU, precision="float16"))
    steps._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    stepped = steps.step(some_batch(), where="here")
    assert (stepped.gradient_norm, stepped.gradient_norms) == (0.0, {})
    assert steps._scaler.get_scale() == 2.0**119
    assert all(torch.equal(p, before[name]) for name, p in recogniser.named_parameters())


# ---- the fused optimiser


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_fused_step_is_torchs_plain_one(optimiser, memory_format):
    """Against torch's loop over parameters, in either layout, for three steps."""
    training = TrainingSettings(optimiser=optimiser, lr=0.05)
    fused, plain = fresh(RESNET).to(memory_format=memory_format), fresh(RESNET)
    ours, theirs = make_optimiser(fused, training), make_optimiser(plain, training)
    for group in theirs.param_groups:
        group["fused"], group["foreach"] = False, False
    settle(ours)
    for seed in range(3):
        torch.manual_seed(seed)
        for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
            other.grad = torch.randn(other.shape)
            one.grad = torch.empty_like(one).copy_(other.grad)
        with flat(ours):
            ours.step()
        theirs.step()
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach().clone(memory_format=memory_format) if one.ndim == 4 else other)
        assert one.shape == one.grad.shape == other.shape
        assert ours.state[one].keys() == theirs.state[other].keys()
        for name, value in ours.state[one].items():
            torch.testing.assert_close(value, theirs.state[other][name], check_stride=False)


def test_a_momentum_that_some_have_is_completed_by_zeros_without_changing_a_bit():
    """A private head comes with its momentum from the last round, the shared backbone without."""
    ours, plain = fresh(), fresh()
    fused, loop = make_optimiser(ours, TRAINING), make_optimiser(plain, TRAINING)
    for group in loop.param_groups:
        group["fused"], group["foreach"] = False, False
    for recogniser, optimiser in ((ours, fused), (plain, loop)):
        optimiser.state[recogniser.head.weight]["momentum_buffer"] = torch.full_like(recogniser.head.weight, 0.1)
        for parameter in recogniser.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
    settle(fused)
    fused.step()
    loop.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_state_that_lies_otherwise_is_laid_out_like_its_parameter():
    """As it is after a resume: read from a file, contiguous."""
    recogniser = fresh(RESNET).to(memory_format=torch.channels_last)
    optimiser = make_optimiser(recogniser, TRAINING)
    weight = recogniser.backbone.trunk.conv1.weight
    saved = torch.randn(weight.shape)
    optimiser.state[weight]["momentum_buffer"] = saved.clone()
    settle(optimiser)
    found = optimiser.state[weight]["momentum_buffer"]
    assert found.stride() == weight.stride()
    assert torch.equal(found, saved)
