"""The tensors of a model that `torch.export` saved, read as plain numbers.

`torch.export.load` unpickles what an archive tells it to and evaluates the formulas of its graph, so whoever can write
to a registry could run code here. The archive is a zip of uncompressed files: `data/weights/model_weights_config.json`
names each tensor, its file beside it holds the bytes.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

CONFIG: Final = "data/weights/model_weights_config.json"
_DTYPES: Final = {5: torch.int64, 7: torch.float32}  # by their numbers in torch._export.serde.schema.ScalarType


class NotPlain(ValueError):
    """The archive is none of ours, or is no plain one."""


def read_exported(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a model.pt2.  Raises NotPlain when it is damaged or holds anything but plain tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            config = _config_of(archive)
            folder = config.removesuffix(CONFIG.rpartition("/")[2])
            tensors = json.loads(archive.read(config))["config"]
            return {name: _tensor(archive, folder, about) for name, about in tensors.items()}
    except NotPlain:
        raise
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise NotPlain(f"it is damaged: {type(error).__name__}: {error}") from None


def _config_of(archive: zipfile.ZipFile) -> str:
    if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
        raise NotPlain("it is compressed, which nothing of ours is")
    for name in archive.namelist():
        if name.partition("/")[2] == CONFIG:
            return name
    raise NotPlain(f"it has no {CONFIG}")


def _tensor(archive: zipfile.ZipFile, folder: str, about: Any) -> Tensor:  # noqa: ANN401 - whatever the file holds
    meta = about["tensor_meta"]
    dtype = _DTYPES.get(meta["dtype"])
    if about["use_pickle"] or dtype is None:
        raise NotPlain(f"the tensor in {about['path_name']!r} is no plain float32 or int64")
    sizes, strides = (tuple(int(one["as_int"]) for one in meta[key]) for key in ("sizes", "strides"))
    flat = torch.frombuffer(bytearray(archive.read(f"{folder}{about['path_name']}")), dtype=dtype)
    if len(sizes) != len(strides) or min((*sizes, *strides), default=0) < 0 or math.prod(sizes) > len(flat):
        raise NotPlain(f"the tensor in {about['path_name']!r} is larger than its file")
    return flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"])).clone()
