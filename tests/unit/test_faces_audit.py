"""The audit finds what a stranger would want to know, on data sets whose faults were put there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from faces_on_disk import make_celeba, make_folder, write

from common.faces.pack import open_pack
from common.faces.splits import Split
from common.settings import DataSettings
from simulation.data.audit import audit, audit_overlap

DATA = DataSettings(image_size=32)


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """9 people of 5 pictures: 1-3 train, 4-6 validation, 7-9 test; then four faults."""
    root = make_celeba(tmp_path / "celeba", {i: ((i - 1) // 3, 5) for i in range(1, 10)})
    pictures = root / "img_align_celeba"
    (pictures / "000001.jpg").write_bytes(b"")
    (pictures / "000002.jpg").write_bytes(b"not a picture")
    shutil.copyfile(pictures / "000041.jpg", pictures / "000006.jpg")  # person 9, test -> person 2, train
    shutil.copyfile(pictures / "000021.jpg", pictures / "000022.jpg")  # person 5, twice
    lines = (root / "list_eval_partition.txt").read_text().split("\n")
    write(root / "list_eval_partition.txt", [*(line.strip() for line in lines[:-1]), ""][:45])
    return root


def test_the_findings_are_those_put_there(celeba: Path) -> None:
    lines = (celeba / "list_eval_partition.txt").read_text().splitlines()
    lines[10] = "000011.jpg 2"  # person 3 trains, but for this picture
    write(celeba / "list_eval_partition.txt", lines)
    report = audit("celeba", celeba, DATA)
    assert (report.num_people, report.num_pictures) == (9, 45)
    assert report.people["test_people"] == 4
    assert report.people["train"] == 2
    assert report.pictures["val_people"] == 14
    assert sum(report.pictures.values()) + len(report.quarantined) == 45
    assert report.people_in_two_splits == ("3",)
    reasons = dict(report.quarantined)
    assert reasons["img_align_celeba/000001.jpg"] == "empty file"
    assert reasons["img_align_celeba/000002.jpg"].startswith("unreadable")
    assert reasons["img_align_celeba/000006.jpg"].startswith("one picture under two people")
    assert reasons["img_align_celeba/000022.jpg"] == "duplicate: of img_align_celeba/000021.jpg"
    assert len(reasons) == 5
    assert [group.people for group in report.copies] == [("2", "9"), ("5", "5")]
    assert [group.paths[1][-10:] for group in report.copies_across_splits] == ["000041.jpg"]
    assert report.fraction_quarantined == pytest.approx(5 / 45)
    assert report.pictures_per_person == {"min": 5, "median": 5.0, "max": 5}
    assert dict(report.histogram)["5-9"] == 9


def test_audit_and_pack_see_the_same(celeba: Path, tmp_path: Path) -> None:
    data = DataSettings(image_size=32, max_quarantined_fraction=0.5)
    report = audit("celeba", celeba, data, workers=2)
    found = open_pack("celeba", celeba, data, tmp_path / "cache", workers=1)
    assert report.quarantined == found.quarantined
    assert report.pictures == {s.name.lower(): int((found.split == s).sum()) for s in Split}
    assert report.people["train"] == found.num_classes


def test_the_report_in_words_and_as_json(celeba: Path) -> None:
    report = audit("celeba", celeba, DATA)
    text = "\n".join(report.lines())
    for words in (
        "9 people, 45 pictures",
        "quarantined: 5 (11.11%",
        "000001.jpg: empty file",
        "2 groups, 1 of them across",
    ):
        assert words in text
    plain = json.loads(report.to_json())
    assert plain["pictures"] == report.pictures
    assert {"path": "img_align_celeba/000001.jpg", "reason": "empty file"} in plain["quarantined"]
    assert plain["copies"][0]["splits"][1] == "test_people"
    assert "hashes" not in plain


def test_long_lists_are_cut_on_the_terminal_but_not_in_the_json(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", {f"p{i:02d}": 6 for i in range(12)})
    for person in range(12):
        (root / f"p{person:02d}" / "000.jpg").write_bytes(b"")
    report = audit("folder", root, DATA)
    assert "    ... and 2 more" in report.lines()
    assert len(json.loads(report.to_json())["quarantined"]) == 12


def test_what_would_stop_packing_is_reported_not_raised(celeba: Path, tmp_path: Path) -> None:
    assert audit("celeba", celeba, DATA).problem.startswith(f"{celeba}: 5 of 45 pictures cannot be used")
    assert audit("celeba", celeba, DataSettings(image_size=32, max_quarantined_fraction=0.2)).problem == ""
    few = make_folder(tmp_path / "few", {f"p{i}": 3 for i in range(5)})
    report = audit("folder", few, DATA)
    assert "1 of 5 people left for training" in report.problem
    assert report.pictures["unused"] == 15
    assert len(report.hashes) == 15, "all pictures are looked at all the same"
    shutil.rmtree(celeba / "img_align_celeba")
    gone = audit("celeba", celeba, DATA)
    assert "45 of 45 pictures cannot be used (missing 45)" in gone.problem
    assert gone.problem in gone.lines()[-1]


def test_people_left_out_by_the_filters_are_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", {f"p{i:02d}": 1 + i % 6 for i in range(36)})
    report = audit("folder", root, DataSettings(image_size=32, min_pictures_per_person=4, max_people=10))
    used = [name for name in report.people if name not in ("unused", "val_pictures", "test_pictures")]
    assert sum(report.people[name] for name in used) == 10
    assert report.people["unused"] == 26
    assert sum(report.pictures.values()) == report.num_pictures == 6 * 21


def test_overlap_of_two_data_sets(tmp_path: Path) -> None:
    one = make_folder(tmp_path / "one", {"Ann_Lee": 3, **{f"p{i}": 3 for i in range(8)}})
    two = make_folder(tmp_path / "two", {"ann lee": 2, **{f"q{i}": 3 for i in range(8)}}, suffix=".png")
    shutil.copyfile(one / "p3" / "001.jpg", two / "q5" / "seen.jpg")
    reports = [audit("folder", root, DATA) for root in (one, two)]
    found = audit_overlap(reports)
    assert [name for name, _, _ in found.people] == ["Ann_Lee"]
    assert found.pictures == ((str(one), "p3/001.jpg", str(two), "q5/seen.jpg"),)
    assert "p3/001.jpg" in "\n".join(found.lines())
    assert json.loads(found.to_json())["people"][0][0] == "Ann_Lee"


def test_numbers_of_different_data_sets_are_not_names(celeba: Path, tmp_path: Path) -> None:
    numbered = make_folder(tmp_path / "f", {str(i): 3 for i in range(1, 10)})
    reports = [audit("celeba", celeba, DATA), audit("folder", numbered, DATA)]
    assert audit_overlap(reports).people == ()
    again = audit_overlap([reports[0], reports[0]])
    assert len(again.people) == 9


@pytest.mark.shared
def test_the_two_real_sets_are_clean_and_share_nobody(shared_faces: Path) -> None:
    """The README of these faces: 85 / 15 / 25 and 43 + 12 people, nobody in both."""
    reports = [audit(name, shared_faces / name, DataSettings(image_size=32)) for name in ("celeba", "vggface2")]
    celeba, vggface2 = reports
    assert (celeba.people["train"], celeba.people["val_people"], celeba.people["test_people"]) == (85, 15, 25)
    assert vggface2.people["train"] + vggface2.people["val_people"] == 43
    assert vggface2.people["test_people"] == 12
    assert (celeba.num_pictures, vggface2.num_pictures) == (1501, 1259)
    assert all(report.people_in_two_splits == () and report.copies == () for report in reports)
    overlap = audit_overlap(reports)
    assert overlap.people == ()
    assert overlap.pictures == ()
    assert np.array_equal([sum(r.pictures.values()) for r in reports], [1501, 1259])
