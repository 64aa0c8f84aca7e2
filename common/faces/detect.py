"""A photograph -> the faces in it: boxes, five landmarks, and how well each can be seen.

The cascade of MTCNN (Zhang et al. 2016, arXiv:1604.02878, section II.A): P-Net proposes windows at many scales, R-Net
and O-Net refine them, non-maximum suppression between.  What is found depends on the picture alone: no random numbers,
and ties are broken by place.  Coordinates are px from the centre of the top left pixel, as in `align`.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from common.faces.align import landmark_maps, similarity, template
from common.models.mtcnn import OutputNet, ProposalNet, RefineNet, load_networks

Float64 = NDArray[np.float64]

SMALLEST_FACE_PX = 20  # of the picture that is looked at; the authors' setting
LONGEST_SIDE_PX = 1280  # larger photographs are looked at at this size: a face of 20 px of it has nothing to recognise
_PIXELS_AT_ONCE = 2**20  # of a photograph that is shrunk: 12 MB as floats
_WINDOW_PX = 12  # what P-Net sees at once
_STRIDE_PX = 2
_SCALE_STEP = 0.709  # between the sizes looked at: half the area
_PROPOSED, _REFINED = (
    0.6,
    0.7,
)  # probabilities below which P-Net's and R-Net's boxes are dropped, as the authors have it
LEAST_SCORE = 0.8  # the same for O-Net's
_MOST_PROPOSALS = 2000  # of a scale, the most probable: a picture of nothing but faces has fewer
_OVERLAP_OF_SCALE, _OVERLAP = 0.5, 0.7  # boxes that share more are one face
_SUPERSAMPLING = 3  # samples a pixel and axis when a box is shrunk to a network's input
_SHARPNESS_PX = 112


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a face can be seen.

    size_px: the shorter side of its box in the photograph.  blur: 0 (sharp) to 1 (nothing but smooth): 1 / (1 + v / 50)
    where v is the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000) of the aligned face at 112 px, grey 0 to
    255; a face that was smaller than that is blurred for it.  yaw_deg (positive: its nose points to the right of the
    picture), pitch_deg (positive: up), roll_deg (positive: turned clockwise): an estimate from the five landmarks.
    """

    size_px: float
    blur: float
    yaw_deg: float
    pitch_deg: float
    roll_deg: float


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face.

    box: float64 [4], px x, y, width, height.  landmarks: float64 [5, 2] px: left eye, right eye, nose, left and right
    mouth corner, left and right as seen in the picture.  score: the network's probability that it is a face.
    """

    box: Float64
    landmarks: Float64
    score: float
    quality: Quality


class FaceDetector:
    """Finds faces.  The networks are loaded with the first picture; one detector is for one thread at a time."""

    def __init__(self, *, device: str = "cpu", smallest_px: int = SMALLEST_FACE_PX) -> None:
        """device: as torch names it.  smallest_px: a smaller face, of the picture that is looked at, is not found."""
        self.device = torch.device(device)
        self.smallest_px = max(smallest_px, _WINDOW_PX)

    @functools.cached_property
    def _networks(self) -> tuple[ProposalNet, RefineNet, OutputNet]:
        proposal, refine, output = load_networks()
        return proposal.to(self.device), refine.to(self.device), output.to(self.device)

    @torch.inference_mode()
    def detect(self, image: NDArray[np.uint8]) -> list[Face]:
        """All faces of a photograph, the largest first.

        image: uint8 RGB [H, W, 3].  Photographs with a side above LONGEST_SIDE_PX are shrunk to it first.
        """
        height, width = image.shape[:2]
        if min(height, width) < _WINDOW_PX:
            return []
        shrink = min(1.0, LONGEST_SIDE_PX / max(height, width))
        size = round(height * shrink), round(width * shrink)
        pixels = _shrunk(image, size, self.device) if shrink < 1.0 else _floats(image, self.device)
        looked_at = (pixels - 127.5) / 128.0
        boxes, landmarks, scores = self._output(looked_at, self._refined(looked_at, self._proposed(looked_at)))
        back = np.array([width / looked_at.shape[3], height / looked_at.shape[2]])
        boxes, landmarks = boxes * np.tile(back, 2), landmarks * back
        faces = [
            Face(
                box=np.concatenate([box[:2] - 0.5, box[2:] - box[:2]]),
                landmarks=points - 0.5,
                score=float(score),
                quality=_quality(pixels, box, points, points / back),
            )
            for box, points, score in zip(boxes, landmarks, scores, strict=True)
        ]
        return sorted(faces, key=lambda face: (-face.box[2] * face.box[3], *face.box[:2].tolist()))

    def _proposed(self, picture: Tensor) -> Float64:
        """P-Net's boxes [N, 4] of a picture [1, 3, H, W]: edges left, top, right, bottom, px; squares."""
        proposal = self._networks[0]
        height, width = picture.shape[2:]
        found, scores = [np.zeros((0, 4))], [np.zeros(0)]
        scale = _WINDOW_PX / self.smallest_px
        while min(height, width) * scale >= _WINDOW_PX:
            size = math.ceil(height * scale), math.ceil(width * scale)
            probability, change = proposal(_resized(picture, size))
            boxes, probabilities = _windows(probability[0], change[0])
            boxes *= np.tile([width / size[1], height / size[0]], 2)
            kept = _suppressed(boxes, probabilities, _OVERLAP_OF_SCALE)
            found.append(boxes[kept])
            scores.append(probabilities[kept])
            scale *= _SCALE_STEP
        boxes, probabilities = np.concatenate(found), np.concatenate(scores)
        return _squares(boxes[_suppressed(boxes, probabilities, _OVERLAP)])

    def _refined(self, picture: Tensor, boxes: Float64) -> Float64:
        """R-Net's boxes [M, 4] of P-Net's [N, 4]; squares."""
        if not len(boxes):
            return boxes
        probability, change = (_numpy(part) for part in self._networks[1](_patches(picture, boxes, 24)))
        sure = probability > _REFINED
        moved = _moved(boxes[sure], change[sure])
        return _squares(moved[_suppressed(moved, probability[sure], _OVERLAP)])

    def _output(self, picture: Tensor, boxes: Float64) -> tuple[Float64, Float64, Float64]:
        """O-Net's boxes [K, 4], landmarks [K, 5, 2] and scores [K] of R-Net's boxes [M, 4]."""
        if not len(boxes):
            return np.zeros((0, 4)), np.zeros((0, 5, 2)), np.zeros(0)
        parts = self._networks[2](_patches(picture, boxes, 48))
        probability, change, points = (_numpy(part) for part in parts)
        corner, side = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
        landmarks = corner + side * points.reshape(-1, 2, 5).transpose(0, 2, 1)
        sure = probability > LEAST_SCORE
        moved, landmarks, probability = _moved(boxes[sure], change[sure]), landmarks[sure], probability[sure]
        kept = _suppressed(moved, probability, _OVERLAP, of_smaller=True)
        return moved[kept], landmarks[kept], probability[kept]


def largest(faces: list[Face]) -> Face | None:
    """The face with the largest box; None where there is none."""
    return faces[0] if faces else None


def subject(faces: list[Face], width: int, height: int) -> Face | None:
    """Whom a photograph of width x height px is of: a large face near its middle; None where there is none.

    The area of its box, less twice the squared distance of its middle from the picture's (px), is the highest: as
    FaceNet's program chooses (Sandberg, align_dataset_mtcnn).  By size alone whoever stands in front is taken.
    """
    middle = np.array([width, height]) / 2

    def weight(face: Face) -> float:
        away = face.box[:2] + face.box[2:] / 2 + 0.5 - middle
        return float(face.box[2] * face.box[3] - 2.0 * away @ away)

    return max(faces, key=weight, default=None)


def landmark_map(face: Face, image_size: int) -> Float64:
    """The map [2, 3] that brings a face's landmarks to the template, as `align` has them."""
    return np.asarray(landmark_maps(face.landmarks[None], image_size)[0])


def pose(landmarks: Float64) -> tuple[float, float, float]:
    """Yaw, pitch and roll in degrees, estimated from five landmarks [5, 2] px; signs as in `Quality`.

    Scaled orthography (the first step of POSIT: DeMenthon & Davis, IJCV 15, 1995): the five points of a mean face in
    space are brought to the landmarks by least squares; the
    rotation nearest to that map (by its singular values) gives the angles.
    """
    model = _mean_face()
    linear = np.linalg.lstsq(model, landmarks - landmarks.mean(axis=0), rcond=None)[0].T  # [2, 3]
    left, _, right = np.linalg.svd(linear, full_matrices=False)
    across, down = left @ right
    forward = np.cross(across, down)  # the rotation's rows: x to the right, y down, z away from the camera
    # the rotation is roll after pitch after yaw, so the last row and the middle column hold one or two of them each
    yaw = math.atan2(forward[0], forward[2])
    pitch = math.asin(max(-1.0, min(1.0, -forward[1])))
    roll = math.atan2(-across[1], down[1])
    return math.degrees(yaw), math.degrees(pitch), math.degrees(roll)


@functools.cache
def _mean_face() -> Float64:
    """Five points [5, 3] in space about their mean, px when aligned at 112 px: x to the right, y down, z away.

    The mean of 156 nearly frontal photographs as this detector sees them, made symmetric; the nose's tip stands 0.45 of
    the eyes' distance before the plane of eyes and mouth corners (28 of 62 mm).
    """
    points = np.array([[-18.0, 0.0, 0.0], [18.0, 0.0, 0.0], [0.0, 21.2, -16.2], [-15.6, 38.9, 0.0], [15.6, 38.9, 0.0]])
    return np.asarray(points - points.mean(axis=0))


def _quality(pixels: Tensor, box: Float64, landmarks: Float64, seen: Float64) -> Quality:
    """pixels: [1, 3, h, w] in [0, 255] as looked at.  box: edges, photograph px.  seen: landmarks there, from edges."""
    to_picture = np.linalg.inv(np.vstack([similarity(seen, template(_SHARPNESS_PX)), [0.0, 0.0, 1.0]]))[:2]
    grey = _sampled(pixels, to_picture[None], _SHARPNESS_PX).mean(dim=1)[0]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4.0 * grey[1:-1, 1:-1]
    yaw, pitch, roll = pose(landmarks)
    return Quality(
        size_px=float(min(box[2] - box[0], box[3] - box[1])),
        blur=1.0 / (1.0 + float(laplacian.var()) / 50.0),
        yaw_deg=yaw,
        pitch_deg=pitch,
        roll_deg=roll,
    )


def _floats(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, H, W], the same values."""
    return torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float()


def _shrunk(image: NDArray[np.uint8], size: tuple[int, int], device: torch.device) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, *size], as `_resized` has it: across first, some rows at a time.

    As floats the whole of 50 million pixels would take 600 MB.
    """
    rows = max(1, _PIXELS_AT_ONCE // image.shape[1])
    strips = [image[top : top + rows] for top in range(0, len(image), rows)]
    narrow = [_resized(_floats(strip, device), (len(strip), size[1])) for strip in strips]
    return _resized(torch.cat(narrow, dim=2), size)


def _resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(picture, size, mode="bilinear", align_corners=False, antialias=True)


def _windows(probability: Tensor, change: Tensor) -> tuple[Float64, Float64]:
    """P-Net's sure windows, their boxes moved: [N, 4] edges in px of its input, and probabilities [N].

    probability: [H', W'].  change: [4, H', W'].
    """
    sure = (probability > _PROPOSED).nonzero()
    scores = probability[sure[:, 0], sure[:, 1]]
    if len(scores) > _MOST_PROPOSALS:
        best = scores.argsort(descending=True, stable=True)[:_MOST_PROPOSALS]
        sure, scores = sure[best], scores[best]
    corners = _numpy(sure.flip(1)) * _STRIDE_PX
    boxes = np.concatenate([corners, corners + _WINDOW_PX], axis=1)
    return _moved(boxes, _numpy(change[:, sure[:, 0], sure[:, 1]].T)), _numpy(scores)


def _moved(boxes: Float64, change: Float64) -> Float64:
    """Boxes [N, 4] with each edge moved by a fraction [N, 4] of their width or height."""
    return boxes + change * np.tile(boxes[:, 2:] - boxes[:, :2], 2)


def _squares(boxes: Float64) -> Float64:
    """Squares about the middle of each box, as wide as its longer side.  [N, 4] edges."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
    return np.concatenate([middle - half, middle + half], axis=1)


def _suppressed(boxes: Float64, scores: Float64, overlap: float, *, of_smaller: bool = False) -> NDArray[np.int64]:
    """Non-maximum suppression: the rows that stay, the most probable first.

    boxes: [N, 4] edges.  A box goes where it shares more than `overlap` of the union, or of the smaller box, with a
    better one that stays.
    """
    rest = np.lexsort([*boxes.T, -scores])
    areas = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).prod(axis=1)
    kept = []
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[rest, :2]), np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.maximum(high - low, 0.0).prod(axis=1)
        whole = np.minimum(areas[best], areas[rest]) if of_smaller else areas[best] + areas[rest] - shared
        rest = rest[shared <= overlap * whole]
    return np.array(kept, dtype=np.int64)


def _patches(picture: Tensor, boxes: Float64, side: int) -> Tensor:
    """What is in each box [N, 4], as [N, 3, side, side]; grey (0) outside the picture [1, 3, H, W]."""
    scale = (boxes[:, 2:] - boxes[:, :2]) / side
    maps = np.zeros((len(boxes), 2, 3))
    maps[:, 0, 0], maps[:, 1, 1], maps[:, :, 2] = scale[:, 0], scale[:, 1], boxes[:, :2]
    return _sampled(picture, maps, side)


def _sampled(picture: Tensor, maps: Float64, side: int) -> Tensor:
    """Bilinear samples, some in each pixel and their mean: [N, C, side, side] of a picture [1, C, H, W].

    maps: [N, 2, 3], output px to picture px, both from the top left edge.
    """
    dense = side * _SUPERSAMPLING
    size = torch.tensor([picture.shape[3], picture.shape[2]], dtype=torch.float64)
    affine = torch.from_numpy(maps)
    # affine_grid speaks of [-1, 1] at both ends: out = (grid + 1) * side / 2, grid = picture / size * 2 - 1
    linear = affine[:, :, :2] * side / size[:, None]
    shift = (affine[:, :, 2] + affine[:, :, :2].sum(dim=2) * side / 2) * 2 / size - 1.0
    theta = torch.cat([linear, shift[:, :, None]], dim=2).to(picture)
    grid = F.affine_grid(theta, [len(maps), picture.shape[1], dense, dense], align_corners=False)
    samples = F.grid_sample(picture.expand(len(maps), -1, -1, -1), grid, mode="bilinear", align_corners=False)
    return F.avg_pool2d(samples, _SUPERSAMPLING)


def _numpy(values: Tensor) -> Float64:
    return values.double().cpu().numpy()
