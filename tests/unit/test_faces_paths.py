"""Paths in one piece of memory are the sequence of strings that they were made of; lists read by blocks are whole."""

import itertools
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.faces import index as reading
from common.faces import paths as module
from common.faces import vggface2
from common.faces.index import build_index, read_index, read_lines
from common.faces.packing import stamps_of
from common.faces.paths import Folders, Paths, by_folder

NAMES = st.text(alphabet=st.sampled_from(list("ab/. \n-é漢\U0001f600\udc80\udcff\ud800\ue000\0")), max_size=6)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few strings are several blocks."""
    monkeypatch.setattr(module, "_BLOCK", 3)


@given(texts=st.lists(NAMES, max_size=12), draw=st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_they_are_the_strings_they_were_made_of(texts: list[str], draw: random.Random) -> None:
    texts = sorted(texts) if draw.random() < 0.3 else texts
    made = Paths.of(iter(texts))
    assert len(made) == len(texts)
    assert list(made) == texts
    assert made == tuple(texts)
    assert made[1:-1] == tuple(texts[1:-1])
    assert made[::-2] == tuple(texts[::-2])
    assert [made[row] for row in range(-len(texts), len(texts))] == [*texts, *texts]
    assert made.is_ascending == all(one < other for one, other in itertools.pairwise(texts))
    order = made.order().tolist()
    assert order == sorted(range(len(texts)), key=texts.__getitem__)
    rows = np.array(draw.sample(range(len(texts)), draw.randint(0, len(texts))), dtype=np.int64)
    assert list(made.take(rows)) == list(made.at(rows)) == [texts[row] for row in rows]
    assert pickle.loads(pickle.dumps(made)) == texts  # noqa: S301
    if texts and "\ud800" not in "".join(texts):
        assert bytes(made.joined) == "\n".join(texts).encode("utf-8", "surrogateescape")


def test_stamps_are_those_of_the_files_wherever_they_lie(tmp_path: Path) -> None:
    names = ["a/b/1", "a/2", "a/gone", "a/link", "a/within", "nowhere/1", "top"]
    (tmp_path / "a" / "b").mkdir(parents=True)
    for size, name in enumerate(("a/b/1", "a/2", "top"), start=3):
        (tmp_path / name).write_bytes(b"x" * size)
        os.utime(tmp_path / name, ns=(0, 1_000_000_007 * size))
    (tmp_path / "a" / "link").symlink_to("b/1")
    (tmp_path / "a" / "within").mkdir()
    index = build_index("folder", tmp_path, names, ["x"] * len(names))
    made_at = (tmp_path / "a" / "within").stat().st_mtime_ns
    stamps = [
        [4, 4_000_000_028],
        [3, 3_000_000_021],
        [-1, -1],
        [3, 3_000_000_021],
        [0, made_at],
        [-1, -1],
        [5, 5_000_000_035],
    ]
    assert list(index.paths) == sorted(names)
    assert stamps_of(index).tolist() == stamps
    assert stamps_of(index, np.array([6, 1, 0])).tolist() == [stamps[6], stamps[1], stamps[0]]


def test_names_of_folders_come_back_by_folder() -> None:
    folders = Folders()
    for folder, names in by_folder(["b/1", "b/2", "top", "a/c/1", "b/3"]):
        folders.add(folder, names)
    folders.add("empty", [])
    assert dict(folders) == {"b": ("1", "2", "3"), "": ("top",), "a/c": ("1",), "empty": ()}
    assert folders.num_names == 5
    assert "empty" in folders
    assert "a" not in folders


@pytest.mark.parametrize("size", [2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\r\n\xc3\xa9b\r\n\r\n\nc\n \n\r\n", ["a", "éb", "", "", "c"]),
        (b"\xef\xbb\xbfa\rb", ["a", "b"]),
        ("é\r\nb\n".encode("utf-16"), ["é", "b"]),
        (b"\n \n", []),
        (b"", []),
    ],
)
def test_lines_are_the_same_however_large_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, content: bytes, lines: list[str]
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", size)
    (tmp_path / "list.txt").write_bytes(content)
    assert read_lines(tmp_path / "list.txt") == lines


@pytest.mark.parametrize("size", [2, 5, 1000])
def test_the_first_byte_that_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", size)
    (tmp_path / "list.txt").write_bytes(b"line\nlin\xc3\xa9\n\xff")
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 11\)"):
        read_lines(tmp_path / "list.txt")


def tree_with_boxes(draw: random.Random, root: Path) -> dict[str, list[float]]:
    """Write a VGGFace2 tree with lists and boxes in some order; returns path -> its box, NaN where there is none."""
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for part in rows:
        for person in draw.sample(["n000001", "n000002", "n000003", "n000004"], draw.randint(1, 4)):
            (root / part / person).mkdir(parents=True)
            for stem in draw.sample(["0001_01", "0001_02", "0002_01", "a.b", "c"], draw.randint(1, 5)):
                for ending in draw.choice([(".jpg",), (".jpg",), (".png",), (".jpg", ".png")]):
                    (root / part / person / f"{stem}{ending}").touch()
                    rows[part].append(f"{person}/{stem}{ending}")
    boxes: dict[str, list[float]] = {}
    (root / "bb_landmark").mkdir()
    for part in sorted(rows, reverse=True):
        listed = sorted(rows[part]) if draw.random() < 0.7 else draw.sample(rows[part], len(rows[part]))
        (root / f"{part}_list.txt").write_text("\n".join(listed))
        lines = ["NAME_ID,X,Y,W,H"] if draw.random() < 0.5 else []
        kept = [path for path in listed if draw.random() < 0.9] if draw.random() < 0.4 else listed
        names = [path.rpartition(".")[0] for path in kept + draw.choices(listed, k=draw.choice([0, 0, 1]))]
        for name in names if draw.random() < 0.5 else dict.fromkeys(names):
            box = [draw.randint(0, 99) for _ in range(4)]
            lines.append(f'"{name}",' + ",".join(map(str, box)))
        (root / "bb_landmark" / f"loose_bb_{part}.csv").write_text("\n".join(lines) + "\n")
    for part in ("test", "train"):  # the files in their order
        for line in (root / "bb_landmark" / f"loose_bb_{part}.csv").read_text().split():
            name, *numbers = line.split(",")
            if numbers[0] != "X":
                boxes[name.strip('"')] = [float(number) for number in numbers]
    return {f"{part}/{path}": boxes.get(path.rpartition(".")[0], [np.nan] * 4) for part in rows for path in rows[part]}


looked_up = {"run": 0, "each": 0}


@pytest.mark.parametrize("seed", range(80))
def test_boxes_are_those_of_their_names_in_whatever_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Of trees with people in both parts, stems with two endings, rows that are missing, doubled or in no order."""
    draw = random.Random(seed)
    monkeypatch.setattr(reading, "_BLOCK_BYTES", draw.choice([2, 40, 200, 2**17]))
    monkeypatch.setattr(vggface2, "_LOOKED_UP", draw.choice([1, 4, 99]))
    run_of = vggface2._Pictures.run_of
    monkeypatch.setattr(vggface2._Pictures, "run_of", lambda self, lines, guess: _counted(run_of(self, lines, guess)))
    wanted = tree_with_boxes(draw, tmp_path)
    index = read_index("vggface2", tmp_path)
    assert index.paths == sorted(wanted)
    assert [index.people[number] for number in index.person] == [path.split("/")[1] for path in index.paths]
    has_boxes = [{np.isnan(wanted[path][0]) for path in wanted if path.startswith(part)} for part in ("test", "train")]
    if {True} in has_boxes:
        assert index.boxes is None
    else:
        assert index.boxes is not None
        np.testing.assert_array_equal(index.boxes, [wanted[path] for path in index.paths])


def test_of_two_rows_of_one_name_the_last_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f'"n000001/000{number}_01",{value},0,1,1\n' for number, value in ((2, 1), (1, 2), (2, 3))]
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 2 * len(lines[0]))  # the first two are in no order, the third follows
    (tmp_path / "train" / "n000001").mkdir(parents=True)
    for number in (1, 2):
        (tmp_path / "train" / "n000001" / f"000{number}_01.jpg").touch()
    (tmp_path / "bb_landmark").mkdir()
    (tmp_path / "bb_landmark" / "loose_bb_train.csv").write_text("".join(lines))
    index = read_index("vggface2", tmp_path)
    assert index.boxes is not None
    assert index.boxes[:, 0].tolist() == [2, 3]


def _counted(run: slice | None) -> slice | None:
    looked_up["each" if run is None else "run"] += 1
    return run


def test_both_ways_of_finding_rows_were_tried() -> None:
    assert min(looked_up.values()) > 50, looked_up
