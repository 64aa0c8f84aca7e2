"""The plan of `make chaos`: one seed, one plan; every kind and phase has its turn; and what damages a file does so."""

from collections import Counter

import pytest

from tests.chaos.checks import Verdict
from tests.chaos.faults import damage
from tests.chaos.plan import FINISH, KINDS, PHASES, plan

RUNS = range(10)


def test_a_seed_gives_the_same_faults_again_and_another_seed_others():
    plans = [[plan(seed, run) for run in RUNS] for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_fifty_faults_bring_every_kind_and_phase_in_the_rounds_order():
    faults = [fault for run in RUNS for fault in plan(0, run)]
    kinds, phases = (Counter(getattr(fault, what) for fault in faults) for what in ("kind", "phase"))
    assert len(faults) == 50
    assert set(kinds) == set(KINDS)
    assert set(phases) == set(PHASES)
    assert max(kinds.values()) - min(kinds.values()) <= 1
    assert max(phases.values()) - min(phases.values()) <= 1
    for run in RUNS:
        rounds = [fault.server_round for fault in plan(0, run)]
        assert rounds == sorted(rounds)
        assert 2 <= rounds[0] <= rounds[-1] <= 20
        assert all(fault.server_round == 20 for fault in plan(0, run) if fault.phase == FINISH)


@pytest.mark.parametrize("choice", [0.0, 0.123, 0.4999, 0.5, 0.77, 0.9999])
def test_damage_flips_one_bit_or_cuts(choice, tmp_path):
    path = tmp_path / "f"
    whole = bytes(range(256))
    path.write_bytes(whole)
    said = damage(path, choice)
    spoilt = path.read_bytes()
    if choice < 0.5:
        assert sum((a ^ b).bit_count() for a, b in zip(whole, spoilt, strict=True)) == 1
        assert "flipped" in said
    else:
        assert whole.startswith(spoilt)
        assert len(spoilt) < len(whole)


def test_a_verdict_notes_what_is_not_true():
    verdict = Verdict()
    verdict.demand(1 + 1 == 2, "sums")
    verdict.demand(not verdict.wrong, "first")
    verdict.demand(1 > 2, "order")
    assert verdict.wrong == ["order"]
