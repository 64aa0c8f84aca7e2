"""Readers of the official layouts, against torchvision's reader and against broken files."""

import gc
import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from faces_on_disk import POINTS, make_celeba, make_folder, picture, write

from common.errors import DataError
from common.faces.datasets import DATASETS
from common.faces.index import read_index
from common.faces.vggface2 import read_names


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_celeba_lines(tmp_path: Path, ending: str) -> None:
    index = read_index("celeba", make_celeba(tmp_path / "c", {30: (0, 2), 7: (2, 1), 9: (1, 1)}, ending=ending))
    assert index.paths == tuple(f"img_align_celeba/{i:06d}.jpg" for i in (1, 2, 3, 4))
    assert [index.people[p] for p in index.person] == ["30", "30", "7", "9"]
    assert index.official_split.tolist() == [0, 0, 2, 1]
    assert index.landmarks is not None
    np.testing.assert_array_equal(index.landmarks[3].ravel(), np.array(POINTS.split(), dtype=float))
    assert index.names is None


def test_the_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    root = make_celeba(tmp_path / "c", {i: (i % 3, 3) for i in range(5)})
    before = read_index("celeba", root)
    for number, name in enumerate(("identity_CelebA.txt", "list_eval_partition.txt")):
        lines = (root / name).read_text().split("\n")[:-1]
        np.random.default_rng(number).shuffle(lines)
        write(root / name, [line.strip() for line in lines])
    after = read_index("celeba", root)
    assert before.paths == after.paths
    assert before.people == after.people
    np.testing.assert_array_equal(before.person, after.person)
    np.testing.assert_array_equal(before.official_split, after.official_split)


def test_celeba_below_celeba_and_in_the_authors_folders(tmp_path: Path) -> None:
    make_celeba(tmp_path / "tv" / "celeba", {1: (0, 2)})
    below = read_index("celeba", tmp_path / "tv")
    assert below.paths[0] == "celeba/img_align_celeba/000001.jpg"
    root = make_celeba(tmp_path / "drive", {1: (0, 2)})
    for folder, name in (("Anno", "identity_CelebA.txt"), ("Eval", "list_eval_partition.txt")):
        (root / folder).mkdir(exist_ok=True)
        (root / name).rename(root / folder / name)
    (root / "Img").mkdir()
    (root / "img_align_celeba").rename(root / "Img" / "img_align_celeba")
    drive = read_index("celeba", root)
    assert (root / drive.paths[1]).is_file()
    assert drive.landmarks is not None


def test_celeba_landmarks_are_joined_by_name_and_may_lack_pictures(tmp_path: Path) -> None:
    root = make_celeba(tmp_path / "c", {1: (0, 3)})
    write(
        root / "list_landmarks_align_celeba.txt",
        ["2", "names", "000003.jpg 1 2 3 4 5 6 7 8 9 10", f"000001.jpg {POINTS}"],
    )
    found = read_index("celeba", root).landmarks
    assert found is not None
    assert found[0, 0].tolist() == [70, 112]
    assert np.isnan(found[1]).all()
    assert found[2, 4].tolist() == [9, 10]


@pytest.mark.parametrize("name", ["identity_CelebA.txt", "list_eval_partition.txt"])
def test_a_missing_metadata_file_is_named(tmp_path: Path, name: str) -> None:
    root = make_celeba(tmp_path / "c", {1: (0, 3)})
    (root / name).unlink()
    with pytest.raises(DataError, match=f"{name}: no such file; the official CelebA layout needs"):
        read_index("celeba", root)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("identity_CelebA.txt", "000002.jpg", "line 2: '000002.jpg' is malformed"),
        ("identity_CelebA.txt", "000002.jpg x7", "line 2: '000002.jpg x7' is malformed"),
        ("identity_CelebA.txt", "../../000002.jpg 1", "line 2: picture '../../000002.jpg' leaves"),
        ("identity_CelebA.txt", "/etc/000002.jpg 1", "line 2: picture '/etc/000002.jpg' leaves"),
        ("identity_CelebA.txt", "000001.jpg 1", "000001.jpg is named twice"),
        ("list_eval_partition.txt", "000002.jpg 3", "line 2: '000002.jpg 3' is malformed"),
        ("list_eval_partition.txt", "000002.jpg 0 0", "line 2: '000002.jpg 0 0' is malformed"),
        ("list_landmarks_align_celeba.txt", "lefteye", None),
    ],
)
def test_a_malformed_line_is_found_by_file_and_number(
    tmp_path: Path, file: str, line: str, message: str | None
) -> None:
    root = make_celeba(tmp_path / "c", {1: (0, 3)})
    lines = (root / file).read_text().splitlines()
    lines[1] = line
    write(root / file, lines)
    if message is None:  # the second line of the landmark file is its heading
        assert read_index("celeba", root).landmarks is not None
        return
    with pytest.raises(DataError) as caught:
        read_index("celeba", root)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad", ["", "2.jpg", "2.jpg 1 2 3", "2.jpg 1 2 3 4 5 6 7 8 9 x", f"2.jpg {POINTS} 1", "2.jpg 1 2 3 4 5 6 7 8 9 nan"]
)
def test_a_malformed_landmark_line_is_found(tmp_path: Path, bad: str) -> None:
    root = make_celeba(tmp_path / "c", {1: (0, 3)})
    lines = (root / "list_landmarks_align_celeba.txt").read_text().splitlines()
    lines[3] = bad
    write(root / "list_landmarks_align_celeba.txt", lines)
    with pytest.raises(DataError, match=r"list_landmarks_align_celeba\.txt, line 4: "):
        read_index("celeba", root)


def make_vggface2(root: Path) -> Path:
    for part, person in (("train", "n000002"), ("train", "n000003"), ("test", "n000001")):
        for name in ("0001_01.jpg", "0002_01.jpg"):
            (root / part / person).mkdir(parents=True, exist_ok=True)
            picture(len(person + name), 60, 70).save(root / part / person / name)
    write(root / "train_list.txt", [f"n00000{p}/000{k}_01.jpg" for p in (2, 3) for k in (1, 2)])
    write(root / "test_list.txt", ["n000001/0001_01.jpg", "n000001/0002_01.jpg"])
    head = "NAME_ID,X,Y,W,H"
    write(root / "bb_landmark/loose_bb_train.csv", [head, '"n000003/0001_01",5,6,7,8', '"n000002/0001_01",1,2,3,4'])
    write(root / "bb_landmark/loose_bb_test.csv", [head, '"n000001/0001_01",-1,0,30,40', '"n000001/0002_01",1,1,1,1'])
    write(
        root / "identity_meta.csv",
        ["Class_ID, Name, Sample_Num, Flag, Gender", 'n000002, "Zoë_Q._Public,_Jr.", 2, 1, f'],
    )
    return root


def test_vggface2_lists_names_and_boxes(tmp_path: Path) -> None:
    index = read_index("vggface2", make_vggface2(tmp_path))
    assert index.paths[:2] == ("test/n000001/0001_01.jpg", "test/n000001/0002_01.jpg")
    assert index.people == ("n000001", "n000002", "n000003")
    assert index.official_split.tolist() == [2, 2, 0, 0, 0, 0]
    assert index.names == ("n000001", "Zoë_Q._Public,_Jr.", "n000003")
    assert index.landmarks is None
    assert index.boxes is not None
    assert index.boxes[0].tolist() == [-1, 0, 30, 40]
    assert index.boxes[2].tolist() == [1, 2, 3, 4]
    assert np.isnan(index.boxes[3]).all()


@pytest.mark.parametrize(
    "bad", ['"n000002/0001_01"', '"n000002/0001_01",', '"n000002/0001_01",1,2,3', "", '"x",1,2,3,4,5']
)
def test_a_malformed_box_line_is_found(tmp_path: Path, bad: str) -> None:
    root = make_vggface2(tmp_path)
    write(root / "bb_landmark/loose_bb_train.csv", ["NAME_ID,X,Y,W,H", '"n000003/0001_01",5,6,7,8', bad, '"x",1,2,3,4'])
    with pytest.raises(DataError, match=r"loose_bb_train\.csv, line 3: "):
        read_index("vggface2", root)


def test_vggface2_without_lists_is_walked(tmp_path: Path) -> None:
    root = make_vggface2(tmp_path)
    listed = read_index("vggface2", root)
    for name in ("train_list.txt", "test_list.txt"):
        (root / name).unlink()
    (root / "train" / "n000002" / "notes.txt").write_text("x")
    walked = read_index("vggface2", root)
    assert walked.paths == listed.paths
    np.testing.assert_array_equal(walked.official_split, listed.official_split)


def test_vggface2_without_test_has_training_people_only(tmp_path: Path) -> None:
    root = make_vggface2(tmp_path)
    (root / "test_list.txt").unlink()
    (root / "test").rename(root / "elsewhere")
    index = read_index("vggface2", root)
    assert index.people == ("n000002", "n000003")
    assert index.boxes is not None


@pytest.mark.parametrize("line", ["../n000002/0001_01.jpg", "n000002", "n000002/../0001.jpg", "../0001_01.jpg"])
def test_vggface2_list_lines_that_are_no_pictures(tmp_path: Path, line: str) -> None:
    root = make_vggface2(tmp_path)
    write(root / "train_list.txt", ["n000002/0001_01.jpg", line])
    with pytest.raises(DataError, match=r"train_list\.txt, line 2: "):
        read_index("vggface2", root)


def test_vggface2_list_without_its_folder(tmp_path: Path) -> None:
    root = make_vggface2(tmp_path)
    (root / "test").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"test: no such folder; test_list\.txt names pictures in it"):
        read_index("vggface2", root)


def test_folder_takes_pictures_of_any_case_and_passes_over_the_rest(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", {"Ann": 2, "bob": 1})
    picture(9, 20, 20).save(root / "bob" / "x.PNG")
    (root / "bob" / "Thumbs.db").write_bytes(b"x")
    (root / ".cache").mkdir()
    picture(9, 20, 20).save(root / ".cache" / "x.png")
    picture(9, 20, 20).save(root / "stray.jpg")
    index = read_index("folder", root)
    assert index.paths == ("Ann/000.jpg", "Ann/001.jpg", "bob/000.jpg", "bob/x.PNG")
    assert index.names == index.people == ("Ann", "bob")


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_missing_folder_is_one_line(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder") as caught:
        read_index(dataset, tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_an_empty_folder_and_an_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures found; the layout is one folder a person"):
        read_index("folder", tmp_path)
    with pytest.raises(DataError, match="did you mean 'celeba'"):
        read_index("celebra", tmp_path)


@pytest.mark.shared
def test_the_official_celeba_files_are_indexed_in_two_seconds(shared_faces: Path) -> None:
    """202,599 pictures of 10,177 people: 162,770 train, 19,867 validation, 19,962 test (the authors' figures).

    CPU time, so that a busy machine does not matter; 0.6 s where this was written.
    """
    gc.collect()
    start = time.process_time()
    index = read_index("celeba", shared_faces / "official_meta")
    seconds = time.process_time() - start
    assert len(index) == 202_599
    assert len(index.people) == 10_177
    assert np.bincount(index.official_split).tolist() == [162_770, 19_867, 19_962]
    assert seconds < 2.0


@pytest.mark.shared
def test_both_quotings_of_vggface2_names(shared_faces: Path) -> None:
    spreadsheet = read_names(shared_faces / "official_meta" / "vggface2_identity_meta.csv")
    assert len(spreadsheet) == 9_131
    assert spreadsheet["n000001"] == "14th_Dalai_Lama"
    assert spreadsheet["n000713"] == "Antonio_Cañizares_Llovera"  # a line that lost its count
    assert not any('"' in name or name != name.strip() for name in spreadsheet.values())
    assert read_names(shared_faces / "vggface2" / "identity_meta.csv")["n900001"] == "Abdullah_Gul"


@pytest.mark.shared
@pytest.mark.parametrize(("part", "code"), [("train", 0), ("valid", 1), ("test", 2)])
def test_torchvision_reads_the_same_from_the_celeba_tree(shared_faces: Path, part: str, code: int) -> None:
    """An oracle: torchvision's class, told these files' own sums, as it insists on the official ones."""
    from torchvision.datasets import CelebA

    root = shared_faces / "celeba"

    class StandIn(CelebA):
        file_list = tuple(
            (None, hashlib.md5((root / name).read_bytes(), usedforsecurity=False).hexdigest(), name)
            for _, _, name in CelebA.file_list
            if (root / name).is_file()
        )

    theirs = StandIn(str(shared_faces), split=part, target_type=["identity", "landmarks"], download=False)
    index = read_index("celeba", root)
    rows = np.flatnonzero(index.official_split == code)
    assert [index.paths[i] for i in rows] == [f"img_align_celeba/{name}" for name in theirs.filename]
    assert [index.people[index.person[i]] for i in rows] == [str(int(i)) for i in theirs.identity[:, 0]]
    assert index.landmarks is not None
    np.testing.assert_array_equal(index.landmarks[rows].reshape(len(rows), 10), theirs.landmarks_align.numpy())
