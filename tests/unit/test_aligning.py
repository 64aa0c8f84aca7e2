"""`facefed data align`: every photograph gives a face or a reason, whatever stops it, however often it is called."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from common.faces.align import TEMPLATE_112_PX
from common.faces.detect import Face, Quality
from common.faces.index import read_index
from simulation.cli import main
from simulation.data import aligning
from simulation.data.aligning import AlignSettings, align_photos, summary_lines

SETTINGS = AlignSettings(image_size=64)


class Detector:
    """Finds a face of half the picture's width for each 100 in the first pixel's red; nobody below 100."""

    def detect(self, image):
        faces = []
        for number in range(int(image[0, 0, 0]) // 100):
            size = image.shape[1] / 2 - 5 * number
            points = TEMPLATE_112_PX * (size / 112)
            quality = Quality(size_px=size, blur=0.25, yaw_deg=1.0, pitch_deg=2.0, roll_deg=3.0)
            faces.append(Face(box=np.array([0.0, 0.0, size, size]), landmarks=points, score=0.9, quality=quality))
        return faces


@pytest.fixture(autouse=True)
def looked_at(monkeypatch):
    """The photographs that were read, in order; faces are found by the stand-in."""
    read = []

    def reading(path):
        read.append(path.name)
        return real(path)

    real = aligning.read_picture
    monkeypatch.setattr(aligning, "read_picture", reading)
    monkeypatch.setattr(aligning, "detector", Detector)
    return read


def photo(path, red, size=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(red).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels[0, 0, 0] = red
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    """Two people: one face, two faces, no face, a small face, no picture."""
    root = tmp_path / "photos"
    photo(root / "anna" / "one.png", 100)
    photo(root / "anna" / "two.png", 200)
    photo(root / "anna" / "deeper" / "none.png", 0)
    photo(root / "bo" / "small.png", 100, size=60)
    photo(root / "bo" / "one.png", 150)
    (root / "bo" / "text.jpg").write_text("no picture")
    return root


def test_every_photograph_gives_a_face_or_a_reason(photos, tmp_path):
    out = tmp_path / "faces"
    summary = align_photos(photos, out, SETTINGS, workers=1)

    assert (summary.num_photos, summary.num_aligned, summary.num_faces) == (6, 3, 3)
    assert summary.left_out == {"no face found": 1, "face too small": 1, "unreadable": 1}
    assert (summary.num_with_several, summary.num_new, summary.num_gone) == (1, 6, 0)
    with (out / "left_out.csv").open() as opened:
        reasons = dict(list(csv.reader(opened))[1:])
    assert set(reasons) == {"anna/deeper/none.png", "bo/small.png", "bo/text.jpg"}
    assert reasons["bo/small.png"] == "face too small: 30 px, at least 40"
    with (out / "landmarks.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [row["file"] for row in rows] == ["anna/one.jpg", "anna/two.jpg", "bo/one.jpg"]
    assert float(rows[0]["nose_y"]) == pytest.approx(TEMPLATE_112_PX[2, 1] * 50 / 112, abs=0.01)
    assert (rows[0]["photo"], rows[0]["size_px"], rows[0]["roll_deg"]) == ("anna/one.png", "50.0", "3.0")
    lines = summary_lines(out, summary, SETTINGS)
    assert lines[0] == f"{out}: 3 faces of 3 of 6 photographs"
    assert "no face found 1" in lines[1]
    assert lines[2] == "1 photographs show several faces: the large one near the middle was taken (--all takes each)"


def test_what_it_writes_is_a_data_set_of_people(photos, tmp_path):
    align_photos(photos, tmp_path / "faces", SETTINGS, workers=1)
    index = read_index("folder", tmp_path / "faces")
    assert index.people == ("anna", "bo")
    assert list(index.paths) == ["anna/one.jpg", "anna/two.jpg", "bo/one.jpg"]
    with Image.open(tmp_path / "faces" / "bo" / "one.jpg") as face:
        assert face.size == (64, 64)


def test_the_same_call_again_looks_at_what_is_new_or_changed_alone(photos, tmp_path, looked_at):
    out = tmp_path / "faces"
    align_photos(photos, out, SETTINGS, workers=1)
    before = {path: path.read_bytes() for path in out.rglob("*.jpg")}
    looked_at.clear()
    assert align_photos(photos, out, SETTINGS, workers=1).num_new == 0
    assert looked_at == []

    photo(photos / "bo" / "new.png", 101)
    photo(photos / "anna" / "one.png", 0)  # changed: nobody is on it now
    (out / "bo" / "one.jpg").write_bytes(b"")  # damaged
    (photos / "anna" / "two.png").unlink()
    summary = align_photos(photos, out, SETTINGS, workers=1)
    assert sorted(looked_at) == ["new.png", "one.png", "one.png"]
    assert (summary.num_photos, summary.num_faces, summary.num_new, summary.num_gone) == (6, 2, 3, 1)
    assert not (out / "anna" / "one.jpg").exists(), "what it showed earlier is no face of this photograph"
    assert (out / "bo" / "one.jpg").read_bytes() == before[out / "bo" / "one.jpg"]
    assert "1 faces lie there whose photographs are gone" in summary_lines(out, summary, SETTINGS)


def test_a_killed_call_is_gone_on_with(photos, tmp_path, looked_at):
    """Half a line at the journal's end, as a killed process leaves it, costs that photograph alone."""
    whole, out = tmp_path / "whole", tmp_path / "faces"
    align_photos(photos, whole, SETTINGS, workers=1)
    shutil.copytree(whole, out)
    (out / "landmarks.csv").unlink()
    journal = (out / "aligned.jsonl").read_text()
    (out / "aligned.jsonl").write_text(journal[: journal.rindex("reason")])
    looked_at.clear()
    align_photos(photos, out, SETTINGS, workers=1)
    assert len(looked_at) == 1
    for name in ("landmarks.csv", "left_out.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    align_photos(photos, out, SETTINGS, workers=1)
    assert len(looked_at) == 1, "the line after the half one is whole"


def test_every_face_on_request(photos, tmp_path):
    settings = AlignSettings(image_size=64, min_size_px=20, every_face=True)
    summary = align_photos(photos, tmp_path / "faces", settings, workers=1)
    assert summary.num_faces == 5
    names = sorted(path.name for path in (tmp_path / "faces" / "anna").glob("*.jpg"))
    assert names == ["one.jpg", "two.jpg", "two.png.2.jpg"]
    assert "each was taken" in summary_lines(tmp_path, summary, settings)[2]


def test_two_photographs_of_one_name_stay_two(photos, tmp_path):
    Image.open(photos / "bo" / "one.png").save(photos / "bo" / "ONE.bmp")
    align_photos(photos, tmp_path / "faces", SETTINGS, workers=1)
    names = sorted(path.name for path in (tmp_path / "faces" / "bo").glob("*.jpg"))
    assert names == ["ONE.bmp.jpg", "one.png.jpg"]


def test_no_photograph_takes_the_name_of_another_ones_further_face(photos, tmp_path):
    two = (photos / "anna" / "two.png").read_bytes()
    for name in ("two.png.2.png", "two.png.png", "two.png.2"):  # the last is no picture
        (photos / "anna" / name).write_bytes(two)
    settings = AlignSettings(image_size=64, min_size_px=20, every_face=True)
    summary = align_photos(photos, tmp_path / "faces", settings, workers=1)
    names = sorted(path.name for path in (tmp_path / "faces" / "anna").glob("*.jpg"))
    assert summary.num_faces == 5 + 4
    assert names == [
        "one.jpg", "two.jpg", "two.png.2.jpg", "two.png.2.png.2.jpg", "two.png.2.png.jpg", "two.png.png.2.jpg",
        "two.png.png.jpg",
    ]  # fmt: skip


def test_other_options_and_other_folders_are_refused(photos, tmp_path):
    out = tmp_path / "faces"
    align_photos(photos, out, SETTINGS, workers=1)
    with pytest.raises(DataError, match=r"was aligned otherwise \(image_size 64\); give the same options, or another"):
        align_photos(photos, out, replace(SETTINGS, image_size=32), workers=1)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "aligned.jsonl").touch()
    with pytest.raises(DataError, match=r"was aligned otherwise \(format None"):
        align_photos(photos, tmp_path / "cut", SETTINGS, workers=1)
    with pytest.raises(DataError, match="holds something else than aligned faces"):
        align_photos(photos, photos.parent, SETTINGS, workers=1)
    for inside in (photos, photos / "anna", photos / "new"):
        with pytest.raises(DataError, match="would be read as photographs"):
            align_photos(photos, inside, SETTINGS, workers=1)
    with pytest.raises(DataError, match="no such folder"):
        align_photos(tmp_path / "nowhere", out, SETTINGS, workers=1)


def test_a_full_disk_is_told(photos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(aligning, "write_bytes", full)
    with pytest.raises(DataError, match="No space left on device; make room there, then run the same command again"):
        align_photos(photos, tmp_path / "faces", SETTINGS, workers=1)


def test_each_line_of_the_journal_is_json(photos, tmp_path):
    align_photos(photos, tmp_path / "faces", SETTINGS, workers=1)
    head, *lines = [json.loads(line) for line in (tmp_path / "faces" / "aligned.jsonl").read_text().split("\n") if line]
    assert (head["image_size"], head["min_size_px"], head["every_face"]) == (64, 40, False)
    assert len(head["detector"]) == 64
    assert len(lines) == 6


def test_the_command_tells_what_lies_there_and_refuses_in_one_line(photos, tmp_path, capsys):
    out = tmp_path / "faces"
    assert main(["data", "align", str(photos), str(out), "--jobs", "1", "--size", "64"]) == 0
    assert f"{out}: 3 faces of 3 of 6 photographs" in capsys.readouterr().out
    for wrong, line in (
        (("--size", "8"), "--size 8: give 32 to 512 px."),
        (("--min-size", "0"), "--min-size 0: give 1 px or more."),
        (("--jobs", "0"), "--jobs 0: give 1 or more."),
        ((), "was aligned otherwise (image_size 64)"),
    ):
        assert main(["data", "align", str(photos), str(out), *wrong]) == 2
        told = capsys.readouterr().err
        assert line in told
        assert told.count("\n") == 1
