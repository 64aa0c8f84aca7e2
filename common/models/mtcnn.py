"""The three networks of MTCNN (Zhang et al. 2016, arXiv:1604.02878, figure 2), with the weights of the wheel `mtcnn`.

P-Net looks at every 12 px window of a picture, R-Net at 24 px and O-Net at 48 px pictures of what was proposed.  All
take float32 RGB [B, 3, H, W], (value - 127.5) / 128, and give the probability of a face [B, ...] and how its box is
moved [B, 4, ...] (left, top, right, bottom as fractions of the box's width and height); O-Net also the five landmarks
[B, 10] (five x, then five y, fractions of the box).

The wheel keeps its arrays as a joblib file.  That is a pickle, and nothing here unpickles: `_arrays` walks over its
opcodes without carrying one out, and takes the plain numbers that stand between them.  So it needs no TensorFlow, of
which the wheel's own program is made.
"""

import functools
import hashlib
import importlib.util
import io
import math
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import FaceFedError

WEIGHTS: Final = {
    "pnet": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}  # network -> SHA-256 of its file in the wheel of mtcnn 1.0.0
_SUB_FOLDER: Final = Path("assets", "weights")


class ProposalNet(nn.Module):
    """P-Net: every 12 px window, 2 px apart, of a picture of any size.

    [B, 3, H, W] -> probability [B, H', W'] and box changes [B, 4, H', W'], H' = ceil((H - 2) / 2) - 4, W' alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 10, 3),
            nn.PReLU(10),
            nn.MaxPool2d(2, 2, ceil_mode=True),
            nn.Conv2d(10, 16, 3),
            nn.PReLU(16),
            nn.Conv2d(16, 32, 3),
            nn.PReLU(32),
        )
        self.box = nn.Conv2d(32, 4, 1)
        self.face = nn.Conv2d(32, 2, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        features = self.features(pictures)
        return self.face(features).softmax(dim=1)[:, 1], self.box(features)


class RefineNet(nn.Module):
    """R-Net: [B, 3, 24, 24] -> probability [B] and box changes [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 28, 3),
            nn.PReLU(28),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(28, 48, 3),
            nn.PReLU(48),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(48, 64, 2),
            nn.PReLU(64),
            _ByColumn(),
            nn.Linear(576, 128),
            nn.PReLU(128),
        )
        self.box = nn.Linear(128, 4)
        self.face = nn.Linear(128, 2)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        features = self.features(pictures)
        return self.face(features).softmax(dim=1)[:, 1], self.box(features)


class OutputNet(nn.Module):
    """O-Net: [B, 3, 48, 48] -> probability [B], box changes [B, 4] and landmarks [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.PReLU(32),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(32, 64, 3),
            nn.PReLU(64),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 64, 3),
            nn.PReLU(64),
            nn.MaxPool2d(2, 2, ceil_mode=True),
            nn.Conv2d(64, 128, 2),
            nn.PReLU(128),
            _ByColumn(),
            nn.Linear(1152, 256),
            nn.PReLU(256),
        )
        self.box = nn.Linear(256, 4)
        self.landmarks = nn.Linear(256, 10)
        self.face = nn.Linear(256, 2)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        features = self.features(pictures)
        return self.face(features).softmax(dim=1)[:, 1], self.box(features), self.landmarks(features)


class _ByColumn(nn.Module):
    """[B, C, H, W] -> [B, W * H * C]: the authors' MATLAB counts along columns, and so do their weights."""

    def forward(self, features: Tensor) -> Tensor:
        return features.permute(0, 3, 2, 1).flatten(1)


def load_networks() -> tuple[ProposalNet, RefineNet, OutputNet]:
    """The three networks with their weights, on the CPU, for use only.  Raises FaceFedError where the wheel is away."""
    networks = ProposalNet(), RefineNet(), OutputNet()
    for name, network in zip(WEIGHTS, networks, strict=True):
        parameters = list(network.parameters())
        arrays = _arrays(_weights(name), [_keras_shape(parameter) for parameter in parameters])
        with torch.no_grad():
            for parameter, array in zip(parameters, arrays, strict=True):
                parameter.copy_(_torch_layout(torch.from_numpy(array.copy()), parameter))
        network.eval().requires_grad_(requires_grad=False)
    return networks


@functools.cache
def weights_digest() -> str:
    """SHA-256, 64 hex digits, over those of the three files: other weights find other faces."""
    return hashlib.sha256("".join(WEIGHTS.values()).encode()).hexdigest()


def _weights(name: str) -> bytes:
    """The unpacked joblib file of one network.  Raises FaceFedError where it is not there, or not the known one."""
    import lz4.frame  # with the detector only

    found = importlib.util.find_spec("mtcnn")  # not imported: that would need TensorFlow
    if found is None or not found.submodule_search_locations:
        raise FaceFedError("the face detector's weights are not installed; install the package mtcnn 1.0.0.")
    file = Path(found.submodule_search_locations[0]) / _SUB_FOLDER / f"{name}.lz4"
    try:
        packed = file.read_bytes()
    except OSError as error:
        raise FaceFedError(
            f"{file}: cannot be read: {error.strerror}; install the package mtcnn 1.0.0 again."
        ) from None
    if hashlib.sha256(packed).hexdigest() != WEIGHTS[name]:
        raise FaceFedError(f"{file}: not the weights of mtcnn 1.0.0 (another SHA-256); install that version.")
    return bytes(lz4.frame.decompress(packed))


def _keras_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape in which Keras keeps such a parameter: kernels [H, W, in, out], matrices [in, out]."""
    if parameter.dim() == 4:
        out, into, height, width = parameter.shape
        return height, width, into, out
    return tuple(reversed(parameter.shape))


def _torch_layout(array: Tensor, parameter: Tensor) -> Tensor:
    return array.permute(3, 2, 0, 1) if parameter.dim() == 4 else array.T if parameter.dim() == 2 else array


def _arrays(stream: bytes, shapes: list[tuple[int, ...]]) -> Iterator[NDArray[np.float32]]:
    """The float32 arrays of a joblib file, in order.

    joblib writes, for each array, the opcodes that make a wrapper with its shape; they end in SETITEMS, BUILD. Then
    come a byte n, n bytes that bring the numbers to a multiple of 16, and the numbers, row by row.
    shapes: what the networks need; that the file holds them in this order follows from its SHA-256.
    """
    file = io.BytesIO(stream)
    for shape in shapes:
        _pass_wrapper(file)
        file.seek(file.read(1)[0], io.SEEK_CUR)
        yield np.frombuffer(file.read(4 * math.prod(shape)), dtype="<f4").reshape(shape)


def _pass_wrapper(file: io.BytesIO) -> None:
    before = ""
    for opcode, _, _ in pickletools.genops(file):
        if (before, opcode.name) == ("SETITEMS", "BUILD"):
            return
        before = opcode.name
