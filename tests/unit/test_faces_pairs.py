"""LFW's list of pairs: the official one at full size, both forms of its first line, and every way to be malformed."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from server.public_set import read_pair_list, require_pictures

TWO_FOLDS = [
    "2\t2",
    "A\t1\t2",
    "B\t1\t12",
    "A\t1\tB\t1",
    "A\t2\tC\t3",
    "D\t1\t2",
    "D\t2\t3",
    "D\t1\tE\t1",
    "E\t1\tF\t9",
]


def written(folder: Path, lines: list[str], end: str = "\n") -> Path:
    file = folder / "pairs.txt"
    file.write_bytes(end.join([*lines, ""]).encode())
    return file


def changed(number: int, line: str) -> list[str]:
    """TWO_FOLDS with one line, counted from 1, replaced."""
    return [line if at == number else old for at, old in enumerate(TWO_FOLDS, start=1)]


@pytest.mark.shared
def test_the_official_list_at_full_size(shared_faces: Path) -> None:
    pairs = read_pair_list(shared_faces / "official_meta" / "lfw_pairs.txt")
    assert len(pairs.genuine) == 6000
    for fold in range(10):
        assert pairs.genuine[pairs.fold == fold].sum() == 300
        assert (~pairs.genuine[pairs.fold == fold]).sum() == 300
    # Known of View 2: 7,701 pictures of 4,281 people are in it, and people are in one fold only.
    people = [path.split("/")[0] for path in pairs.paths]
    assert len(set(pairs.paths)) == len(pairs.paths) == 7701
    assert len(set(people)) == 4281
    folds_of: dict[str, set[int]] = {}
    for first, second, fold in zip(pairs.first, pairs.second, pairs.fold, strict=True):
        for place in (first, second):
            folds_of.setdefault(people[place], set()).add(int(fold))
    assert all(len(folds) == 1 for folds in folds_of.values())
    # The file's first and last pairs, and the first impostor pair (line 302).
    named = [(pairs.paths[a], pairs.paths[b]) for a, b in zip(pairs.first, pairs.second, strict=True)]
    assert named[0] == ("Abel_Pacheco/Abel_Pacheco_0001.jpg", "Abel_Pacheco/Abel_Pacheco_0004.jpg")
    assert named[300] == ("Abdel_Madi_Shabneh/Abdel_Madi_Shabneh_0001.jpg", "Dean_Barker/Dean_Barker_0001.jpg")
    assert named[-1] == ("Slobodan_Milosevic/Slobodan_Milosevic_0002.jpg", "Sok_An/Sok_An_0001.jpg")
    same = np.array([people[a] == people[b] for a, b in zip(pairs.first, pairs.second, strict=True)])
    np.testing.assert_array_equal(same, pairs.genuine)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\t", " ", "  "])
def test_pairs_by_hand(tmp_path: Path, end: str, separator: str) -> None:
    pairs = read_pair_list(written(tmp_path, [line.replace("\t", separator) for line in TWO_FOLDS], end))
    assert pairs.paths[:4] == ("A/A_0001.jpg", "A/A_0002.jpg", "B/B_0001.jpg", "B/B_0012.jpg")
    assert pairs.first.tolist() == [0, 2, 0, 1, 5, 6, 5, 8]
    assert pairs.second.tolist() == [1, 3, 2, 4, 6, 7, 8, 9]
    assert pairs.genuine.tolist() == [True, True, False, False] * 2
    assert pairs.fold.tolist() == [0] * 4 + [1] * 4


def test_a_first_line_of_one_number_means_one_fold(tmp_path: Path) -> None:
    pairs = read_pair_list(written(tmp_path, ["2", *TWO_FOLDS[1:5]]))
    assert pairs.fold.tolist() == [0] * 4
    assert pairs.genuine.tolist() == [True, True, False, False]


def test_names_with_spaces_are_read_where_tabs_separate(tmp_path: Path) -> None:
    pairs = read_pair_list(written(tmp_path, ["1", "Ada L\t1\t2", "Ada L\t1\tBob\t1"]), suffix=".png")
    assert pairs.paths == ("Ada L/Ada L_0001.png", "Ada L/Ada L_0002.png", "Bob/Bob_0001.png")


def test_a_number_of_more_than_four_digits_is_not_cut(tmp_path: Path) -> None:
    assert read_pair_list(written(tmp_path, ["1", "A\t1\t12345", "A\t1\tB\t1"])).paths[1] == "A/A_12345.jpg"


@pytest.mark.parametrize(
    ("number", "line", "said"),
    [
        (1, "ten 300", "the numbers of folds and of pairs"),
        (1, "2 2 2", "the numbers of folds and of pairs"),
        (1, "0 2", "the numbers of folds and of pairs"),
        (1, "-2 2", "the numbers of folds and of pairs"),
        (2, "A\tone\t2", "NAME, I, J"),
        (2, "A\t1\t2.0", "NAME, I, J"),
        (2, "A\t0\t2", "NAME, I, J"),
        (2, "A\t1\t9999999999", "NAME, I, J"),
        (3, "B\t1", "NAME, I, J"),
        (3, "", "NAME, I, J"),
        (3, "A\t1\tB\t1", "NAME, I, J"),
        (4, "A\t1\t2", "NAME1, I, NAME2, J"),
        (4, "A\t1\tB\tx", "NAME1, I, NAME2, J"),
        (5, "A\t2\tA\t3", "two people, not A twice"),
        (6, "D\t2\t2", "two pictures, not picture 2 twice"),
        (6, "../D\t1\t2", "NAME, I, J"),
        (8, "D\t1\t..\t1", "NAME1, I, NAME2, J"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, number: int, line: str, said: str) -> None:
    file = written(tmp_path, changed(number, line))
    with pytest.raises(DataError) as caught:
        read_pair_list(file)
    message = str(caught.value)
    assert message.startswith(f"{file}, line {number}: {line!r} is malformed; expected ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("kept", [1, 5, 8])
def test_a_list_cut_short_is_an_error(tmp_path: Path, kept: int) -> None:
    with pytest.raises(DataError, match=rf"promises 2 folds of 2 x 2 pairs, 9 lines in all, but the file has {kept};"):
        read_pair_list(written(tmp_path, TWO_FOLDS[:kept]))


def test_more_lines_than_promised_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9 lines in all, but the file has 10"):
        read_pair_list(written(tmp_path, [*TWO_FOLDS, "Z\t1\tY\t1"]))


def test_a_line_cut_in_its_middle_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 9: 'E' is malformed"):
        read_pair_list(written(tmp_path, changed(9, "E")))


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_list_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pairs.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"pairs.txt: empty; give LFW's pairs.txt"):
        read_pair_list(tmp_path / "pairs.txt")


def test_a_list_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_pair_list(tmp_path / "none.txt")
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_pair_list(tmp_path / "picture.jpg")


def test_pictures_that_are_not_there_are_named(tmp_path: Path) -> None:
    pairs = read_pair_list(written(tmp_path, TWO_FOLDS))
    root = tmp_path / "lfw"
    with pytest.raises(DataError, match="no such folder; give the folder with one folder a person"):
        require_pictures(pairs, root)
    for path in pairs.paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    require_pictures(pairs, root)
    (root / "B/B_0012.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 10 pictures that the pairs name are not there \(B/B_0012.jpg\); give"):
        require_pictures(pairs, root)
    for path in pairs.paths[:5]:
        (root / path).unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"\(A/A_0001.jpg, A/A_0002.jpg, B/B_0001.jpg and 2 more\)"):
        require_pictures(pairs, root)
