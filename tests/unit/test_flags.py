"""Each flag and each alias changes its own setting and no other; a bad value names the setting."""

import argparse
import dataclasses
import re
import shlex

import pytest

import clients.cli
import server.cli
import simulation.cli
from common import config
from common.errors import ConfigError
from common.flags import FLAGS, add_run_settings, program_parser, read_run_settings, refuse_run_settings
from common.settings import Settings
from common.system.runtime import facefed_version

OTHER = {
    ("federation", "strategy"): "fedprox",
    ("federation", "rounds"): 7,
    ("federation", "local_epochs"): 5,
    ("federation", "proximal_mu"): 0.5,
    ("model", "backbone"): "cnn",
    ("model", "head"): "arcface",
    ("training", "lr"): 0.125,
    ("training", "batch_size"): 9,
    ("training", "epochs"): 3,
    ("data", "max_people"): 6,
    ("secagg", "enabled"): True,
    ("run", "seed"): 42,
    ("run", "out"): "elsewhere",
    ("run", "log_level"): "debug",
    ("tracking", "uri"): "http://127.0.0.1:5000",
}
NAMES = [(flag, name) for flag in FLAGS for name in flag.names]


def read(*argv: str, **keywords) -> Settings:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_run_settings(parser)
    return read_run_settings(parser.parse_args(list(argv)), **keywords)


def changes(settings: Settings) -> dict[tuple[str, str], object]:
    before, after = config.to_mapping(Settings()), config.to_mapping(settings)
    return {(s, k): v for s, values in after.items() for k, v in values.items() if v != before[s][k]}


def test_no_flag_no_change():
    assert read() == Settings()


@pytest.mark.parametrize(("flag", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_flag_changes_its_setting_and_no_other(flag, name):
    key = (flag.section, flag.key)
    value = [] if flag.stands_for else [str(OTHER[key])]
    assert changes(read(name, *value)) == {key: OTHER[key]}


def test_the_promised_aliases_are_there():
    by_key = {(flag.section, flag.key): set(flag.names) for flag in FLAGS}
    assert by_key["federation", "strategy"] == {"--strategy", "--method"}
    assert by_key["tracking", "uri"] == {"--tracking-uri", "--mlflow-uri", "--mlflow_uri"}


@pytest.mark.parametrize("name", ["--no-mlflow", "--mlflow-disabled", "--mlflow_disabled"])
def test_tracking_can_be_switched_off(name):
    assert changes(read(name)) == {("tracking", "enabled"): False}


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("data.image_size=64", 64),
        ("data.max_people=12", 12),
        ("augmentation.flip=0.25", 0.25),
        ("augmentation.flip=1", 1.0),
        ("tracking.enabled=false", False),
        ("tracking.enabled=False", False),
        ("training.threads=2", 2),
        ("model.pretrained=a=b.safetensors", "a=b.safetensors"),
        ("run.out=5", "5"),
        ("training.weight_decay=1e-3", 1e-3),
    ],
)
def test_set_overrides_any_setting(item, value):
    section, key = item.split("=")[0].split(".")
    assert changes(read("--set", item)) == {(section, key): value}


def test_set_is_repeatable_and_takes_the_word():
    read_settings = read("--set", "data.max_people=9", "--set", "data.max_people=all", "--set", "run.seed=3")
    assert read_settings.data.max_people == "all"
    assert read_settings.run.seed == 3
    assert read("--epochs", "auto").training.epochs == "auto"


@pytest.mark.parametrize("item", ["data.image_size", "image_size=64", "=3", "64"])
def test_set_says_how_it_is_written(item):
    with pytest.raises(ConfigError, match=r"write SECTION\.KEY=VALUE"):
        read("--set", item)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--lr", "fast"], 'training.lr = "fast" has the wrong type'),
        (["--lr", "-1"], "training.lr = -1.0 must be greater than 0"),
        (["--lr", "nan"], "training.lr = nan is not finite"),
        (["--rounds", "0"], "federation.rounds = 0 must be at least 1"),
        (["--rounds", "2.5"], 'federation.rounds = "2.5" has the wrong type'),
        (["--epochs", "-3"], "training.epochs = -3 must be at least 1"),
        (["--seed", "-1"], "run.seed = -1 must be at least 0"),
        (["--model", "resnet81"], "model.backbone = 'resnet81' is unknown; did you mean 'resnet18'"),
        (["--method", "fedprxo"], "federation.strategy = 'fedprxo' is unknown; did you mean 'fedprox'"),
        (["--set", "tracking.enabled=yes"], 'tracking.enabled = "yes" has the wrong type; write true or false'),
        (["--set", "model.bakbone=cnn"], "'model.bakbone' is unknown; did you mean 'model.backbone'"),
        (["--set", "modle.backbone=cnn"], "section = 'modle' is unknown; did you mean 'model'"),
    ],
)
def test_a_bad_value_names_the_setting(argv, told):
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    assert told in str(caught.value)


def test_all_bad_flags_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        read("--lr", "0", "--rounds", "0", "--head", "hat")
    assert len(caught.value.problems) == 3


def test_config_default_is_the_commands_own(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text("[run]\nseed = 77\n", encoding="utf-8")
    for argv in ([], ["--config", "default"]):
        assert read(*argv, default_config=str(own)).run.seed == 77
    assert read("--config", "default", "--seed", "5", default_config=str(own)).run.seed == 5
    other = tmp_path / "other.toml"
    other.write_text("[run]\nseed = 78\n", encoding="utf-8")
    assert read("--config", str(other), default_config=str(own)).run.seed == 78


def test_every_flag_names_a_setting_that_exists():
    known = {(s, f.name) for s, kind in config._section_types().items() for f in dataclasses.fields(kind)}
    assert {(flag.section, flag.key) for flag in FLAGS} <= known
    assert set(OTHER) == {(flag.section, flag.key) for flag in FLAGS}, "a new flag needs a value here"


def test_flags_can_be_left_out():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_run_settings(parser, flags=[flag for flag in FLAGS if flag.names[0] != "--epochs"])
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parser.parse_args(["--epochs", "3"])


def test_mlflows_own_variable_is_read_and_a_flag_wins(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    assert read().tracking.uri == "http://127.0.0.1:5999"
    assert read("--tracking-uri", "sqlite:///other.db").tracking.uri == "sqlite:///other.db"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--lr", "0.1"], "--lr"),
        (["--config", "demo"], "--config"),
        (["--set", "data.image_size=64"], "--set"),
        (["--no-mlflow"], "--no-mlflow"),
        (["--rounds", "3", "--seed", "2"], "--rounds, --seed"),
    ],
)
def test_settings_beside_a_flag_that_brings_its_own_are_refused(argv, told):
    parser = argparse.ArgumentParser()
    add_run_settings(parser)
    with pytest.raises(ConfigError, match=f"leave {told} out"):
        refuse_run_settings(parser.parse_args(argv), "--resume", but=("run.out",))


def test_what_may_be_given_beside_it_is_not_refused():
    parser = argparse.ArgumentParser()
    add_run_settings(parser)
    refuse_run_settings(parser.parse_args(["--out", "elsewhere"]), "--resume", but=("run.out",))


# -- a mistyped command line -------------------------------------------------------------------------------------------

PROGRAMS = {
    "flower-server": server.cli.main,
    "flower-client": clients.cli.main,
    "flower-simulation": simulation.cli.main_simulation,
    "facefed": simulation.cli.main,
}


def said(capsys, *words):
    """How a program ends before it has begun, and what it says."""
    with pytest.raises(SystemExit) as end:
        PROGRAMS[words[0]](list(words[1:]))
    streams = capsys.readouterr()
    return end.value.code, streams.out, streams.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("facefed trian local", "did you mean 'train'?"),
        ("facefed train locla", "did you mean 'local'?"),
        ("facefed data synth --layout celba --out x", "did you mean 'celeba'?"),
        ("flower-server --ruonds 3", "flower-server: error: --ruonds is unknown; did you mean --rounds?"),
        ("flower-server --ruonds=3", "flower-server: error: --ruonds is unknown; did you mean --rounds?"),
        (
            "facefed train local --client celeba --rounds 3",
            "does not read --rounds; flower-server, flower-simulation and facefed train federated do",
        ),
        (
            "flower-server --epochs=3",
            "does not read --epochs; facefed train local, facefed train centralized and facefed train twins do",
        ),
        (
            "facefed data audit --lr 1",
            "flower-simulation, facefed train federated, facefed train local, facefed train"
            " centralized and facefed train twins do",
        ),
        ("flower-client --datset celeba", "flower-client: error: --datset is unknown; did you mean --dataset?"),
        ("flower-server --weight-decay 0.1", "write --set training.weight_decay=VALUE"),
        ("flower-simulation --xyzzy", "--xyzzy is unknown; flower-simulation --help lists what there is"),
        ("flower-server celeba", "celeba: nothing more was expected; does an option's name stand before it?"),
        ("facefed tracking", "a command is missing; give one of serve, sync, import-wandb, doctor"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(capsys, words, line):
    code, out, err = said(capsys, *words.split())
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith(line)


def test_facefed_alone_shows_its_help(capsys):
    code, _, err = said(capsys, "facefed")
    assert code == 2
    assert "local training, and what surrounds a federation" in err
    assert all(f"\n    {name} " in err for name in ("data", "train", "evaluate", "attention", "tracking", "certs"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_tells_its_version(capsys, program):
    assert said(capsys, program, "--version")[:2] == (0, f"{program} {facefed_version()}\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lr", "abc"], '--lr: training.lr = "abc" has the wrong type'),
        (["--method", "fedprx"], "--method: federation.strategy = 'fedprx' is unknown; did you mean 'fedprox'?"),
        (["--set", "data.image_size=7"], "--set data.image_size: data.image_size = 7 must be"),
        (["--set", "data.imge_size=7"], "--set data.imge_size: setting = 'data.imge_size' is unknown"),
        # two that do not go together: the flag's is at fault, wherever the other comes from
        (["--set", "model.pretrained=imagenet"], "--set model.pretrained: model.width = 0.5 has no ImageNet weights"),
        (["--rounds", "3"], "FILE: model.depth = 0 must be"),
    ],
)
def test_a_flags_mistake_is_not_the_files(tmp_path, words, line):
    file = tmp_path / "a.toml"
    file.write_text("[model]\ndepth = 0\n" if line.startswith("FILE") else "[model]\nwidth = 0.5\n")
    parser = program_parser("program", "")
    add_run_settings(parser)
    with pytest.raises(ConfigError) as caught:
        read_run_settings(parser.parse_args(["--config", str(file), *words]))
    [problem] = caught.value.problems
    assert problem.startswith(line.replace("FILE", str(file)))


def leaves(parser):
    below = [action for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict)]
    return [leaf for action in below for each in action.choices.values() for leaf in leaves(each)] or [parser]


PARSERS = {
    "facefed": simulation.cli.facefed_parser,
    "flower-server": server.cli.parser,
    "flower-client": clients.cli.parser,
    "flower-simulation": simulation.cli.simulation_parser,
}
HELPED = [leaf for make in PARSERS.values() for leaf in leaves(make())]


@pytest.mark.parametrize("parser", HELPED, ids=[leaf.prog for leaf in HELPED])
def test_every_command_shows_examples_that_parse(parser):
    shown = parser.format_help().partition("examples:\n")[2].splitlines()
    assert shown
    for line in shown:
        command = re.sub(r"^\s+(?:eval \"\$\()?|\)\" +.*$| > \S+$", "", line)
        program, *words = shlex.split(re.split(r" {3,}", command)[0])
        assert " ".join([program, *words]).startswith(parser.prog)
        PARSERS[program]().parse_args(words)


def test_defaults_are_those_of_the_commands_own_configuration():
    helps = {leaf.prog: " ".join(leaf.format_help().split()) for leaf in HELPED}
    assert "highest learning rate (default: 0.05)" in helps["facefed train local"]
    assert (
        f"learning rate (default: {config.load(config.find_config('twins_dcal')).training.lr})"
        in helps["facefed train twins"]
    )
    assert "where flower-server listens (default: 127.0.0.1:8000)" in helps["flower-client"]


# What a run would be that a server asks for.
AS_A_SERVER = dict.fromkeys(("facefed policy check", "facefed privacy attack"), "flower-server")


def test_a_command_offers_only_what_it_reads():
    for leaf in HELPED:
        offered = {action.dest for action in leaf._actions}
        for flag in FLAGS:
            if flag.read_by:
                is_offered = f"{flag.section}.{flag.key}" in offered
                reader = AS_A_SERVER.get(leaf.prog, leaf.prog)
                assert is_offered == (reader in flag.read_by), (leaf.prog, flag.names[0])
