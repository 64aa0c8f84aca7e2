"""Files that survive a crash: the old file or the new one, never a part, and damage is one line."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError
from common.system import checkpoints, files
from common.system.checkpoints import read_flat, read_sealed, read_tensors, write_sealed, write_tensors

ROOT = Path(__file__).resolve().parents[2]
TENSORS = {"a": torch.arange(300.0), "b": torch.ones(2, 3, dtype=torch.float16), "n": torch.tensor(5)}


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_error_between_write_and_rename_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "state.json"
    files.write_json(path, {"round": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"round": 2})
    monkeypatch.undo()
    assert files.read_json(path) == {"round": 1}
    assert list(tmp_path.iterdir()) == [path], "nothing is left lying about"


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path):
    """Not an exception but the end: nothing of ours runs any more."""
    path = tmp_path / "state.json"
    files.write_json(path, {"round": 1})
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom common.system import files\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "files.write_json(Path(sys.argv[1]), {'round': 2, 'long': 'x' * 100000})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == -9
    assert files.read_json(path) == {"round": 1}
    files.write_json(path, {"round": 3})
    assert files.read_json(path) == {"round": 3}


def test_content_reaches_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append("fsync") or fsync(number))
    monkeypatch.setattr(Path, "replace", lambda *paths: done.append("rename") or replace(*paths))
    files.write_bytes(tmp_path / "new/folder/x", b"1")
    assert done == ["fsync", "rename", "fsync"]
    assert (tmp_path / "new/folder/x").read_bytes() == b"1"


def test_a_seal_is_made_while_the_numbers_are_written_and_its_place_is_no_note_of_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_BLOCK_BYTES", 100)  # of 1,200 bytes and a rest
    path, notes = tmp_path / "s.safetensors", {"a": "0" * 64, "round": "3"}
    write_sealed(path, {"z": torch.arange(3.0), **TENSORS}, notes)
    tensors, found = read_sealed(path)
    assert found == notes
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_sealed(path)


def test_the_seal_is_that_of_earlier_files(tmp_path):
    """Of the notes as JSON, and in the order of names each name, dtype and shape before its bytes."""
    write_sealed(tmp_path / "s", {"b": torch.ones(2), "a": torch.arange(4, dtype=torch.int64)}, {"round": "1"})
    seal = read_tensors(tmp_path / "s")[1][files.SEAL]
    parts = [b"a torch.int64 (4,) ", torch.arange(4).numpy().tobytes(), b"b torch.float32 (2,) ", b"\x00\x00\x80?" * 2]
    assert seal == files.seal_of([["round", "1"]], parts)


def test_tensors_and_notes_come_back(tmp_path):
    path = tmp_path / "m.safetensors"
    turned = torch.arange(12.0).reshape(3, 4).T
    checkpoints.write_tensors(path, TENSORS | {"turned": turned, "grad": torch.ones(2, requires_grad=True)}, {"r": "3"})
    tensors, notes = checkpoints.read_tensors(path)
    assert notes == {"r": "3"}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert tensors["b"].dtype == torch.float16
    assert torch.equal(tensors["turned"], turned)
    assert not tensors["grad"].requires_grad


@pytest.mark.parametrize("left", [0, 4, 60, 400, -1])
def test_a_file_cut_short_is_a_checkpoint_error(tmp_path, left):
    path = tmp_path / "m.safetensors"
    checkpoints.write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file") as caught:
        checkpoints.read_tensors(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_checkpoint_errors(tmp_path):
    path = tmp_path / "m.safetensors"
    for content in (b"\xff" * 200, b"PK\x03\x04" + b"0" * 100, b"{}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            checkpoints.read_tensors(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.read_tensors(tmp_path / "none")
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.read_tensors(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1, 2]", b"3", b"\xff\xfe"])
def test_json_that_is_damaged_or_no_object(tmp_path, content):
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"s\.json"):
        files.read_json(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        files.read_json(tmp_path / "none.json")


def test_json_says_the_same_for_the_same(tmp_path):
    files.write_json(tmp_path / "a", {"b": 1, "a": [1, "ü"]})
    files.write_json(tmp_path / "b", {"a": [1, "ü"], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert files.read_json(tmp_path / "a") == {"a": [1, "ü"], "b": 1}


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (5, 7)])
def test_what_is_written_without_the_library_is_what_the_library_reads(tmp_path, dtype, shape):
    size = torch.Size(shape).numel()
    tensors = {"ä": torch.arange(size).remainder(2).reshape(shape).to(dtype), "b": torch.ones(1)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"note": "é"})
    read, notes = read_tensors(tmp_path / "t.safetensors")
    assert notes == {"note": "é"}
    assert {name: (t.dtype, t.shape, t.tolist()) for name, t in read.items()} == {
        name: (t.dtype, t.shape, t.tolist()) for name, t in tensors.items()
    }


def test_a_tensor_that_is_a_transposed_view_is_written_in_its_own_order(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "t.safetensors", {"t": tensor.t(), "same": tensor}, {})
    read, _ = read_tensors(tmp_path / "t.safetensors")
    assert read["t"].tolist() == tensor.t().tolist()
    assert read["same"].tolist() == tensor.tolist()


def test_writing_a_model_copies_none_of_it(tmp_path):
    """What Python allocates meanwhile: the header and the file's buffer, not the four megabytes."""
    tensors = {f"layer {number}": torch.zeros(250_000) for number in range(4)}
    tracemalloc.start()
    write_tensors(tmp_path / "t.safetensors", tensors, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "t.safetensors").stat().st_size > 4_000_000
    assert peak < 500_000


LAYOUT = [("a", (2, 3)), ("b", (4,))]


def flat_file(path, **changed):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": -torch.ones(4)} | changed
    write_tensors(path, {name: t for name, t in tensors.items() if t is not None}, {"sha256": "x"})
    return path


def test_a_flat_file_is_read_into_one_buffer(tmp_path):
    buffer, notes = read_flat(flat_file(tmp_path / "t"), LAYOUT)
    assert buffer.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, -1.0, -1.0, -1.0, -1.0]
    assert notes == {"sha256": "x"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"b": torch.ones(5)}, r"b is F32 of shape \(5,\); the model needs it with shape \(4,\)"),
        ({"b": None}, "b is missing"),
        ({"c": torch.ones(4)}, "it has 3 tensors"),
        ({"a": torch.arange(6.0)}, r"a is F32 of shape \(6,\)"),
        ({"b": torch.ones(4, dtype=torch.float64)}, "b is F64"),
    ],
)
def test_a_flat_file_of_another_model_is_refused(tmp_path, changed, said):
    with pytest.raises(CheckpointError, match=f"t is of another model: {said}"):
        read_flat(flat_file(tmp_path / "t", **changed), LAYOUT)


@pytest.mark.parametrize("length", [0, 3, 8, 9, 60, -1])
def test_a_flat_file_that_is_cut_is_refused(tmp_path, length):
    path = flat_file(tmp_path / "t")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_flat(path, LAYOUT)


@pytest.mark.parametrize("content", [b"\xff" * 100, (10**18).to_bytes(8, "little") + b"{}", bytes(8) + b"[]", b"x"])
def test_noise_is_no_flat_file(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_flat(tmp_path / "t", LAYOUT)
