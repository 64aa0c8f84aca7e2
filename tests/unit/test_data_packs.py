"""`facefed data packs list|remove`, and `prepare --verify`."""

import io
import os
import shutil
from pathlib import Path

import pytest
from faces_on_disk import SMALL, in_cache, make_folder, opened, people_in

from common.errors import UserError
from common.faces import pack as pack_module
from common.faces import reopen, shards
from common.faces.pack import load_pack, open_pack
from common.faces.pack_store import locked
from simulation.cli import main
from simulation.data.packs import list_packs, remove_packs, size_words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return people_in(tmp_path)


def listed(cache: Path) -> str:
    out = io.StringIO()
    assert list_packs(cache, out) == 0
    return out.getvalue()


def test_the_list_says_what_each_is_and_how_large(folder: Path) -> None:
    cache = folder.parent / "cache"
    first = opened(folder)
    (folder / "p00" / "000.jpg").unlink()
    second = opened(folder)
    old = cache / ("ab" * 32)
    old.mkdir()
    (old / "pictures.npy").write_bytes(bytes(12_345_678))
    with pytest.raises(KeyboardInterrupt):
        _interrupted(folder)
    text = listed(cache)
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert f"folder, 32 px, resize, raw  {folder}" in rows[first.key[:12]]
    assert " 72  " in rows[first.key[:12]]
    assert " 71  " in rows[second.key[:12]]
    assert "225.7 kB" in rows[second.key[:12]], "the shard is shared by both"
    assert "12.3 MB" in rows["ab" * 6]
    assert "of an earlier version" in rows["ab" * 6]
    assert "unfinished" in text
    assert "1 of an earlier version are not used any more (12.3 MB)" in text


def _interrupted(folder: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    other = make_folder(folder.parent / "other", {f"q{i}": 3 for i in range(8)})
    open_pack("folder", other, SMALL, folder.parent / "cache", workers=1, progress=stop)


def test_removing_one_leaves_the_others_whole(folder: Path) -> None:
    cache = folder.parent / "cache"
    first = opened(folder)
    (folder / "p00" / "000.jpg").unlink()
    second = opened(folder)
    out = io.StringIO()
    assert remove_packs(cache, [first.key[:8]], out, earlier=False) == 0
    assert out.getvalue().startswith(f"removed {first.key[:12]} (folder, 32 px, resize, raw): ")
    assert in_cache(folder) == {second.key}
    assert len(load_pack(cache / second.key).pictures[:]) == 71


def test_earlier_removes_those_of_earlier_versions_only(folder: Path) -> None:
    cache = folder.parent / "cache"
    kept = opened(folder)
    (cache / ("ab" * 32)).mkdir()
    (cache / "trials.json").write_text("{}")
    (cache / "notes").mkdir()
    assert remove_packs(cache, [], io.StringIO(), earlier=True) == 0
    assert {path.name for path in cache.iterdir() if path.name[0] != "."} == {kept.key, "trials.json", "notes"}


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["ffff0000"], "ffff0000: no pack in .* is called so .*; there: [0-9a-f]{12}"),
        (["abab"], "abab: 2 packs begin so; give more of the name"),
        (["ab"], "ab: no pack in .* is called so .of its name 4 characters at least"),
        ([], "name the packs to remove, .* or give --earlier"),
    ],
)
def test_what_cannot_be_removed_is_one_line_and_nothing_goes(folder: Path, names: list[str], line: str) -> None:
    key = opened(folder).key
    cache = folder.parent / "cache"
    for end in ("00", "11"):
        (cache / ("ab" * 31 + end)).mkdir()
    with pytest.raises(UserError, match=line):
        remove_packs(cache, [key, *names] if names else [], io.StringIO(), earlier=False)
    assert len(in_cache(folder)) == 3


def test_a_pack_in_the_making_is_not_removed(folder: Path) -> None:
    key = opened(folder).key
    cache = folder.parent / "cache"
    with locked(cache, key), pytest.raises(UserError, match="is being packed by another program"):
        remove_packs(cache, [key], io.StringIO(), earlier=False)
    assert in_cache(folder) == {key}


def test_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = folder.parent / "cache"
    key = opened(folder).key
    assert main(["data", "packs", "list", "--cache-dir", str(cache)]) == 0
    assert key[:12] in capsys.readouterr().out
    assert main(["data", "packs", "remove", "nope", "--cache-dir", str(cache)]) == 2
    assert "no pack in" in capsys.readouterr().err
    assert main(["data", "packs", "remove", key[:12], "--cache-dir", str(cache)]) == 0
    assert "are free again" in capsys.readouterr().out
    assert main(["data", "packs", "list", "--cache-dir", str(cache)]) == 0
    assert "no packs" in capsys.readouterr().out
    assert main(["data", "packs", "list", "--cache-dir", str(cache / "none")]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["data", "packs", "remove", "--help"])
    assert ended.value.code == 0


def test_sizes_in_words() -> None:
    assert [size_words(n) for n in (12, 1500, 2_345_678, 124_600_000_000)] == [
        "12 bytes",
        "1.5 kB",
        "2.3 MB",
        "124.6 GB",
    ]


def test_verify_reads_every_byte_and_packs_what_is_damaged_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte between the blocks that an opening reads of a large shard, which are made small here."""
    monkeypatch.setattr(shards, "_BLOCK", 16)
    whole = opened(folder)
    content = whole.pictures[:]
    file = folder.parent / "cache" / whole.key / "00000.pictures"
    payload = bytearray(file.read_bytes())
    payload[1000] ^= 255
    file.write_bytes(payload)
    assert not (opened(folder).pictures[:] == content).all(), "an opening does not see it"
    again = open_pack("folder", folder, SMALL, folder.parent / "cache", workers=1, verify=True)
    assert (again.pictures[:] == content).all()


@pytest.fixture
def by_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every data set is a large one, and changes of just now count as settled."""
    monkeypatch.setattr(pack_module, "LOOK_AT_EACH", 1)
    monkeypatch.setattr(reopen, "_SETTLED_S", -10.0)


@pytest.mark.usefixtures("by_folders")
def test_a_large_set_is_found_again_by_its_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(folder)
    monkeypatch.setattr(pack_module, "read_index", lambda *_: pytest.fail("read the index"))
    again = opened(folder)
    assert again.key == first.key
    assert (again.pictures[:] == first.pictures[:]).all()
    assert again.account.notes[-1].startswith("no folder changed since it was packed, so no file was looked at")
    assert again.people == first.people


@pytest.mark.usefixtures("by_folders")
def test_a_new_gone_or_replaced_file_or_list_is_seen(folder: Path) -> None:
    keys = [opened(folder).key]
    shutil.copyfile(folder / "p01" / "000.jpg", folder / "p00" / "new.jpg")
    keys.append(opened(folder).key)
    (folder / "p00" / "new.jpg").unlink()
    assert opened(folder).key == keys[0]
    (folder / "p05").rename(folder / "q05")
    keys.append(opened(folder).key)
    assert len(set(keys)) == 3


@pytest.mark.usefixtures("by_folders")
def test_a_picture_written_in_place_is_seen_by_verify(folder: Path) -> None:
    first = opened(folder)
    file = folder / "p00" / "000.jpg"
    os.utime(file, ns=(1, 1))
    assert opened(folder).key == first.key, "no folder changed: that is what the line says"
    verified = open_pack("folder", folder, SMALL, folder.parent / "cache", workers=1, verify=True)
    assert verified.key != first.key
    assert opened(folder).key == verified.key


def test_a_folder_that_just_changed_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "LOOK_AT_EACH", 1)
    opened(folder)
    assert not list((folder.parent / "cache").glob("*.opened"))


def test_the_audit_is_of_several_processes_and_shows_its_progress(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulation.sites.num_cores", lambda: 2)
    assert main(["data", "audit", "--json", "--client", f"x:folder={folder}"]) == 0
    told = capsys.readouterr()
    assert "reading x: 72 pictures" in told.err
    assert told.out.startswith("{")
