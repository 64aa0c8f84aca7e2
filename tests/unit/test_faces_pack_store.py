"""The pack's folder: damage, another key, a full disk, kills and races."""

import errno
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
from faces_on_disk import SMALL, in_cache, make_folder, opened, people_in

from common.errors import CheckpointError, DataError
from common.faces import pack, pack_store
from common.faces.pack import load_pack, open_pack
from common.system import files

REPO = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return people_in(tmp_path)


@pytest.mark.parametrize("name", ["pictures.npy", "person.npy", "split.npy", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "alter", "remove"])
def test_a_damaged_pack_is_never_taken_for_a_whole_one(folder: Path, name: str, harm: str) -> None:
    whole = opened(folder)
    pixels, key = whole.pictures.tobytes(), whole.key
    del whole
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
    assert opened(folder).pictures.tobytes() == pixels


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
    assert (cache / found.key / "pictures.npy").exists(), "what is not ours is not removed"


def test_nothing_in_a_pack_is_pickled(folder: Path) -> None:
    key = opened(folder).key
    for file in (folder.parent / "cache" / key).glob("*.npy"):
        np.load(file, allow_pickle=False)
    assert sorted(p.suffix for p in (folder.parent / "cache" / key).iterdir()) == [".json", ".npy", ".npy", ".npy"]


def test_no_space_is_told_before_packing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"no space left: packing needs \d{6} bytes and 1 are free"):
        opened(folder)
    assert in_cache(folder) == set()


def test_a_disk_that_fills_up_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pack.scan

    def full(*args: object, **options: object):  # type: ignore[no-untyped-def]
        yield next(real(*args, **options))  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack, "scan", full)
    with pytest.raises(DataError, match="no space left: packing needs"):
        opened(folder)
    assert in_cache(folder) == set()


def test_a_cache_that_cannot_be_written_is_one_line(folder: Path) -> None:
    (folder.parent / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        open_pack("folder", folder, SMALL, folder.parent / "file" / "cache", workers=1)


def test_a_faulty_reader_of_progress_leaves_nothing(folder: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done > 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_pack("folder", folder, SMALL, folder.parent / "cache", workers=2, progress=stop)
    assert in_cache(folder) == set()


_PACK = """
import sys, time
from pathlib import Path
from common.settings import DataSettings
from common.faces.pack import open_pack
def slow(done, total):
    print(done, flush=True)
    time.sleep(float(sys.argv[3]))
if __name__ == "__main__":
    root, cache, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4])
    data = DataSettings(image_size=32)
    print(open_pack("folder", root, data, cache, workers=workers, progress=slow).key, flush=True)
"""


def start(folder: Path, pause_s: float, workers: int = 1) -> "subprocess.Popen[str]":
    script = folder.parent / "pack_it.py"
    script.write_text(_PACK)
    command = [sys.executable, str(script), str(folder), str(folder.parent / "cache"), str(pause_s), str(workers)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}
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
    process.wait()
    process.stdout.close()
    left = in_cache(folder)
    assert len(left) == 1
    assert next(iter(left)).endswith(".tmp"), "half a pack must not stand under its key"
    for _ in range(100):
        if not any(lives(pid) for pid in children):
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes of a killed packer live on")
    other = make_folder(folder.parent / "other", {f"q{i}": 3 for i in range(8)})
    key = opened(other).key
    assert in_cache(folder) == {key}, "the next packer of anything clears up"
    assert len(opened(folder)) == 72


def test_two_processes_at_once_both_end_well(folder: Path) -> None:
    first = start(folder, 0.3)
    assert first.stdout is not None
    assert first.stdout.readline() == "32\n"
    second = start(folder, 0.0)
    out_1, _ = first.communicate(timeout=60)
    out_2, _ = second.communicate(timeout=60)
    key = out_1.split()[-1]
    assert (first.returncode, second.returncode) == (0, 0)
    assert out_2.split() == [key], "the second waits and decodes nothing"
    assert in_cache(folder) == {key}


def test_without_locks_the_rename_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks: another process finishes the same pack while this one is at work."""
    real, cache = pack.scan, folder.parent / "cache"

    def overtaken(*args: object, **options: object):  # type: ignore[no-untyped-def]
        yield from real(*args, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(pack, "scan", real)
        opened(folder)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    monkeypatch.setattr(pack_store, "_remove_stale", lambda *_: None)
    monkeypatch.setattr(pack, "scan", overtaken)
    found = opened(folder)
    assert len(found) == 72
    assert {p.name for p in cache.iterdir() if not p.name.startswith(".")} == {found.key}
    assert not list(cache.glob(".*.tmp"))


def test_dropping_rows_keeps_the_rest_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    path = tmp_path / "pictures.npy"
    for kept in (rng.random(50) < 0.7, np.ones(50, dtype=bool), np.arange(50) >= 49):
        with path.open("wb") as file:
            pack_store.write_header(file, 999, 4)  # as when fewer were written than planned
            file.write(pictures.tobytes())
        pack_store.keep_rows(path, kept, 4)
        np.testing.assert_array_equal(np.load(path, allow_pickle=False), pictures[kept])
