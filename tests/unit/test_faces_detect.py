"""Faces are found where they are, whatever the picture's size; what is told of each is what was done to it."""

import importlib.util
import math
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from common.errors import FaceFedError
from common.faces import detect, photos
from common.faces.align import TEMPLATE_112_PX
from common.faces.decode import DETECT, Job, Recipe, decode_aligned, decode_job
from common.faces.detect import FaceDetector, largest, pose
from common.faces.index import read_index
from common.models import mtcnn
from simulation.data.synthetic import SynthSettings, write_dataset


@pytest.fixture(scope="module")
def detector():
    return FaceDetector()


@pytest.fixture(scope="module")
def portraits(tmp_path_factory):
    """Drawn people who do not exist: (uint8 [H, W, 3], landmarks [5, 2]) of each picture."""
    root = tmp_path_factory.mktemp("drawn") / "set"
    write_dataset(SynthSettings(layout="vggface2", num_people=7, pictures_per_person=2), root)
    index = read_index("vggface2", root)
    return [
        (np.array(Image.open(root / path).convert("RGB")), points.astype(np.float64))
        for path, points in zip(index.paths, index.landmarks, strict=True)
    ]


@pytest.fixture(scope="module")
def frontal(portraits):
    """Of these the one who looks straightest into the camera: uint8 [H, W, 3]."""
    return min(portraits, key=lambda drawn: abs(pose(drawn[1])[0]))[0]


def error_of(face, points):
    """Mean distance of the landmarks over the eyes' distance (NME)."""
    return np.linalg.norm(face.landmarks - points, axis=1).mean() / np.linalg.norm(points[1] - points[0])


def test_a_large_photograph_is_shrunk_in_strips_to_the_same_picture(monkeypatch):
    image = np.random.default_rng(1).integers(0, 256, (301, 173, 3), dtype=np.uint8)
    whole = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    wanted = torch.nn.functional.interpolate(whole, (64, 37), mode="bilinear", align_corners=False, antialias=True)
    widest = []
    real = detect._floats
    monkeypatch.setattr(detect, "_floats", lambda part, device: widest.append(part[..., 0].size) or real(part, device))
    monkeypatch.setattr(detect, "_PIXELS_AT_ONCE", 5_000)
    found = detect._shrunk(image, (64, 37), torch.device("cpu"))
    assert torch.allclose(found, wanted, rtol=0.0, atol=1e-3)  # of 255
    assert sum(widest) == image[..., 0].size
    assert max(widest) <= 5_000


def test_drawn_faces_are_found_with_their_landmarks(detector, portraits):
    found = [largest(detector.detect(image)) for image, _ in portraits]
    errors = [error_of(face, points) for face, (_, points) in zip(found, portraits, strict=True) if face]
    assert len(errors) >= 0.9 * len(portraits)
    assert np.median(errors) < 0.1
    for face in filter(None, found):
        left, top, width, height = face.box
        inside = (face.landmarks > [left, top]) & (face.landmarks < [left + width, top + height])
        assert inside.all()
        assert 0.8 < face.score <= 1.0


def test_a_mirrored_picture_gives_mirrored_landmarks(detector, portraits):
    """x -> W - 1 - x between centres of pixels: half a pixel of error in the convention would show in the mean."""
    apart = []
    for image, points in portraits:
        here, there = (largest(detector.detect(seen)) for seen in (image, image[:, ::-1]))
        if here and there and error_of(here, points) < 0.2:
            mirrored = image.shape[1] - 1 - there.landmarks[[1, 0, 2, 4, 3], 0]
            apart.append(float(np.median(here.landmarks[:, 0] - mirrored)) / 2)
    assert abs(np.median(apart)) < 0.3, apart


def test_the_same_picture_gives_the_same_bits(detector, frontal):
    first, again = (FaceDetector().detect(frontal)[0], detector.detect(frontal)[0])
    np.testing.assert_array_equal(first.landmarks, again.landmarks)
    assert first.quality == again.quality


def on_canvas(height, width, *placed):
    canvas = np.full((height, width, 3), 90, dtype=np.uint8)
    for image, left, top in placed:
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def test_a_face_elsewhere_is_found_elsewhere(detector, frontal):
    image = frontal
    here = largest(detector.detect(on_canvas(700, 600, (image, 40, 60))))
    there = largest(detector.detect(on_canvas(700, 600, (image, 140, 160))))
    np.testing.assert_allclose(there.landmarks - here.landmarks, 100.0, atol=2.5)
    np.testing.assert_allclose(there.box[2:], here.box[2:], rtol=0.08)


def test_two_faces_come_largest_first(detector, frontal):
    image = frontal
    small = np.asarray(Image.fromarray(image).resize((image.shape[1] // 2, image.shape[0] // 2)))
    faces = detector.detect(on_canvas(500, 800, (small, 500, 200), (image, 20, 20)))
    assert len(faces) == 2
    assert faces[0].landmarks[:, 0].max() < 450 < faces[1].landmarks[:, 0].min()
    assert faces[0].quality.size_px > 1.5 * faces[1].quality.size_px


def test_a_large_photograph_is_answered_in_its_own_pixels(detector, frontal):
    image = frontal
    here = largest(detector.detect(image))
    factor = math.ceil(2 * detect.LONGEST_SIDE_PX / max(image.shape))
    large = np.asarray(Image.fromarray(image).resize((image.shape[1] * factor, image.shape[0] * factor)))
    there = largest(detector.detect(large))
    np.testing.assert_allclose((there.landmarks + 0.5) / factor, here.landmarks + 0.5, atol=3.0)


def test_a_photograph_is_of_the_large_face_near_its_middle():
    def face(left, top, size):
        quality = detect.Quality(size_px=size, blur=0.0, yaw_deg=0.0, pitch_deg=0.0, roll_deg=0.0)
        box = np.array([left, top, size, size], dtype=np.float64)
        return detect.Face(box=box, landmarks=np.zeros((5, 2)), score=1.0, quality=quality)

    middle, rim, tiny = face(80, 80, 90), face(0, 0, 95), face(120, 120, 10)
    assert detect.subject([rim, middle, tiny], 250, 250) is middle, "not a slightly larger one in a corner"
    assert detect.subject([tiny, face(60, 60, 90)], 250, 250).box[2] == 90, "nor a tiny one in the very middle"
    assert detect.subject([], 250, 250) is None


@pytest.mark.parametrize("shape", [(200, 200), (11, 300), (1, 1), (12, 12)])
def test_where_there_is_no_face_there_is_none(detector, shape):
    noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert detector.detect(noise) == []
    assert largest([]) is None


def turned(yaw, pitch, roll):
    """Landmarks [5, 2] of the mean face turned by these degrees, seen from far away, at another size and place."""
    a, b, c = np.radians([yaw, pitch, roll])
    about_y = np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), np.sin(b)], [0, -np.sin(b), np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return (detect._mean_face() @ (about_z @ about_x @ about_y).T)[:, :2] * 1.7 + [90.0, 40.0]


@pytest.mark.parametrize(
    "angles", [(0, 0, 0), (30, 0, 0), (-50, 0, 0), (0, 20, 0), (0, -25, 0), (0, 0, 40), (25, -15, 10)]
)
def test_a_turn_of_the_mean_face_is_told(angles):
    """The five points are turned in space and projected along z: the estimate must give the three angles back."""
    np.testing.assert_allclose(pose(turned(*angles)), angles, atol=0.01)


def test_the_signs_of_the_angles():
    straight = turned(0, 0, 0)
    eyes = straight[:2].mean(axis=0)
    assert turned(30, 0, 0)[2, 0] > straight[2, 0], "yaw > 0: the nose points to the right of the picture"
    assert turned(0, 20, 0)[2, 1] < straight[2, 1], "pitch > 0: the nose points up"
    assert turned(0, 0, 20)[1, 1] > eyes[1], "roll > 0: clockwise, so the right eye is lower"


def test_blur_is_told(detector, frontal):
    image = Image.fromarray(frontal)
    blurs = [
        largest(detector.detect(np.asarray(image.filter(ImageFilter.GaussianBlur(radius))))).quality.blur
        for radius in (0, 2, 4)
    ]
    assert 0 <= blurs[0] < blurs[1] < blurs[2] <= 1


def test_suppression_keeps_the_best_of_each_heap():
    generator = np.random.default_rng(3)
    corners = generator.integers(0, 40, (60, 2)).astype(np.float64)
    boxes = np.concatenate([corners, corners + generator.integers(5, 30, (60, 2))], axis=1)
    scores = generator.random(60).round(1)  # with ties
    for of_smaller in (False, True):
        kept = []
        for row in sorted(range(60), key=lambda i: (-scores[i], *boxes[i][::-1])):
            if all(overlap(boxes[row], boxes[other], of_smaller=of_smaller) <= 0.5 for other in kept):
                kept.append(row)
        found = detect._suppressed(boxes, scores, 0.5, of_smaller=of_smaller)
        np.testing.assert_array_equal(found, kept)


def overlap(one, other, *, of_smaller):
    shared = np.prod(np.maximum(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0))
    areas = np.prod(one[2:] - one[:2]), np.prod(other[2:] - other[:2])
    return shared / (min(areas) if of_smaller else sum(areas) - shared)


# -- the weights ------------------------------------------------------------------------------------------------------


def test_the_arrays_are_those_that_joblib_unpickles():
    """An independent reader of the same files; ours carries out no opcode."""
    folder = Path(importlib.util.find_spec("mtcnn").submodule_search_locations[0], "assets", "weights")
    for name, network in zip(mtcnn.WEIGHTS, mtcnn.load_networks(), strict=True):
        for array, parameter in zip(joblib.load(folder / f"{name}.lz4"), network.parameters(), strict=True):
            theirs = array.squeeze()
            if theirs.ndim == 2 and parameter.dim() == 2:
                theirs = theirs.T
            elif parameter.dim() == 4:
                theirs = array.transpose(3, 2, 0, 1)
            np.testing.assert_array_equal(parameter.numpy(), theirs)


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setitem(mtcnn.WEIGHTS, "rnet", "0" * 64)
    with pytest.raises(FaceFedError, match=r"rnet\.lz4: not the weights of mtcnn 1\.0\.0"):
        mtcnn.load_networks()


def test_a_missing_wheel_is_told(monkeypatch):
    monkeypatch.setattr(mtcnn.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(FaceFedError, match="install the package mtcnn"):
        mtcnn.load_networks()


def test_p_net_gives_a_number_for_each_window():
    proposal = mtcnn.load_networks()[0]
    for height, width in ((12, 12), (13, 40), (57, 100)):
        probability, change = proposal(torch.zeros(1, 3, height, width))
        rows, columns = math.ceil((height - 2) / 2) - 4, math.ceil((width - 2) / 2) - 4
        assert probability.shape == (1, rows, columns)
        assert change.shape == (1, 4, rows, columns)


# -- aligned ----------------------------------------------------------------------------------------------------------


def test_the_aligned_face_is_found_on_the_template(detector, frontal):
    image = frontal
    face = photos.aligned(image, largest(detector.detect(image)))
    assert face.shape == (112, 112, 3)
    again = largest(detector.detect(on_canvas(212, 212, (face, 50, 50))))
    assert np.linalg.norm(again.landmarks - 50 - TEMPLATE_112_PX, axis=1).mean() < 4.0


def test_aligning_pixels_is_aligning_the_file(tmp_path, detector, frontal):
    """`data align` works on pixels, packing on files: the same face must come out."""
    image = frontal
    Image.fromarray(image).save(tmp_path / "a.png")
    face = largest(detector.detect(photos.open_photo(tmp_path / "a.png")))
    affine = detect.landmark_map(face, 96)
    by_file = decode_aligned((tmp_path / "a.png").read_bytes(), affine, 96)
    np.testing.assert_array_equal(photos.aligned(image, face, 96), by_file)


def test_packing_may_find_the_landmarks_itself(tmp_path, detector, frontal):
    """`data.alignment = detect`: the aligned face of each file, or the reason why there is none."""
    Image.fromarray(frontal).save(tmp_path / "face.png")
    noise = np.random.default_rng(1).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "nobody.png")
    (tmp_path / "text.png").write_text("no picture")
    recipe = Recipe(alignment=DETECT, image_size=112, box_margin=0.0)
    job = Job(root=tmp_path, paths=("face.png", "nobody.png", "text.png"), points=None, recipe=recipe)
    done = decode_job(job)
    assert done.reasons == ("", "no face found", "unreadable: not a JPEG, PNG, WebP or BMP picture")
    [face] = (np.frombuffer(picture, dtype=np.uint8).reshape(112, 112, 3) for picture in done.pictures)
    np.testing.assert_array_equal(face, photos.aligned(frontal, largest(detector.detect(frontal))))
