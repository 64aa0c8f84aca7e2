"""Which models a comparison finds, and what it says about those that it does not."""

import dataclasses
import json
import re
import shlex

import pytest

from common import config
from common.errors import CheckpointError, TrackingError, UserError
from simulation.compare.evaluate import _client_told
from simulation.compare.model_lookup import Search, Wanted, explicit_runs, find_models, wanted_models
from simulation.sites import data_options
from tests.comparable_models import write_run
from tests.tiny_federation import settings_with

BOTH = ("alpha", "beta")
FEDAVG = Wanted(kind="fedavg")
LOCAL = Wanted(kind="local", client="alpha")


@pytest.fixture
def search(tmp_path):
    return Search(settings=settings_with(run__out=str(tmp_path)), clients=BOTH, command_options="--config tiny")


def _federated(out, run_id, strategy="fedavg", **values):
    return write_run(out, run_id, mode="federated", clients=BOTH, strategy=strategy, **values)


def test_kinds_become_models():
    wanted = wanted_models("local, centralized,fedavg", BOTH, {"fedbn": "x", "fedavg": "y"})
    assert [want.name for want in wanted] == ["local-alpha", "local-beta", "centralized", "fedavg", "fedbn"]
    assert [want.mode for want in wanted] == ["local", "local", "centralized", "federated", "federated"]


@pytest.mark.parametrize("text", ["fedavg,fedpro", "", "local-alpha", "fedavg,,fedprox"])
def test_a_kind_that_nobody_knows(text):
    with pytest.raises(UserError, match=r"--compare = .* is unknown;.*fedprox"):
        wanted_models(text, BOTH, {})


def test_named_runs():
    assert explicit_runs(["fedavg=a", "local-gamma=b"], BOTH) == {"fedavg": "a", "local-gamma": "b"}
    assert explicit_runs(["local=b"], ("alpha",)) == {"local-alpha": "b"}
    for texts, fragment in (
        (["fedavg"], "write KIND=RUN"),
        (["fedavg="], "write KIND=RUN"),
        (["fedpro=x"], "'fedpro' is unknown; did you mean 'fedprox'"),
        (["local=x"], "whose? Write local-NAME=RUN"),
        (["fedavg=x", "fedavg=y"], "fedavg has a run already (x)"),
    ):
        with pytest.raises(UserError) as error:
            explicit_runs(texts, BOTH)
        assert fragment in str(error.value)


def test_the_newest_finished_run_that_fits_is_taken(search, tmp_path):
    _federated(tmp_path, "1-old")
    _federated(tmp_path, "2-right", seed=5)
    _federated(tmp_path, "3-other-strategy", "fedprox")
    _federated(tmp_path, "4-other-backbone", model__backbone="resnet18")
    _federated(tmp_path, "5-private", model__normalisation="private")
    write_run(tmp_path, "6-of-others", mode="federated", clients=("alpha", "gamma"), strategy="fedavg")
    _federated(tmp_path, "7-unfinished")
    (tmp_path / "7-unfinished" / "metrics.json").unlink()
    write_run(tmp_path, "8-centralized", mode="centralized", clients=BOTH)
    (tmp_path / "9-damaged").mkdir()
    (tmp_path / "9-damaged" / "run.json").write_text("{")
    (tmp_path / "clients").mkdir()
    wanted = [FEDAVG, Wanted(kind="fedprox"), Wanted(kind="fedbn"), Wanted(kind="centralized")]
    found = find_models(search, wanted, {})
    assert [m.source for m in found] == ["2-right", "3-other-strategy", "5-private", "8-centralized"]
    assert found[0].checkpoint == tmp_path / "2-right" / "checkpoints" / "round-000002.safetensors"
    assert found[3].checkpoint == tmp_path / "8-centralized" / "checkpoints" / "best.safetensors"
    assert found[0].clients == BOTH
    assert found[0].step == 2


def test_all_missing_kinds_are_named_with_the_commands_that_make_them(search, tmp_path):
    write_run(tmp_path, "1")
    wanted = wanted_models("local,centralized,fedavg,fedbn", BOTH, {})
    with pytest.raises(UserError) as error:
        find_models(search, wanted, {})
    line = str(error.value)
    assert "\n" not in line
    assert f"no trained cnn model in {tmp_path} of local-beta, centralized, fedavg, fedbn" in line
    both = "--client alpha --client beta"
    for command in (
        "`facefed train local --client beta --model cnn --config tiny`",
        f"`facefed train centralized {both} --model cnn --config tiny`",
        f"`facefed train federated {both} --method fedavg --model cnn --config tiny`",
        f"`facefed train federated {both} --set model.normalisation=private --model cnn --config tiny`",
    ):
        assert command in line
    assert "local-alpha" not in line
    assert "Or compare" not in line  # one model is no comparison


def without_config(search):
    return dataclasses.replace(search, command_options="")


def test_what_is_missing_is_to_be_trained_like_what_is_there(search, tmp_path):
    """After the demo, without --config: the default's backbone is that of the demo, and all else is not."""
    _federated(tmp_path, "1")
    _federated(tmp_path, "2")
    write_run(tmp_path, "3")
    with pytest.raises(UserError) as error:
        find_models(without_config(search), wanted_models("local,centralized,fedavg", BOTH, {}), {})
    like = f"--config {tmp_path}/2/config.toml"
    assert f"local-beta: `facefed train local --client beta {like}`;" in str(error.value)
    assert f"centralized: `facefed train centralized --client alpha --client beta {like}`." in str(error.value)
    assert "Or compare" not in str(error.value)  # of the local models one is missing
    write_run(tmp_path, "4", clients=("beta",))
    with pytest.raises(UserError, match=r"`\. Or compare what is there: --compare local,fedavg\.$"):
        find_models(search, wanted_models("local,centralized,fedavg", BOTH, {}), {})


def test_such_a_configuration_is_one(search, tmp_path):
    """The command's --config is what a run wrote of itself."""
    _federated(tmp_path, "1", model__embedding_size=24)
    with pytest.raises(UserError) as error:
        find_models(without_config(search), wanted_models("local,fedavg", ("alpha",), {}), {})
    path = re.search(r"--config (\S+)`", str(error.value))[1]
    assert config.load(config.find_config(path)).model.embedding_size == 24


@pytest.mark.parametrize(
    ("runs", "clients", "told"),
    [
        ((), ("celeba",), "--client celeba --client vggface2"),  # the usual two
        ((("alpha", "gamma"),), ("alpha",), "--client alpha=x --client gamma"),  # those of the federation that is there
        ((), ("alpha",), "--client alpha=x --client OTHER=DIR"),  # nobody knows with whom
    ],
)
def test_to_compare_on_one_client_is_no_federation_of_one(search, tmp_path, runs, clients, told):
    for number, holders in enumerate(runs):
        write_run(tmp_path, str(number), mode="federated", clients=holders, strategy="fedavg")
    alone = dataclasses.replace(search, clients=clients, told={"alpha": "alpha=x"})
    with pytest.raises(UserError) as error:
        find_models(alone, wanted_models("centralized,fedprox", clients, {}), {})
    assert f"`facefed train centralized {told} --model cnn --config tiny`" in str(error.value)
    assert f"`facefed train federated {told} --method fedprox --model cnn --config tiny`" in str(error.value)


def test_a_run_is_named_by_id_by_folder_and_beyond_the_default_rules(search, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    _federated(tmp_path, "1")
    _federated(tmp_path, "2")
    write_run(elsewhere, "3", mode="federated", clients=("alpha", "gamma"), strategy="fedavg")
    for run, source in (("1", "1"), (str(tmp_path / "2"), "2"), (str(elsewhere / "3"), "3")):
        assert find_models(search, [FEDAVG], {"fedavg": run})[0].source == source


def test_runs_that_cannot_stand_for_what_they_are_named(search, tmp_path):
    write_run(tmp_path, "local")
    _federated(tmp_path, "open")
    (tmp_path / "open" / "metrics.json").unlink()
    _federated(tmp_path, "big", model__backbone="resnet18")
    _federated(tmp_path, "stepless", metrics={"best_round": "two"})
    for run, kind, fragment in (
        ("nowhere", UserError, "--run fedavg=nowhere: there is no such run"),
        ("local", UserError, "that run is local ['alpha'], not fedavg"),
        ("open", UserError, "has not finished (no metrics.json)"),
        ("big", UserError, "fedavg (big) has model.backbone = resnet18, --model has cnn"),
        ("stepless", CheckpointError, "best_round is 'two'"),
        ("models:/x/1", TrackingError, "tracking is off"),
    ):
        with pytest.raises(kind) as error:
            find_models(search, [FEDAVG], {"fedavg": run})
        assert fragment in str(error.value)
        assert "\n" not in str(error.value)


def test_models_of_two_embedding_sizes_are_not_compared(search, tmp_path):
    write_run(tmp_path, "1")
    _federated(tmp_path, "2", model__embedding_size=32)
    with pytest.raises(UserError, match=r"fedavg \(2\) has model.embedding_size = 32, local-alpha \(1\) has 16"):
        find_models(search, [LOCAL, FEDAVG], {})


def test_a_metrics_file_cut_short_is_named(search, tmp_path):
    write_run(tmp_path, "1")
    whole = json.dumps({"best_epoch": 2})
    (tmp_path / "1" / "metrics.json").write_text(whole[:-3])
    with pytest.raises(CheckpointError, match=r"1/metrics.json cannot be read"):
        find_models(search, [LOCAL], {})


@pytest.mark.parametrize(
    ("client", "told"),
    [
        ("celeba", "celeba"),
        ("mine:folder=data/mine", "mine:folder"),
        ("celeba=/faces/celeba", "celeba=/faces/celeba"),
        ("mine:folder=my faces", "'mine:folder=my faces'"),
    ],
)
def test_a_client_is_told_as_a_training_command_takes_it(client, told):
    [option] = data_options([client], [])
    assert _client_told(option) == told
    assert data_options(shlex.split(told), []) == [option]
