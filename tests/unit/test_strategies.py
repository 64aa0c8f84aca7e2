"""A strategy is a row of its table and nothing else: the settings read it, and no code asks for a strategy by name."""

import ast
from pathlib import Path

import pytest

from common import config
from common.errors import ConfigError, UserError
from common.settings import FederationSettings
from common.strategies import STRATEGIES, check_number

ROOT = Path(__file__).resolve().parents[2]
# Where a name may stand beside the table, and why.
NAMED = {
    "common/settings.py": {"fedavg"},  # the default
    "simulation/found_models.py": {"fedavg", "fedprox"},  # what a comparison compares where nothing is said
    "common/plots/style.py": {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi"},  # the look of their curves
}


def names_in(source):
    """The strategies that stand in the code as a text of their own."""
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return {text for text in texts if isinstance(text, str)} & STRATEGIES.keys()


def test_no_code_asks_for_a_strategy_by_name():
    files = [path for folder in ("common", "server", "clients", "simulation") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): names_in(path.read_text(encoding="utf-8")) for path in files}
    assert found.pop("common/strategies.py") == set(STRATEGIES)
    assert {path: names for path, names in found.items() if names} == NAMED


def test_a_comparison_would_be_seen():
    assert names_in('if federation.strategy != "fedprox": pass\nx = "krum" in name') == {"fedprox", "krum"}


def test_the_settings_take_the_tables_names_and_no_other():
    for name in STRATEGIES:
        assert config.from_mapping({"federation": {"strategy": name}}).federation.strategy == name
    with pytest.raises(ConfigError, match=f"choices: {', '.join(STRATEGIES)}"):
        config.from_mapping({"federation": {"strategy": "x"}})


@pytest.mark.parametrize("name", ["krum", "multikrum"])
def test_what_needs_more_clients_says_which_setting_decides_it(name):
    federation = FederationSettings(strategy=name, num_malicious=2)
    check_number(federation, 7)
    with pytest.raises(UserError) as caught:
        check_number(federation, 6)
    assert str(caught.value) == (
        f"{name} with federation.num_malicious = 2 needs 7 clients in each round, and there are 6; start more, lower"
        " it, or choose fedmedian."
    )
