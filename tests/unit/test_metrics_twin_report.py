"""A model's figures on twins and the gap of two models, against pairs scored and families drawn one by one."""

import dataclasses
import functools
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from common.errors import DataError
from common.metrics.bootstrap import Drawn, Estimate, paired_gap, twin_figures
from common.metrics.figures import JUDGED, KINDS, PAIRS, figures_of
from common.metrics.pairs import pair_counts

THRESHOLD = 0.5
NUM_REPLICATES = 200
SEED = 11
FIGURES = tuple(figure.name for figure in figures_of(PAIRS, JUDGED))


pytestmark = pytest.mark.usefixtures("one_thread")


def people() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """12 families of two, 3 people alone; 4 pictures each, shuffled; families numbered oddly."""
    person = np.random.default_rng(2).permutation(np.repeat(np.arange(27), 4))
    return person, np.where(person < 24, person // 2 * 7 - 5, person + 1000)


def model(noise: float, seed: int = 1) -> NDArray[np.float32]:
    """Embeddings of `people`: a family's mean, a person's own part, and noise."""
    person, family = people()
    random = np.random.default_rng(5)
    means = random.normal(size=(27, 16)) * 0.7
    of_family = {one: random.normal(size=16) for one in np.unique(family).tolist()}
    shot = np.random.default_rng(seed).normal(size=(len(person), 16))
    found = np.stack([of_family[one] for one in family.tolist()]) + means[person] + noise * shot
    return (found * 3).astype(np.float32)


@functools.cache
def pairs(embeddings: bytes, kind: str) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Of the pairs of that kind, taken one by one: the score, whether it is genuine, and the families of both [N, 2].

    embeddings: of `model`, as bytes, by which it is known that this pair list is made already.
    """
    person, family = people()
    rows = np.frombuffer(embeddings, dtype=np.float32).reshape(len(person), -1).astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores, genuine, families = [], [], []
    for i, j in combinations(range(len(person)), 2):
        same_person, same_family = person[i] == person[j], family[i] == family[j]
        if kind == "strangers" and same_family and not same_person:
            continue
        if kind == "twins" and (not same_family or family[i] >= 1000):
            continue
        scores.append(unit[i] @ unit[j])
        genuine.append(same_person)
        families.append((family[i], family[j]))
    return np.array(scores), np.array(genuine), np.array(families)


def naive(embeddings: NDArray[np.float32], kind: str, times: dict[int, int], threshold: float) -> dict[str, float]:
    """Figures of one drawing of families: each pair as often as its families are drawn."""
    s, g, families = pairs(embeddings.tobytes(), kind)
    known, places = np.unique(families, return_inverse=True)
    drawn = np.array([times.get(one, 0) for one in known.tolist()], dtype=float)[places].reshape(families.shape)
    w = np.where(families[:, 0] == families[:, 1], drawn[:, 0], drawn.prod(axis=1))
    s, g, w = s[w > 0], g[w > 0], w[w > 0]
    far, tar, _ = roc_curve(g, s, sample_weight=w, drop_intermediate=False)
    far, tar = far / far[-1], tar / tar[-1]
    figures = {"roc_auc": roc_auc_score(g, s, sample_weight=w)}
    crossing = np.argmax(far + tar - 1 >= 0)
    before = far[crossing - 1] + tar[crossing - 1] - 1
    share = -before / (far[crossing] + tar[crossing] - 1 - before)
    figures["eer"] = far[crossing - 1] + share * (far[crossing] - far[crossing - 1])
    for digits in (1, 2, 3):
        figures[f"tar_at_far_1e-{digits}"] = tar[far <= 10.0**-digits + 1e-12].max()
    hit = np.average(s[g] >= threshold, weights=w[g])
    figures["accuracy"] = (hit + np.average(s[~g] < threshold, weights=w[~g])) / 2
    return figures


def drawings(seed: int) -> list[dict[int, int]]:
    """How often each replicate draws each family, in rising order: as the module's doc says, by a plain loop."""
    families = np.unique(people()[1]).tolist()
    drawn = np.random.default_rng(seed).integers(0, len(families), (NUM_REPLICATES, len(families)))
    return [{one: int((row == k).sum()) for k, one in enumerate(families)} for row in drawn]


@pytest.mark.parametrize("kind", KINDS)
def test_figures_and_intervals_are_those_of_pairs_taken_one_by_one(kind: str) -> None:
    embeddings = model(0.8)
    person, family = people()
    every = twin_figures(Drawn.by_seed(embeddings, person, family, num_replicates=NUM_REPLICATES, seed=SEED), THRESHOLD)
    assert tuple(every) == KINDS
    figures = every[kind]
    expected = naive(embeddings, kind, dict.fromkeys(np.unique(family).tolist(), 1), THRESHOLD)
    replicates = [naive(embeddings, kind, times, THRESHOLD) for times in drawings(SEED)[:NUM_REPLICATES]]
    assert set(FIGURES) == set(expected)
    for name in FIGURES:
        bins = 1.01 / 144 if name.startswith("tar") else 2e-3  # within a bin one genuine pair may be on the other side
        assert figures[name]["value"] == pytest.approx(expected[name], abs=bins), name
        low, high = np.quantile([one[name] for one in replicates], [0.025, 0.975])
        assert figures[name]["low"] == pytest.approx(low, abs=0.012), name
        assert figures[name]["high"] == pytest.approx(high, abs=0.012), name
        assert figures[name]["low"] < figures[name]["high"]
    assert figures["accuracy"]["value"] == pytest.approx(expected["accuracy"], abs=1e-9)


def test_pairs_are_counted_by_kind() -> None:
    """27 people with 4 pictures have 6 genuine pairs each; two siblings have 4 x 4 pairs; 108 x 107 / 2 in all."""
    person, family = people()
    genuine, siblings, total = 27 * 6, 12 * 16, 108 * 107 // 2
    assert pair_counts(person, family) == {
        "all": (genuine, total - genuine),
        "twins": (24 * 6, siblings),
        "strangers": (genuine, total - genuine - siblings),
    }
    every = twin_figures(Drawn.by_seed(model(0.8), person, family, num_replicates=3, seed=1), 0.5)
    assert every["twins"]["num_genuine_pairs"] == {"value": 24 * 6}
    assert every["twins"]["num_impostor_pairs"] == {"value": siblings}


def test_a_gap_is_paired_over_families() -> None:
    one, other = model(0.8), model(0.9)
    person, family = people()
    found = paired_gap([one], [other], person, family, "twins", "roc_auc", num_replicates=NUM_REPLICATES, seed=SEED)
    once = dict.fromkeys(np.unique(family).tolist(), 1)
    gaps = [
        naive(one, "twins", times, THRESHOLD)["roc_auc"] - naive(other, "twins", times, THRESHOLD)["roc_auc"]
        for times in (once, *drawings(SEED))
    ]
    assert found.value == pytest.approx(gaps[0], abs=1e-3)
    assert found.value > 0.005
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(gaps[1:], [0.025, 0.975])), abs=4e-3)
    swapped = paired_gap([other], [one], person, family, "twins", "roc_auc", num_replicates=NUM_REPLICATES, seed=SEED)
    assert dataclasses.astuple(swapped) == pytest.approx((-found.value, -found.high, -found.low))
    assert paired_gap([one], [one], person, family, "all", "eer", num_replicates=20, seed=SEED) == Estimate(
        value=0.0, low=0.0, high=0.0
    )


def test_the_mean_over_seeds_is_taken_within_each_replicate() -> None:
    person, family = people()
    ones, others = [model(0.8, seed) for seed in (1, 2, 3)], [model(0.9, seed) for seed in (4, 5, 6)]
    found = paired_gap(ones, others, person, family, "twins", "eer", num_replicates=NUM_REPLICATES, seed=SEED)
    rows = []
    for times in (dict.fromkeys(np.unique(family).tolist(), 1), *drawings(SEED)):
        better, worse = ([naive(m, "twins", times, THRESHOLD)["eer"] for m in models] for models in (ones, others))
        rows.append(np.mean(better) - np.mean(worse))
    assert found.value == pytest.approx(rows[0], abs=2e-3)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(rows[1:], [0.025, 0.975])), abs=8e-3)
    singles = [
        paired_gap([a], [b], person, family, "twins", "eer", num_replicates=NUM_REPLICATES, seed=SEED)
        for a, b in zip(ones, others, strict=True)
    ]
    assert found.value == pytest.approx(np.mean([single.value for single in singles]), abs=1e-12)
    assert found.high - found.low < np.mean([single.high - single.low for single in singles])


def test_accuracy_is_judged_by_each_model_s_own_threshold() -> None:
    one, other = model(0.8), model(0.9)
    person, family = people()
    once = dict.fromkeys(np.unique(family).tolist(), 1)
    expected = naive(one, "twins", once, 0.8)["accuracy"] - naive(other, "twins", once, 0.3)["accuracy"]
    found = paired_gap(
        [one], [other], person, family, "twins", "accuracy", num_replicates=50, seed=SEED, thresholds=[(0.8, 0.3)]
    )
    assert found.value == pytest.approx(expected, abs=1e-9)
    assert found.low < found.value < found.high
    with pytest.raises(ValueError, match="needs the thresholds"):
        paired_gap([one], [other], person, family, "twins", "accuracy", num_replicates=5, seed=SEED)


def test_a_kind_without_pairs_is_an_error_that_names_it() -> None:
    person, _ = people()
    embeddings = model(0.8)
    cases = {
        "twins": (person, person),  # nobody has a sibling
        "strangers": (person, np.zeros_like(person)),  # one family
        "all": (np.arange(len(person)), np.arange(len(person))),  # nobody has two pictures
    }
    for kind, (who, kin) in cases.items():
        with pytest.raises(DataError, match=rf"^{kind}: \d+ genuine and \d+ impostor pairs") as caught:
            twin_figures(Drawn.by_seed(embeddings, who, kin, num_replicates=3, seed=1), 0.5)
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match=f"^{kind}: "):
            paired_gap([embeddings], [embeddings], who, kin, kind, "eer", num_replicates=3, seed=1)


def test_mistakes_of_the_caller_are_told() -> None:
    person, family = people()
    one = model(0.8)
    with pytest.raises(ValueError, match="0 models against 0"):
        paired_gap([], [], person, family, "twins", "eer", num_replicates=3, seed=1)
    with pytest.raises(ValueError, match="2 models against 1"):
        paired_gap([one, one], [one], person, family, "twins", "eer", num_replicates=3, seed=1)
    with pytest.raises(ValueError, match="kind = 'siblings'"):
        paired_gap([one], [one], person, family, "siblings", "eer", num_replicates=3, seed=1)
    with pytest.raises(ValueError, match="figure = 'auc'"):
        paired_gap([one], [one], person, family, "twins", "auc", num_replicates=3, seed=1)
