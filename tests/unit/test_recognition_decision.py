"""What a score means: thresholds that were measured, rates in closed form, and a poor model that is not asked."""

import dataclasses

import pytest
from recognition_models import thresholds

from common.errors import UserError
from simulation.recognition.decision import (
    WORST_EER,
    chosen_threshold,
    far_of_search,
    rate_words,
    require_good,
)

GOOD = thresholds()  # 20,000 impostor pairs: enough for a FAR of 1e-3, and not for 1e-4


def test_a_search_adds_up_its_comparisons():
    # 1 - (1 - 0.001)^100 = 0.09521 and 1 - (1 - 0.1)^2 = 0.19, worked out by hand.
    assert far_of_search(1e-3, 100) == pytest.approx(0.0952078, abs=1e-6)
    assert far_of_search(0.1, 2) == pytest.approx(0.19)
    assert far_of_search(1e-3, 0) == 0.0
    assert far_of_search(0.0, 10**6) == 0.0
    assert far_of_search(1.0, 3) == 1.0
    assert far_of_search(1e-12, 10**6) == pytest.approx(1e-6, rel=1e-6)  # where 1 - (1 - f)^n in floats would be off


def test_the_usual_threshold_or_the_lowest_that_was_measured():
    assert chosen_threshold(GOOD, None).far == 1e-3
    assert chosen_threshold(dataclasses.replace(GOOD, rows=GOOD.rows[:2]), None).far == 1e-2
    assert chosen_threshold(GOOD, 0.1).far == 0.1


@pytest.mark.parametrize(
    ("far", "told"),
    [
        (1e-4, r"thresholds for 0.1, 0.01, 0.001; a lower one takes more than its 20,000 impostor pairs; give one"),
        (5e-2, r"thresholds for 0.1, 0.01, 0.001; give one of these"),
        (0.0, r"between 0 and 1"),
        (1.0, r"between 0 and 1"),
        (float("nan"), r"between 0 and 1"),
    ],
)
def test_a_rate_that_nobody_measured_is_refused(far, told):
    with pytest.raises(UserError, match=told):
        chosen_threshold(GOOD, far)


def test_a_model_without_thresholds_says_so():
    with pytest.raises(UserError, match=r"300 genuine and 20,000 impostor pairs\), too few for any FAR"):
        chosen_threshold(dataclasses.replace(GOOD, rows=()), None)


def test_a_poor_model_is_not_asked_but_anyway():
    assert require_good(GOOD, "m", anyway=False) == ""
    assert require_good(dataclasses.replace(GOOD, eer=WORST_EER), "m", anyway=False) == ""
    poor = dataclasses.replace(GOOD, eer=0.43)
    with pytest.raises(UserError, match=r"m judges 43% of pairs wrongly .* the limit is 10%.*--anyway"):
        require_good(poor, "m", anyway=False)
    assert require_good(poor, "m", anyway=True).startswith("warning: m judges 43%")


def test_an_eer_that_is_no_number_is_no_good_one():
    with pytest.raises(UserError):
        require_good(dataclasses.replace(GOOD, eer=float("nan")), "m", anyway=False)


def test_a_threshold_is_told_with_what_it_stands_on():
    row = dataclasses.replace(GOOD.rows[2], far_low=0.0005, far_high=0.002)
    known = dataclasses.replace(GOOD, num_people=40)
    assert rate_words(row, known) == (
        "FAR 0.001 (95 % interval 0.0005 to 0.002), measured on 40 people (300 genuine and 20,000 impostor pairs)"
    )
