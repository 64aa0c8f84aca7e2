"""Loads given weights into a backbone: ImageNet's through torchvision, or a .safetensors file of the user's.

A loaded tensor is never initialised again: this runs after the backbone is built, and nothing runs after it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import CheckpointError, ConfigError
from common.models.backbone import Backbone
from common.models.dcal import VitBackbone
from common.models.table import BACKBONES

_CLASSIFIERS: Final = ("fc.", "classifier.", "heads.")  # ImageNet's last layer, in torchvision's names
_OLD_NAMES: Final = (("mlp.linear_1.", "mlp.0."), ("mlp.linear_2.", "mlp.3."))  # in the files of torchvision's ViTs
_POSITIONS: Final = "encoder.pos_embedding"
_GLCA: Final = ("glca.", "glca_closing.")
_COUNTER: Final = "num_batches_tracked"
_MEAN: Final = "running_mean"
# What layers have of batch normalisation alone, and an embedding's of group normalisation alone.
_OF_NORM: Final = (_MEAN, "running_var", _COUNTER, "normalisation.weight", "normalisation.bias")
_NUM_SHOWN: Final = 5


def load_pretrained(backbone: Backbone | VitBackbone, *, name: str, pretrained: str) -> None:
    """Overwrite the backbone's tensors, in place, with given ones.

    name: the backbone's name in the settings.  pretrained: "none", "imagenet", or the path of a .safetensors file.

    A file holds either a whole backbone under this project's names (with or without "backbone." before them; heads
    and loss weights are ignored) or a trunk under torchvision's names (its classifier is ignored). Of both, every
    tensor has to be there in the right shape; only counters of batches may be missing, and a GLCA branch of which the
    file has nothing (a plain ViT's): it stays as it is. The position embedding of a ViT is interpolated where the
    picture has more or fewer patches. ImageNet's weights and a trunk leave what embeds,
    and a GLCA branch, as they are.
    ImageNet's trunks were trained on pictures scaled by mean and deviation, not to [-1, 1]; the first batch
    normalisation absorbs the difference while training.

    Raises ConfigError when the weights cannot be had, CheckpointError when they do not fit.
    """
    if pretrained == "none":
        return
    if pretrained == "imagenet":
        _load(backbone.trunk, _without_classifier(_imagenet_weights(name)), source=f"imagenet weights of {name}")
        return
    tensors = _read(Path(pretrained).expanduser())
    if any(key.startswith("backbone.") for key in tensors):  # what is not the backbone's is private
        tensors = {k.removeprefix("backbone."): value for k, value in tensors.items() if k.startswith("backbone.")}
    tensors = {key: value for key, value in tensors.items() if not key.startswith("head.")}
    if any(key.startswith("trunk.") for key in tensors):
        _load(backbone, tensors, source=pretrained)
    else:
        _load(backbone.trunk, _without_classifier(tensors), source=pretrained)


def _imagenet_weights(name: str) -> Mapping[str, Tensor]:
    asked = BACKBONES[name].imagenet
    if asked is None:
        known = ", ".join(row.name for row in BACKBONES.values() if row.imagenet)
        raise ConfigError([f'model.pretrained = "imagenet" has no weights for {name}; choose {known}, or "none".'])
    import torchvision  # seconds, for ImageNet's weights only

    weights = torchvision.models.get_weight(asked)
    try:
        tensors: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network or no space; a download that fails its checksum
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            [
                f'model.pretrained = "imagenet": the weights of {name} cannot be downloaded ({reason}); go online, '
                'or give the path of a .safetensors file with them, or "none".'
            ]
        ) from None
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise ConfigError(
            [
                f'model.pretrained = "{path}" is no file of weights; write none, imagenet, FILE.safetensors or, for the'
                " whole run, models:/NAME@champion, a run's folder or its id."
            ]
        )
    if not path.is_file():
        raise ConfigError([f'model.pretrained = "{path}": no such file; give the path of a .safetensors file.'])
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # odd headers raise any
        raise CheckpointError(f"{path}: not a readable .safetensors file ({error}); write or copy it again.") from None


def _without_classifier(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk's tensors under torchvision's present names."""
    kept = {}
    for key, value in tensors.items():
        if not key.startswith(_CLASSIFIERS):
            for old, new in _OLD_NAMES:
                key = key.replace(old, new)  # noqa: PLW2901
            kept[key] = value
    return kept


def interpolated(positions: Tensor, num_tokens: int) -> Tensor:
    """A ViT's position embedding for another number of patches: bicubic over the grid, the class token's as it is.

    positions: [1, 1 + g^2, D] float.  num_tokens: 1 + h^2.  Returns [1, num_tokens, D].
    """
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(num_tokens - 1)
    grid = positions[:, 1:].transpose(1, 2).reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def _with_fitting_positions(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with the position embedding of a square grid brought to the model's; others stay as they are."""
    fitted = dict(tensors)
    for name in tensors.keys() & wanted.keys():
        have, want = tensors[name].shape, wanted[name].shape
        if not name.endswith(_POSITIONS) or len(have) != len(want) or have[1] == want[1] or have[2] != want[2]:
            continue
        if have[1] > 1 and math.isqrt(have[1] - 1) ** 2 == have[1] - 1:
            fitted[name] = interpolated(tensors[name], want[1])
    return fitted


def _check_norm(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError where what does not fit is that the layers are normalised otherwise."""
    apart = wanted.keys() ^ tensors.keys()
    kinds = ["batch" if any(name.endswith(_MEAN) for name in one) else "group" for one in (wanted, tensors)]
    if kinds[0] != kinds[1] and all(name.endswith(_OF_NORM) for name in apart):
        raise CheckpointError(
            f'{source}: its layers have {kinds[1]} normalisation, and model.norm = "{kinds[0]}"; set model.norm ='
            f' "{kinds[1]}", or name other weights.'
        )


def _load(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    wanted = module.state_dict()
    tensors = _with_fitting_positions(tensors, wanted)
    without_glca = not any(name.startswith(_GLCA) for name in tensors)
    problems = []
    for name, tensor in wanted.items():
        if name not in tensors:
            if not (name.endswith(_COUNTER) or (without_glca and name.startswith(_GLCA))):
                problems.append(f"{name} {list(tensor.shape)} is missing")
        elif tensors[name].shape != tensor.shape:
            problems.append(f"{name} is {list(tensors[name].shape)}, the model has {list(tensor.shape)}")
    problems += [f"{name} {list(tensors[name].shape)} is not in the model" for name in tensors if name not in wanted]
    if problems:
        _check_norm(wanted, tensors, source)
        more = f"; and {len(problems) - _NUM_SHOWN} more" if len(problems) > _NUM_SHOWN else ""
        raise CheckpointError(
            f"{source}: does not fit model.backbone and model.embedding_size: {'; '.join(problems[:_NUM_SHOWN])}{more}."
        )
    module.load_state_dict(tensors, strict=False)  # strict is done above, counters apart
