"""Robust rules against plain NumPy on small changes, in pieces and in codecs, and that one liar cannot move them."""

import numpy as np
import pytest

from common.protocol import codec
from common.protocol.codec import decode, encode
from common.settings import FederationSettings
from common.strategies import krum_order, mean_of, median, trimmed_mean
from server import aggregate
from server.aggregate import KeptChanges, norms


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces even of small changes, so that their borders are tested."""
    monkeypatch.setattr(codec, "PIECE", codec.BLOCK)
    monkeypatch.setattr(aggregate, "PIECE", codec.BLOCK)


def changes_of(num_clients, size=3 * codec.BLOCK + 5, seed=0):
    return np.random.default_rng(seed).normal(size=(num_clients, size)).astype(np.float32)


def stored(folder, changes, name="float32", **values):
    store = KeptChanges(folder / "replies", FederationSettings(**values), changes.shape[1])
    for number, change in enumerate(changes):
        store.add(encode(change, name), 10 + number, f"c{number}")
    return store


@pytest.mark.parametrize("num_clients", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", ["float32", "float16", "int8"])
def test_the_median_is_numpys(tmp_path, num_clients, name):
    changes = changes_of(num_clients)
    decoded = np.stack([decode(encode(change, name)) for change in changes])
    found = median(stored(tmp_path, changes, name)).numpy()
    np.testing.assert_allclose(found, np.median(decoded, axis=0), rtol=1e-6, atol=1e-9)
    assert found.dtype == np.float32


@pytest.mark.parametrize(("num_clients", "fraction", "cut"), [(5, 0.2, 1), (5, 0.0, 0), (9, 0.4, 3), (4, 0.2, 0)])
def test_the_trimmed_mean_leaves_out_each_elements_ends(tmp_path, num_clients, fraction, cut):
    changes = changes_of(num_clients)
    expected = np.sort(changes, axis=0)[cut : num_clients - cut].astype(np.float64).mean(axis=0)
    trimmed = trimmed_mean(stored(tmp_path, changes), fraction).numpy()
    np.testing.assert_allclose(trimmed, expected, rtol=1e-5, atol=1e-6)


def krum_by_hand(changes, num_malicious):
    apart = ((changes[:, None].astype(np.float64) - changes[None].astype(np.float64)) ** 2).sum(-1)
    kept = len(changes) - num_malicious - 2
    scores = [np.sort(np.delete(apart[row], row))[:kept].sum() for row in range(len(changes))]
    return np.argsort(scores, kind="stable").tolist()


@pytest.mark.parametrize(("num_clients", "num_malicious"), [(3, 0), (5, 1), (8, 2)])
def test_krums_order_is_the_papers(tmp_path, num_clients, num_malicious):
    changes = changes_of(num_clients)
    order = krum_order(stored(tmp_path, changes), num_malicious)
    assert order == krum_by_hand(changes, num_malicious)
    mean = mean_of(stored(tmp_path, changes), order[:2]).numpy()
    np.testing.assert_allclose(mean, changes[sorted(order[:2])].mean(0), rtol=1e-5, atol=1e-7)


def test_krum_with_too_few_clients_is_refused(tmp_path):
    with pytest.raises(ValueError, match="krum with 1 malicious clients needs 5, not 4"):
        krum_order(stored(tmp_path, changes_of(4)), 1)


def test_one_liar_moves_no_robust_rule_and_every_mean(tmp_path):
    changes = changes_of(7) * 0.1 + 1.0
    changes[3] = 1e6
    store = stored(tmp_path, changes)
    for rule in (median(store).numpy(), trimmed_mean(store, 0.2).numpy()):
        assert np.abs(rule - 1.0).max() < 0.5
    order = krum_order(store, 2)
    assert order[-1] == 3
    assert np.abs(mean_of(store, order[:5]).numpy() - 1.0).max() < 0.5
    assert np.abs(changes.mean(0) - 1.0).min() > 1e4


def test_a_change_much_longer_than_the_others_is_named_from_four_clients_on(tmp_path):
    changes = changes_of(5)
    changes[2] *= 20
    told = stored(tmp_path, changes, norm_factor=5.0).outliers()
    assert list(told) == ["c2"]
    assert "more than 5 times the clients' median" in told["c2"]
    assert stored(tmp_path, changes_of(5), norm_factor=5.0).outliers() == {}
    assert stored(tmp_path, changes[1:4], norm_factor=5.0).outliers() == {}


def test_norms_are_numpys(tmp_path):
    changes = changes_of(3)
    expected = np.linalg.norm(changes.astype(np.float64), axis=1)
    assert norms(stored(tmp_path, changes)) == pytest.approx(expected)


def test_what_is_left_out_and_closed_is_gone(tmp_path):
    store = stored(tmp_path, changes_of(4) * np.float32([[1], [20], [1], [1]]), norm_factor=5.0)
    kept = [(change.name, change.num_examples) for change in store.changes]
    assert kept == [("c0", 10), ("c1", 11), ("c2", 12), ("c3", 13)]
    assert list(store.outliers()) == ["c1"]
    assert [change.name for change in store.changes] == ["c0", "c2", "c3"]
    store.close()
    assert list(tmp_path.iterdir()) == []
