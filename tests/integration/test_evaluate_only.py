"""`flower-server --evaluate`: everybody scores a model, nothing is trained, and the figures are that model's own."""

import csv
import json

import pytest
from secure_federation import secure_mailbox
from tiny_federation import MANIFEST, InProcessMailbox, enter_run, settings_with, task_for, tiny_pack

import clients.message_handler
import server.cli
from clients.policy import DEFAULT, OWN_MACHINE, TaskWords, against_settings, against_task
from common.errors import ConfigError, UserError
from common.runs import EVALUATED, WEIGHTS_FILE, write_config_file
from common.system.checkpoints import read_tensors, write_tensors
from common.weights import begin_run
from server import cross_sites
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
    events = [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]
    assert {event.get("evaluated") for event in events if event["kind"] == "scored"} == {True}
    recorded = [json.loads(line) for line in (run_folder / "spool.jsonl").read_text().splitlines()]
    told = {(line["run"], line["key"]): line["value"] for line in recorded if "key" in line}
    assert told["", "test_roc_auc"] == summary["best"]["roc_auc"]
    assert told["alpha", "test_roc_auc"] == summary["clients"]["alpha"]["test_roc_auc"]
    assert not [line for line in recorded if line.get("kind") == "model"]  # nothing is registered


@pytest.fixture
def scored(trained, tmp_path, monkeypatch):
    """scored(*models) -> (exit code, folders), of `flower-server --evaluate ...` with its runs in this process.

    A model of which the name has `bad` in it ends its run with 1.
    """
    folder, _ = trained

    def serve(*models):
        folders = []

        def serve_run(arguments):
            [model] = arguments.evaluate
            if "bad" in model:
                return 1, tmp_path / "none"
            settings, run_folder = begin_run(_settings_and_folder(arguments)[0], "")
            run(run_folder, settings, tmp_path / f"sites-{len(folders)}")
            folders.append(run_folder)
            return 0, run_folder

        monkeypatch.setattr(server.cli, "_serve_run", serve_run)
        given = [part for model in models for part in ("--evaluate", str(model))]
        config = ("--config", str(folder / "config.toml"), "--out", str(folder.parent), "--no-mlflow")
        return server.cli._serve_each(parser().parse_args([*given, *config])), folders

    return serve


def test_several_models_are_scored_one_after_the_other_and_stand_in_one_table(trained, scored, capsys):
    """As with each site's own model: a file or a run that its people hand over, and a policy that takes it."""
    folder, before = trained
    _, begun = begin_run(evaluation_of(folder.name, folder.parent), "")
    tensors, notes = read_tensors(begun / WEIGHTS_FILE)
    other = folder.parent / "own-model.safetensors"
    write_tensors(other, {name: tensor.roll(1, 0) for name, tensor in tensors.items()}, notes)

    code, folders = scored(folder.name, other)

    assert (code, len(folders)) == (0, 2)
    summaries = [json.loads((one / "metrics.json").read_text()) for one in folders]
    told = json.loads((folders[1] / "cross_sites.json").read_text())
    assert [(line["model"], line["site"]) for line in told] == [
        (model, site) for model in (folder.name, str(other)) for site in ("alpha", "beta", "all sites")
    ]
    for line in told:
        summary = summaries[line["model"] == str(other)]
        figures = summary["best"] if line["site"] == "all sites" else summary["clients"][line["site"]]
        prefix = "" if line["site"] == "all sites" else "test_"
        assert (line["roc_auc"], line["eer"]) == (figures[f"{prefix}roc_auc"], figures[f"{prefix}eer"])
        assert line["model_sha256"] == summary["model_sha256"]
    assert told[0]["roc_auc"] == before["clients"]["alpha"]["test_roc_auc"] != told[3]["roc_auc"]
    rows = list(csv.DictReader((folders[1] / "cross_sites.csv").read_text().splitlines()))
    assert [float(row["roc_auc"]) for row in rows] == [line["roc_auc"] for line in told]
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if line.startswith("  model"))
    assert head.split() == ["model", "alpha", "beta", "all", "sites"]
    assert f"{told[0]['roc_auc']:.3f} ({told[0]['eer']:.3f})" in out
    assert "missing" not in out


def test_of_models_of_which_one_cannot_be_scored_the_others_are_told_and_how_many(trained, scored, capsys):
    folder, _ = trained
    code, folders = scored(folder.name, "bad.safetensors", "another.safetensors")
    assert (code, len(folders)) == (1, 1)
    assert "1 of 3 models were scored" in capsys.readouterr().out
    assert len(json.loads((folders[0] / "cross_sites.json").read_text())) == 3


def test_a_site_that_was_left_out_is_a_gap_that_is_counted(tmp_path):
    def summary(name, **sites):
        folder = tmp_path / name
        folder.mkdir()
        clients = {site: {"test_roc_auc": value, "test_eer": 1 - value} for site, value in sites.items()}
        of_all = {"clients": clients, "best": {"roc_auc": 0.5, "eer": 0.5}, "model_sha256": "0"}
        (folder / "metrics.json").write_text(json.dumps(of_all))
        return cross_sites.row_of(name, folder)

    lines = cross_sites.lines([summary("one", north=0.9, south=0.8), summary("two", south=0.7)], 2)
    assert lines[1].split() == ["model", "north", "south", "all", "sites"]
    assert lines[3].split() == ["two", "-", "0.700", "(0.300)", "0.500", "(0.500)"]
    assert lines[-1].strip().startswith("1 scores are missing")


@pytest.mark.parametrize(
    ("models", "words"), [(("a.safetensors",) * 2, "is given twice"), (("a.safetensors", "none"), "is no model")]
)
def test_models_that_cannot_be_compared_are_refused_before_the_first_is_scored(models, words, scored):
    with pytest.raises(UserError, match=words):
        scored(*models)


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
