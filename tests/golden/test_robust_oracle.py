"""The robust rules' numbers: against the papers' formulas in float64, and against Flower's own strategies.

Flower's strategies take whole models and ours changes; to Flower the change is given as the model, for all four rules
only add, sort and select. Its multikrum weights what it chose by num-examples, which are equal here: ours does not.
"""

import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click for a name that click will drop
    import typer  # noqa: F401
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from tiny_federation import enter_run

from common.protocol import codec
from common.protocol.codec import encode
from common.settings import FederationSettings
from server import aggregate as server_aggregate
from server.aggregate import aggregate_for

SIZE = 3 * codec.BLOCK + 5
NUM_MALICIOUS = 2
CASES = [
    ("fedmedian", {}),
    ("fedtrimmedavg", {"trim_fraction": 0.2}),
    ("fedtrimmedavg", {"trim_fraction": 0.4}),
    ("krum", {"num_malicious": NUM_MALICIOUS}),
    ("multikrum", {"num_malicious": NUM_MALICIOUS}),
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces even of small changes, so that their borders are tested."""
    enter_run(monkeypatch)
    monkeypatch.setattr(codec, "PIECE", codec.BLOCK)
    monkeypatch.setattr(server_aggregate, "PIECE", codec.BLOCK)


def changes_of(num_clients, seed):
    """Changes that go roughly one way, in sizes from 1e-5 to 10, with ties, zeros and two liars among them."""
    random = np.random.default_rng(seed)
    common = random.normal(size=SIZE)
    scales = 10.0 ** random.uniform(-5, 1, size=SIZE)
    drawn = (common + 0.3 * random.normal(size=(num_clients, SIZE))) * scales
    drawn[:, :7] = 0.0
    drawn[:2, 7:20] = drawn[2, 7:20]
    drawn[1], drawn[num_clients - 1] = -20.0 * drawn[0], 300.0
    return drawn.astype(np.float32)


def ours(folder, strategy, values, changes):
    aggregate = aggregate_for(FederationSettings(strategy=strategy, **values), SIZE, folder / "replies")
    for number, change in enumerate(changes):
        aggregate.add(encode(change, "float32"), 10 + 90 * number, f"c{number:02d}")
    assert aggregate.outliers() == {}
    try:
        return aggregate.mean()
    finally:
        aggregate.close()


def assert_equal_but_for_rounding(seen, expected, changes):
    """Within some units in the last place of the largest honest number of each element: sums of them may cancel."""
    largest = np.sort(np.abs(changes), axis=0)[-3]  # two are liars
    off = np.abs(seen - expected) / np.maximum(largest, 1e-30)
    assert off.max() < 5e-7


# ---- the papers' formulas, written out once more, in float64


def krum_in_float64(changes, num_malicious, num_chosen):
    """arXiv:1703.02757, section 4: each score is the sum over the n - f - 2 nearest others."""
    number = len(changes)
    scores = []
    for one in range(number):
        apart = sorted(((changes[one] - changes[other]) ** 2).sum() for other in range(number) if other != one)
        scores.append(sum(apart[: number - num_malicious - 2]))
    chosen = sorted(range(number), key=lambda index: (scores[index], index))[:num_chosen]
    return changes[chosen].mean(axis=0)


def trimmed_in_float64(changes, fraction):
    """arXiv:1803.01498, definition 2, an element at a time."""
    cut, number = int(fraction * len(changes)), len(changes)
    return np.array([np.mean(sorted(column)[cut : number - cut]) for column in changes.T])


def expected_of(strategy, values, changes):
    exact = changes.astype(np.float64)
    if strategy == "fedmedian":
        return np.array([np.median(column) for column in exact.T])
    if strategy == "fedtrimmedavg":
        return trimmed_in_float64(exact, values["trim_fraction"])
    return krum_in_float64(exact, NUM_MALICIOUS, 1 if strategy == "krum" else len(changes) - NUM_MALICIOUS)


@pytest.mark.parametrize("num_clients", [7, 8, 12])
@pytest.mark.parametrize(("strategy", "values"), CASES)
def test_the_rule_is_the_papers_formula(tmp_path, strategy, values, num_clients):
    changes = changes_of(num_clients, seed=num_clients)
    seen = ours(tmp_path, strategy, values, changes)
    assert seen.dtype == np.float32
    assert_equal_but_for_rounding(seen, expected_of(strategy, values, changes), changes)


def test_the_oracle_tells_the_rules_apart():
    """Else one of them could stand in for another unseen."""
    changes = changes_of(12, seed=8)  # of 8, a mean without 40 % at each end is the median
    found = [expected_of(strategy, values, changes) for strategy, values in CASES]
    for place, one in enumerate(found):
        assert all(np.abs(one - other).max() > 0.01 for other in found[place + 1 :])


# ---- Flower's own strategies


def flowers(strategy, values, changes):
    chosen = {
        "fedmedian": lambda: FedMedian(),
        "fedtrimmedavg": lambda: FedTrimmedAvg(beta=values["trim_fraction"]),
        "krum": lambda: Krum(num_malicious_nodes=NUM_MALICIOUS),
        "multikrum": lambda: MultiKrum(
            num_malicious_nodes=NUM_MALICIOUS, num_nodes_to_select=len(changes) - NUM_MALICIOUS
        ),
    }[strategy]()
    replies = []
    for number, change in enumerate(changes):
        # In float64, for Flower's distances are differences of large products.
        content = RecordDict({"arrays": ArrayRecord({"a": Array(change.astype(np.float64))})})
        content["metrics"] = MetricRecord({"num-examples": 10})
        replies.append(Message(content, reply_to=Message(RecordDict(), number + 1, MessageType.TRAIN)))
    arrays, _ = chosen.aggregate_train(1, replies)
    return arrays["a"].numpy()


@pytest.mark.parametrize("num_clients", [7, 8, 12])
@pytest.mark.parametrize(("strategy", "values"), CASES)
def test_flowers_strategy_gives_the_same(tmp_path, strategy, values, num_clients):
    changes = changes_of(num_clients, seed=100 + num_clients)
    seen = ours(tmp_path, strategy, values, changes)
    assert_equal_but_for_rounding(seen, flowers(strategy, values, changes), changes)
