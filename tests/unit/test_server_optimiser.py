"""The server's step: what it may touch, what it keeps, and that a plain mean is still a plain mean to the bit."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.errors import CheckpointError
from common.protocol.parameters import Entry, Manifest
from common.settings import FederationSettings
from common.strategies import STRATEGIES
from server.exchange.guard import LARGEST_CHANGE
from server.global_model import ServerOptimiser, trainable_spans
from server.record.checkpoint import RunCheckpoints
from server.record.history import History

# Two weights, a normalisation layer's scale, mean and variance, then a last layer.
TENSORS = ("a.weight", "b.weight", "n.weight", "n.running_mean", "n.running_var", "c.weight")
MANIFEST = Manifest(tuple(Entry(name=name, shape=(3,), offset=3 * number) for number, name in enumerate(TENSORS)))
TRAINABLE = frozenset(entry.name for entry in MANIFEST.entries if "running" not in entry.name)
BUFFERS = slice(9, 15)
WITH_MOMENTS = ("fedavgm", "fedadam", "fedyogi")


def optimiser_of(name, **values):
    return ServerOptimiser.of(FederationSettings(strategy=name, **values), MANIFEST, TRAINABLE)


def random_buffer(seed, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=MANIFEST.size)).astype(np.float32)


def test_runs_of_elements_of_one_kind_are_one_span():
    assert trainable_spans(MANIFEST, TRAINABLE) == (
        (slice(0, 9), True),
        (slice(9, 15), False),
        (slice(15, 18), True),
    )


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_the_mean_is_added_as_it_is(name):
    """To the bit what `w + mean` is: the models of earlier versions are repeated."""
    model, change = random_buffer(1), random_buffer(2, 1e-3)
    wanted = model + change
    optimiser = optimiser_of(name)
    optimiser.apply(model, change)
    assert model.tobytes() == wanted.tobytes()
    assert optimiser.moments == {}


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_a_learning_rate_scales_the_mean_change_of_parameters_only(name):
    model, change = np.zeros(MANIFEST.size, dtype=np.float32), np.ones(MANIFEST.size, dtype=np.float32)
    optimiser_of(name, server_lr=0.25).apply(model, change)
    assert set(model[BUFFERS]) == {1.0}
    assert set(np.delete(model, np.r_[BUFFERS])) == {0.25}


AUTO = {"fedavg": 1.0, "fedprox": 1.0, "fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01}


@pytest.mark.parametrize(("name", "lr"), AUTO.items())
def test_auto_is_the_strategys_own_learning_rate(name, lr):
    models = []
    for given_lr in ("auto", lr):
        model = random_buffer(1)
        optimiser_of(name, server_lr=given_lr).apply(model, random_buffer(2))
        models.append(model.tobytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("name", tuple(STRATEGIES))
def test_statistics_of_normalisation_are_averaged_plainly_and_have_no_moments(name):
    """The mean variance falls from 1 to 0.4 and 0.01: one more step with momentum would take it below zero."""
    optimiser, model = optimiser_of(name, server_momentum=0.9), np.ones(MANIFEST.size, dtype=np.float32)
    first = {moment: buffer.copy() for moment, buffer in optimiser.moments.items()}
    for change in (-0.6, -0.39, 0.0):
        wanted = model[BUFFERS] + np.float32(change)
        optimiser.apply(model, np.full(MANIFEST.size, change, dtype=np.float32))
        assert model[BUFFERS].tobytes() == wanted.tobytes()
        assert (model[BUFFERS] > 0).all()
    for moment, buffer in optimiser.moments.items():
        is_changed = buffer != first[moment]
        assert not is_changed[BUFFERS].any()
        assert is_changed.sum() == 12  # every element of every parameter


@pytest.mark.parametrize("name", tuple(STRATEGIES))
def test_all_stays_float32_and_in_place_and_the_change_is_not_touched(name):
    optimiser, model, change = optimiser_of(name), random_buffer(1), random_buffer(2)
    moments, before = dict(optimiser.moments), change.tobytes()
    optimiser.apply(model, change)
    assert {buffer.dtype for buffer in (model, *optimiser.moments.values())} == {np.dtype(np.float32)}
    assert all(optimiser.moments[moment] is buffer for moment, buffer in moments.items())
    assert change.tobytes() == before


LARGEST = float(np.float32(LARGEST_CHANGE))
finite = arrays(np.float32, MANIFEST.size, elements=st.floats(-LARGEST, LARGEST, width=32))


@pytest.mark.parametrize("name", WITH_MOMENTS)
@settings(max_examples=60, deadline=None)
@given(changes=st.lists(finite, min_size=1, max_size=4))
def test_whatever_passes_the_guard_leaves_numbers(name, changes):
    """A change of 1e30 has a square that float32 cannot hold; infinity less infinity would be no number."""
    optimiser, model = optimiser_of(name), np.zeros(MANIFEST.size, dtype=np.float32)
    for change in changes:
        optimiser.apply(model, change)
        assert np.isfinite(model).all()
        assert all(np.isfinite(buffer).all() for buffer in optimiser.moments.values())
        assert (optimiser.moments.get("second", np.zeros(1)) >= 0).all()


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
@settings(max_examples=60, deadline=None)
@given(change=arrays(np.float32, MANIFEST.size, elements=st.floats(-1e3, 1e3, width=32)))
def test_the_first_adaptive_step_goes_with_the_change_and_is_bounded(name, change):
    """m = 0.1 d and sqrt(v) >= 0.1 |d| x sqrt(1 - rounding), so no parameter moves by more than lr."""
    model = np.zeros(MANIFEST.size, dtype=np.float32)
    optimiser_of(name, server_lr=0.5).apply(model, change)
    moved, asked = np.delete(model, np.r_[BUFFERS]), np.delete(change, np.r_[BUFFERS])
    assert (np.abs(moved) <= 0.5 * (1 + 1e-5)).all()
    assert (moved * asked >= 0).all()


def test_fedavgm_multiplies_a_steady_change_by_lr_over_one_minus_momentum():
    optimiser, model = optimiser_of("fedavgm", server_momentum=0.9), np.zeros(MANIFEST.size, dtype=np.float32)
    change = np.full(MANIFEST.size, 0.5, dtype=np.float32)
    for _ in range(300):
        before = model.copy()
        optimiser.apply(model, change)
    assert (model - before)[0] == pytest.approx(0.5 * 10, rel=1e-3)
    assert (model - before)[9] == pytest.approx(0.5, rel=1e-3)


# ---- going on from a checkpoint


@pytest.mark.parametrize("name", WITH_MOMENTS)
def test_a_restored_strategy_goes_on_bit_for_bit(name, tmp_path):
    """Six rounds at once, and three, a checkpoint on disk, a new process's objects, and three more."""
    whole, model = optimiser_of(name), random_buffer(0)
    for number in range(1, 7):
        whole.apply(model, random_buffer(number, 1e-2))

    checkpoints = RunCheckpoints(tmp_path, MANIFEST)
    first, half = optimiser_of(name), random_buffer(0)
    for number in range(1, 4):
        first.apply(half, random_buffer(number, 1e-2))
    sha256 = checkpoints.save(3, half, first.moments, History(), {})
    second, resumed = optimiser_of(name), checkpoints.load(3)
    second.restore(checkpoints.load_moments(3, sha256))
    for number in range(4, 7):
        second.apply(resumed, random_buffer(number, 1e-2))
    assert resumed.tobytes() == model.tobytes()
    assert {k: v.tobytes() for k, v in second.moments.items()} == {k: v.tobytes() for k, v in whole.moments.items()}

    forgetful, other = optimiser_of(name), checkpoints.load(3)
    for number in range(4, 7):
        forgetful.apply(other, random_buffer(number, 1e-2))
    assert other.tobytes() != model.tobytes()  # the moments do matter


@pytest.mark.parametrize(
    ("name", "moments"),
    [
        ("fedavgm", {}),
        ("fedavg", {"momentum": np.zeros(18, dtype=np.float32)}),
        ("fedadam", {"momentum": np.zeros(18, dtype=np.float32)}),
        ("fedavgm", {"momentum": np.zeros(17, dtype=np.float32)}),
    ],
)
def test_moments_of_another_strategy_or_model_are_refused(name, moments):
    with pytest.raises(CheckpointError, match=f"{name} needs .*; resume with the settings that the run began with"):
        optimiser_of(name).restore(moments)


def test_the_second_moment_starts_at_the_square_of_the_adaptivity():
    """Algorithm 2 of arXiv:2003.00295; from zero the first step would be lr * sign(change) however small it is."""
    optimiser = optimiser_of("fedadam", server_adaptivity=0.5)
    assert set(optimiser.moments["second"]) == {0.25}
    model = np.zeros(MANIFEST.size, dtype=np.float32)
    optimiser.apply(model, np.full(MANIFEST.size, 1e-4, dtype=np.float32))
    assert model[0] == pytest.approx(0.01 * 1e-5 / (math.sqrt(0.99 * 0.25) + 0.5), rel=1e-3)
