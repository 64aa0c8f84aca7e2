"""Tensors on disk, in files that survive a crash (`common/system/files.py`); safetensors, which cannot run code."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from common.errors import CheckpointError
from common.system.files import SEAL, replacing, require_seal, write_parts

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_NO_SEAL = "0" * hashlib.sha256().digest_size * 2  # in a file's head, until all of it is there
_BLOCK_BYTES = 2**20  # what was hashed is still in the cache when it is written


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write named tensors and text notes as a safetensors file, atomically.

    The bytes go from the tensors' own memory into the file: the library's writer copies all of them twice, which for
    the server's checkpoint would be two models. The format is a length, a JSON header, and the data.
    Raises KeyError for a dtype that we never keep.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_parts(path, itertools.chain((_head(plain, notes),), map(_bytes_of, plain.values())))


def _head(plain: Mapping[str, Tensor], notes: Mapping[str, str]) -> bytes:
    """What stands before the data: a length, and names, dtypes, shapes and places as JSON."""
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for name, tensor in plain.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bytes_of(plain: Tensor) -> memoryview:
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _sealed_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        yield _label(name, plain)
        yield _bytes_of(plain)


def _label(name: str, plain: Tensor) -> bytes:
    return f"{name} {plain.dtype} {tuple(plain.shape)} ".encode()


def write_sealed(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """`write_tensors` with a digest over names, shapes, numbers and notes, which `read_sealed` examines.

    The numbers are read once: each block is hashed as it is written, and the digest gets its place at the end, before
    the file has its name.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    head = _head(plain, {SEAL: _NO_SEAL, **notes})
    digest = hashlib.sha256(json.dumps(sorted(notes.items()), sort_keys=True).encode())
    with replacing(path) as aside, aside.open("wb") as file:
        file.write(head)
        for name, tensor in plain.items():
            digest.update(_label(name, tensor))
            data = _bytes_of(tensor)
            for start in range(0, len(data), _BLOCK_BYTES):
                block = data[start : start + _BLOCK_BYTES]
                digest.update(block)
                file.write(block)
        file.seek(head.index(_NO_SEAL.encode()))
        file.write(digest.hexdigest().encode())


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read_tensors` of a file of `write_sealed`.  Raises CheckpointError also when a single bit of it has changed."""
    tensors, notes = read_tensors(path)
    require_seal(path, notes.pop(SEAL, None), sorted(notes.items()), _sealed_parts(tensors))
    return tensors, notes


def read_flat(path: Path, layout: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[NDArray[np.float32], dict[str, str]]:
    """The data of a file of `write_tensors` as one flat float32 buffer, and its notes; nothing is copied twice.

    layout: names and shapes of the tensors in their order.  Raises CheckpointError for any other file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        with path.open("rb") as file:
            header = _read_header(file, path.stat().st_size)
            notes = {str(name): str(note) for name, note in header.pop("__metadata__", {}).items()}
            begin, wanted = 0, {}
            for name, shape in layout:
                begin, end = begin + 4 * math.prod(shape), begin
                wanted[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, begin]}
            buffer = np.empty(begin // 4, dtype=np.float32)
            fits = list(header.items()) == list(wanted.items())
            whole = fits and file.readinto(buffer.data) == begin and not file.read(1)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}).") from None
    if not fits:
        raise CheckpointError(f"{path} is of another model: {_first_difference(header, layout)}")
    if not whole:
        raise CheckpointError(f"{path} is not a whole safetensors file (it is cut short).")
    return buffer, notes


def _first_difference(header: Mapping[str, Any], layout: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    for name, shape in layout:
        entry = header.get(name)
        if not isinstance(entry, dict):
            return f"{name} is missing; the model needs it with shape {shape}."
        if (entry.get("dtype"), entry.get("shape")) != ("F32", list(shape)):
            sizes = entry.get("shape")
            seen = f"{entry.get('dtype')} of shape {tuple(sizes) if isinstance(sizes, list) else sizes}"
            return f"{name} is {seen}; the model needs it with shape {shape}."
    return f"it has {len(header)} tensors, or another order; the model has {len(layout)}."


def _read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    """The header of a safetensors file of that many bytes.  Raises ValueError or AttributeError for none."""
    length = int.from_bytes(file.read(8), "little")
    if length > size:
        raise ValueError("its header is longer than the file")
    header: dict[str, Any] = json.loads(file.read(length))
    header.keys()  # there are some, or this is no header
    return header


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors and notes of a safetensors file.

    Raises CheckpointError when the file is missing, cut short or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
        return load_file(path), notes
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # odd headers raise any
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}).") from None
