"""A crafted model that prints single pictures into the change of its weights: an attack that a site should not answer.

A ViT, whose only patch may be the picture.  Each of many equal rows of its patch projection measures how bright the
picture is; behind it the row's own threshold lets its gradient pass or not, and the class token learns of nothing else.
The changes of two rows with neighbouring thresholds then differ by the pictures whose brightness is in between: where
that is one, by the picture itself, times a number (Fowl et al., "Robbing the Fed", arXiv:2110.13057).  Of smaller
patches it is their mean.  A server that may not send that model at once goes there from an honest one by steps.
"""

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.models.recogniser import build_recogniser, shared_names
from common.protocol.parameters import Manifest, flatten, manifest_of
from common.settings import Settings

Buffer = NDArray[np.float32]

LEVEL: Final = 100.0  # of two constant features, beside which all others hardly count in a layer normalisation
SLOPE: Final = 4000.0  # of the thresholds: how sharp they are
DARKEST, BRIGHTEST = -0.5, 0.5  # of pictures' means that thresholds lie between, in [-1, 1]
ROWS = "backbone.trunk.conv_proj.weight"
SETTINGS: Final[dict[str, object]] = {
    "model.backbone": "vit_tiny", "model.depth": 1, "model.width": 1.0, "model.attention": "sa",
    "model.inference": "sa", "model.dropout": 0.0, "model.pretrained": "none",
    "training.optimiser": "sgd", "training.lr": 1.0, "training.warmup_fraction": 0.0, "training.batch_size": 4096,
    "training.accumulate": 1, "training.head_warmup_epochs": 0, "training.clip_norm": 10.0,
    "augmentation.flip": 0.0, "augmentation.crop": 0.0, "augmentation.rotation_rad": 0.0, "augmentation.colour": 0.0,
    "federation.local_epochs": 1,
}  # fmt: skip


def crafted(settings: Settings, brightest: float = BRIGHTEST) -> tuple[Buffer, Manifest]:
    """The crafted model of a run with SETTINGS, [size] float32.

    brightest: mean of a picture, in [-1, 1], above which no threshold lies.
    """
    recogniser = build_recogniser(
        settings.model, num_people=2, image_size=settings.data.image_size, backbone_seed=1, head_seed=0
    )
    state = recogniser.state_dict()
    with torch.no_grad():
        _craft({name.removeprefix("backbone."): tensor for name, tensor in state.items()}, brightest)
    manifest = manifest_of({name: state[name] for name in shared_names(recogniser, settings.model.normalisation)})
    return flatten(state, manifest), manifest


def num_rows(dim: int) -> int:
    """How many thresholds there are in a model of so many features."""
    return 3 * dim // 4


def _craft(state: dict[str, Tensor], brightest: float) -> None:
    rows_of, block = state["trunk.conv_proj.weight"], "trunk.encoder.layers.encoder_layer_0."
    dim = len(rows_of)
    rows, told = num_rows(dim), slice(num_rows(dim), dim - 2)
    spread = LEVEL * (2.0 / dim) ** 0.5  # what a layer normalisation divides by
    for name, tensor in state.items():
        if name.startswith("trunk.") and not name.endswith(("ln_1.weight", "ln_2.weight")):
            tensor.zero_()
    rows_of[:rows] = 1.0 / rows_of[0].numel()
    state["trunk.encoder.pos_embedding"][..., -2:] = torch.tensor([LEVEL, -LEVEL])
    one, patches = torch.arange(rows), state["trunk.encoder.pos_embedding"].shape[1] - 1
    state[block + "self_attention.in_proj_weight"][2 * dim + one, one] = 1.0
    state[block + "self_attention.out_proj.weight"][one, one] = (1 + 1 / patches) * spread  # it attends to itself too
    state[block + "mlp.0.weight"][one, one] = SLOPE * spread
    # A layer normalisation subtracts the mean over features, of which `rows` are the picture's: twice here.
    kept = 1.0 - rows / dim
    state[block + "mlp.0.bias"][one] = -SLOPE * kept**2 * torch.linspace(DARKEST, brightest, rows)
    signs = torch.where(torch.arange(dim - 2 - rows) % 2 == 0, 1.0, -1.0)
    state[block + "mlp.3.weight"][told, :rows] = signs[:, None] / (SLOPE * rows)
    state["trunk.encoder.ln.weight"][told] = 1.0


def toward(model: Buffer, target: Buffer, manifest: Manifest, step: float) -> Buffer:
    """The model one round nearer to the target: no weight moves by more than `step` of its norm; vectors go there."""
    nearer = model.copy()
    for entry in manifest.entries:
        here = slice(entry.offset, entry.offset + entry.size)
        gap, most = target[here] - model[here], step * float(np.linalg.norm(model[here]))
        far = float(np.linalg.norm(gap))
        nearer[here] += gap * np.float32(most / far) if len(entry.shape) > 1 and far > most else gap
    return nearer


def repeated(read: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Patches that were read, [K, 3 P P], side by side to whole pictures, [K, 3 S S]."""
    patch = math.isqrt(read.shape[1] // 3)
    tiled = np.tile(read.reshape(-1, 3, patch, patch), (1, 1, side // patch, side // patch))
    return np.asarray(tiled.reshape(len(read), -1))


def read_pictures(change: Buffer, manifest: Manifest) -> NDArray[np.float32]:
    """What pairs of neighbouring rows tell, [rows - 1, 3 P P] float32 of a patch, up to a factor and a constant."""
    [entry] = [entry for entry in manifest.entries if entry.name == ROWS]
    moved = change[entry.offset : entry.offset + entry.size].reshape(entry.shape[0], -1)
    return np.asarray(np.diff(moved[: num_rows(entry.shape[0])], axis=0), dtype=np.float32)


def best_correlations(read: NDArray[np.float32], pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of each picture the highest correlation, by amount, with anything that was read, [N] float64 in [0, 1].

    read: [K, 3 S S].  pictures: [N, S, S, 3] uint8.
    """
    flat = pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1).astype(np.float64)
    return np.asarray(np.abs(_standardised(flat) @ _standardised(read.astype(np.float64)).T).max(axis=1))


def _standardised(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = rows - rows.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12))
