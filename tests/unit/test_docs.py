"""The documents say what the programs do: commands parse, links lead somewhere, settings and metrics exist."""

import dataclasses
import math
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import clients.cli
import server.cli
import simulation.cli
from clients.node import NODE_KEYS, check_keys
from common import config
from common.metrics.names import BYTES_DOWN, BYTES_UP, EPOCH_SECONDS, ROUND_SECONDS, WORK_SECONDS, of_split, seconds_of
from common.metrics.sums import CLOSED_FIELDS, COUNTS
from common.protocol.wire import TRAIN_FIELDS, Site
from common.settings import Settings
from server.exchange.clock import PHASES
from server.run_config import OWN, read_run_config
from tests.pages import FENCE, commands, commands_of, page

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS_PAGE = (ROOT / "docs" / "SETTINGS.md").read_text(encoding="utf-8")
TWO_SCREENS = 115  # lines
PARSERS = {
    "flower-server": server.cli.parser,
    "flower-client": clients.cli.parser,
    "flower-simulation": simulation.cli.simulation_parser,
    "facefed": simulation.cli.facefed_parser,
}
OTHER_PROGRAMS = (
    "make",
    "python",
    "mlflow",
    "tensorboard",
    "source",
    "docker",
    "flower-superlink",
    "flower-supernode",
    "flwr",
    "pip",
    "uv",
    ".venv/bin/pre-commit",
    ".venv/bin/python",
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SECTIONS = "|".join(config.to_mapping(Settings()))
SETTING = re.compile(rf"(?<![\w./])(({SECTIONS})\.[a-z_]+)(?![\w/])")


ALL_COMMANDS = [(path.name, line) for path in DOCUMENTS for line in commands(path.read_text(encoding="utf-8"))]
OUR_COMMANDS = [line for _, line in ALL_COMMANDS if line.split()[0] in PARSERS]


def prose(text):
    """The text without its code blocks."""
    return FENCE.sub("", text)


def test_every_program_has_a_command_in_the_readme():
    assert {line.split()[0] for line in commands(README)} >= {*PARSERS, "make"}


def test_the_readme_is_two_screens_and_leads_to_every_page():
    assert README.count("\n") <= TWO_SCREENS
    linked = {target.partition("#")[0] for target in LINK.findall(README)}
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


def test_the_demos_data_have_people_for_the_clients_that_a_page_asks_for():
    """Two sets of 80 people; a client needs two to train on, of those that neither validation nor test takes."""
    data = config.load(config.find_config("demo")).data
    for_training = 80 * (1 - data.fraction_val_people - data.fraction_test_people)
    for line in commands_of("RUNNING", "flower-simulation"):
        if found := re.search(r"--clients (\d+) .*clients_per_round=(\d+)", line):
            assert int(found[2]) <= int(found[1]) <= 2 * (for_training // 2) * 0.8
            break
    else:
        pytest.fail("no page shows --clients")


def test_no_command_is_that_of_composes_end_of_life():
    assert [line for _, line in ALL_COMMANDS if line.startswith("docker-compose")] == []


def test_what_leaves_has_the_numbers_of_the_wire():
    page = (ROOT / "docs" / "WIRE.md").read_text(encoding="utf-8")
    assert f"{len(dataclasses.fields(Site))} values, about" in page
    assert f"| {len(TRAIN_FIELDS)} numbers |" in page
    assert f"| {len(CLOSED_FIELDS)} numbers each |" in page
    counts = sum(math.prod(shape) for shape in COUNTS.values() if shape)
    assert f"{counts:,} counts each" in page


@pytest.mark.parametrize(("document", "line"), ALL_COMMANDS)
def test_every_command_begins_with_a_program_that_is_there(document, line):
    words = line.split()
    assert words[0] in PARSERS or words[0] in OTHER_PROGRAMS, f"{document}: {line}"
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= targets
    if words[0].endswith("python") and words[1] == "-m" and words[2] != "pytest":
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file()


def test_the_batch_script_asks_for_what_it_starts():
    """Each line is a directive, or starts a program of ours with flags that it has."""
    (block,) = [text for language, text in FENCE.findall(page("RUNNING")) if language == "sbatch"]
    first, *lines = block.splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")]
    started = [line for line in lines if not line.startswith("#")]
    assert first == "#!/bin/bash"
    assert all(re.fullmatch(r"[a-z-]+=\S+", one) for one in asked)
    assert {"gpus-per-task", "cpus-per-task", "signal"} <= {one.partition("=")[0] for one in asked}
    for line in started:
        launcher, program, *arguments = shlex.split(line)
        assert launcher == "srun"
        PARSERS[program]().parse_args(arguments)
    assert started


@pytest.mark.parametrize("line", OUR_COMMANDS)
def test_every_command_parses(line):
    program, *arguments = shlex.split(line, comments=True)
    parsed = vars(PARSERS[program]().parse_args(arguments))
    if parsed.get("config"):
        assert config.find_config(parsed["config"]).is_file()


@pytest.mark.parametrize("line", OUR_COMMANDS)
def test_a_flag_that_no_program_knows_would_be_seen(line):
    program, *arguments = shlex.split(line, comments=True)
    with pytest.raises(SystemExit) as end:
        PARSERS[program]().parse_args([*arguments, "--no-such-flag"])
    assert end.value.code == 2


def configurations_of(option):
    """What the pages' commands of Flower's own give by that option, one mapping a command."""
    lines = (shlex.split(line) for _, line in ALL_COMMANDS if line.startswith(("flwr run", "flower-supernode")))
    texts = (words[words.index(option) + 1] for words in lines if option in words)
    return [tomllib.loads(re.sub(r"(?<=\S)\s+(?=[\w.-]+=)", "\n", text)) for text in texts]


def test_flowers_own_commands_give_what_is_read():
    runs, nodes = configurations_of("--run-config"), configurations_of("--node-config")
    assert len(runs) >= 2
    assert len(nodes) >= 2
    for run in runs:
        flat = {(f"{key}.{name}" if name else key): value for key, table in run.items()
                for name, value in (table.items() if isinstance(table, dict) else [("", table)])}  # fmt: skip
        read_run_config(flat)
    for node in nodes:
        check_keys(node)
    section = page("RUNNING").partition("\n## On stock Flower\n")[2].partition("\n## ")[0]
    assert not [key for key in (*NODE_KEYS, *OWN) if f"`{key}`" not in section]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(path):
    targets = [target for target in LINK.findall(path.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in targets if not (path.parent / target.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_in_code_marks_exists(path):
    """`common/protocol/wire.py`, `configs/`, ...: paths below the packages, as they stand in the documents."""
    tops = ("common/", "server/", "clients/", "simulation/", "configs/", "tests/", "bench/", "docs/")
    named = re.findall(r"`([\w./-]+)`", prose(path.read_text(encoding="utf-8")))
    paths = [word for word in named if word.startswith(tops) and "NAME" not in word]
    assert not [word for word in paths if not (ROOT / word).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_named_exists(path):
    known = {f"{section}.{key}" for section, values in config.to_mapping(Settings()).items() for key in values}
    named = {found[0] for found in SETTING.findall(prose(path.read_text(encoding="utf-8")))}
    assert not {name for name in named if not name.endswith(".py")} - known


@pytest.mark.parametrize("name", ["RELIABILITY.md", "FIELD.md"])
def test_every_test_that_shows_a_fault_exists(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    named = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", page)
    assert len(named) > 20
    assert page.count("`test_") == len(named)
    missing = [name for name, path in named if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")]
    assert not missing


def test_the_page_of_settings_names_settings_and_only_flags_that_exist(capsys):
    """The numbers are there so that no test here passes for want of anything to look at."""
    assert len({found[0] for found in SETTING.findall(SETTINGS_PAGE)}) > 10
    for command in (["train", "local"], ["evaluate"], ["attention"]):
        with pytest.raises(SystemExit):
            simulation.cli.facefed_parser().parse_args([*command, "--help"])
    texts = [capsys.readouterr().out, *(parser().format_help() for parser in PARSERS.values())]
    known = {flag for text in texts for flag in re.findall(r"--[a-z_-]+", text)}
    named = set(re.findall(r"`(--[a-z-]+)", prose(SETTINGS_PAGE)))
    assert len(named) > 10
    assert not named - known


def test_every_metric_that_is_logged_stands_in_the_metrics_page():
    """The names as the code spells them; those made of parts are listed here as they come out."""
    page = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    source = "".join(
        (ROOT / name).read_text(encoding="utf-8")
        for name in (
            "server/rounds.py",
            "server/record/tell.py",
            "server/record/history.py",
            "simulation/alone/baselines.py",
        )
    )
    spelt = set(re.findall(r'"((?:round|wait|exchange|aggregate|checkpoint|epoch|train)_[a-z]+)"', source))
    spelt |= {BYTES_DOWN, BYTES_UP, ROUND_SECONDS, WORK_SECONDS, EPOCH_SECONDS, *map(seconds_of, PHASES)}
    spelt |= {
        "refused_replies",
        "best_round",
        "best_val_roc_auc",
        "gradient_norm",
        "images_per_second",
        "learning_rate",
    }
    spelt |= {of_split(split, name) for split in ("val", "test") for name in ("loss", "accuracy", "roc_auc", "eer")}
    spelt |= {of_split("public", name) for name in ("ten_fold_accuracy", "roc_auc", "eer")}
    spelt |= {f"test_{name}" for name in ("accuracy", "loss", "precision", "recall", "f1", "roc_auc", "eer")}
    spelt |= {f"test_tar_at_far_1e-{digits}" for digits in (1, 2, 3)}
    of_twins = ("twins_roc_auc", "twins_eer", "strangers_roc_auc")
    spelt |= {of_split(split, name) for split in ("val", "test") for name in of_twins}
    spelt |= {f"test_{name}" for name in of_twins}
    assert len(spelt) > 30
    assert not sorted(name for name in spelt if f"`{name}`" not in page)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_figure_is_left_open(path):
    assert not re.findall(r"@@\w+@@", path.read_text(encoding="utf-8"))
