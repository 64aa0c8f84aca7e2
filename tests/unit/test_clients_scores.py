"""Which counts leave: all of them, coarser, noisy, or two words; and digests that only the site can make again."""

import dataclasses

import numpy as np
import pytest

from clients.policy import DEFAULT
from clients.scores import NOT_SHARED, TOO_FEW, coarser, geometric_noise, leaving
from common.metrics.figures import scores
from common.metrics.sums import NOTHING, NUM_BINS
from common.system.site_secret import FILE, keyed_digest, site_secret
from tests.tiny_federation import folds_with, sums_with

SUMS = sums_with(0.9)


def left(sums=SUMS, *, seed=1, asks_confusion=True, **policy):
    policy = dataclasses.replace(DEFAULT, **policy)
    return leaving(policy, sums, seed, num_pictures=100, asks_confusion=asks_confusion)


def test_by_default_exact_counts_leave_and_no_confusion():
    found = left()
    assert found.confusion.shape == (0, 0)
    assert dataclasses.replace(found, confusion=SUMS.confusion) == pytest.approx(SUMS) or all(
        np.array_equal(a, b) for a, b in zip(found.arrays().values(), SUMS.arrays().values(), strict=True) if a.size
    )


@pytest.mark.parametrize(("site", "run"), [(True, False), (False, True), (False, False)])
def test_confusion_leaves_where_both_want_it(site, run):
    assert left(confusion=True).confusion is SUMS.confusion
    assert left(confusion=site, asks_confusion=run).confusion.size == 0


def test_of_few_pairs_two_words_leave():
    few = dataclasses.replace(SUMS, pairs=SUMS.pairs // 10)
    assert left(few) == TOO_FEW
    assert left(few, min_pairs=10) != TOO_FEW
    assert left(scores="none") == NOT_SHARED


@pytest.mark.parametrize("num_bins", [1024, 256])
def test_coarser_bins_keep_the_number_of_pairs_and_nearly_the_figures(num_bins):
    """Scores as a trained model has them, 4,000 genuine and 40,000 impostor pairs."""
    random = np.random.default_rng(3)
    pairs = np.stack(
        [
            np.histogram(random.normal(mean, 0.15, size), bins=NUM_BINS, range=(-1, 1))[0]
            for mean, size in ((0.45, 4000), (0.15, 40_000))
        ]
    ).astype(np.int64)
    fine = dataclasses.replace(SUMS, pairs=pairs, folds=folds_with(0.9))
    coarse = coarser(fine, num_bins)
    assert np.array_equal(coarse.pairs.sum(axis=1), pairs.sum(axis=1))
    assert int((coarse.pairs.sum(axis=0) > 0).sum()) <= num_bins
    before, after = scores(fine), scores(coarse)
    most = {1024: 5e-5, 256: 5e-4}[num_bins]
    assert abs(before["roc_auc"] - after["roc_auc"]) < most
    assert abs(before["eer"] - after["eer"]) < 20 * most


def test_noise_is_two_sided_geometric():
    """Variance 2 e^-eps / (1 - e^-eps)^2 (Ghosh et al.); its mean is 0."""
    noise = geometric_noise((200_000,), 0.5, np.random.default_rng(1))
    wanted = 2 * np.exp(-0.5) / (1 - np.exp(-0.5)) ** 2
    assert abs(noise.mean()) < 0.03
    assert abs(noise.var() / wanted - 1) < 0.03


def test_noisy_counts_are_possible_and_the_same_when_asked_again():
    found = left(scores="noisy", epsilon=0.5, confusion=True)
    again, other = left(scores="noisy", epsilon=0.5, confusion=True), left(scores="noisy", epsilon=0.5, seed=2)
    assert np.array_equal(found.pairs, again.pairs)
    assert not np.array_equal(found.pairs, other.pairs)
    assert not np.array_equal(found.pairs, SUMS.pairs)
    assert found.pairs.min() >= 0
    assert found.pairs.sum() <= 100 * 99 // 2
    assert int((found.pairs.sum(axis=0) > 0).sum()) <= 256
    assert bool((found.twins <= found.pairs).all())
    assert 0 <= found.closed.correct <= found.closed.num_examples
    assert found.confusion.sum() <= SUMS.closed.num_examples


def test_nothing_adds_nothing():
    merged = SUMS + NOTHING
    assert np.array_equal(merged.pairs, SUMS.pairs)
    assert merged.closed == SUMS.closed


# ---- digests


def test_a_digest_is_the_sites_own(tmp_path):
    """Equal over rounds and runs; other for another site, for another thing, and for whoever has no secret."""
    secret = site_secret(tmp_path / "packs")
    assert site_secret(tmp_path / "packs") == secret
    assert (tmp_path / "packs" / FILE).stat().st_mode & 0o777 == 0o600
    digest = keyed_digest(secret, "val people", "Anna Claus", digits=16)
    assert digest == keyed_digest(secret, "val people", "Anna Claus", digits=16)
    others = (
        keyed_digest(site_secret(tmp_path / "other"), "val people", "Anna Claus", digits=16),
        keyed_digest(secret, "test pairs", "Anna Claus", digits=16),
        keyed_digest(b"", "val people", "Anna Claus", digits=16),
    )
    assert digest not in others
