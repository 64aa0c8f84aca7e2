"""`flower-server --evaluate`: everybody scores a model, nothing is trained, and the figures are that model's own."""

import json

import pytest
from secure_federation import secure_mailbox
from tiny_federation import MANIFEST, InProcessMailbox, enter_run, settings_with, task_for, tiny_pack

import clients.message_handler
from clients.policy import DEFAULT, OWN_MACHINE, TaskWords, against_settings, against_task
from common.errors import ConfigError, UserError
from common.runs import EVALUATED, write_config_file
from common.weights import begin_run
from server.app import Surroundings, federate
from server.cli import _settings_and_folder, parser


@pytest.fixture(scope="module", autouse=True)
def tiny_packs():
    with pytest.MonkeyPatch.context() as patch:
        enter_run(patch)
        patch.setattr(clients.message_handler, "_workplaces", {})
        patch.setattr(clients.packs, "open_pack", lambda _kind, folder, *_, **__: tiny_pack(folder.parent.name))
        yield


def run(folder, settings, sites, seen=None, mailbox=None):
    """A federation of alpha and beta in `folder`; returns its summary.  seen: gets (client, kind, round).

    mailbox: of other sites.
    """
    clients.message_handler._workplaces.clear()

    def watch(name, task, reply):
        if seen is not None:
            seen.append((name, task.kind, task.server_round))
        return reply

    folder.mkdir(parents=True, exist_ok=True)
    federate(
        settings,
        mailbox or InProcessMailbox(("alpha", "beta"), sites, watch),
        Surroundings(run_folder=folder, stopped=lambda: False, all_nodes_are_here=lambda: True, git_commit="none"),
    )
    assert json.loads((folder / "outcome.json").read_text()) == {"exit_code": 0, "line": ""}
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two rounds, and its summary."""
    tmp_path = tmp_path_factory.mktemp("trained")
    settings = settings_with(federation__join_timeout_s=20.0, run__out=str(tmp_path / "runs"))
    settings, folder = begin_run(settings, "")
    write_config_file(folder, settings)
    return folder, run(folder, settings, tmp_path / "trained-sites")


def evaluation_of(model, out, *more):
    """What `flower-server --evaluate MODEL` makes of its command line."""
    arguments = parser().parse_args(["--evaluate", str(model), "--out", str(out), "--no-mlflow", *more])
    return _settings_and_folder(arguments)[0]


def test_a_runs_model_has_the_figures_that_it_ended_with_and_nobody_trains(trained, tmp_path):
    folder, before = trained
    settings, run_folder = begin_run(evaluation_of(folder.name, folder.parent), "")
    seen = []

    summary = run(run_folder, settings, tmp_path / "other-sites", seen)

    assert {(kind, step) for _, kind, step in seen} == {("join", 0), ("evaluate", 0)}
    assert [name for name, kind, _ in seen if kind == "evaluate"].count("alpha") == 1  # one round, and no other
    for name in ("test_roc_auc", "test_eer"):
        of_site = {client: figures[name] for client, figures in summary["clients"].items()}
        assert of_site == {client: figures[name] for client, figures in before["clients"].items()}
    assert summary["best"]["roc_auc"] == before["best"]["roc_auc"]
    assert "accuracy" in before["best"]
    assert "accuracy" not in summary["best"]  # of a head that nobody trained
    assert "test_accuracy" not in summary["clients"]["alpha"]
    assert json.loads((run_folder / "run.json").read_text())["mode"] == EVALUATED
    recorded = [json.loads(line) for line in (run_folder / "spool.jsonl").read_text().splitlines()]
    told = {(line["run"], line["key"]): line["value"] for line in recorded if "key" in line}
    assert told["", "test_roc_auc"] == summary["best"]["roc_auc"]
    assert told["alpha", "test_roc_auc"] == summary["clients"]["alpha"]["test_roc_auc"]
    assert not [line for line in recorded if line.get("kind") == "model"]  # nothing is registered


def test_with_secure_aggregation_only_the_sum_is_known(tmp_path):
    mailbox = secure_mailbox(("alpha", "beta", "gamma"), tmp_path / "sites")
    settings = settings_with(
        federation__evaluate_only=True,
        federation__min_clients=3,
        federation__join_timeout_s=20.0,
        secagg__enabled=True,
    )
    summary = run(tmp_path / "run-1", settings, tmp_path / "sites", mailbox=mailbox)
    assert 0.0 < summary["best"]["roc_auc"] < 1.0
    assert 0.0 < summary["validation"]["roc_auc"] < 1.0
    assert summary["clients"] == {}


def test_a_run_that_is_named_brings_its_own_settings_and_a_config_beside_it_counts(trained, tmp_path):
    folder, _ = trained
    own = evaluation_of(folder, tmp_path)
    assert (own.model.backbone, own.model.width, own.data.image_size) == ("cnn", 0.25, 32)
    assert own.federation.evaluate_only
    assert own.federation.rounds == 1
    assert evaluation_of(folder, tmp_path, "--config", "demo").model.backbone == "resnet18"


def test_a_file_that_does_not_fit_the_model_is_refused_before_anything_is_made(trained, tmp_path):
    folder, before = trained
    file = folder / "checkpoints" / f"round-{before['best_round']:06d}.safetensors"
    out = tmp_path / "new"

    with pytest.raises(Exception, match=r"does not fit model\.backbone"):
        begin_run(evaluation_of(file, out), "")

    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rounds", "2"], "there are no rounds; leave --rounds out"),
        (["--resume", "x"], "give one of them"),
        (["--set", "model.normalisation=private"], "scores one whole model"),
        (["--set", "privacy.unit=person", "--set", "model.norm=group"], "no score leaves a site then"),
    ],
)
def test_what_contradicts_it_is_the_users_mistake(more, words, tmp_path):
    with pytest.raises((UserError, ConfigError), match=words):
        evaluation_of("weights.safetensors", tmp_path, *more)


@pytest.mark.parametrize("model", ["none", "imagenet", ""])
def test_no_model_is_none(model, tmp_path):
    with pytest.raises(UserError, match="is no model"):
        evaluation_of(model, tmp_path)


def test_a_site_answers_no_training_in_such_a_run_and_its_policy_says_which_models_it_scores():
    settings = settings_with(federation__evaluate_only=True, model__pretrained="x.safetensors")
    task = task_for(MANIFEST, settings)
    words = TaskWords(*(getattr(task, name) for name in TaskWords._fields))

    assert [one.setting for one in against_task(OWN_MACHINE, settings, "train", words)] == ["federation.evaluate_only"]
    assert against_task(OWN_MACHINE, settings, "evaluate", words) == []
    assert "model.pretrained" in [one.setting for one in against_settings(DEFAULT, settings)]
    assert against_settings(OWN_MACHINE, settings) == []
