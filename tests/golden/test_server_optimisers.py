"""The server optimisers' numbers: by hand, against the papers' formulas in float64, and against Flower's own."""

import math
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click for a name that click will drop
    import typer  # noqa: F401
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi
from tiny_federation import enter_run

from common.protocol.parameters import Entry, Manifest
from common.settings import FederationSettings
from server.global_model import ServerOptimiser

ROUNDS, SIZE = 12, 400
MANIFEST = Manifest((Entry(name="backbone.a", shape=(SIZE,), offset=0),))


def optimiser_of(name, size=SIZE, **values):
    manifest = Manifest((Entry(name="backbone.a", shape=(size,), offset=0),))
    return ServerOptimiser.of(FederationSettings(strategy=name, **values), manifest, {"backbone.a"})


def changes():
    """Changes of many sizes, from far below tau to far above it, with some that are exactly zero."""
    random = np.random.default_rng(5)
    drawn = random.normal(size=(ROUNDS, SIZE)) * 10.0 ** random.uniform(-6, 1, size=SIZE)
    drawn[random.random((ROUNDS, SIZE)) < 0.05] = 0.0
    return drawn.astype(np.float32)


def start():
    return np.random.default_rng(6).normal(size=SIZE).astype(np.float32)


def models_of(optimiser):
    """The model after each round."""
    model, seen = start(), []
    for change in changes():
        optimiser.apply(model, change.copy())
        seen.append(model.copy())
    return np.array(seen)


# ---- the papers' formulas, written out once more, in float64


def momentum_in_float64(lr, beta):
    w, v, seen = start().astype(np.float64), np.zeros(SIZE), []
    for delta in changes().astype(np.float64):
        v = beta * v + delta
        w = w + lr * v
        seen.append(w)
    return np.array(seen)


def adaptive_in_float64(kind, lr, beta1, beta2, tau):
    w, m, v = start().astype(np.float64), np.zeros(SIZE), np.full(SIZE, tau**2)
    seen = []
    for delta in changes().astype(np.float64):
        m = beta1 * m + (1 - beta1) * delta
        if kind == "fedadam":
            v = beta2 * v + (1 - beta2) * delta**2
        else:
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        w = w + lr * m / (np.sqrt(v) + tau)
        seen.append(w)
    return np.array(seen)


@pytest.mark.parametrize(("lr", "beta"), [(1.0, 0.9), (0.3, 0.5), (2.0, 0.0)])
def test_fedavgm_is_the_papers_formula(lr, beta):
    seen = models_of(optimiser_of("fedavgm", server_lr=lr, server_momentum=beta))
    np.testing.assert_allclose(seen, momentum_in_float64(lr, beta), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi"])
@pytest.mark.parametrize(("lr", "beta1", "beta2", "tau"), [(0.01, 0.9, 0.99, 1e-3), (0.5, 0.3, 0.6, 0.1)])
def test_the_adaptive_steps_are_the_papers_formulas(kind, lr, beta1, beta2, tau):
    optimiser = optimiser_of(kind, server_lr=lr, server_momentum=beta1, server_beta2=beta2, server_adaptivity=tau)
    wanted = adaptive_in_float64(kind, lr, beta1, beta2, tau)
    np.testing.assert_allclose(models_of(optimiser), wanted, rtol=5e-6, atol=5e-6)
    assert np.abs(wanted[-1] - start()).max() > lr / 2  # it did move


# ---- by hand


def test_fedavgm_by_hand():
    """beta = 0.5, lr = 0.5, changes 2 then 4: v = 2, w = 1; v = 0.5 * 2 + 4 = 5, w = 1 + 2.5 = 3.5."""
    optimiser, model = optimiser_of("fedavgm", 1, server_lr=0.5, server_momentum=0.5), np.zeros(1, dtype=np.float32)
    for change, expected in ((2.0, 1.0), (4.0, 3.5)):
        optimiser.apply(model, np.float32([change]))
        assert model.tolist() == [expected]


def test_fedadam_by_hand():
    """tau = 1, beta1 = beta2 = 0.5, lr = 2, change 3: m = 1.5, v = 0.5 + 0.5 * 9 = 5, w = 2 * 1.5 / (sqrt 5 + 1)."""
    rates = {"server_lr": 2.0, "server_momentum": 0.5, "server_beta2": 0.5, "server_adaptivity": 1.0}
    model = np.zeros(1, dtype=np.float32)
    optimiser_of("fedadam", 1, **rates).apply(model, np.float32([3.0]))
    assert model[0] == pytest.approx(3.0 / (math.sqrt(5.0) + 1.0), rel=1e-6)


def test_fedyogi_by_hand():
    """As above, v grows by 0.5 * 9 to 5.5; a change of 1 < sqrt(5.5) then takes 0.5 * 1 away: v = 5, m = 1.25."""
    rates = {"server_lr": 2.0, "server_momentum": 0.5, "server_beta2": 0.5, "server_adaptivity": 1.0}
    optimiser, model = optimiser_of("fedyogi", 1, **rates), np.zeros(1, dtype=np.float32)
    optimiser.apply(model, np.float32([3.0]))
    first = 3.0 / (math.sqrt(5.5) + 1.0)
    assert model[0] == pytest.approx(first, rel=1e-6)
    optimiser.apply(model, np.float32([1.0]))
    assert model[0] == pytest.approx(first + 2.5 / (math.sqrt(5.0) + 1.0), rel=1e-6)


# ---- Flower's own strategies


def flower_models(strategy, before_round=lambda _strategy, _server_round: None):
    """Flower's global model after each round, when one client replies with what it got plus the round's change."""
    strategy.fraction_train = 0.0  # so that configure_train asks no grid for nodes
    model, seen = start(), []
    for server_round, change in enumerate(changes(), start=1):
        arrays = ArrayRecord({"a": Array(model)})
        strategy.configure_train(server_round, arrays, ConfigRecord(), None)
        before_round(strategy, server_round)
        content = RecordDict({"arrays": ArrayRecord({"a": Array(model + change)})})
        content["metrics"] = MetricRecord({"num-examples": 7})
        request = Message(RecordDict(), 1, MessageType.TRAIN)
        new, _ = strategy.aggregate_train(server_round, [Message(content, reply_to=request)])
        model = new["a"].numpy().astype(np.float32)
        seen.append(model)
    return np.array(seen)


def test_flowers_fedavgm_agrees(monkeypatch):
    enter_run(monkeypatch)
    theirs = flower_models(FedAvgM(server_learning_rate=0.3, server_momentum=0.8))
    ours = models_of(optimiser_of("fedavgm", server_lr=0.3, server_momentum=0.8))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kind", "their_kind"), [("fedadam", FedAdam), ("fedyogi", FedYogi)])
def test_flowers_adaptive_strategies_agree(monkeypatch, kind, their_kind):
    """Flower starts v at 0 where the paper has tau^2, and its FedAdam corrects the bias, which algorithm 2 does not.

    Both are set right here before Flower's step, so that the rest of the formulas is what is compared.
    """

    def as_in_the_paper(strategy, server_round):
        if server_round == 1:
            strategy.v_t = {"a": np.full(SIZE, 0.1**2)}
        if kind == "fedadam":
            correction = math.sqrt(1 - 0.9 ** (server_round + 1.0)) / (1 - 0.8 ** (server_round + 1.0))
            strategy.eta = 0.05 / correction

    enter_run(monkeypatch)
    theirs = flower_models(their_kind(eta=0.05, beta_1=0.8, beta_2=0.9, tau=0.1), as_in_the_paper)
    rates = {"server_lr": 0.05, "server_momentum": 0.8, "server_beta2": 0.9, "server_adaptivity": 0.1}
    np.testing.assert_allclose(models_of(optimiser_of(kind, **rates)), theirs, rtol=1e-5, atol=1e-5)
