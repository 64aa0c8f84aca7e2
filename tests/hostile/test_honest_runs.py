"""The built-in policy refuses no honest run: a few of `tests.hostile.honest_runs`, one of each kind."""

import pytest

from common.settings import CODECS
from common.strategies import STRATEGIES
from common.system.runtime import use_threads
from tests.hostile.honest_runs import FEWEST, Honest, coded, every_run, run
from tests.tiny_federation import enter_run

ROUNDS = {"federation__rounds": 2}


def few():
    """Each strategy with one of the codecs, in turn, and what differs from them."""
    for number, strategy in enumerate(STRATEGIES):
        codec = CODECS[number % len(CODECS)]
        fewest = FEWEST if "krum" in strategy else 2
        yield Honest(f"{strategy}, {codec}", ROUNDS | {"federation__strategy": strategy, **coded(codec)}, fewest)
    yield Honest("fedbn", ROUNDS | {"model__normalisation": "private"}, 2)
    yield Honest("steps", ROUNDS | {"federation__local_epochs": "off", "federation__local_steps": 3}, 2)
    yield Honest("eight clients, of which two are drawn", ROUNDS | {"federation__clients_per_round": 2}, 8)


@pytest.mark.parametrize("honest", list(few()), ids=lambda honest: honest.name)
def test_an_honest_run_is_not_refused(honest, tmp_path, monkeypatch):
    use_threads(1)
    enter_run(monkeypatch)
    found = run(honest, tmp_path)
    assert (found.code, found.num_refusals, found.line) == (0, 0, "")
    assert found.most_models <= 1  # the untrained one


def test_all_strategies_and_codecs_are_among_those_that_are_played_in_full():
    names = {honest.name for honest in every_run()}
    assert {f"{strategy}, {codec}" for strategy in STRATEGIES for codec in CODECS} <= names
