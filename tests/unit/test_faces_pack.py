"""Packs: whole or not there, reused when nothing changed, honest about what was left out."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from faces_on_disk import SMALL, in_cache, make_celeba, make_folder, opened, people_in, picture, pixels, unfinished_in

from common.errors import DataError
from common.faces import pack as pack_module
from common.faces import packing
from common.faces.pack import open_pack
from common.faces.pack_store import MANIFEST
from common.faces.splits import Split
from common.settings import DataSettings

REPO = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return people_in(tmp_path)


def test_a_pack_holds_the_aligned_pictures_of_their_people(folder: Path) -> None:
    found = opened(folder)
    assert found.pictures.shape == (72, 32, 32, 3)
    expected = np.asarray(picture(1, 64, 64).resize((32, 32))).astype(int)
    assert np.abs(found.pictures[0].astype(int) - expected).mean() < 6
    assert [found.people[p] for p in found.person[:7]] == ["p00"] * 6 + ["p01"]
    assert found.quarantined == ()


def test_labels_number_the_training_people_only(folder: Path) -> None:
    found = opened(folder)
    closed = np.isin(found.split, [Split.TRAIN, Split.VAL_PICTURES, Split.TEST_PICTURES])
    assert found.num_classes == 12 - 2 - 2
    assert (found.training_labels[~closed] == -1).all()
    assert set(found.training_labels[closed].tolist()) == set(range(found.num_classes))
    np.testing.assert_array_equal(found.training_people[found.training_labels[closed]], found.person[closed])
    assert sum(len(found.indices(split)) for split in Split) == len(found)


def test_workers_give_the_same_bytes_in_the_same_order(folder: Path) -> None:
    one = opened(folder)
    shutil.rmtree(folder.parent / "cache")
    calls: list[tuple[int, int]] = []
    two = open_pack("folder", folder, SMALL, folder.parent / "cache", workers=2, progress=lambda *c: calls.append(c))
    assert two.key == one.key
    np.testing.assert_array_equal(two.split, one.split)
    assert pixels(two) == pixels(one)
    assert calls == [(0, 72), (32, 72), (64, 72), (72, 72)]


def test_a_second_open_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(folder)
    monkeypatch.setattr(packing, "scan", lambda *_, **__: pytest.fail("decoded again"))
    assert opened(folder).key == first.key


def test_a_change_of_data_or_settings_packs_anew(folder: Path) -> None:
    keys = {opened(folder).key}
    for data in (
        DataSettings(image_size=33),
        DataSettings(image_size=32, fraction_val_pictures=0.2),
        DataSettings(image_size=32, max_people=9),
    ):
        keys.add(opened(folder, data).key)
    picture(999, 64, 64).save(folder / "p03" / "002.jpg")
    keys.add(opened(folder).key)
    os.utime(folder / "p03" / "001.jpg", ns=(1, 1))
    keys.add(opened(folder).key)
    (folder / "p03" / "000.jpg").rename(folder / "p03" / "new.jpg")
    keys.add(opened(folder).key)
    (folder / "p03").rename(folder / "other")
    keys.add(opened(folder).key)
    assert len(keys) == 8
    assert in_cache(folder) == keys


def test_what_does_not_matter_does_not_pack_anew(folder: Path) -> None:
    key = opened(folder).key
    assert opened(folder, DataSettings(image_size=32, max_quarantined_fraction=0.5, box_margin=0.3)).key == key
    moved = folder.rename(folder.parent / "moved")
    assert opened(moved).key == key


def damage(folder: Path) -> dict[str, str]:
    """Spoil six pictures; what the pack must say of each."""
    (folder / "p00" / "001.jpg").unlink()
    (folder / "p00" / "001.jpg").symlink_to("nothing-here")  # listed, yet missing
    (folder / "p01" / "002.jpg").write_bytes(b"")
    (folder / "p02" / "003.jpg").write_bytes((folder / "p02" / "003.jpg").read_bytes()[:700])
    shutil.copyfile(folder / "p04" / "004.jpg", folder / "p05" / "000.jpg")
    shutil.copyfile(folder / "p06" / "000.jpg", folder / "p06" / "009.jpg")
    return {
        "p00/001.jpg": "missing",
        "p01/002.jpg": "empty file",
        "p02/003.jpg": "unreadable",
        "p04/004.jpg": "one picture under two people: also p05/000.jpg",
        "p05/000.jpg": "one picture under two people: also p04/004.jpg",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_used_is_left_out_and_listed(folder: Path, workers: int) -> None:
    reasons = damage(folder)
    data = DataSettings(image_size=32, max_quarantined_fraction=0.2)
    found = opened(folder, data, workers=workers)
    listed = dict(found.quarantined)
    copy = listed.keys() & {"p06/000.jpg", "p06/009.jpg"}
    assert len(copy) == 1
    assert listed[copy.pop()].startswith("duplicate: of p06/00")
    assert listed.keys() - {"p06/000.jpg", "p06/009.jpg"} == reasons.keys()
    assert all(listed[path].startswith(reason) for path, reason in reasons.items())
    assert len(found) == 73 - 6
    # every picture that is left stands at its own place: compare with each decoded alone
    clean = make_folder(folder.parent / "clean", {f"p{i:02d}": 6 for i in range(12)})
    originals = opened(clean)
    position = {f"p{i // 6:02d}/{i % 6:03d}.jpg": i for i in range(72)} | {"p06/009.jpg": 36}
    paths = sorted(set(position) - listed.keys() - ({"p06/009.jpg"} if "p06/009.jpg" in listed else set()))
    assert len(paths) == len(found)
    for row, path in enumerate(paths):
        np.testing.assert_array_equal(found.pictures[row], originals.pictures[position[path]])
        assert found.people[found.person[row]] == path[:3]


def test_a_person_keeps_training_pictures_whatever_is_quarantined(folder: Path) -> None:
    """Splits are decided on what is left: spoil exactly the TRAIN pictures of a training person but one."""
    before = opened(folder)
    person = int(before.training_people[0])
    rows = before.indices(Split.TRAIN)
    rows = rows[before.person[rows] == person]
    for row in rows.tolist()[1:]:
        (folder / before.people[person] / f"{row - 6 * person:03d}.jpg").write_bytes(b"")
    after = opened(folder, DataSettings(image_size=32, max_quarantined_fraction=0.2))
    codes = set(after.split[after.person == person].tolist())
    assert Split.TRAIN in codes or not codes & {Split.VAL_PICTURES, Split.TEST_PICTURES}


def test_a_copy_in_two_splits_stays_out_of_training(folder: Path) -> None:
    before = opened(folder)
    test_row = int(before.indices(Split.TEST_PICTURES)[0])
    train = [r for r in before.indices(Split.TRAIN).tolist() if before.person[r] == before.person[test_row]]
    name = [folder / before.people[before.person[r]] / f"{r % 6:03d}.jpg" for r in (train[0], test_row)]
    shutil.copyfile(name[1], name[0])
    after = opened(folder)
    assert [path for path, _ in after.quarantined] == [name[0].relative_to(folder).as_posix()]


def test_too_many_quarantined_is_one_line_and_nothing_is_decoded_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(folder)
    with pytest.raises(DataError) as caught:
        opened(folder)
    line = str(caught.value)
    assert "6 of 73 pictures cannot be used" in line
    assert "one picture under two people 2" in line
    assert "max_quarantined_fraction = 0.05" in line
    assert "p00/001.jpg, p01/002.jpg, p02/003.jpg" in line
    assert "\n" not in line
    assert in_cache(folder) == set()
    monkeypatch.setattr(packing, "scan", lambda *_, **__: pytest.fail("decoded again"))
    assert len(opened(folder, DataSettings(image_size=32, max_quarantined_fraction=0.2))) == 67
    assert unfinished_in(folder) == []


def test_the_limit_holds_for_a_pack_that_is_there(folder: Path) -> None:
    damage(folder)
    opened(folder, DataSettings(image_size=32, max_quarantined_fraction=0.2))
    with pytest.raises(DataError, match="6 of 73 pictures cannot be used"):
        opened(folder)


def test_absent_pictures_are_told_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_celeba(tmp_path / "c", {i: (i % 3, 3) for i in range(9)})
    shutil.rmtree(root / "img_align_celeba")
    monkeypatch.setattr(packing, "scan", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"27 of 27 pictures cannot be used \(missing 27\)"):
        open_pack("celeba", root, SMALL, tmp_path / "cache", workers=1)


def test_alignment_that_the_data_set_cannot_give(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_celeba(tmp_path / "c", {i: (i % 3, 3) for i in range(9)})
    boxed = DataSettings(image_size=32, alignment="box")
    resized = DataSettings(image_size=32, alignment="resize")
    keys = {open_pack("celeba", root, data, tmp_path / "cache", workers=1).key for data in (SMALL, boxed, resized)}
    assert len(keys) == 3
    assert open_pack("celeba", root, SMALL, tmp_path / "cache", workers=1).cut == "landmarks"
    (root / "list_landmarks_align_celeba.txt").unlink()
    lacking = open_pack("celeba", root, SMALL, tmp_path / "cache", workers=1)
    assert lacking.key not in keys
    assert lacking.cut == "centre square"
    assert lacking.account.notes == (
        "no list_landmarks_align_celeba.txt for these pictures: they are cut to their centre square, not aligned by"
        " landmarks",
    )
    np.testing.assert_array_equal(
        lacking.pictures, open_pack("celeba", root, resized, tmp_path / "cache", workers=1).pictures
    )
    with caplog.at_level("INFO", logger="facefed.faces"):
        opened(make_folder(tmp_path / "f", {f"p{i}": 3 for i in range(8)}))
    assert [r.message for r in caplog.records if "centre square" in r.message] != []
    caplog.clear()
    made = make_folder(tmp_path / "made", {f"p{i}": 3 for i in range(8)})
    (made / "aligned.jsonl").write_text("{}\n")  # as `facefed data align` leaves it
    with caplog.at_level("INFO", logger="facefed.faces"):
        assert opened(made).cut == "aligned beforehand"
    said = " ".join(r.message for r in caplog.records)
    assert "were aligned by `facefed data align` and are taken as they are" in said
    assert "centre square" not in said


def test_how_its_pictures_were_cut_is_found_for_a_pack_of_an_earlier_version_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "LOOK_AT_EACH", 1)  # from now on a pack is found by the times of its folders
    first = opened(folder)
    manifest = folder.parent / "cache" / first.key / MANIFEST
    assert pack_module.load_pack(manifest.parent).cut == opened(folder).cut == "centre square"
    about = json.loads(manifest.read_text())
    del about["cut"]
    manifest.write_text(json.dumps(about))
    assert opened(folder).cut == "centre square"
    manifest.write_text(json.dumps({**about, "cut": "by hand"}))
    assert pack_module.load_pack(manifest.parent).cut == ""


def test_people_below_the_limits_after_quarantine(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "faces", {f"p{i}": 2 for i in range(6)})
    (root / "p3" / "001.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 6 people left for training"):
        opened(root, DataSettings(image_size=32, max_quarantined_fraction=0.5))
    assert in_cache(root) == set()


@pytest.mark.shared
@pytest.mark.parametrize("dataset", ["celeba", "vggface2"])
def test_real_faces_are_packed_and_opened_again_in_a_second(shared_faces: Path, tmp_path: Path, dataset: str) -> None:
    first = open_pack(dataset, shared_faces / dataset, DataSettings(), tmp_path, workers=2)
    assert len(first) == {"celeba": 1501, "vggface2": 1259}[dataset]
    assert first.quarantined == ()
    assert first.num_classes == {"celeba": 85, "vggface2": 38}[dataset]
    start_s = time.process_time()
    open_pack(dataset, shared_faces / dataset, DataSettings(), tmp_path, workers=2)
    assert time.process_time() - start_s < 1.0
    # a face is in the middle and upright: over the mean face the eyes' rows are darker than forehead and cheeks
    rows = first.pictures[:].astype(np.float32).mean(axis=(0, 3))[:, 30:82].mean(axis=1)
    assert rows[49:55].mean() < min(rows[30:36].mean(), rows[64:70].mean())
