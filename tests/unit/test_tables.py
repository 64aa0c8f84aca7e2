"""Strategies, backbones and heads are rows of tables: the settings read those, and no code asks for one by name."""

import argparse
import ast
from pathlib import Path

import pytest

from common import config
from common.errors import ConfigError, UserError
from common.flags import add_run_settings
from common.models.table import BACKBONES, HEADS
from common.settings import FederationSettings
from common.strategies import STRATEGIES, check_number

ROOT = Path(__file__).resolve().parents[2]
# Where a name may stand beside the table, and why.
STRATEGIES_NAMED = {
    "common/settings.py": {"fedavg"},  # the default
    "simulation/compare/model_lookup.py": {"fedavg", "fedprox"},  # what a comparison compares where nothing is said
    "common/plots/style.py": {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi"},  # the look of their curves
}
MODELS_NAMED = {
    "common/settings.py": {"resnet18", "cosface"},  # the defaults
    "common/models/resnet.py": {"resnet18", "resnet50"},  # their blocks
    "common/models/vit.py": {"vit_tiny", "vit_small", "vit_base"},  # their numbers of heads
    "common/models/heads.py": {"cosface", "arcface"},  # their margins
    "common/results.py": {"cosface", "arcface"},  # what a picture of losses calls them
    "simulation/admin/imprint.py": {"vit_tiny"},  # the model that the attack crafts
}


def names_in(source, names):
    """Those that stand in the code as a text of their own."""
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return {text for text in texts if isinstance(text, str)} & set(names)


@pytest.mark.parametrize(
    ("table", "names", "named"),
    [
        ("common/strategies.py", set(STRATEGIES), STRATEGIES_NAMED),
        ("common/models/table.py", {*BACKBONES, *HEADS}, MODELS_NAMED),
    ],
    ids=["strategies", "models"],
)
def test_no_code_asks_for_a_row_by_name(table, names, named):
    files = [path for folder in ("common", "server", "clients", "simulation") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): names_in(path.read_text(encoding="utf-8"), names) for path in files}
    assert found.pop(table) == names
    assert {path: seen for path, seen in found.items() if seen} == named


def test_a_comparison_would_be_seen():
    source = 'if federation.strategy != "fedprox": pass\nx = "krum" in name'
    assert names_in(source, STRATEGIES) == {"fedprox", "krum"}


@pytest.mark.parametrize("setting", config.TABLES)
def test_the_settings_take_the_tables_names_and_no_other(setting):
    section, key = setting.split(".")
    for name in config.TABLES[setting]:
        others = {"backbone": "vit_tiny"} if key == "attention" else {}
        settings = config.from_mapping({"data": {"image_size": 32}, section: others | {key: name}})
        assert getattr(getattr(settings, section), key) == name
    with pytest.raises(ConfigError, match=f"hoices: {', '.join(config.TABLES[setting])}"):
        config.from_mapping({section: {key: "x"}})


def test_help_lists_the_tables(capsys):
    parser = argparse.ArgumentParser()
    add_run_settings(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--model NAME resnet18, resnet50, mobilenet_v2, cnn, vit_tiny, vit_small or vit_base" in told
    assert "--head NAME softmax, cosface or arcface" in told
    *first, last = STRATEGIES
    assert f"NAME {', '.join(first)} or {last}" in told


def test_the_page_of_settings_lists_the_tables():
    page = (ROOT / "docs" / "SETTINGS.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if "|" in line}
    for flag, table in (("`--strategy`", STRATEGIES), ("`--model`", BACKBONES), ("`--head`", HEADS)):
        assert [name for name in rows[flag].partition("; a file's")[0].split("`")[5::2] if name.strip()] == list(table)


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
