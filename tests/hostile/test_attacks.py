"""Attacks of a hostile server against a site's own code: each gets something without a policy, and nothing with it.

They are those of `facefed privacy attack`, played against the client's own message handler.
"""

import dataclasses

import pytest

from clients.policy import DEFAULT
from common.faces.pack import open_pack
from common.system.runtime import use_threads
from common.training.evaluation import people_digest
from simulation.admin.attacks import ATTACKS, VARIANTS, play
from simulation.data.synthetic import SynthSettings, write_dataset
from tests.tiny_federation import site_settings
from tests.tiny_settings import TINY


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """What each attack got of twelve people with eight pictures, by its name."""
    use_threads(1)
    folder = tmp_path_factory.mktemp("site")
    write_dataset(SynthSettings(layout="vggface2", num_people=12, pictures_per_person=8), folder / "data")
    site = site_settings("alpha", folder)
    site = dataclasses.replace(site, dataset="vggface2", data_dir=folder / "data", policy=DEFAULT)
    pack = open_pack(site.dataset, site.data_dir, TINY.data, site.cache_dir, workers=1)
    found = {one.attack.name: one for one in play(ATTACKS, site, TINY, pack)}
    assert people_digest(pack, "test")  # what the dictionary is compared with
    return found


def test_every_attack_is_played(played):
    assert list(played) == [attack.name for attack in ATTACKS]


@pytest.mark.parametrize(
    ("name", "without", "refused"),
    [
        ("crafted first model", VARIANTS, "model"),
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
