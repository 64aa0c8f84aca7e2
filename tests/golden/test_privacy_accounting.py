"""The accountant beside dp-accounting's PLD accountant and mpmath, whose numbers stand in privacy_accounting.json.

They were made once, in an environment of its own (dp-accounting pins attrs < 24), by the script that the file's
`made_by` holds: `PLDAccountant(value_discretization_interval=1e-4)` composed with `GaussianDpEvent(z)` T times, and
the closed form at 60 digits.
"""

import json
import math
from pathlib import Path

import pytest

from common.privacy.accounting import (
    delta_of,
    epsilon_of,
    is_within,
    mu_of,
    noise_multiplier,
    pure_epsilon_of,
    rounds_left,
    squared_mu,
    squared_mu_of_pure,
)

GOLDEN = json.loads((Path(__file__).parent / "privacy_accounting.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", GOLDEN["exact"], ids=lambda row: f"mu {row['mu']:g}, epsilon {row['epsilon']:g}")
def test_delta_is_the_closed_form_at_sixty_digits(row):
    assert delta_of(row["mu"], row["epsilon"]) == pytest.approx(float(row["delta"]), rel=1e-9)


@pytest.mark.parametrize("row", GOLDEN["gaussian"], ids=lambda r: f"z {r['z']:g} x {r['rounds']}, {r['delta']:g}")
def test_epsilon_is_that_of_dp_accounting_within_one_percent(row):
    mu = math.sqrt(squared_mu(row["z"], row["rounds"]))
    assert epsilon_of(mu, row["delta"]) == pytest.approx(row["epsilon"], rel=0.01)
    # and the inverse: so much noise for that epsilon
    found = noise_multiplier(row["epsilon"], row["delta"], row["rounds"])
    assert found == pytest.approx(row["z"], rel=0.01)


@pytest.mark.parametrize("row", GOLDEN["deltas"], ids=lambda row: f"z {row['z']:g} x {row['rounds']}")
def test_delta_is_that_of_dp_accounting_within_one_percent(row):
    assert delta_of(math.sqrt(row["rounds"]) / row["z"], row["epsilon"]) == pytest.approx(row["delta"], rel=0.01)


@pytest.mark.parametrize("row", GOLDEN["mixed"], ids=lambda row: f"{len(row['parts'])} kinds of noise")
def test_unlike_gaussian_releases_add_in_squares(row):
    spent = sum(squared_mu(z, rounds) for z, rounds in row["parts"])
    assert epsilon_of(math.sqrt(spent), row["delta"]) == pytest.approx(row["epsilon"], rel=0.01)


@pytest.mark.parametrize("row", GOLDEN["with_pure"], ids=lambda row: f"{row['count']} of {row['epsilon0']:g}")
def test_pure_releases_beside_gaussian_ones_are_never_counted_too_small(row):
    """dp-accounting composes the worst pure mechanism (randomized response) itself; ours bounds it by GDP.

    Of many small releases the bound is near, of a few large ones it is far off (twice for one of epsilon 1).
    """
    spent = squared_mu(row["z"], row["rounds"]) + row["count"] * squared_mu_of_pure(row["epsilon0"])
    ours = epsilon_of(math.sqrt(spent), row["delta"])
    assert row["epsilon"] * 0.999 <= ours
    if row["epsilon0"] <= 0.1:
        assert ours <= row["epsilon"] * 1.35


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3, 0.1, 1.0, 5.0, 40.0, 300.0])
def test_the_pure_bound_and_its_inverse(epsilon):
    mu = math.sqrt(squared_mu_of_pure(epsilon))
    assert pure_epsilon_of(mu**2) == pytest.approx(epsilon, rel=1e-9)
    # the two curves meet where the trade-off curve of the pure release has its corner
    corner = 1.0 / (1.0 + math.exp(epsilon)) if epsilon < 100.0 else 0.0
    if corner:
        assert 0.5 * math.erfc(0.5 * mu / math.sqrt(2.0)) == pytest.approx(corner, rel=1e-6)


def test_inverses_give_back_what_went_in_over_a_wide_grid():
    for epsilon in (0.01, 0.1, 0.5, 1.0, 4.0, 16.0, 100.0):
        for delta in (0.01, 1e-4, 1e-6, 1e-9, 1e-12):
            mu = mu_of(epsilon, delta)
            assert epsilon_of(mu, delta) == pytest.approx(epsilon, rel=1e-6)
            assert delta_of(mu, epsilon) <= delta


def test_rounds_left_is_what_was_planned_and_ends_at_the_budget():
    epsilon, delta, rounds = 3.0, 1e-5, 17
    budget, each = mu_of(epsilon, delta) ** 2, squared_mu(noise_multiplier(epsilon, delta, rounds))
    assert [rounds_left(budget, done * each, each) for done in (0, 1, 16, 17, 30)] == [17, 16, 1, 0, 0]
    assert is_within(budget, 17 * each)
    assert not is_within(budget, 18 * each)


def test_nothing_costs_nothing_and_nonsense_is_refused():
    assert delta_of(0.0, 1.0) == 0.0
    assert epsilon_of(0.0, 1e-5) == 0.0
    assert squared_mu_of_pure(0.0) == pytest.approx(0.0, abs=1e-12)
    for wrong in (
        lambda: delta_of(-1.0, 1.0),
        lambda: delta_of(1.0, math.inf),
        lambda: epsilon_of(1.0, 0.0),
        lambda: epsilon_of(1.0, 1.0),
        lambda: mu_of(0.0, 1e-5),
        lambda: squared_mu_of_pure(-1.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()
