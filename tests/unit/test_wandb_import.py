"""Offline runs of Weights & Biases in MLflow: all of it, once, whatever happens in between."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest

from bench.wandb_log import framed
from common.errors import TrackingError
from simulation.admin import wandb_import
from simulation.admin.wandb_folders import find_logs
from simulation.admin.wandb_import import RUN_TAG, Importer, import_folders
from simulation.admin.wandb_log import read_facts
from simulation.admin.wandb_values import MAX_NAME, Names, nearest_name
from tests.unit.wandb_logs import (
    NEW,
    OLD,
    exit_record,
    log_of,
    row_record,
    run_record,
    summary_record,
    write_log,
)

T0 = 1_700_000_000


@pytest.fixture(scope="module")
def uri(tmp_path_factory, tables_once):  # noqa: ARG001 - for what it does
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def bring(uri, experiment, *folders, **how):
    out, err = io.StringIO(), io.StringIO()
    assert import_folders([str(folder) for folder in folders], uri, experiment, out, err, **how) == 0
    return out.getvalue()


def only_run(client, experiment):
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def points(client, run, key):
    return [(p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, key)]


def everything(client, experiment):
    """All that MLflow has of an experiment's one run."""
    run = only_run(client, experiment)
    history = {key: points(client, run, key) for key in run.data.metrics}
    return repr((run.data.params, sorted(run.data.tags.items()), history, run.info.status)), sorted(
        artifacts(client, run)
    )


def artifacts(client, run, folder=None):
    for found in client.list_artifacts(run.info.run_id, folder):
        if found.is_dir:
            yield from artifacts(client, run, found.path)
        else:
            yield found.path


def text_of(client, run, place, tmp_path):
    return Path(client.download_artifacts(run.info.run_id, place, str(tmp_path))).read_text(encoding="utf-8")


@pytest.mark.parametrize(("folder", "steps"), [(OLD, 170), (NEW, 85)])
def test_a_real_run_arrives_whole(uri, client, folder, steps):
    experiment, log = f"real {steps}", log_of(folder)
    bring(uri, experiment, folder)
    run = only_run(client, experiment)
    facts = read_facts(log)

    loss = points(client, run, "loss")
    assert [(step, value) for step, value, _ in loss] == [(2 * step, 2.0 / (step + 1)) for step in range(steps)]
    assert all(facts.start_ms <= time <= run.info.end_time for _, _, time in loss)
    assert [value for _, value, _ in points(client, run, "val.auc")] == [step / steps for step in range(steps)]
    assert [value for _, value, _ in points(client, run, "good")] == [float(step > 3) for step in range(steps)]
    assert [(step, math.isnan(value)) for step, value, _ in points(client, run, "odd")] == [(2 * steps, True)]
    assert [value for _, value, _ in points(client, run, "best_auc")] == [0.95]
    assert set(run.data.metrics) == {"loss", "val.auc", "good", "odd", "best_auc"}
    assert run.data.params == {
        "lr": "0.02", "epochs": str(steps), "model.name": "resnet18", "model.width": "64", "sizes": "[1, 2]",
        "none": "None",
    }  # fmt: skip
    assert (run.info.status, run.info.start_time) == ("FINISHED", facts.start_ms)
    assert run.info.run_name == f"resnet on {folder.name.removeprefix('wandb-')}"
    tags = run.data.tags
    assert tags[RUN_TAG] == f"faces/{facts.run_id}"
    assert tags["mlflow.note.content"] == "First try.\nSecond line."
    assert (tags["wandb.tags"], tags["wandb.summary.verdict"]) == ("baseline, celeba", "kept")
    assert tags["nonfinite_metrics"] == "odd"


@pytest.mark.parametrize(("folder", "steps"), [(OLD, 170), (NEW, 85)])
def test_pictures_files_and_what_is_no_metric_are_artifacts(uri, client, tmp_path, folder, steps):
    experiment, log = f"files {steps}", log_of(folder)
    bring(uri, experiment, folder)
    run = only_run(client, experiment)
    places = set(artifacts(client, run))
    kept = f"wandb/{log.parent.name}"
    lines = [json.loads(line) for line in text_of(client, run, f"{kept}/no_metrics.jsonl", tmp_path).splitlines()]
    by_key = {line["key"]: line for line in lines}

    picture = by_key["sample"]["value"]
    assert picture["path"] in places
    assert picture["caption"] == "a square"
    assert by_key["sample"]["step"] == 2 * steps + 2
    assert (by_key["odd"]["value"], by_key["odd"]["step"]) == ("inf", 2 * steps + 1)
    assert sum(line["key"] == "phase" for line in lines) == steps
    assert text_of(client, run, "extra.txt", tmp_path) == "a file of the run\n"
    assert json.loads(text_of(client, run, f"{kept}/config.json", tmp_path))["model"] == {
        "name": "resnet18",
        "width": 64,
    }
    summary = text_of(client, run, f"{kept}/summary.json", tmp_path)
    assert json.loads(summary, parse_constant=pytest.fail)["odd"] == "inf"


def test_importing_twice_adds_nothing(uri, client):
    first = bring(uri, "twice", OLD)
    before = everything(client, "twice")
    second = bring(uri, "twice", OLD / "wandb", OLD)

    assert "512 points, 6 params, 3 files" in first
    assert second.count("\n") == 1
    assert "nothing new" in second
    assert everything(client, "twice") == before


def test_an_import_that_was_cut_off_is_completed_without_doubles(uri, client, monkeypatch):
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(wandb_import, "METRICS_PER_CALL", 100)
    log, calls = log_of(OLD), []
    importer = Importer(uri, "cut off")
    send = importer._client.log_batch

    def dies(*arguments, **named):
        calls.append(named)
        if sum("metrics" in call for call in calls) == 4:
            raise MlflowException("connection lost")
        return send(*arguments, **named)

    importer._client.log_batch = dies
    with pytest.raises(TrackingError, match="connection lost"):
        importer.send(log, read_facts(log))
    assert len(points(client, only_run(client, "cut off"), "loss")) < 170

    bring(uri, "cut off", OLD)
    bring(uri, "in one go", OLD)
    assert everything(client, "cut off") == everything(client, "in one go")


def some_rows(first, last):
    return [row_record(step, {"loss": 1 / (step + 1), "note": "x"}, T0 + step) for step in range(first, last)]


def test_a_log_that_grew_adds_what_is_new(uri, client, tmp_path):
    head = [run_record(config={"lr": 0.1})]
    write_log(tmp_path, [*head, *some_rows(0, 6)])
    assert "6 points" in bring(uri, "grew", tmp_path)
    assert only_run(client, "grew").info.status == "KILLED"  # nothing in the log says how it ended

    write_log(tmp_path, [*head, *some_rows(0, 10), summary_record({"loss": 0.1, "best": 7}), exit_record(1)])
    assert "5 points, 0 params" in bring(uri, "grew", tmp_path)  # four rows and the summary's best
    run = only_run(client, "grew")

    assert points(client, run, "loss") == [(step, 1 / (step + 1), (T0 + step) * 1000) for step in range(10)]
    assert points(client, run, "best") == [(9, 7.0, (T0 + 9) * 1000)]
    assert run.info.status == "FAILED"


def test_a_truncated_log_keeps_its_whole_records_and_names_the_place(uri, client, tmp_path):
    records = [run_record(), *some_rows(0, 10), exit_record()]
    content, begins = framed(records)
    log = write_log(tmp_path, records)
    log.write_bytes(content[: begins[8] + 20])

    said = bring(uri, "truncated", tmp_path)

    assert f"damaged at byte {begins[8]:,}: the file ends inside a record" in said
    assert [step for step, _, _ in points(client, only_run(client, "truncated"), "loss")] == list(range(7))

    log.write_bytes(content)
    assert "damaged" not in bring(uri, "truncated", tmp_path)
    assert [step for step, _, _ in points(client, only_run(client, "truncated"), "loss")] == list(range(10))


def test_a_record_that_was_damaged_arrives_when_the_log_is_mended(uri, client, tmp_path):
    records = [run_record(), *some_rows(0, 10), exit_record()]
    content, begins = framed(records)
    log = write_log(tmp_path, records)
    hurt = bytearray(content)
    hurt[begins[5] + 12] ^= 4
    log.write_bytes(bytes(hurt))

    said = bring(uri, "mended", tmp_path)
    assert f"damaged at byte {begins[5]:,}: a record whose checksum is wrong" in said
    assert [step for step, _, _ in points(client, only_run(client, "mended"), "loss")] == [0, 1, 2, 3, 5, 6, 7, 8, 9]

    log.write_bytes(content)
    bring(uri, "mended", tmp_path)
    assert sorted(step for step, _, _ in points(client, only_run(client, "mended"), "loss")) == list(range(10))


def test_a_summary_of_its_own_becomes_a_metric_beside_the_history(uri, client, tmp_path):
    write_log(
        tmp_path, [run_record(), *some_rows(0, 3), summary_record({"loss": 0.01, "auc": {"max": 1}}), exit_record()]
    )

    bring(uri, "", tmp_path)
    run = only_run(client, "p")  # without --experiment: wandb's project

    assert run.data.metrics == {"loss": 1 / 3, "summary.loss": 0.01, "auc.max": 1.0}


def test_a_resumed_run_is_one_run(uri, client, tmp_path):
    write_log(tmp_path, [run_record(config={"lr": 1}), *some_rows(0, 3)])
    later = [run_record(config={"lr": 2, "new": 3}), *some_rows(3, 5), exit_record()]
    write_log(tmp_path, later, name="offline-run-20260102_000000-r1")

    bring(uri, "resumed", tmp_path)
    run = only_run(client, "resumed")

    assert [step for step, _, _ in points(client, run, "loss")] == list(range(5))
    assert run.data.params == {"lr": "1", "new": "3"}


def test_names_that_mlflow_refuses_find_others(uri, client, tmp_path):
    names = ["loss%", "loss_", "a//b", "/x", "..", "../up", "é ü", "k" * 400, "", "a:b", "."]
    values = {name: float(n) for n, name in enumerate(names)}
    record = run_record(project="../../p'q", config=values)
    write_log(tmp_path, [record, row_record(0, values, T0), summary_record(dict.fromkeys(names, "t")), exit_record()])

    bring(uri, "", tmp_path)
    run = only_run(client, ".._.._p_q".replace("..", "__"))

    assert sorted(run.data.metrics.values()) == sorted(values.values())
    assert sorted(map(float, run.data.params.values())) == sorted(values.values())
    assert (run.data.metrics["é ü"], run.data.metrics["a:b"]) == (6.0, 9.0)


def test_names_are_kept_apart_and_short():
    names = Names()

    assert [names(name) for name in ("loss%", "loss_", "loss&", "loss%")] == ["loss_", "loss__2", "loss__3", "loss_"]
    assert names.changed() == {"loss%": "loss_", "loss_": "loss__2", "loss&": "loss__3"}
    assert len(nearest_name("k" * 400)) <= MAX_NAME
    assert nearest_name("k" * 400) != nearest_name("k" * 401)


def test_a_link_of_wandb_is_followed_where_that_is_asked_for_and_a_dead_one_told(uri, client, tmp_path, caplog):
    log = write_log(tmp_path, [run_record(), exit_record()])
    (log.parent / "files" / "sub").mkdir(parents=True)
    (tmp_path / "weights.txt").write_text("w")
    (log.parent / "files" / "sub" / "weights.txt").symlink_to(tmp_path / "weights.txt")
    (log.parent / "files" / "gone.txt").symlink_to(tmp_path / "nowhere")

    bring(uri, "links", tmp_path, follow_links=True)

    assert "sub/weights.txt" in set(artifacts(client, only_run(client, "links")))
    assert "gone.txt leads to a file that is gone" in caplog.text


def test_a_foreign_folder_takes_nothing_along_from_outside_of_it(uri, client, tmp_path):
    """Whoever made it chose where its links lead: a file, wandb's notes, a whole folder, a run of somebody else."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "private.json").write_text('{"os": "secret"}')
    own = write_log(home, [run_record(), exit_record()])
    log = write_log(tmp_path / "foreign", [run_record(), exit_record()])
    files = log.parent / "files"
    (files / "sub").mkdir(parents=True)
    (files / "own.txt").write_text("w")
    (files / "inside.txt").symlink_to("own.txt")
    (files / "sub" / "more\x1b[31m.txt").symlink_to(home / "private.json")
    (files / "wandb-metadata.json").symlink_to(home / "private.json")
    (files / "folder").symlink_to(home)
    (log.parent.parent / "offline-run-2").mkdir()
    (log.parent.parent / "offline-run-2" / "run-2.wandb").symlink_to(own)

    with pytest.raises(TrackingError, match="1 of 2 files could not be read"):
        import_folders([str(tmp_path / "foreign")], uri, "outside", out := io.StringIO(), err := io.StringIO())

    run = only_run(client, "outside")
    assert {"own.txt", "inside.txt"} == {path for path in artifacts(client, run) if not path.startswith("wandb/")}
    assert not any(path.endswith("metadata.json") for path in artifacts(client, run))
    assert "2 files left out: links that lead out of the run's folder (folder, sub/more\\x1b[31m.txt)" in out.getvalue()
    assert "run-2.wandb leads out of" in err.getvalue()
    shutil.rmtree(files)
    files.symlink_to(home)
    told = bring(uri, "outside", log)
    assert "1 files left out: links that lead out of the run's folder (files)" in told
    assert "private.json" not in set(artifacts(client, run))


# What wandb writes about a person and a machine by itself; the keys are those of 0.16 and of 0.31.
WHO = {
    "username": "nele-the-user", "email": "nele@example.org", "host": "neles-laptop", "root": "/home/nele/wandb",
    "program": "/home/nele/train.py", "codePath": "nele/train.py", "codePathLocal": "nele/train.py",
    "executable": "/home/nele/bin/python", "args": ["--owner", "nele"], "docker": "nele/image",
    "git": {"remote": "git@example.org:nele/faces.git", "commit": "c0ffee"}, "disk": {"/home/nele": {"total": 1}},
    "slurm": {"job_user": "nele"}, "writerId": "nele", "os": "Linux-6", "python": "3.11.7", "gpu": "NVIDIA H100",
}  # fmt: skip


def test_who_trained_it_stays_in_wandbs_folder(uri, client, tmp_path):
    """A person's name reaches MLflow only in what the user logged: the account, the host and the folders do not."""
    records = [run_record(entity="nele-entity", host="neles-laptop"), *some_rows(0, 2), exit_record()]
    files = write_log(tmp_path, records).parent / "files"
    (files / "mine").mkdir(parents=True)
    (files / "wandb-metadata.json").write_text(json.dumps(WHO))
    (files / "config.yaml").write_text("_wandb:\n  value:\n    e:\n      x:\n        email: nele@example.org\n")
    (files / "conda-environment.yaml").write_text("prefix: /home/nele/conda\n")
    (files / "mine" / "config.yaml").write_text("width: 3\n")  # the user's own, by wandb's name

    said = bring(uri, "who", tmp_path)
    run = only_run(client, "who")
    all_of_it = str(run.to_dictionary()) + "".join(text_of(client, run, it, tmp_path) for it in artifacts(client, run))

    assert "nele" not in (said + all_of_it).lower().replace(str(tmp_path).lower(), "")
    kept = json.loads(text_of(client, run, "wandb/offline-run-20260101_000000-r1/metadata.json", tmp_path))
    assert kept == {"os": "Linux-6", "python": "3.11.7", "gpu": "NVIDIA H100", "git": {"commit": "c0ffee"}}
    assert "mine/config.yaml" in set(artifacts(client, run))
    assert "nothing new" in bring(uri, "who", tmp_path)


def test_two_entities_runs_of_one_name_stay_two_runs(uri, client, tmp_path):
    for entity in ("nele", "ada"):
        write_log(tmp_path / entity, [run_record(entity=entity), *some_rows(0, 2), exit_record()])
        bring(uri, "two entities", tmp_path / entity)

    assert len(client.search_runs([client.get_experiment_by_name("two entities").experiment_id])) == 2


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"git": null}'])
def test_damaged_metadata_of_wandb_keep_nothing_back(uri, tmp_path, content):
    log = write_log(tmp_path, [run_record(), *some_rows(0, 2), exit_record()])
    (log.parent / "files").mkdir()
    (log.parent / "files" / "wandb-metadata.json").write_text(content)

    assert "2 points" in bring(uri, f"damaged {content!r}", tmp_path)


def test_one_bad_file_keeps_no_other_back(uri, client, tmp_path):
    good = write_log(tmp_path, [run_record(), *some_rows(0, 2), exit_record()])
    bad = tmp_path / "wandb" / "run-bad" / "run-bad.wandb"
    bad.parent.mkdir()
    bad.write_text("hello there")
    err = io.StringIO()

    with pytest.raises(TrackingError, match="1 of 2 files"):
        import_folders([str(tmp_path)], uri, "one bad", io.StringIO(), err)

    assert f"{bad} is no Weights & Biases log" in err.getvalue()
    assert len(points(client, only_run(client, "one bad"), "loss")) == 2
    with pytest.raises(TrackingError, match="begins with b'hell'"):
        import_folders([str(bad)], "sqlite:///not/looked/at.db", "", io.StringIO(), err)
    assert good.exists()


def test_logs_are_found_from_every_folder_around_them(tmp_path):
    folder = shutil.copytree(NEW, tmp_path / "here")
    log = log_of(folder)
    (log.parent.parent / "latest-run").symlink_to(log.parent.name)

    for path in (folder, folder / "wandb", log.parent, log, log.parent.parent / "latest-run"):
        assert find_logs([path]) == ([log.resolve()], [])
    assert find_logs([folder, log]) == ([log.resolve()], [])
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "empty", "holds no .wandb file"), (tmp_path / "no", "does not exist")):
        with pytest.raises(TrackingError, match=words):
            find_logs([path])


def test_a_deleted_experiment_is_one_line(uri, client, tmp_path):
    write_log(tmp_path, [run_record(), exit_record()])
    client.delete_experiment(client.create_experiment("thrown away"))

    with pytest.raises(TrackingError, match=r"'thrown away' of .* was deleted; bring it back"):
        bring(uri, "thrown away", tmp_path)


def resumed_rows(first, last):
    return [row_record(step, {"loss": 100.0 + step}, T0 + 1000 + step) for step in range(first, last)]


def write_resumed(folder):
    """A run of steps 0 to 5 that was resumed at step 3 and went on to 8, as wandb offline leaves it."""
    first = [run_record(), *some_rows(0, 6), summary_record({"loss": 0.5, "best": 3}), exit_record(1)]
    later = [run_record(seconds=1_700_001_000), *resumed_rows(3, 9), exit_record()]
    one = write_log(folder, first, name="run-20260102_000000-r1")  # by its name it would come last
    return one, write_log(folder, later, name="offline-run-20260103_000000-r1")


ONE_CURVE = [(step, 1 / (step + 1)) for step in range(3)] + [(step, 100.0 + step) for step in range(3, 9)]


def curve(client, experiment):
    return [(step, value) for step, value, _ in points(client, only_run(client, experiment), "loss")]


def test_a_resumed_run_is_one_curve(uri, client, tmp_path):
    """Two values at one step would be a line that goes back: the later one wins, as in wandb, and that is told."""
    write_resumed(tmp_path)
    said = bring(uri, "one curve", tmp_path)
    assert curve(client, "one curve") == ONE_CURVE
    assert only_run(client, "one curve").data.metrics["best"] == 3.0
    assert "3 points are left out: the run was resumed, and has later values at their steps" in said
    before = everything(client, "one curve")
    assert "points are left out" not in bring(uri, "one curve", tmp_path)
    assert everything(client, "one curve") == before


def test_a_run_that_is_resumed_after_its_import_is_imported_afresh(uri, client, tmp_path):
    one, _ = write_resumed(tmp_path)
    bring(uri, "afresh", one.parent)
    former = only_run(client, "afresh").info.run_id
    said = bring(uri, "afresh", tmp_path)
    assert curve(client, "afresh") == ONE_CURVE
    assert "imported afresh, for the run was resumed and its later values win" in said
    assert client.get_run(former).info.lifecycle_stage == "deleted"
    assert former in said
    assert "imported afresh" not in bring(uri, "afresh", tmp_path)


def test_a_later_part_that_is_imported_by_itself_is_told(uri, client, tmp_path):
    one, later = write_resumed(tmp_path)
    bring(uri, "doubled", one.parent)
    said = bring(uri, "doubled", later.parent)
    assert "3 points stand beside others of the same step" in said
    assert "import all folders of the run together for one curve" in said
    assert len(curve(client, "doubled")) == 12
    bring(uri, "doubled", tmp_path)
    assert curve(client, "doubled") == ONE_CURVE


def test_a_copy_of_a_log_replaces_nothing(uri, client, tmp_path):
    for name in ("a", "b"):
        write_log(tmp_path / name, [run_record(), *some_rows(0, 4), exit_record()])
    bring(uri, "copies", tmp_path / "a", tmp_path / "b")
    assert [step for step, _ in curve(client, "copies")] == list(range(4))
