"""Attacks of a hostile server against a site's own code: each gets something without a policy, and nothing with it.

They are those of `facefed privacy attack`, played against the client's own message handler.
"""

import dataclasses

import numpy as np
import pytest

from clients.policy import DEFAULT
from common import config
from common.faces.pack import open_pack
from common.system.runtime import use_threads
from common.training.evaluation import people_digest
from simulation.admin import imprint
from simulation.admin.attacks import ATTACKS, OPEN, VARIANTS, Hostile, drifted, imprinted, play
from simulation.data.synthetic import SynthSettings, write_dataset
from tests.tiny_federation import site_settings
from tests.tiny_settings import TINY

VARIANTS_OF_THE_IMPRINT = 100


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site of twelve people with eight pictures."""
    use_threads(1)
    folder = tmp_path_factory.mktemp("site")
    write_dataset(SynthSettings(layout="vggface2", num_people=12, pictures_per_person=8), folder / "data")
    made = site_settings("alpha", folder)
    return dataclasses.replace(made, dataset="vggface2", data_dir=folder / "data", policy=DEFAULT)


@pytest.fixture(scope="module")
def pack(site):
    return open_pack(site.dataset, site.data_dir, TINY.data, site.cache_dir, workers=1)


@pytest.fixture(scope="module")
def played(site, pack):
    """What each attack got, by its name."""
    found = {one.attack.name: one for one in play(ATTACKS, site, TINY, pack)}
    assert people_digest(pack, "test")  # what the dictionary is compared with
    return found


def test_every_attack_is_played(played):
    assert list(played) == [attack.name for attack in ATTACKS]


@pytest.mark.parametrize(
    ("name", "without", "refused"),
    [
        ("crafted first model", VARIANTS, "model"),
        ("imprint from one reply", 20, "model.patch_size"),
        ("learning rate of 20", 1, "training.lr"),
        ("update of a few pictures", 12, "data"),
        ("another model in mid-run", 1, "model"),
        ("scores of single pairs", 50, "data"),
    ],
)
def test_an_attack_succeeds_without_a_policy_and_gets_nothing_with_it(played, name, without, refused):
    one = played[name]
    assert one.without >= without
    assert one.within == 0
    assert list(one.refused) == [refused]


def test_a_drift_within_the_limits_of_each_round_is_found_before_it_reads_a_picture(played, site, pack, tmp_path):
    one = played["slow drift to an imprint"]
    assert one.without >= 20
    assert one.within == 0
    assert list(one.refused) == ["model", "run"]  # and after so many refusals the run is over
    one_patch = dataclasses.replace(DEFAULT, max_patch_fraction=1.0)  # what the built-in policy never lets pass
    server = Hostile(site=dataclasses.replace(site, state_dir=tmp_path, policy=one_patch), settings=TINY, pack=pack)
    assert drifted(server) == 0
    assert "run" in server.refusals


def test_a_probe_by_scores_gets_no_more_models_scored_than_a_run_has(played):
    one = played["pixel probing by scores"]
    assert one.within == DEFAULT.max_extra_models < one.without
    assert list(one.refused) == ["model", "run"]  # and after so many refusals the run is over


def test_a_right_guess_of_the_names_confirms_no_digest(played):
    assert played["names by dictionary"].within == 0


def test_no_endless_or_impossible_task_is_begun(played):
    one = played["endless or impossible tasks"]
    assert one.within == 0
    assert set(one.refused) == {"federation.local_epochs", "round", "splits", "threads"}


def server_of(site, pack, tmp_path, **policy):
    """A hostile server of a site that allows anything but what these limits say."""
    own = dataclasses.replace(site, state_dir=tmp_path, policy=dataclasses.replace(OPEN, **policy))
    return Hostile(site=own, settings=TINY, pack=pack)


@pytest.mark.parametrize(
    ("policy", "setting", "limit"),
    [
        ({"max_patch_fraction": DEFAULT.max_patch_fraction}, "model.patch_size", "max_patch_fraction"),
        ({"first_model": True}, "model", "first_model"),
        ({"max_person_share": DEFAULT.max_person_share}, "model", "max_person_share"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_of_these_limits_alone_stops_the_imprint(site, pack, tmp_path, caplog, policy, setting, limit):
    server = server_of(site, pack, tmp_path, **policy)
    assert imprinted(server) == 0.0
    assert server.refusals == [setting]
    assert f"({limit})" in caplog.text


def test_thresholds_that_several_people_pass_are_not_seen_as_one_persons(site, pack, tmp_path):
    """What the share of a gradient does not find, as docs/SECURITY.md says: pictures are differences of units."""
    server = server_of(site, pack, tmp_path, max_person_share=DEFAULT.max_person_share)
    assert imprinted(server, brightest=-0.1) > 0.0
    assert not server.refusals


def test_of_a_hundred_variants_of_the_imprint_none_is_answered(site, pack, tmp_path):
    """Other scales and patches, each in a run of its own, of settings that the built-in policy allows or not."""
    own = dataclasses.replace(site, state_dir=tmp_path)
    random = np.random.default_rng(1)
    runs = [config.with_values(TINY, imprint.SETTINGS | {"model.patch_size": patch}) for patch in (32, 16, 8)]
    models = [imprint.crafted(settings)[0] for settings in runs]
    for number in range(VARIANTS_OF_THE_IMPRINT):
        settings, model = runs[number % 3], models[number % 3] * np.float32(10.0 ** random.uniform(-2, 1))
        server = Hostile(site=own, settings=settings, pack=pack, asked=number)
        assert server.ask("train", model, settings=settings) is None
        assert server.refusals[0] in {"model.patch_size", "model"}
