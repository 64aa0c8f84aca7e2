"""What a site makes of a received model, and of what a run asked before: its own record decides, and no server."""

import dataclasses
import json
import time

import numpy as np
import pytest

from clients.past_tasks import BACK, FOLDER, PastTasks, prune_runs
from clients.policy import DEFAULT, PolicyRefusal
from clients.received_model import LAST, ModelWatch, coding_loss
from common.protocol.codec import decode, encode
from common.protocol.wire import Task
from tests.tiny_federation import MANIFEST, settings_with
from tests.tiny_settings import changed

SETTINGS = changed(settings_with(), federation__rounds=10)
FIRST = np.linspace(-1.0, 1.0, MANIFEST.size, dtype=np.float32)
NAMES = frozenset(entry.name for entry in MANIFEST.entries)


def record_in(folder, run_id="run-1", **policy):
    return PastTasks.of(folder, run_id, dataclasses.replace(DEFAULT, **policy))


def watch_over(record, settings=SETTINGS, first=FIRST):
    return ModelWatch(record, settings, MANIFEST, lambda: first, NAMES)


def task(server_round, kind="train"):
    return Task(kind=kind, run_id="run-1", server_round=server_round, settings="")


def refused(limit):
    return pytest.raises(PolicyRefusal, match=rf"\({limit}\)\.$")


# ---- a model


def test_the_first_model_is_the_one_that_the_seed_gives(tmp_path):
    watch_over(record_in(tmp_path)).admit(task(1), FIRST.copy())
    rounded = FIRST * np.float32(1 + 1e-6)  # another processor's last bits
    watch_over(record_in(tmp_path / "b")).admit(task(1), rounded)
    for model in (np.roll(FIRST, 1), FIRST * np.float32(1.001), np.full_like(FIRST, np.nan)):
        with refused("first_model"):
            watch_over(record_in(tmp_path / "c")).admit(task(1), model)
    watch_over(record_in(tmp_path / "d", first_model=False)).admit(task(1), np.roll(FIRST, 1))


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_the_first_model_may_be_coded(tmp_path, codec):
    settings = changed(SETTINGS, federation__download_codec=codec)
    watch_over(record_in(tmp_path), settings).admit(task(1), decode(encode(FIRST, codec)))
    with refused("first_model"):
        watch_over(record_in(tmp_path / "b"), settings).admit(task(1), np.roll(FIRST, 1))


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_what_a_codec_loses_is_bounded(codec):
    values = np.random.default_rng(1).normal(size=2000).astype(np.float32)
    lost = np.abs(values - decode(encode(values, codec)))
    assert bool((lost <= coding_loss(values, codec) * 1.02).all())
    assert coding_loss(values, "float32") is None


def test_given_weights_must_be_named_by_their_digest(tmp_path):
    settings = changed(SETTINGS, model__pretrained="weights.safetensors")
    with refused("pretrained"):
        watch_over(record_in(tmp_path), settings).admit(task(1), FIRST)
    digest = record_with_model(tmp_path / "b").models
    watch_over(record_in(tmp_path / "c", pretrained=tuple(digest)), settings).admit(task(1), FIRST)


def record_with_model(folder, change=0.01, **policy):
    record = record_in(folder, **policy)
    watch = watch_over(record)
    watch.admit(task(1), FIRST)
    watch.trained(np.full_like(FIRST, change))
    return record


def test_a_later_model_may_move_as_far_as_training_does(tmp_path):
    record = record_with_model(tmp_path, max_move=20.0, max_relative_move=0.0)
    watch = watch_over(record)
    watch.admit(task(2), FIRST + np.float32(0.19))
    with pytest.raises(PolicyRefusal) as jump:
        watch.admit(task(3), FIRST + np.float32(0.19 + 0.21))
    assert jump.value.against.limit == "max_move"
    assert jump.value.against.asked.startswith("backbone.b moved 21 x what training moved it")
    assert "21" not in str(jump.value)


def test_of_a_missed_round_more_is_allowed_and_a_known_model_is_never_refused(tmp_path):
    record = record_with_model(tmp_path, max_move=20.0, max_relative_move=0.0)
    watch = watch_over(record)
    with refused("max_move"):
        watch.admit(task(2), FIRST + np.float32(0.5))
    watch.admit(task(4), FIRST + np.float32(0.5))  # three rounds later
    watch.admit(task(1), FIRST)  # a server that went back


def test_an_adaptive_step_may_move_what_training_hardly_did(tmp_path):
    settings = changed(SETTINGS, federation__strategy="fedadam")
    record = record_with_model(tmp_path, change=1e-6, max_relative_move=0.0)
    watch_over(record, settings).admit(task(2), FIRST + np.float32(0.02))
    with refused("max_move"):
        watch_over(record, settings).admit(task(3), FIRST + np.float32(0.2))


def test_another_site_may_move_a_weight_far_but_not_replace_it(tmp_path):
    record = record_with_model(tmp_path, change=1e-6)
    watch_over(record).admit(task(2), FIRST * np.float32(1.8))
    with refused("max_move"):
        watch_over(record).admit(task(3), -FIRST)


def test_a_run_that_has_begun_is_joined_where_the_policy_says_so(tmp_path):
    watch_over(record_in(tmp_path)).admit(task(5), np.roll(FIRST, 1))
    with refused("late_entry"):
        watch_over(record_in(tmp_path / "b", late_entry=False)).admit(task(5), np.roll(FIRST, 1))


def test_distinct_models_are_limited_and_the_same_bits_are_not_counted_again(tmp_path):
    record = record_in(tmp_path, max_extra_models=1)
    for number in range(11):  # ten rounds, and the untrained
        record.take_model(f"{number:064x}", number, 10)
        record.take_model(f"{number:064x}", number, 10)
    with refused("max_extra_models"):
        record.take_model("f" * 64, 10, 10)


def test_a_second_model_of_a_round_is_one_that_a_killed_server_repeats_or_refused(tmp_path):
    record = record_in(tmp_path)
    for server_round in range(1, 7):
        record.take("train", server_round, SETTINGS)
        record.take_model(f"model-{server_round - 1}", server_round - 1, 10)
    record.take_model("another", 5 - BACK, 10)  # made anew, with other members
    record.take_model("model-1", 1, 10)  # the best of all, once more
    with refused("max_extra_models"):
        record.take_model("a third", 4 - BACK, 10)
    record.take_model("model-1", 1, 10)


def test_an_old_rounds_model_that_never_came_here_may_come_late(tmp_path):
    record = record_in(tmp_path)  # of a client that was drawn for the last round only
    record.take("train", 9, SETTINGS)
    record.take_model("model-8", 8, 10)
    record.take_model("best", 2, 10)
    with refused("max_extra_models"):
        record.take_model("another best", 2, 10)


def test_models_of_a_day_are_limited_over_all_runs(tmp_path):
    for number in range(3):
        record = record_in(tmp_path, f"run-{number}", max_models_a_day=5)
        record.take("train", 1, SETTINGS)
        for model in range(2 if number < 2 else 1):
            record.take_model(f"{number}{model}", 0, 10)
        record.save()
    with refused("max_models_a_day"):
        record.take_model("more", 0, 10)


# ---- a run


def test_a_record_survives_and_a_damaged_one_is_begun_anew(tmp_path):
    record = record_with_model(tmp_path)
    record.take("train", 1, SETTINGS)
    record.save()
    again = record_in(tmp_path)
    assert (again.num_tasks, again.models, again.moved) == (1, record.models, record.moved)
    record.path.write_text('{"num_ta')
    assert record_in(tmp_path).num_tasks == 0


def test_a_run_keeps_its_settings_but_for_where_it_is_kept(tmp_path):
    record = record_in(tmp_path)
    record.take("join", 0, SETTINGS)
    record.take("train", 1, changed(SETTINGS, run__out="elsewhere", tracking__plots="final"))
    with refused("max_runs_a_day"):
        record.take("train", 2, changed(SETTINGS, data__max_people=7))


def test_rounds_go_up_but_for_those_that_a_killed_server_repeats(tmp_path):
    record = record_in(tmp_path)
    record.take("train", 6, SETTINGS)
    record.take("train", 6 - BACK, SETTINGS)
    with refused("max_rounds"):
        record.take("train", 6 - BACK - 1, SETTINGS)


def test_quotas_of_a_run_and_of_a_day(tmp_path):
    record = record_in(tmp_path, max_tasks_a_run=2)
    record.take("join", 0, SETTINGS)
    record.take("train", 1, SETTINGS)
    with refused("max_tasks_a_run"):
        record.take("train", 1, SETTINGS)
    record.save()
    with refused("max_runs_a_day"):
        record_in(tmp_path, "run-2", max_runs_a_day=1).take("join", 0, SETTINGS)
    with refused("max_data_choices_a_day"):
        other = changed(SETTINGS, data__max_people=7)
        record_in(tmp_path, "run-2", max_data_choices_a_day=1).take("join", 0, other)
    record_in(tmp_path, "run-2", max_data_choices_a_day=1).take("join", 0, SETTINGS)


def test_what_was_asked_yesterday_is_not_counted_today(tmp_path):
    record = record_in(tmp_path)
    record.take("join", 0, SETTINGS)
    record.began = time.time() - 90_000
    record.save()
    record_in(tmp_path, "run-2", max_runs_a_day=1).take("join", 0, SETTINGS)


def test_cpu_and_disk_of_a_run_are_limited(tmp_path):
    record = record_in(tmp_path, max_cpu_hours_a_run=1.0, max_disk_gb_a_run=1e-6)
    record.cpu_seconds = 3601.0
    with refused("max_cpu_hours_a_run"):
        record.take("train", 1, SETTINGS)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "big").write_bytes(bytes(2000))
    with refused("max_disk_gb_a_run"):
        record.require_disk(tmp_path / "private")


def test_after_so_many_refusals_a_run_is_over(tmp_path):
    record = record_in(tmp_path, max_refusals=2)
    record.num_refusals = 2
    with refused("max_refusals"):
        record.take("train", 1, SETTINGS)


def test_private_states_of_older_runs_go_and_the_newest_stay(tmp_path):
    for number in range(4):
        folder = tmp_path / "private" / f"run-{number}"
        folder.mkdir(parents=True)
        (tmp_path / FOLDER / f"run-{number}").mkdir(parents=True)
        (tmp_path / FOLDER / f"run-{number}" / LAST).write_bytes(b"x")
        (tmp_path / FOLDER / f"run-{number}.json").write_text(json.dumps({"began": 0.0}))
    prune_runs(tmp_path, "run-3", 2)
    assert len(list((tmp_path / "private").iterdir())) == 2
    assert (tmp_path / "private" / "run-3").is_dir()
    assert [path.name for path in sorted((tmp_path / FOLDER).iterdir())] == [
        "run-0.json", "run-1.json", "run-2.json", "run-3", "run-3.json",
    ]  # fmt: skip
