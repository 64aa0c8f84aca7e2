"""`flwr run --run-config`: what the project file declares, how it becomes settings, and each way to get it wrong."""

import json
import tomllib
from pathlib import Path

import pytest

from common import config
from common.errors import ConfigError, UserError
from common.runs import CONFIG_FILE
from common.settings import Settings
from server.run_config import DEFAULT_CONFIG, OWN, declared, read_run_config

ROOT = Path(__file__).resolve().parents[2]


def flat(table, before=""):
    items = ((f"{before}{key}", value) for key, value in table.items())
    return {
        name: found
        for key, value in items
        for name, found in (flat(value, f"{key}.").items() if isinstance(value, dict) else [(key, value)])
    }


def asked(**given):
    """As Flower hands it over: what the project file declares, with what was given; `__` stands for a dot."""
    return read_run_config(declared() | {name.replace("__", ".").replace("_of_", "-"): v for name, v in given.items()})


def test_the_project_file_declares_every_key_and_no_other():
    """Flower refuses whatever else is given; after a new setting: make app-config."""
    in_file = flat(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])
    wanted = declared()
    assert [f'{key} = ""' for key in wanted if key not in in_file] == [], "make app-config adds these lines"
    assert [key for key in in_file if key not in wanted] == [], "make app-config takes these out"
    assert in_file == wanted
    assert {type(value) for value in in_file.values()} <= {bool, int, float, str}
    assert len(wanted) == len(OWN) + sum(len(table) for table in config.to_mapping(Settings()).values())


def test_nothing_given_is_the_usual_configuration():
    found = asked()
    assert found.settings == config.load(ROOT / "configs" / f"{DEFAULT_CONFIG}.toml")
    assert (found.clients, found.resumed) == ((), None)


def test_a_configuration_by_name_with_settings_of_each_type_over_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no configs there: those beside the program count
    found = asked(
        config="demo", federation__rounds=7, training__lr=1, tracking__enabled=False, federation__strategy="fedprox",
        federation__clients_per_round="all",
    )  # fmt: skip
    demo = config.load(ROOT / "configs" / "demo.toml")
    assert found.settings == config.with_values(
        demo,
        {
            "federation.rounds": 7, "training.lr": 1.0, "tracking.enabled": False, "federation.strategy": "fedprox",
            "federation.clients_per_round": "all",
        },
    )  # fmt: skip
    assert found.settings.training.lr == 1.0
    assert type(found.settings.training.lr) is float


def test_the_default_of_a_setting_that_is_given_holds_against_the_configuration(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[federation]\nrounds = 3\n")
    default = Settings().federation.rounds
    assert asked(config=str(file)).settings.federation.rounds == 3
    assert asked(config=str(file), federation__rounds=default).settings.federation.rounds == default != 3


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"config": "dmo"}, "--run-config config = dmo: no such file"),
        ({"federation__rounds": 0}, "--run-config: federation.rounds = 0 must be at least 1."),
        ({"federation__rounds": "3"}, '--run-config: federation.rounds = "3" has the wrong type'),
        ({"model__backbone": "resnet81"}, "--run-config: model.backbone = 'resnet81' is unknown; did you mean"),
        ({"resume": "no-such-run"}, "--resume no-such-run: no run is at"),
        ({"resume": "r", "federation__rounds": 3}, "resume goes on with the run's own settings and sites; leave fed"),
        ({"resume": "r", "clients": "celeba=/c"}, "resume goes on with the run's own settings and sites; leave clien"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(given, line):
    with pytest.raises(UserError) as raised:
        asked(**given)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_key_is_told_with_the_nearest_one():
    with pytest.raises(UserError, match=r"--run-config: the key = 'federation.round' is unknown; did you mean 'feder"):
        read_run_config({"federation.round": 3})


def test_all_wrong_settings_are_told_together():
    with pytest.raises(ConfigError) as raised:
        asked(federation__rounds=0, training__lr=-1.0)
    assert len(raised.value.problems) == 2


def test_a_password_may_not_travel_to_every_node_and_nobody_reads_it_here():
    with pytest.raises(UserError, match=r"tracking\.uri has a password") as raised:
        asked(tracking__uri="postgresql://me:geheim@db/mlflow")
    assert "geheim" not in str(raised.value)
    assert asked(tracking__uri="http://127.0.0.1:5000").settings.tracking.uri == "http://127.0.0.1:5000"


def test_clients_of_a_simulation_are_all_waited_for():
    found = asked(clients=" celeba=/a , north:folder=/b,", federation__min_clients=9)
    assert found.clients == ("celeba=/a", "north:folder=/b")
    assert found.settings.federation.min_clients == 2


def test_a_run_that_goes_on_has_its_own_settings(tmp_path):
    folder = tmp_path / "runs" / "one"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "state.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps({"mode": "federated"}))
    own = config.with_value(Settings(), "federation", "rounds", 4)
    (folder / CONFIG_FILE).write_text(config.to_toml(own))
    found = asked(resume="one", run__out=str(tmp_path / "runs"))
    assert (found.resumed, found.settings) == (folder, own)
