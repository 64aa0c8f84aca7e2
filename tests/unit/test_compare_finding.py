"""Which models a comparison finds, and what it says about those that it does not."""

import json

import pytest

from common.errors import CheckpointError, TrackingError, UserError
from simulation.compare.model_lookup import Search, Wanted, explicit_runs, find_models, wanted_models
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
