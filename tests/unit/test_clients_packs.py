"""Packs that runs had made at a site: how many stay, which go, and that nobody's own are touched."""

import dataclasses

import pytest

from clients.message_handler import answer
from clients.packs import open_site_pack, prune_packs
from common import config
from common.faces.pack_store import MANIFEST, locked_by_nobody
from common.protocol import wire
from common.protocol.wire import Task
from tests.tiny_federation import site_settings, tiny_pack
from tests.tiny_settings import TINY, changed

PACK = tiny_pack("alpha")


def key_for(size):
    return f"{size:064x}"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site that keeps two packs; a pack is a folder with a manifest."""

    def made(_dataset, _root, data, cache_dir, **_options):
        key = key_for(data.image_size)
        (cache_dir / key).mkdir(parents=True, exist_ok=True)
        (cache_dir / key / MANIFEST).write_text("{}")
        return dataclasses.replace(PACK, key=key)

    monkeypatch.setattr("clients.packs.open_pack", made)
    plain = site_settings("alpha", tmp_path)
    return dataclasses.replace(plain, policy=dataclasses.replace(plain.policy, keep_packs=2))


def opened(site, *sizes):
    for size in sizes:
        open_site_pack(site, dataclasses.replace(TINY.data, image_size=size))
        prune_packs(site)


def kept(site):
    return sorted(int(path.name, 16) for path in site.cache_dir.iterdir() if path.is_dir())


def test_the_packs_that_were_used_last_stay_and_the_others_are_told(site, caplog):
    with caplog.at_level("INFO", logger="facefed.client"):
        opened(site, 32, 48, 64)
    assert kept(site) == [48, 64]
    assert f"the pack {key_for(32)[:12]}, which an earlier run had made, is removed: 2 bytes" in caplog.text
    assert "(keep_packs = 2)" in caplog.text
    opened(site, 48, 96)  # 48 is used again, so 64 is the oldest
    assert kept(site) == [48, 96]


def test_a_pack_that_was_there_before_any_run_is_never_removed(site):
    (site.cache_dir / key_for(32)).mkdir(parents=True)
    opened(site, 32, 48, 64, 96)
    assert kept(site) == [32, 64, 96]


def test_a_pack_that_somebody_packs_stays(site):
    opened(site, 32, 48)
    with locked_by_nobody(site.cache_dir, key_for(32)):
        opened(site, 64)
        assert kept(site) == [32, 48, 64]
    prune_packs(site)
    assert kept(site) == [48, 64]


def test_a_record_that_was_cut_removes_nothing(site):
    opened(site, 32, 48)
    (site.state_dir / "packs.json").write_text('{"')
    opened(site, 64)
    assert kept(site) == [32, 48, 64]


def test_joins_that_are_refused_for_their_data_fill_no_disk(site):
    """The policy sees how many pictures there are only when they are packed."""
    demanding = dataclasses.replace(site, policy=dataclasses.replace(site.policy, min_training_people=10))
    for number, size in enumerate((32, 48, 64, 96)):
        settings = changed(TINY, data__image_size=size)
        task = Task(kind="join", run_id=f"run-{number}", server_round=0, settings=config.to_json(settings))
        assert "data (min_training_people)" in answer(demanding, wire.task_content(task, None))
    assert kept(site) == [64, 96]
