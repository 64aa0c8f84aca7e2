"""The pairs that a model gets most wrong, against every pair scored one by one; and the figure of them."""

import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from common.metrics.hardest import hardest_genuine, hardest_impostors
from common.plots.hardest import ShownPair, hardest_pairs
from common.private_figures import hardest, own_threshold
from tests.unit.packs_in_memory import CPU, memory_pack, recogniser_for


@pytest.mark.parametrize("number", [1, 3, 100])
def test_the_hardest_pairs_are_those_of_every_pair_scored_one_by_one(number):
    random = np.random.default_rng(number)
    person = random.integers(0, 7, 40)
    embeddings = random.normal(size=(40, 6)).astype(np.float32)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    impostors, genuine = {}, {}
    for one, other in itertools.combinations(range(40), 2):
        score, two = float(unit[one] @ unit[other]), frozenset((person[one], person[other]))
        if len(two) == 2:
            impostors[two] = max(impostors.get(two, -2.0), score)
        else:
            genuine[two] = min(genuine.get(two, 2.0), score)
    found = hardest_impostors(embeddings, person, number)
    assert [pair.score for pair in found] == pytest.approx(sorted(impostors.values(), reverse=True)[:number], abs=1e-6)
    lowest = hardest_genuine(embeddings, person, number)
    assert [pair.score for pair in lowest] == pytest.approx(sorted(genuine.values())[:number], abs=1e-6)
    for pair in (*found, *lowest):
        assert float(unit[pair.first] @ unit[pair.second]) == pytest.approx(pair.score, abs=1e-6)
    assert all(person[pair.first] != person[pair.second] for pair in found)
    assert all(person[pair.first] == person[pair.second] and pair.first != pair.second for pair in lowest)


def test_nobody_is_paired_with_nobody():
    alone = np.ones((2, 3), dtype=np.float32)
    assert hardest_impostors(alone, np.zeros(2, dtype=np.int64), 3) == []
    assert hardest_genuine(alone, np.arange(2), 3) == []


def test_each_pair_says_its_score_and_whether_the_threshold_judges_it_rightly():
    face = np.zeros((8, 8, 3), dtype=np.uint8)
    two = [ShownPair(face, face, ("Ann", "Bob"), score) for score in (0.9, 0.3)]
    one = [ShownPair(face, face, ("Ann", "Ann"), score) for score in (0.1, 0.6)]
    figure = hardest_pairs(two, one, threshold=0.5, title="t")
    written = [text.get_text() for text in figure.findobj(Text)]
    for text in (
        "0.900 accepted, wrongly",
        "0.300 rejected, rightly",
        "0.100 rejected, wrongly",
        "0.600 accepted, rightly",
    ):
        assert text in written
    assert {"Ann   |   Bob", "Ann"} <= set(written)
    assert not [
        text for text in hardest_pairs(two, [], threshold=None, title="t").findobj(Text) if "ly" in text.get_text()
    ]
    with pytest.raises(ValueError, match="at most 8"):
        hardest_pairs(two * 5, [], threshold=None, title="t")


def test_a_clients_picture_says_its_threshold_and_counts_its_errors():
    pack = memory_pack()
    pack = dataclasses.replace(pack, people=tuple(f"Person {number}" for number in range(len(pack.people))))
    recogniser = recogniser_for(pack)
    threshold = own_threshold(recogniser, pack, CPU)
    assert threshold is not None
    figure = hardest(recogniser, pack, CPU, client="mine", threshold=threshold)
    assert f"Threshold {threshold:.3f}, from validation: " in figure.get_supxlabel()
    assert "sent nowhere" in figure.get_supxlabel()
    assert any(text.get_text().startswith("Person") for text in figure.findobj(Text))
