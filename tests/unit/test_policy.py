"""A site's policy: the file and its mistakes, what it says of a run and of a task, and what of a refusal leaves."""

import dataclasses
import json
from pathlib import Path

import pytest

from clients.flower.trainer import site_from_json, site_to_json
from clients.policy import (
    DEFAULT,
    OWN_MACHINE,
    Against,
    Policy,
    PolicyRefusal,
    TaskWords,
    against_data,
    against_scores,
    against_settings,
    against_share,
    against_task,
    digest_of,
    read_policy,
    require_none,
    require_room,
    rows,
)
from common import config
from common.errors import ConfigError, UserError
from common.protocol.refusals import refused_setting
from common.settings import CODECS, Settings
from common.strategies import STRATEGIES
from common.training.gradient_shares import Share
from tests.tiny_federation import site_settings
from tests.tiny_settings import changed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*.toml") if "[sweep]" not in path.read_text())


def limits_against(policy=DEFAULT, **values):
    return [one.limit for one in against_settings(policy, changed(Settings(), **values))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_built_in_policy_fits_every_shipped_configuration(path, strategy):
    settings = config.load(path)
    for codec in CODECS:
        values = {"federation__strategy": strategy, "federation__upload_codec": codec}
        assert against_settings(DEFAULT, changed(settings, **values, federation__download_codec=codec)) == []


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"training__lr": 20.0}, "max_lr"),
        ({"training__clip_norm": 1e6}, "max_clip_norm"),
        ({"training__batch_size": 2}, "min_batch_size"),
        ({"training__head_warmup_epochs": 51}, "max_head_warmup_epochs"),
        ({"training__threads": 100_000}, "max_threads"),
        ({"federation__local_epochs": 10**9}, "max_local_epochs"),
        (
            {"federation__local_epochs": "off", "federation__local_steps": 2, "training__batch_size": 8},
            "min_training_pictures",
        ),
        ({"federation__rounds": 501}, "max_rounds"),
        ({"federation__server_lr": 1e6}, "max_server_lr"),
        ({"data__image_size": 512}, "max_image_size"),
        ({"model__backbone": "vit_tiny", "data__image_size": 64, "model__patch_size": 64}, "max_patch_fraction"),
        ({"model__pretrained": "imagenet"}, "pretrained"),
    ],
)
def test_what_was_used_in_attacks_stands_against_the_built_in_policy(values, limit):
    assert limits_against(**values) == [limit]


@pytest.mark.parametrize(
    ("policy", "values", "limit"),
    [
        ({"backbones": ("cnn",)}, {}, "backbones"),
        ({"heads": ("softmax",)}, {}, "heads"),
        ({"strategies": ("fedprox",)}, {}, "strategies"),
        ({"codecs": ("int8",), "max_rounds": 500}, {"federation__upload_codec": "int8"}, "codecs"),
        ({"losses": ("head",)}, {"training__triplet": 0.5}, "losses"),
        ({"normalisations": ("private",)}, {}, "normalisations"),
        ({"require_dp": True}, {}, "require_dp"),
        ({"require_secagg": True}, {}, "require_secagg"),
    ],
)
def test_what_a_site_does_not_list_it_does_not_do(policy, values, limit):
    assert limits_against(dataclasses.replace(DEFAULT, **policy), **values) == [limit]


WORDS = TaskWords(
    server_round=1, best_round=0, splits="val test", precision="float32", memory_format="contiguous", threads=2
)


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        ({}, None),
        ({"server_round": -5}, "round"),
        ({"server_round": 2**62}, "round"),
        ({"server_round": 0}, "round"),
        ({"best_round": 99}, "best_round"),
        ({"splits": "test " * 2000}, "splits"),
        ({"precision": "float7"}, "precision"),
        ({"memory_format": "x"}, "memory_format"),
        ({"threads": 100_000}, "threads"),
        ({"threads": 0}, "threads"),
    ],
)
def test_a_task_has_ranges(words, setting):
    found = against_task(DEFAULT, Settings(), "train", WORDS._replace(**words))
    assert [one.setting for one in found] == ([setting] if setting else [])


def test_a_refusal_says_the_setting_and_no_number():
    settings = changed(Settings(), training__lr=20.0)
    with pytest.raises(PolicyRefusal) as refusal:
        require_none(against_settings(DEFAULT, settings))
    assert str(refusal.value) == "this site's policy does not allow it: training.lr (max_lr)."
    assert refused_setting(f"alpha: {refusal.value}") == "training.lr"
    assert refused_setting("alpha: its data cannot be used") is None
    [few] = against_data(DEFAULT, num_people=4, num_pictures=7)
    with pytest.raises(PolicyRefusal) as refusal:
        require_none([few])
    assert "7" not in str(refusal.value)


def test_few_people_pictures_and_pairs_are_too_few():
    assert against_data(DEFAULT, num_people=4, num_pictures=20) == []
    found = against_data(DEFAULT, num_people=3, num_pictures=19)
    assert [one.limit for one in found] == ["min_training_people", "min_training_pictures"]
    assert against_scores(DEFAULT, 20, 20) == []
    assert against_scores(DEFAULT, 19, 20) == [Against("genuine pairs", "min_pairs", "19", "20 or more")]


# ---- the file


def written(folder, text):
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_changes_what_it_names_and_its_digest(tmp_path):
    read = read_policy(written(tmp_path, 'max_lr = 1\nbackbones = ["cnn", "resnet18"]\nscores = "noisy"\n'))
    assert (read.max_lr, read.backbones, read.scores) == (1.0, ("cnn", "resnet18"), "noisy")
    assert read.max_rounds == DEFAULT.max_rounds
    assert digest_of(read) != digest_of(DEFAULT) == digest_of(read_policy(written(tmp_path, "max_lr = 1.0")))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("max_lrr = 1", "did you mean 'max_lr'?"),
        ('max_lr = "1"', 'max_lr = "1" has the wrong type; write a number'),
        ("max_lr = true", "has the wrong type"),
        ("max_rounds = 2.5", "write a whole number"),
        ("max_lr = 0", "must be greater than 0"),
        ("max_lr = nan", "is not finite"),
        ("min_batch_size = 1", "must be at least 2"),
        ("max_image_size = 4096", "must be at most 512"),
        ('heads = ["hat"]', "choices: "),
        ("heads = []", "heads is empty"),
        ('scores = "fuzzy"', "scores = 'fuzzy' is unknown"),
        ("confusion = 1", "true or false"),
        ("min_training_people = 30", "min_training_pictures = 20 is less than min_training_people = 30"),
        ('losses = ["triplet"]', 'losses has no "head"'),
        ("max_lr = 1\nmax_lr = 2", "is no TOML"),
        ("max_rounds = 1\nmax_local_epochs = 1\nmax_image_size = 32", "refuses every configuration that FaceFed has"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, text, fragment):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_policy(path)
    assert fragment in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_policy(tmp_path / "nowhere.toml")


def test_a_site_with_less_than_every_run_must_have_is_told_at_the_door():
    require_room(DEFAULT, None, num_people=6, num_pictures=40)
    policy = dataclasses.replace(DEFAULT, min_batch_size=500)
    with pytest.raises(UserError, match="min_batch_size = 500 is more than the 40 that this site has"):
        require_room(policy, Path("site.toml"), num_people=6, num_pictures=40)


def test_every_limit_has_a_reason_and_what_is_shown_can_be_read_again(tmp_path):
    shown = list(rows(DEFAULT))
    assert [row[0] for row in shown] == [field.name for field in dataclasses.fields(Policy)]
    assert all(why.strip() for *_, why in shown)
    text = "\n".join(f"{name} = {value}  # {why}" for name, value, _, why in shown)
    assert read_policy(written(tmp_path, text)) == DEFAULT


def test_the_trainer_gets_the_whole_policy(tmp_path):
    site = dataclasses.replace(site_settings("alpha", tmp_path), policy=OWN_MACHINE)
    assert site_from_json(site_to_json(site)) == site
    assert "policy" in json.loads(site_to_json(site))


def test_one_persons_share_of_a_gradient_is_limited_and_its_words_stay_here():
    share = Share("trunk.blocks.0.1", 7, 0.98, even=0.1, num_people=20, num_pictures=200)
    [against] = against_share(DEFAULT, share)
    assert (against.setting, against.limit, against.allowed) == ("model", "max_person_share", "0.60")
    assert against.asked == "0.98 of the gradient of unit 7 of backbone.trunk.blocks.0.1 is one person's"
    assert "0.98" not in str(PolicyRefusal(against))
    assert against_share(DEFAULT, dataclasses.replace(share, share=0.49)) == []
    assert against_share(DEFAULT, None) == []
