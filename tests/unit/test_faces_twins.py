"""The twins' layout: families, official split, prefixes of other machines, and every fault in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from faces_on_disk import make_folder, picture

from common.errors import DataError
from common.faces.decode import plan
from common.faces.index import read_index, take
from common.faces.pack import load_pack, open_pack, union_pack
from common.faces.splits import Split, assign_splits
from common.settings import DataSettings
from simulation.cli import main
from simulation.data.audit import audit

TRAIN = {
    "90004": ["90004/90004d13.jpg", "/kaggle/input/nd/ND_TWINS/90004/90004d2.jpg"],
    "90007": ["C:\\data\\twins\\90007\\90007d1.jpg"],
    "90001": ["./90001/90001d1.jpg"],
}
TEST = {"80001": ["80001/80001d1.jpg"], "80002": ["80002/80002d1.jpg"], "80003": ["80003/80003d1.jpg"]}
TRAIN_PAIRS, TEST_PAIRS = [["90007", "90004"]], [["80001", "80002"], [80003, 80002]]


def make(root: Path, **files: object) -> Path:
    """The four lists, with some of them replaced: by another content, by text as it stands, or by None for no file."""
    root.mkdir(parents=True, exist_ok=True)
    content = {"train_dataset_infor": TRAIN, "test_dataset_infor": TEST} | {
        "train_twin_pairs": TRAIN_PAIRS,
        "test_twin_pairs": TEST_PAIRS,
    }
    for name, value in (content | files).items():
        if value is not None:
            (root / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return root


def make_pictures(root: Path, num_families: int, count: int = 4) -> Path:
    """Families (1, 2), (3, 4), ... of 9000N, each person with `count` pictures; the last fifth of them is test."""
    people = [str(90001 + k) for k in range(2 * num_families)]
    held_out = people[-2 * (num_families // 5) :]
    lists = {who: [f"{who}/{who}d{k}.jpg" for k in range(count)] for who in people}
    for number, path in enumerate(path for paths in lists.values() for path in paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(number, 48, 60).save(root / path)
    parts = {"train": [who for who in people if who not in held_out], "test": held_out}
    return make(
        root,
        **{f"{part}_dataset_infor": {who: lists[who] for who in names} for part, names in parts.items()},
        **{f"{part}_twin_pairs": list(zip(names[::2], names[1::2], strict=True)) for part, names in parts.items()},
    )


def test_the_last_two_parts_of_a_path_count_and_families_are_found(tmp_path: Path) -> None:
    index = read_index("twins", make(tmp_path))
    assert index.paths[:2] == ("80001/80001d1.jpg", "80002/80002d1.jpg")
    assert index.paths[3:] == ("90001/90001d1.jpg", "90004/90004d13.jpg", "90004/90004d2.jpg", "90007/90007d1.jpg")
    assert index.people == ("80001", "80002", "80003", "90001", "90004", "90007")
    assert index.official_split.tolist() == [2, 2, 2, 0, 0, 0, 0]
    assert index.family is not None
    named = {index.people[k]: index.people[first] for k, first in enumerate(index.family.tolist())}
    assert named == {"80001": "80001", "80002": "80001", "80003": "80001"} | {
        "90004": "90004",
        "90007": "90004",
        "90001": "90001",
    }, "a chain of pairs is one family, named after its smallest; who is in no pair is one alone"
    assert take(index, np.array([0, 6])).family is index.family


def test_without_test_files_all_are_training_people(tmp_path: Path) -> None:
    index = read_index("twins", make(tmp_path, test_dataset_infor=None, test_twin_pairs=None))
    assert set(index.official_split.tolist()) == {0}
    with pytest.raises(DataError, match=r"test_twin_pairs\.json: no such file; the twins' layout needs it"):
        read_index("twins", make(tmp_path, test_twin_pairs=None))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train_twin_pairs": [["90004", "12"]]}, r"train_twin_pairs.json, pair 1: person '12' is unknown; list"),
        ({"train_dataset_infor": TRAIN | {"90009": []}}, r"train_dataset_infor.json: person '90009' is without pict"),
        ({"train_twin_pairs": [["90004", "80001"]]}, r"pair 1: the family of '90004' and '80001' is split over train"),
        ({"test_twin_pairs": [["80001", "80002"], ["80003", "90001"]]}, r"pair 2: the family of '80003' and '90001'"),
        ({"test_dataset_infor": TEST | {"90001": ["90001/x.jpg"]}}, r"person '90001' stands in train_dataset_infor"),
        ({"train_twin_pairs": [["90004", "90004"]]}, r"pair 1: pairs person '90004' with itself; name two people"),
        ({"train_dataset_infor": '{"a": [\n"b/c.jpg",]}'}, r"train_dataset_infor.json, line 2: not valid JSON"),
        ({"train_dataset_infor": '{"a": ["a/1.jpg"], "a": ["a/2.jpg"]}'}, r"the name 'a' stands twice in one object"),
        ({"test_twin_pairs": "[" * 100_000}, r"test_twin_pairs.json: not valid JSON"),
        ({"train_dataset_infor": []}, r"train_dataset_infor.json: holds \[\], not one object of the form"),
        ({"train_dataset_infor": {}}, r"train_dataset_infor.json: holds \{\}, not one object of the form"),
        ({"train_twin_pairs": {"90004": "90007"}}, r'holds \{"90004": "90007"\}, not one list of the form'),
        ({"train_twin_pairs": [["90004"]]}, r'pair 1: \["90004"\] is malformed; expected two people'),
        ({"train_twin_pairs": ["9000490007"]}, r'pair 1: "9000490007" is malformed'),
        ({"train_dataset_infor": {"90004": "90004/90004d1.jpg"}}, r"person '90004' has \"90004/90004d1.jpg\", not a"),
        ({"train_dataset_infor": {"90004": [7]}}, r"person '90004' has \[7\], not a list of paths"),
        ({"train_dataset_infor": TRAIN | {"90009": ["90009d1.jpg"]}}, r"picture \"90009d1.jpg\" of person"),
        ({"train_dataset_infor": TRAIN | {"90009": ["../x.jpg"]}}, r"picture \"../x.jpg\" of person"),
        ({"train_dataset_infor": TRAIN | {"90009": ["90004/x.jpg"]}}, r"'90009' but lies in the folder of"),
        ({"train_dataset_infor": TRAIN | {"90009": ["q/1.jpg", "x/q/1.jpg"]}}, r"picture q/1.jpg is named twice"),
        ({"train_dataset_infor": None}, r"train_dataset_infor.json: no such file; the twins' layout needs it"),
    ],
)  # fmt: skip
def test_every_fault_is_one_line(tmp_path: Path, files: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read_index("twins", make(tmp_path, **files))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (make(tmp_path) / "train_twin_pairs.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"train_twin_pairs\.json: not valid JSON"):
        read_index("twins", tmp_path)


def test_families_are_kept_by_the_pack_and_by_several_packs_seen_as_one(tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "twins", 10)
    data = DataSettings(image_size=32)
    pack = open_pack("twins", root, data, tmp_path / "cache", workers=1)
    index = read_index("twins", root)
    assert index.family is not None
    assert index.family.tolist() == [k - k % 2 for k in range(20)]
    np.testing.assert_array_equal(pack.families, index.family)
    np.testing.assert_array_equal(load_pack(tmp_path / "cache" / pack.key).families, index.family)
    assert pack.families.dtype == np.int64
    both = union_pack({"one": pack, "two": pack})
    np.testing.assert_array_equal(both.families, np.concatenate([index.family, index.family + 20]))
    held_out = pack.person[pack.indices(Split.TEST_PEOPLE)]
    assert {pack.people[k] for k in held_out} == {"90017", "90018", "90019", "90020"}

    (root / "test_twin_pairs.json").write_text('[["90017", "90019"], ["90018", "90020"]]')
    other = open_pack("twins", root, data, tmp_path / "cache", workers=1)
    np.testing.assert_array_equal(other.split, pack.split)
    assert other.key != pack.key, "the splits are the same, the families are not"


def test_pictures_come_as_centre_squares_and_a_lost_picture_leaves_families_whole(tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "twins", 10)
    index = read_index("twins", root)
    for alignment in ("landmarks", "box", "resize"):
        recipe, points = plan(index, DataSettings(alignment=alignment))
        assert (recipe.alignment, points) == ("resize", None)
    (root / "90001" / "90001d0.jpg").write_bytes(b"broken")
    data = DataSettings(image_size=32)
    pack = open_pack("twins", root, data, tmp_path / "cache", workers=1)
    assert len(pack.quarantined) == 1
    sides: dict[int, set[bool]] = {}
    for who, code in zip(pack.person, pack.split, strict=True):
        sides.setdefault(int(pack.families[who]), set()).add(code in (Split.VAL_PEOPLE, Split.TEST_PEOPLE))
    assert all(len(seen) == 1 for seen in sides.values())
    report = audit("twins", root, data)
    assert (report.num_people, report.num_pictures, report.problem) == (20, 80, "")


def test_validation_families_come_from_the_training_file(tmp_path: Path) -> None:
    index = read_index("twins", make_pictures(tmp_path / "twins", 10, count=3))
    split = assign_splits(index, DataSettings())
    validation = {index.people[k] for k in index.person[split == Split.VAL_PEOPLE].tolist()}
    assert len(validation) == 4, "two families"
    assert max(validation) <= "90016"


def test_the_audit_counts_families(tmp_path: Path) -> None:
    """10 pairs, of which the last two are test, and two more people to train on: one alone, one a triplet's third.

    Somebody of the first pair has a single broken picture left, so that pair has a sibling no more.
    """
    root = make_pictures(tmp_path / "twins", 10)
    lists = json.loads((root / "train_dataset_infor.json").read_text())
    for who in ("95000", "95001"):
        lists[who] = [f"{who}/{who}d{k}.jpg" for k in range(3)]
        (root / who).mkdir()
        for k in range(3):
            picture(int(who) + 7 * k, 48, 60).save(root / who / f"{who}d{k}.jpg")
    for k in range(4):
        (root / "90001" / f"90001d{k}.jpg").write_bytes(b"broken")
    (root / "train_dataset_infor.json").write_text(json.dumps(lists))
    pairs = [*json.loads((root / "train_twin_pairs.json").read_text()), ["95000", "90003"]]
    (root / "train_twin_pairs.json").write_text(json.dumps(pairs))
    report = audit("twins", root, DataSettings(image_size=32, max_quarantined_fraction=0.5))
    families = report.families
    assert families is not None
    assert (families.number, families.by_size, families.people_without_sibling) == (11, {1: 1, 2: 9, 3: 1}, 1)
    assert families.by_split["test_people"] == families.with_siblings["test_people"] == 2
    assert sum(families.by_split.values()) == 11
    assert sum(families.with_siblings.values()) == 9, "not the person alone, nor the one whose sibling is broken"
    text = "\n".join(report.lines())
    assert "  families: 11, by members: 1: 1, 2: 9, 3: 1; people without a sibling: 1" in text
    assert f"  families by split: train {families.by_split['train']}, val_people" in text
    plain = json.loads(report.to_json())["families"]
    assert plain["by_size"] == {"1": 1, "2": 9, "3": 1}
    assert plain["by_split"] == families.by_split


def test_data_without_families_have_no_line_of_them(tmp_path: Path) -> None:
    report = audit("folder", make_folder(tmp_path / "faces", {f"p{k}": 3 for k in range(12)}), DataSettings())
    assert report.families is None
    assert not [line for line in report.lines()[1:] if "famil" in line]
    assert json.loads(report.to_json())["families"] is None


# What the issue names as bad input, through the command that a user types.
@pytest.mark.parametrize("action", ["audit", "prepare"])
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train_twin_pairs": [["90004", "80001"]]}, "the family of '90004' and '80001' is split over train and test"),
        ({"train_twin_pairs": [["90004", "12"]]}, "pair 1: person '12' is unknown"),
        ({"train_dataset_infor": TRAIN | {"90009": []}}, "person '90009' is without pictures"),
    ],
    ids=["split family", "unknown person", "without pictures"],
)
def test_bad_twins_end_the_command_with_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, object],
    said: str,
    action: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("simulation.cli.go_silent", lambda: None)  # it changes the process
    root = make(tmp_path / "twins", **files)
    assert main(["data", action, "--client", "twins", "--data-dir", str(root)]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    [line] = seen.err.splitlines()
    assert line.startswith("facefed: ")
    assert said in line
    assert str(root) in line
    assert [path.name for path in tmp_path.iterdir()] == ["twins"], "nothing is left behind"


@pytest.mark.parametrize("shape", ["text", "json"])
def test_the_command_shows_families(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("simulation.cli.go_silent", lambda: None)
    root = make_pictures(tmp_path / "twins", 10)
    asked = ["data", "audit", "--client", "twins", "--data-dir", str(root)]
    assert main([*asked, *(["--json"] if shape == "json" else [])]) == 0
    out = capsys.readouterr().out
    if shape == "json":
        assert json.loads(out)["twins"]["families"]["with_siblings"] == {"train": 6, "val_people": 2, "test_people": 2}
    else:
        assert "families by split: train 6, val_people 2, test_people 2" in out
        assert "pictures a person: min 4" in out
