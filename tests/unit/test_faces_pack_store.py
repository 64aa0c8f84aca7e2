"""The pack's folder: damage, another key, a full disk, kills and races."""

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from faces_on_disk import SMALL, in_cache, make_folder, opened, people_in, picture, pixels, unfinished_in

from common.errors import CheckpointError, DataError
from common.faces import pack, pack_store, packing, shards
from common.faces.pack import load_pack, open_pack
from common.faces.shards import shards_in
from common.settings import DataSettings
from common.system import files

REPO = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return people_in(tmp_path)


@pytest.mark.parametrize("name", ["00000.pictures", "places.npy", "person.npy", "split.npy", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "alter", "remove"])
def test_a_damaged_pack_is_never_taken_for_a_whole_one(folder: Path, name: str, harm: str) -> None:
    whole = opened(folder)
    content, key = pixels(whole), whole.key
    file = folder.parent / "cache" / key / name
    payload = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(payload[:-5])
    elif harm == "alter":
        payload[len(payload) // 2 :] = bytes(len(payload) - len(payload) // 2)
        file.write_bytes(payload)
    else:
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_pack(file.parent)
    assert "\n" not in str(caught.value)
    assert pixels(opened(folder)) == content


def test_a_pack_of_another_key_is_refused(folder: Path) -> None:
    found = opened(folder)
    cache = folder.parent / "cache"
    other = "0" * 64
    (cache / found.key).rename(cache / other)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        load_pack(cache / other)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        load_pack(cache / other, key="1" * 64)
    (cache / other).rename(cache / found.key)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        load_pack(cache / found.key, key=other)
    manifest = json.loads((cache / found.key / "manifest.json").read_text())
    (cache / found.key / "manifest.json").write_text(json.dumps({**manifest, "key": other}))
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        opened(folder)
    assert (cache / found.key / "00000.pictures").exists(), "what is not ours is not removed"


def test_nothing_in_a_pack_is_pickled(folder: Path) -> None:
    key = opened(folder).key
    for file in (folder.parent / "cache" / key).glob("*.npy"):
        np.load(file, allow_pickle=False)
    kinds = {p.suffix for p in (folder.parent / "cache" / key).iterdir()}
    assert kinds == {".json", ".npy", ".pictures"}


def test_no_space_is_told_before_packing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"no space left: packing needs \d{6} bytes and 1 are free"):
        opened(folder)
    assert in_cache(folder) == set()


def test_a_disk_that_fills_up_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = packing.scan

    def full(*args: object, **options: object):  # type: ignore[no-untyped-def]
        yield next(real(*args, **options))  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing, "scan", full)
    with pytest.raises(DataError, match="no space left while packing"):
        opened(folder)
    assert in_cache(folder) == set()
    monkeypatch.setattr(packing, "scan", real)
    calls: list[int] = []
    open_pack("folder", folder, SMALL, folder.parent / "cache", workers=1, progress=lambda done, _: calls.append(done))
    assert calls == [32, 64, 72], "it begins with what was packed, and decodes the other 40"


def test_a_cache_that_cannot_be_written_is_one_line(folder: Path) -> None:
    (folder.parent / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        open_pack("folder", folder, SMALL, folder.parent / "file" / "cache", workers=1)


def test_a_faulty_reader_of_progress_loses_nothing(folder: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done > 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_pack("folder", folder, SMALL, folder.parent / "cache", workers=2, progress=stop)
    assert in_cache(folder) == set()
    assert len(unfinished_in(folder)) == 1
    assert [len(shard.rows()) for shard in shards_in(unfinished_in(folder)[0])] == [32]


_PACK = """
import sys, time
from pathlib import Path
from common.settings import DataSettings
from common.faces import pack_progress, shards
from common.faces.pack import open_pack
shards.SHARD_BYTES = 1  # each job is a shard
pack_progress.WRITE_EVERY_S = 0.0
def slow(done, total):
    if not done:
        return
    print(done, flush=True)
    time.sleep(float(sys.argv[3]))
    while len(sys.argv) > 5 and not Path(sys.argv[5]).exists():
        time.sleep(0.05)
if __name__ == "__main__":
    root, cache, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4])
    data = DataSettings(image_size=32)
    print(open_pack("folder", root, data, cache, workers=workers, progress=slow).key, flush=True)
"""


def start(folder: Path, pause_s: float, workers: int = 1, gate: Path | None = None) -> "subprocess.Popen[str]":
    """A packer that stands still after its first pictures until the gate is there."""
    script = folder.parent / "pack_it.py"
    script.write_text(_PACK)
    command = [sys.executable, str(script), str(folder), str(folder.parent / "cache"), str(pause_s), str(workers)]
    command += [] if gate is None else [str(gate)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_packer_leaves_no_pack_and_its_rest_is_cleared(folder: Path, workers: int) -> None:
    process = start(folder, 30.0, workers)
    assert process.stdout is not None
    assert process.stdout.readline() == "32\n"
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert (len(children) >= 2) == (workers == 2)
    process.kill()
    process.communicate()
    assert in_cache(folder) == set(), "half a pack must not stand under its key"
    assert len(unfinished_in(folder)) == 1
    for _ in range(100):
        if not any(lives(pid) for pid in children):
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes of a killed packer live on")
    assert len(opened(folder)) == 72
    assert unfinished_in(folder) == []


@pytest.mark.parametrize("coding", ["raw", "jpeg"])
def test_killed_at_any_moment_it_goes_on_and_ends_as_if_undisturbed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, coding: str
) -> None:
    """To files os._exit is what kill -9 is: at the n-th time that the packer touches the disk, for all n until done."""
    data = DataSettings(image_size=32, pack=coding, max_quarantined_fraction=0.5)
    (folder / "p03" / "002.jpg").write_bytes(b"")  # and one that cannot be used
    whole = opened(folder, data)
    expected = (pixels(whole), whole.key, whole.quarantined, whole.split.tolist())
    shutil.rmtree(folder.parent / "cache")
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    decoded: list[int] = []
    real = packing.scan

    def counting(index, *args, **options):  # type: ignore[no-untyped-def]
        decoded.append(len(index))
        return real(index, *args, **options)

    monkeypatch.setattr(packing, "scan", counting)
    for moment in range(1, 200):
        if (pid := os.fork()) == 0:
            _die_at(moment)
            opened(folder, data)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
        if moment % 4 == 0:  # else the next kill meets what this one left
            shutil.rmtree(folder.parent / "cache", ignore_errors=True)
    assert moment > 15
    found = opened(folder, data)
    assert (pixels(found), found.key, found.quarantined, found.split.tolist()) == expected
    assert unfinished_in(folder) == []


def _die_at(moment: int) -> None:
    """End this process like kill -9 in the moment-th of its calls that change the disk."""
    left = moment

    def dying(call):  # type: ignore[no-untyped-def]
        def once(*args, **options):  # type: ignore[no-untyped-def]
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return call(*args, **options)

        return once

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (np, "save")):
        setattr(owner, name, dying(getattr(owner, name)))


def test_a_pack_that_was_killed_decodes_only_the_rest(folder: Path) -> None:
    process = start(folder, 0.0)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "64\n":  # the first shard is on disk, the second perhaps not
            break
    process.kill()
    process.communicate()
    calls: list[int] = []
    found = open_pack(
        "folder", folder, SMALL, folder.parent / "cache", workers=1, progress=lambda done, _: calls.append(done)
    )
    assert calls[0] in (32, 64) or not calls, "it was quick enough to end"
    assert len(found) == 72


def test_a_new_person_and_a_touched_file_are_all_that_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened(folder)
    pixels_before = before.pictures[:]
    make_folder(folder / "more", {"x": 2})
    (folder / "more" / "x").rename(folder / "p99")
    (folder / "more").rmdir()
    os.utime(folder / "p03" / "001.jpg", ns=(1, 1))
    decoded: list[str] = []
    real = packing.scan

    def seen(index, *args, **options):  # type: ignore[no-untyped-def]
        decoded.extend(index.paths)
        return real(index, *args, **options)

    monkeypatch.setattr(packing, "scan", seen)
    after = opened(folder, DataSettings(image_size=32, max_quarantined_fraction=0.5))
    assert sorted(decoded) == ["p03/001.jpg", "p99/000.jpg", "p99/001.jpg"]
    assert after.key != before.key
    cache = folder.parent / "cache"
    one, other = (cache / pack.key / "00000.pictures" for pack in (before, after))
    assert one.samefile(other), "what is the same takes its place on disk once"
    shutil.rmtree(cache / before.key)
    np.testing.assert_array_equal(load_pack(cache / after.key).pictures[:], pixels_before[2:])
    # x/000.jpg and x/001.jpg are copies of p00's, made from the same seeds: they stand under two people and are out
    assert dict(after.quarantined).keys() == {"p00/000.jpg", "p00/001.jpg", "p99/000.jpg", "p99/001.jpg"}


def test_a_small_rest_of_a_shard_is_copied_not_linked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten of twelve people go: the next pack holds a sixth of the old shard, and no more than that on disk."""
    data = DataSettings(image_size=32, fraction_val_people=0.2, fraction_test_people=0.2)
    before = opened(folder, data)
    content = before.pictures[np.arange(36)]
    for person in range(6, 12):
        shutil.rmtree(folder / f"p{person:02d}")
    (folder / "p05" / "005.jpg").unlink()
    monkeypatch.setattr(packing, "scan", lambda *_, **__: pytest.fail("decoded again"))
    after = opened(folder, data)
    np.testing.assert_array_equal(after.pictures[np.arange(35)], content[:35])
    assert (folder.parent / "cache" / after.key / "00000.pictures").stat().st_size == 35 * 32 * 32 * 3


def test_a_damaged_shard_is_made_anew_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    whole = opened(folder)
    content = pixels(whole)
    cache = folder.parent / "cache" / whole.key
    assert len(list(cache.glob("*.pictures"))) == 3
    (cache / "00001.pictures").write_bytes(b"damage")
    decoded: list[int] = []
    real = packing.scan

    def seen(index, *args, **options):  # type: ignore[no-untyped-def]
        decoded.append(len(index))
        return real(index, *args, **options)

    monkeypatch.setattr(packing, "scan", seen)
    assert pixels(opened(folder)) == content
    assert decoded == [32]


def test_a_pack_of_an_earlier_version_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key is another, and what it holds is not taken over: it may hold pictures that are left out today."""
    monkeypatch.setattr(shards, "FORMAT", 2)
    monkeypatch.setattr(pack, "FORMAT", 2)
    monkeypatch.setattr(pack_store, "FORMAT", 2)
    monkeypatch.setattr(pack_store.Origin, "__init__", functools.partialmethod(pack_store.Origin.__init__, format=2))
    old = opened(folder)
    monkeypatch.undo()
    calls: list[int] = []
    open_pack("folder", folder, SMALL, folder.parent / "cache", workers=1, progress=lambda done, _: calls.append(done))
    assert calls == [0, 32, 64, 72]
    assert old.key in in_cache(folder)


def test_data_that_change_while_they_are_packed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once: the changed picture is packed again, as it is now.  Always: one line, and what is packed stays."""
    changed = iter(range(2, 10))

    def touch_once(done: int, _: int) -> None:
        if done == 32 and (when := next(changed)) == 2:
            picture(999, 64, 64).save(folder / "p00" / "000.jpg")
            os.utime(folder / "p00" / "000.jpg", ns=(when, when))

    cache = folder.parent / "cache"
    found = open_pack("folder", folder, SMALL, cache, workers=1, progress=touch_once)
    expected = np.asarray(picture(999, 64, 64).resize((32, 32))).astype(int)
    assert np.abs(found.pictures[0].astype(int) - expected).mean() < 6
    assert "1 pictures changed while they were packed, such as p00/000.jpg" in caplog.text
    assert unfinished_in(folder) == []
    shutil.rmtree(cache)
    times = iter(range(100, 200))

    def always(_: int, __: int) -> None:
        os.utime(folder / "p00" / "000.jpg", ns=(1, next(times)))

    with pytest.raises(DataError, match=r"1 pictures changed while they were packed, such as p00/000\.jpg, 3 times"):
        open_pack("folder", folder, SMALL, cache, workers=1, progress=always)
    assert len(opened(folder)) == 72


def test_two_processes_at_once_both_end_well(folder: Path) -> None:
    gate = folder.parent / "gate"
    first = start(folder, 0.0, gate=gate)
    assert first.stdout is not None
    assert first.stdout.readline() == "32\n"
    second = start(folder, 0.0)
    assert second.stderr is not None
    told = second.stderr.readline()
    assert told.startswith("another program is packing these pictures; waiting for it (packing 44 %")
    gate.touch()
    out_1, _ = first.communicate(timeout=60)
    out_2, _ = second.communicate(timeout=60)
    key = out_1.split()[-1]
    assert (first.returncode, second.returncode) == (0, 0)
    assert out_2.split()[-1] == key
    assert in_cache(folder) == {key}


def test_without_locks_the_rename_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks: another process finishes the same pack while this one is at work."""
    real, cache = packing.scan, folder.parent / "cache"

    def overtaken(*args: object, **options: object):  # type: ignore[no-untyped-def]
        yield from real(*args, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(packing, "scan", real)
        opened(folder)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    monkeypatch.setattr(pack_store, "_remove_stale", lambda *_: None)
    monkeypatch.setattr(packing, "scan", overtaken)
    found = opened(folder)
    assert len(found) == 72
    assert {p.name for p in cache.iterdir() if not p.name.startswith(".")} == {found.key}
    assert not list(cache.glob(".*.tmp"))
