"""Synthetic data sets: official layouts on disk, repeatable bytes, true landmarks, and faces that are not too easy."""

import dataclasses
import errno
import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from common.errors import DataError
from common.faces.datasets import DRAWN
from simulation.data.synth_camera import View, curve, loop, sample_size, sample_view
from simulation.data.synth_people import LATENT_SIZE, TRAITS, person_latent, picture_generator, read_traits
from simulation.data.synth_portrait import render_face
from simulation.data.synthetic import MANIFEST, SynthSettings, attributes_of, layout_of, write_dataset

OFFICIAL = ("celeba", "vggface2")
SMALL = {"num_people": 7, "pictures_per_person": 3, "seed": 5}

PLAIN = View(
    yaw_rad=0.0, pitch_rad=0.0, roll_rad=0.0, eye_distance=0.2, centre=(0.5, 0.5), light=(0.0, 0.0, 1.0), ambient=0.7,
    exposure=1.0, cast=(1.0, 1.0, 1.0), contrast=1.0, blur_px=0.0, noise=0.0, smile=0.0, mouth_opening=0.0,
    brow_raise=0.0, eye_closing=0.0, gaze=(0.0, 0.0), extras=frozenset(), hair_length=0.0, hair_volume=1.0,
    hair_shift=0.0, colours=((90, 90, 90),) * 8, seed=3,
)  # fmt: skip
AVERAGE = np.zeros(LATENT_SIZE)
SIZE = (200, 240)


def plain(**changes):
    return render_face(AVERAGE, dataclasses.replace(PLAIN, **changes), layout_of("celeba").style, SIZE)


def settings(layout, **changes):
    return SynthSettings(layout=layout, **{**SMALL, **changes})


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Both layouts, drawn once: layout -> folder."""
    root = tmp_path_factory.mktemp("synth")
    for layout in OFFICIAL:
        write_dataset(settings(layout), root / layout)
    return {layout: root / layout for layout in OFFICIAL}


@pytest.mark.parametrize("layout", OFFICIAL)
def test_same_settings_give_the_same_bytes_in_any_number_of_processes(layout, drawn, tmp_path):
    write_dataset(settings(layout), tmp_path / "again", num_processes=2)
    assert digests(tmp_path / "again") == digests(drawn[layout])
    write_dataset(settings(layout, seed=6), tmp_path / "other")
    ours, others = digests(drawn[layout]), digests(tmp_path / "other")
    pictures = {name for name in ours if name.endswith(".jpg")}
    assert not {ours[name] for name in pictures} & set(others.values())


def test_no_person_is_in_two_data_sets_or_seeds():
    streams = [layout_of(layout).stream for layout in DRAWN]
    latents = [person_latent(seed, stream, person) for stream in streams for seed in (1, 2) for person in range(40)]
    closeness = np.corrcoef(np.stack(latents)) - np.eye(len(latents))
    # 240 people of 48 independent normal traits: the largest of 28,680 correlations stays near 4.2 / sqrt(48) = 0.61.
    assert closeness.max() < 0.75


def test_celeba_layout(drawn):
    root, count = drawn["celeba"], 21
    names = [f"{number:06d}.jpg" for number in range(1, count + 1)]
    assert sorted(path.name for path in (root / "img_align_celeba").iterdir()) == names
    for name in names:
        with Image.open(root / "img_align_celeba" / name) as picture:
            assert (picture.size, picture.mode, picture.format) == ((178, 218), "RGB", "JPEG")

    identity_bytes = (root / "identity_CelebA.txt").read_bytes()
    assert identity_bytes.count(b"\r\n") == identity_bytes.count(b"\n") == count
    assert (root / "list_eval_partition.txt").read_bytes().count(b"\r\n") == count
    identity = dict(line.split() for line in identity_bytes.decode().splitlines())
    partition = dict(line.split() for line in (root / "list_eval_partition.txt").read_text().splitlines())
    assert list(identity) == list(partition) == names
    people = {part: {identity[n] for n in names if partition[n] == part} for part in "012"}
    assert [len(people[part]) for part in "012"] == [3, 2, 2]
    assert set.union(*people.values()) == {str(number) for number in range(1, 8)}
    assert [partition[name] for name in names] == sorted(partition.values())  # one split after another, as official
    assert [identity[name] for name in names] != sorted(identity.values(), key=list(identity.values()).index)

    for file, columns in (("list_landmarks_align_celeba", 10), ("list_bbox_celeba", 4), ("list_attr_celeba", 40)):
        first, header, *rows = (root / f"{file}.txt").read_bytes().decode().removesuffix("\n").split("\n")
        assert first == str(count)
        assert len(header.removeprefix("image_id ").split()) == columns
        assert [row.split()[0] for row in rows] == names
        assert {len(row.split()) for row in rows} == {columns + 1}
        assert all(re.fullmatch(r"-?\d+", value) for row in rows for value in row.split()[1:])


def test_vggface2_layout(drawn):
    root = drawn["vggface2"]
    meta = (root / "identity_meta.csv").read_text().splitlines()
    assert meta[0] == "Class_ID, Name, Sample_Num, Flag, Gender"
    assert all(re.fullmatch(r'n\d{6}, "[^",]+", 3, [01], [mf]', row) for row in meta[1:])
    flags = {row.split(", ")[0]: row.split(", ")[3] for row in meta[1:]}
    assert list(flags) == [f"n{number:06d}" for number in range(1, 8)]
    for split, flag in (("train", "1"), ("test", "0")):
        assert {path.name for path in (root / split).iterdir()} == {n for n, seen in flags.items() if seen == flag}
        listed = (root / f"{split}_list.txt").read_text().splitlines()
        on_disk = sorted(str(path.relative_to(root / split)) for path in (root / split).rglob("*.jpg"))
        assert listed == on_disk
        assert all(re.fullmatch(r"n\d{6}/\d{4}_01\.jpg", name) for name in listed)
        stems = [f'"{name.removesuffix(".jpg")}"' for name in listed]
        for kind, header, value in (
            ("bb", "NAME_ID,X,Y,W,H", r"\d+"),
            ("landmark", "NAME_ID,P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y", r"-?\d+\.\d{6}"),
        ):
            first, *rows = (root / "bb_landmark" / f"loose_{kind}_{split}.csv").read_text().splitlines()
            assert first == header
            assert [row.split(",")[0] for row in rows] == stems
            assert all(re.fullmatch(value, v) for row in rows for v in row.split(",")[1:])
            assert {len(row.split(",")) for row in rows} == {len(header.split(","))}


@pytest.mark.shared
@pytest.mark.parametrize("layout", OFFICIAL)
def test_list_files_begin_like_the_real_stand_ins(layout, drawn, shared_faces):
    for path in sorted((shared_faces / layout).rglob("*.txt")) + sorted((shared_faces / layout).rglob("*.csv")):
        ours = drawn[layout] / path.relative_to(shared_faces / layout)
        theirs, mine = path.read_bytes().split(b"\n"), ours.read_bytes().split(b"\n")
        head = {"list_landmarks_align_celeba": 2, "list_bbox_celeba": 2, "list_attr_celeba": 2}.get(path.stem, 0)
        if head:
            assert mine[1] == theirs[1], path.name
        elif path.suffix == ".csv":
            assert mine[0] == theirs[0], path.name
        assert mine[head].endswith(b"\r") == theirs[head].endswith(b"\r"), path.name
        assert len(mine[head].split()) == len(theirs[head].split()), path.name


def test_the_same_data_set_is_not_drawn_twice(drawn):
    root = drawn["celeba"]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    summary = write_dataset(settings("celeba"), root)
    assert (summary.drawn, summary.num_people, summary.num_pictures) == (False, 7, 21)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with pytest.raises(DataError, match=r"other settings.*seed 5.*seed 9"):
        write_dataset(settings("celeba", seed=9), root)


def test_an_interrupted_data_set_is_never_taken_for_a_whole_one(drawn, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(done, total):
        assert total == 21
        if done >= 6:
            raise StoppedError

    with pytest.raises(StoppedError):
        write_dataset(settings("vggface2"), tmp_path, progress=stop)
    assert json.loads((tmp_path / MANIFEST).read_text())["complete"] is False
    assert not list(tmp_path.glob("*.txt"))
    seen = []
    summary = write_dataset(settings("vggface2"), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert summary.drawn
    assert seen == [(done, 21) for done in range(3, 22, 3)]
    assert digests(tmp_path) == digests(drawn["vggface2"])


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="no synthetic data set"):
        write_dataset(settings("celeba"), tmp_path)
    for content in ("[1]", "{}", "not json"):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(DataError, match="no synthetic data set"):
            write_dataset(settings("celeba"), tmp_path)
    with pytest.raises(DataError, match="is a file"):
        write_dataset(settings("celeba"), tmp_path / "holiday.jpg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holiday.jpg", MANIFEST]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"layout": "celebs"}, "did you mean 'celeba'"),
        ({"num_people": 0}, "num_people = 0 cannot be drawn; choose a number from 6"),
        ({"num_people": 5}, "num_people = 5"),
        ({"pictures_per_person": 1}, "pictures_per_person = 1 .* from 2"),
        ({"pictures_per_person": -3}, "pictures_per_person = -3"),
        ({"num_people": 90_000, "pictures_per_person": 90}, "num_people x pictures_per_person = 8100000"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_bad_settings_are_one_line(changes, line, tmp_path):
    with pytest.raises(DataError, match=line) as caught:
        write_dataset(SynthSettings(**{"layout": "celeba", **SMALL, **changes}), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("code", "line"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written")])
def test_a_full_or_read_only_disk_is_one_line(code, line, tmp_path, monkeypatch):
    def save(*_args, **_kwargs):
        raise OSError(code, "the disk says no")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(DataError, match=line):
        write_dataset(settings("celeba"), tmp_path / "out")


def test_landmarks_follow_the_head():
    """Derivation: an average person's eyes stand 2 x 0.46 head units apart, which PLAIN makes 0.2 x 200 px = 40 px."""
    face = plain()
    left, right, nose, *_ = face.landmarks
    assert face.picture.shape == (240, 200, 3)
    np.testing.assert_allclose(right - left, (40.0, 0.0), atol=0.6)
    np.testing.assert_allclose((left + right) / 2, (100.0, 120.0), atol=1.0)
    assert abs(nose[0] - 100) < 1e-6

    rolled = plain(roll_rad=0.3).landmarks
    across = rolled[1] - rolled[0]
    assert np.arctan2(across[1], across[0]) == pytest.approx(0.3, abs=1e-9)
    assert plain(yaw_rad=0.4).landmarks[2, 0] > 105  # the nose turns to the right before the eyes do
    assert plain(pitch_rad=0.3).landmarks[2, 1] > nose[1] + 1
    assert plain(smile=1.0).landmarks[3, 0] < face.landmarks[3, 0] - 1
    x, y, width, height = face.box
    assert (face.landmarks > (x, y)).all()
    assert (face.landmarks < (x + width, y + height)).all()


def test_eyes_are_drawn_where_the_landmarks_say():
    wide = AVERAGE.copy()
    wide[list(TRAITS).index("eye_opening")] = 2.0
    for yaw in (-0.35, 0.0, 0.35):
        view = dataclasses.replace(PLAIN, yaw_rad=yaw, roll_rad=0.1)
        face = render_face(wide, view, layout_of("celeba").style, SIZE)
        for x, y in face.landmarks[:2]:
            patch = face.picture[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].mean(axis=2)
            assert patch.min() < 40  # the pupil


def test_drawing_is_pure_and_continuous():
    style, stream = layout_of("vggface2").style, layout_of("vggface2").stream
    rng = picture_generator(1, stream, 0, 0)
    view, size, latent = sample_view(rng, style), sample_size(rng, style), person_latent(1, stream, 0)
    first = render_face(latent, view, style, size)
    again = render_face(latent, view, style, size)
    np.testing.assert_array_equal(first.picture, again.picture)
    np.testing.assert_array_equal(first.landmarks, again.landmarks)
    moved = render_face(latent + 1e-3, view, style, size)
    stranger = render_face(person_latent(1, stream, 1), view, style, size)

    def apart(other):
        return np.abs(first.picture.astype(float) - other.picture).mean()

    assert 0 < apart(moved) < 0.1 * apart(stranger)


def test_every_trait_can_be_seen():
    """Each number of the latent changes the picture of someone who shows that trait (a man, bearded, old, freckled)."""
    shown = {"masculine": 0.5, "age": 0.9, "freckles": 1.5, "mole_size": 1.5, "beard": 1.5, "moustache": 1.5,
             "fringe": 1.2, "hair_wave": 0.5, "parting": 0.5, "lip_colour": 0.5}  # fmt: skip
    base = np.array([shown.get(name, 0.1) for name in TRAITS])
    view = dataclasses.replace(PLAIN, mouth_opening=0.3)
    before = render_face(base, view, layout_of("celeba").style, SIZE).picture.astype(int)
    for index, name in enumerate(TRAITS):
        other = base.copy()
        other[index] -= 1.6
        after = render_face(other, view, layout_of("celeba").style, SIZE).picture.astype(int)
        assert np.abs(after - before).max() >= 10, name


def test_every_extra_can_be_seen_and_bad_arguments_are_refused():
    before = plain().picture.astype(int)
    for name in ("glasses", "sunglasses", "cap", "hat", "hand", "bar"):
        assert (np.abs(plain(extras=frozenset({name})).picture - before) > 12).mean() > 0.003, name
    with pytest.raises(ValueError, match="finite numbers"):
        read_traits(np.zeros(3))
    with pytest.raises(ValueError, match="a side of a portrait"):
        render_face(AVERAGE, PLAIN, layout_of("celeba").style, (16, 200))


def test_attributes_say_what_is_in_the_picture():
    traits = {**read_traits(AVERAGE), "masculine": 0.9, "hair_tone": 0.95, "age": 0.2}
    view = dataclasses.replace(PLAIN, extras=frozenset({"hat", "glasses"}), smile=0.9)
    seen = attributes_of(traits, view)
    assert {"Male", "Blond_Hair", "Young", "Wearing_Hat", "Eyeglasses", "Smiling"} <= seen
    assert not {"Black_Hair", "Gray_Hair", "Mouth_Slightly_Open"} & seen


def test_curves_pass_through_their_points():
    corners = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0], [4.0, 4.0]])
    np.testing.assert_allclose(curve(corners, 5)[::5], corners, atol=1e-12)
    np.testing.assert_allclose(loop(corners, 5)[::5], corners, atol=1e-12)
    # Catmull-Rom halfway between inner points: (-p0 + 9 p1 + 9 p2 - p3) / 16.
    halfway = (-corners[0] + 9 * corners[1] + 9 * corners[2] - corners[3]) / 16
    np.testing.assert_allclose(curve(corners, 2)[3], halfway, atol=1e-12)


@pytest.mark.parametrize("layout", DRAWN)
def test_pixels_alone_do_not_tell_people_apart(layout):
    """Cosine of raw pixels around the face, cut by the eyes: no better than an untrained network (at most 0.75)."""
    style, people, shots = layout_of(layout).style, 14, 8
    rows = []
    for person in range(people):
        latent = person_latent(1, layout_of(layout).stream, person)
        for shot in range(shots):
            rng = picture_generator(1, layout_of(layout).stream, person, shot)
            view, size = sample_view(rng, style), sample_size(rng, style)
            face = render_face(latent, view, style, size)
            left, right = face.landmarks[:2]
            along = (right - left) / 35.0  # 112 px template: the eyes 35 px apart, 38 px from the left, 52 from above
            down = np.array([-along[1], along[0]])
            start = left - 38.0 * along - 52.0 * down
            matrix = (along[0], down[0], start[0], along[1], down[1], start[1])
            cut = Image.fromarray(face.picture).transform(
                (112, 112), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
            )
            rows.append(np.asarray(cut.resize((56, 56)), dtype=float).ravel() - 127.5)
    flat = np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    owner = np.repeat(np.arange(people), shots)
    pairs = np.triu_indices(len(owner), 1)
    score = roc_auc_score((owner[:, None] == owner)[pairs], (flat @ flat.T)[pairs])
    assert 0.5 < score < 0.72
