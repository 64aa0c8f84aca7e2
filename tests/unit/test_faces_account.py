"""Everything below a data folder is used, left out with a reason, or passed over with kind and number."""

import io
import os
import random
import shutil
import struct
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faces_on_disk import SMALL, make_celeba, make_folder, opened, picture, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_federation import settings_with

from clients.local_update import join
from clients.own_machine import ClientOption, site_of
from common.errors import DataError
from common.faces import account
from common.faces.account import DATA, ODD, account_of, walk
from common.faces.decode import decode_aligned
from common.faces.index import read_index
from common.faces.pack import load_pack, open_pack
from common.settings import DataSettings
from server.public_set import PublicSet, open_public_set
from simulation.data.audit import audit
from simulation.sites import pack_at_the_door

ANY = DataSettings(image_size=32, max_quarantined_fraction=1.0)


def passed(root: Path, dataset: str = "folder") -> dict[str, int]:
    return {one.words: one.number for one in read_index(dataset, root).account.passed_over}


def test_all_kinds_of_still_pictures_are_read(tmp_path: Path) -> None:
    """Six types that Pillow reads, with endings in any case: 96 pictures of 12 people."""
    endings = (".jpg", ".JPG", ".Jpeg", ".tif", ".pgm", ".gif", ".jfif", ".avif")
    for person in range(12):
        for number, ending in enumerate(endings):
            file = tmp_path / "f" / f"person{person}" / f"{number}{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = picture(100 * person + number, 40, 40).convert("L" if ending == ".pgm" else "RGB")
            image.save(file, "JPEG" if ending == ".jfif" else None)
    pack = opened(tmp_path / "f")
    assert (len(pack), pack.quarantined, pack.account.passed_over) == (96, (), ())


def test_what_is_not_read_is_named_by_kind_and_number(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", {f"p{i}": 6 for i in range(12)})
    for number in range(60):
        (root / f"p{number % 12}" / f"{number}.CR2").write_bytes(b"raw")
    (root / "p0" / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    (root / "p1" / "gone").symlink_to("nowhere")
    (root / "p1" / "lost.jpg").symlink_to("nowhere.jpg")
    assert passed(root) == {"60 .cr2": 60, "1 folder without pictures": 1, "1 link to nowhere": 1, "1 .txt": 1}
    assert read_index("folder", root).account.missing == (("p1/lost.jpg", "missing: a link to nowhere"),)
    with pytest.raises(DataError) as caught:
        opened(root)
    assert "60 .cr2, 1 folder without pictures, 1 link to nowhere" in str(caught.value)
    assert "of 133 pictures cannot be used" in str(caught.value)
    pack = opened(root, ANY)
    assert pack.account.num_unused_data == 60
    assert pack.account.lines() == [
        "not used: 60 .cr2, 1 folder without pictures, 1 link to nowhere; facefed data audit lists them"
    ]
    assert load_pack(root.parent / "cache" / pack.key).account.passed_over == pack.account.passed_over
    report = audit("folder", root, ANY)
    assert report.account == pack.account.__class__(**{**vars(pack.account), "missing": report.account.missing})
    assert "60 .cr2, such as p0/0.CR2" in "\n".join(report.lines())
    assert report.fraction_quarantined == pytest.approx(61 / 133)


def test_pictures_any_number_of_folders_below_a_person(tmp_path: Path) -> None:
    for person in range(12):
        for number in range(6):
            file = tmp_path / "f" / (f"p{person}/2019/a" if person < 3 else f"p{person}") / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(100 * person + number, 40, 40).save(file)
    index = read_index("folder", tmp_path / "f")
    assert (len(index.people), len(index)) == (12, 72)
    assert index.account.passed_over == ()


def test_parts_are_no_people(tmp_path: Path) -> None:
    make_folder(tmp_path / "f" / "train", {"ann": 2, "bob": 2})
    make_folder(tmp_path / "f" / "val", {"ann": 1})
    index = read_index("folder", tmp_path / "f")
    assert index.people == ("ann", "bob")
    assert np.bincount(index.person).tolist() == [3, 2]
    assert index.account.notes == (
        "train/, val/ taken as parts of one set: people of one name are one person, splits are by hash",
    )


def test_people_one_level_deeper_are_pointed_at(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "faces" / "a" / "b", {f"p{i}": 1 for i in range(12)})
    with pytest.raises(DataError, match=f"12 folders of pictures 2 levels deeper, in a/b: give {root}"):
        read_index("folder", tmp_path / "faces")
    shutil.move(root / "p0" / "000.jpg", tmp_path / "only.jpg")
    (tmp_path / "flat").mkdir()
    shutil.move(tmp_path / "only.jpg", tmp_path / "flat")
    with pytest.raises(DataError, match=r"no pictures found; .*There: 1 pictures in the folder itself"):
        read_index("folder", tmp_path / "flat")


def test_two_spellings_of_one_name_are_one_person(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "José Pérez") for form in ("NFC", "NFD"))
    root = make_folder(tmp_path / "f", {composed: 2, decomposed: 3, "p1": 2})
    index = read_index("folder", root)
    assert index.people == (composed, "p1")
    assert "1 name stands in two Unicode spellings" in index.account.notes[0]
    shutil.rmtree(root / composed)
    assert read_index("folder", root).people == (decomposed, "p1")  # a name's one spelling stays: so do its splits


def test_a_folder_that_cannot_be_entered_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "f", {f"p{i}": 6 for i in range(12)})
    (root / "lost+found").mkdir()
    (root / "secret").mkdir()
    (root / "loop").symlink_to("loop")
    (root / "p3" / "up").symlink_to("..")
    real = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith(("secret", "lost+found")):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(account.os, "scandir", scandir)
    pack = opened(root)
    assert len(set(pack.person.tolist())) == 12
    assert passed(root) == {
        "1 folder that cannot be read (Permission denied)": 1,
        "1 link to nowhere": 1,
        "1 link to a folder that is read already": 1,
        "1 folders of the system": 1,
    }


def test_people_are_chosen_among_those_with_pictures(tmp_path: Path) -> None:
    root = make_celeba(tmp_path / "c", {p: (0 if p <= 8 else 1 if p <= 10 else 2, 6) for p in range(1, 13)})
    for number in range(72):
        if number // 6 + 1 not in (2, 5, 6, 7, 9, 10, 11, 12):
            (root / "img_align_celeba" / f"{number + 1:06d}.jpg").unlink()
    assert len(set(open_pack("celeba", root, ANY, tmp_path / "cache", workers=1).person.tolist())) == 8
    six = DataSettings(image_size=32, max_quarantined_fraction=1.0, max_people=6)
    pack = open_pack("celeba", root, six, tmp_path / "cache", workers=1)
    assert len(set(pack.person.tolist())) == 6
    assert len(pack.quarantined) == 24
    assert audit("celeba", root, six).quarantined == pack.quarantined


def test_a_key_does_not_depend_on_what_lies_beside(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", {f"p{i}": 6 for i in range(12)})
    key = opened(root).key
    (root / "p1" / "a.txt").write_text("x")
    (root / "p1" / "b.cr2").write_text("x")
    again = opened(root)
    assert again.key == key
    assert again.account.words() == "1 .cr2"


def test_too_few_people_says_what_is_needed_and_there(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", {f"p{i}": 1 for i in range(5)})
    with pytest.raises(DataError) as caught:
        opened(root)
    assert "There: 5 people with pictures, 5 of them with a single one; needed: 6 people" in str(caught.value)
    assert "relax" not in str(caught.value)


# ---- pictures


def write_grey16(file: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint16)).save(file)


def test_pictures_that_show_nothing_are_left_out_and_deep_ones_are_scaled(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", {f"p{i}": 6 for i in range(12)})
    grey = np.asarray(picture(1, 80, 80).convert("L")).astype(np.uint16)
    write_grey16(root / "p0" / "camera12.png", grey << 4)
    write_grey16(root / "p0" / "values8.png", grey + 1)
    Image.new("RGB", (60, 60)).save(root / "p1" / "black.png")
    Image.new("RGB", (60, 60), (250, 250, 250)).save(root / "p1" / "blank.png")
    Image.new("RGB", (1, 1), (9, 200, 7)).save(root / "p1" / "dot.png")
    pack = opened(root, ANY)
    assert {path: reason.split(":")[0] for path, reason in pack.quarantined} == {
        "p1/black.png": "no contrast",
        "p1/blank.png": "no contrast",
        "p1/dot.png": "too small",
    }
    assert pack.pictures[:].reshape(len(pack), -1).max(axis=1).min() > 100
    assert len(pack) == 74
    values = [note for note in pack.account.notes if note.startswith("values: ")]
    assert values == [f"values: 1 x 16-bit file with values of {bits} bits, scaled" for bits in (12, 8)]
    assert opened(root, ANY).account == pack.account


def photo(file: Path, upright: Image.Image, tag: int, kind: int, value: bytes) -> None:
    """A picture stored turned (Orientation 6) whose EXIF has one more tag, of a kind that the standard does not say."""
    stream = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(stream, "JPEG", quality=95)
    entries = sorted([(0x0112, 3, struct.pack("<HH", 6, 0)), (tag, kind, value)])
    ifd = struct.pack("<H", 2) + b"".join(struct.pack("<HHI", t, k, 1) + v for t, k, v in entries) + bytes(4)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + ifd
    jpeg = stream.getvalue()
    file.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [
        (0x0213, 3, struct.pack("<HH", 1, 0)),
        (0x0213, 1, b"\x01\0\0\0"),  # YCbCrPositioning as BYTE
        (0x011A, 2, b"72\0\0"),  # XResolution as text
        (0x0128, 4, struct.pack("<I", 99999)),  # ResolutionUnit as LONG
    ],
)
def test_a_photo_is_turned_by_its_orientation_flag_alone(tmp_path: Path, tag: int, kind: int, value: bytes) -> None:
    upright = picture(3, 80, 120)
    photo(tmp_path / "a.jpg", upright, tag, kind, value)
    upright.save(tmp_path / "plain.jpg", quality=95)
    turned, plain = (decode_aligned((tmp_path / name).read_bytes(), None, 32) for name in ("a.jpg", "plain.jpg"))
    assert np.abs(turned.astype(int) - plain.astype(int)).mean() < 3


@pytest.mark.parametrize("name", [b"zTXt", b"tEXt", b"iTXt"])
def test_the_text_in_a_png_says_nothing_about_its_pixels(name: bytes) -> None:
    stream = io.BytesIO()
    picture(3, 40, 40).save(stream, "PNG")
    whole = stream.getvalue()
    body = b"Comment\0\0" + zlib.compress(bytes(50_000_000))
    chunk = struct.pack(">I", len(body)) + name + body + bytes(4)  # with a wrong check sum
    spoilt = whole[:33] + chunk + whole[33:]
    np.testing.assert_array_equal(decode_aligned(spoilt, None, 32), decode_aligned(whole, None, 32))


# ---- everything is accounted for


ENDINGS = ("jpg", "JPG", "png", "tif", "heic", "cr2", "txt", "zip", "", "GIF", "avif", "db")
NAMES = ("train", "val", "ann", "José", "Jose\u0301", ".git", "lost+found", "a b", "x" * 40, "Anno", "bb_landmark")


def grow(draw: random.Random, folder: Path, depth: int, places: list[Path]) -> None:
    """A random tree; files are empty, for nothing is decoded."""
    for number in range(draw.randrange(5)):
        ending = draw.choice(ENDINGS)
        name = f"{'.' if draw.random() < 0.1 else ''}f{number}{'.' if ending else ''}{ending}"
        (folder / name).write_bytes(b"")
    if draw.random() < 0.1:
        os.mkfifo(folder / draw.choice(("pipe", "pipe.jpg")))
    if draw.random() < 0.3:
        aim = draw.choice([*places, folder / "nowhere", folder / "link", folder / "f0.jpg"])
        (folder / draw.choice(("link", "link.jpg"))).symlink_to(aim)
    places.append(folder)
    for _ in range(draw.randrange(4) if depth else 0):
        below = folder / (draw.choice(NAMES) if draw.random() < 0.5 else f"d{draw.randrange(9)}")
        if not below.exists():
            below.mkdir()
            grow(draw, below, depth - 1, places)


def everything(root: Path, closed: set[str], folder: str = "") -> set[str]:
    """All that is on disk, found another way: what is no folder, but for what lies in folders that are not entered."""
    found = set()
    for name in os.listdir(root / folder):  # noqa: PTH208
        path = f"{folder}/{name}" if folder else name
        if path in closed or not (root / path).is_dir():
            found.add(path)
        else:
            found |= everything(root, closed, path)
    return found


def celeba_around(draw: random.Random, root: Path) -> Path:
    """CelebA's lists, and some of the pictures that they name; the folder of pictures."""
    base = root / draw.choice(("", "celeba"))
    folder = base / "img_align_celeba"
    folder.mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(draw.randrange(1, 6))]
    put(draw, folder, names)
    write(base / "identity_CelebA.txt", [f"{name} {number // 2}" for number, name in enumerate(names)])
    write(base / "list_eval_partition.txt", [f"{name} 0" for name in names])
    return folder


def vggface2_around(draw: random.Random, root: Path) -> Path:
    """VGGFace2's parts, with lists or without, and some of the pictures; the folder of people to train on."""
    base = root / draw.choice(("", "data"))
    for part in ("train", "test")[: draw.randrange(1, 3)]:
        listed = []
        for person in range(draw.randrange(1, 3)):
            folder = base / part / f"n{person + 10 * (part == 'test'):06d}"
            folder.mkdir(parents=True)
            names = [f"{number:04d}_01.jpg" for number in range(draw.randrange(1, 4))]
            put(draw, folder, names)
            listed += [f"{folder.name}/{name}" for name in names]
        if draw.random() < 0.5:
            write(base / f"{part}_list.txt", listed)
    return base / "train"


def put(draw: random.Random, folder: Path, names: list[str]) -> None:
    """Most of the files, the last as a link to nowhere now and then."""
    for name in names:
        if draw.random() < 0.8:
            (folder / name).write_bytes(b"")
        elif draw.random() < 0.3:
            (folder / name).symlink_to("nowhere")


def person_around(draw: random.Random, root: Path) -> Path:
    """A folder of pictures that are one person's; the folder."""
    (root / "bob").mkdir()
    put(draw, root / "bob", ["0.jpg", "1.png"])
    return root / "bob"


AROUND = {"folder": person_around, "celeba": celeba_around, "vggface2": vggface2_around}
tried = Counter[str]()


@pytest.mark.parametrize("layout", AROUND)
@given(draw=st.randoms(use_true_random=False))
@settings(max_examples=170, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_used_left_out_and_passed_over_are_everything_on_disk(layout: str, draw: random.Random) -> None:
    """Of 510 trees, whose depth, names, endings, links, pipes and forbidden folders are drawn."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        root, places = Path(folder) / "tree", list[Path]()
        root.mkdir()
        own = AROUND[layout](draw, root)
        grow(draw, root, 3, places)
        grow(draw, own, 1, places)
        forbidden = {str(place.resolve()) for place in places[1:] if place != own and draw.random() < 0.05}
        patched.setattr(account.os, "scandir", forbidding(forbidden))
        listing = walk(root)
        try:
            index = read_index(layout, root)
            told, paths = index.account, set(index.paths)
        except DataError:
            told, paths = account_of(listing, ()), set()
            tried[f"{layout}: refused"] += 1
        tried[layout] += 1
        on_disk = everything(root, set(listing.closed))
        empty = sum(one.number for one in told.passed_over if "without pictures" in one.words)
        left_out = {path for path, _ in told.missing}
        assert left_out <= paths
        assert paths - on_disk <= left_out
        assert len(paths & on_disk) + told.num_passed_over - empty == len(on_disk)
        assert told.num_found == len(on_disk) + empty


def test_most_of_those_trees_were_read() -> None:
    if any(tried[layout] < 170 for layout in AROUND):
        pytest.skip("they were not all tried in this process")
    assert sum(tried[layout] for layout in AROUND) >= 500
    for layout in AROUND:
        assert tried[f"{layout}: refused"] < tried[layout] / 4, tried


def forbidding(folders: set[str]) -> Callable[[str | Path], Iterator[os.DirEntry[str]]]:
    """os.scandir for an account that may not read those folders."""
    real = os.scandir

    def scandir(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if os.path.realpath(path) in folders:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    return scandir


# ---- layouts


def kaggle_celeba(root: Path) -> Path:
    """The csv lists of Kaggle's copy, folder in folder, with the identity list beside it."""
    made = make_celeba(root, {p: (0 if p <= 8 else 1 if p <= 10 else 2, 6) for p in range(1, 13)})
    (made / "img_align_celeba").rename(made / "x")
    (made / "img_align_celeba").mkdir()
    (made / "x").rename(made / "img_align_celeba" / "img_align_celeba")
    for name, heading, skipped in (
        ("list_eval_partition", "image_id,partition", 0),
        ("list_landmarks_align_celeba", "image_id,lefteye_x,lefteye_y", 2),
    ):
        rows = [",".join(line.split()) for line in (made / f"{name}.txt").read_text().splitlines()[skipped:]]
        write(made / f"{name}.csv", [heading, *rows])
        (made / f"{name}.txt").unlink()
    return made


def test_celeba_as_kaggle_has_it(tmp_path: Path) -> None:
    official = make_celeba(tmp_path / "o", {p: (0 if p <= 8 else 1 if p <= 10 else 2, 6) for p in range(1, 13)})
    root = kaggle_celeba(tmp_path / "k")
    one, other = read_index("celeba", official), read_index("celeba", root)
    assert len(other) == 72
    np.testing.assert_array_equal(one.official_split, other.official_split)
    np.testing.assert_array_equal(one.landmarks, other.landmarks)
    assert len(open_pack("celeba", root, SMALL, tmp_path / "cache", workers=1)) == 72
    (root / "identity_CelebA.txt").unlink()
    with pytest.raises(DataError, match="Kaggle's come without it: it is in the authors' drive") as caught:
        read_index("celeba", root)
    assert "list_eval_partition.csv" in str(caught.value)
    shutil.copytree(official, tmp_path / "deep" / "data" / "celeba")
    assert len(read_index("celeba", tmp_path / "deep")) == 72


@pytest.mark.parametrize(("folder", "ending"), [("img_align_celeba_png", ".png"), ("img_align_celeba", ".JPG")])
def test_celeba_with_other_endings(tmp_path: Path, folder: str, ending: str) -> None:
    root = make_celeba(tmp_path / "c", {p: (0 if p <= 8 else 1 if p <= 10 else 2, 6) for p in range(1, 13)})
    (root / "img_align_celeba").rename(root / "away")
    (root / folder).mkdir()
    for number in range(72):
        picture(number).save(root / folder / f"{number + 1:06d}{ending}")
    shutil.rmtree(root / "away")
    pack = open_pack("celeba", root, SMALL, tmp_path / "cache", workers=1)
    assert len(pack) == 72
    assert "72 pictures have another ending than their list says: taken as the same" in pack.account.notes


def test_celeba_that_is_still_packed_and_lists_without_headings(tmp_path: Path) -> None:
    root = make_celeba(tmp_path / "c", {p: (p % 3, 3) for p in range(1, 9)})
    file = root / "list_landmarks_align_celeba.txt"
    before = read_index("celeba", root).landmarks
    write(file, file.read_text().splitlines()[2:])
    np.testing.assert_array_equal(read_index("celeba", root).landmarks, before)
    shutil.rmtree(root / "img_align_celeba")
    (root / "img_align_celeba.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"img_align_celeba\.zip: is still packed"):
        read_index("celeba", root)


def vggface2(root: Path, size: tuple[int, int] = (120, 140)) -> Path:
    """train/ of 10 people, test/ of 3, landmarks and lists as the authors have them."""
    for part, people in (("train", range(2, 12)), ("test", (1, 12, 13))):
        names = [f"n{person:06d}/{number:04d}_01" for person in people for number in range(4)]
        for seed, name in enumerate(names):
            file = root / part / f"{name}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(1000 * (part == "test") + seed, *size).save(file)
        rows = [f'"{name}",40,50,80,50,60,70,45,95,75,95' for name in names]
        write(root / "bb_landmark" / f"loose_landmark_{part}.csv", ["NAME_ID,P1X,P1Y", *rows])
        write(root / f"{part}_list.txt", [f"{name}.jpg" for name in names])
    return root


def test_copies_of_vggface2_say_the_same(tmp_path: Path) -> None:
    official = read_index("vggface2", vggface2(tmp_path / "o"))
    root = vggface2(tmp_path / "copy" / "data")
    for part in ("train", "test"):
        file = root / f"{part}_list.txt"
        write(file, [f"{part}/{line} {number // 4}" for number, line in enumerate(file.read_text().splitlines())])
    lines = [(root / "bb_landmark" / f"loose_landmark_{part}.csv") for part in ("train", "test")]
    write(
        root / "bb_landmark" / "loose_landmark.csv",
        [line for file in lines for line in file.read_text().split("\n")[1:-1]],
    )
    for file in lines:
        file.unlink()
    (root / "test").rename(root / "val")
    (root / "test_list.txt").rename(root / "val_list.txt")
    write(
        root / "val_list.txt",
        [line.replace("test/", "val/") for line in (root / "val_list.txt").read_text().split("\n")[:-1]],
    )
    copy = read_index("vggface2", tmp_path / "copy")
    assert copy.people == official.people
    assert set(copy.official_split.tolist()) == {0, 1}
    train = official.official_split == 0
    np.testing.assert_array_equal(copy.landmarks[copy.official_split == 0], official.landmarks[train])
    assert not np.isnan(copy.landmarks).any()
    assert copy.account.passed_over == () or all(one.weight not in (DATA, ODD) for one in copy.account.passed_over)


def test_vggface2_without_lists_landmarks_or_train(tmp_path: Path) -> None:
    root = vggface2(tmp_path / "v")
    shutil.rmtree(root / "bb_landmark")
    pack = open_pack("vggface2", root, SMALL, tmp_path / "cache", workers=1)
    assert any("cut to their centre square, not aligned by landmarks" in note for note in pack.account.notes)
    shutil.rmtree(root / "test")
    for part in ("train", "test"):
        (root / f"{part}_list.txt").unlink()
    (root / "train").rename(tmp_path / "vggface2_112x112")
    index = read_index("vggface2", tmp_path / "vggface2_112x112")
    assert (len(index.people), len(index)) == (10, 40)
    small = vggface2(tmp_path / "small", (64, 64))
    index = read_index("vggface2", small)
    assert index.landmarks is None
    assert "copies of 64 x 64 px" in index.account.notes[0]
    (tmp_path / "none" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train: no such folder; the official VGGFace2 .*--client NAME:folder"):
        read_index("vggface2", tmp_path / "none")


def test_what_the_lists_do_not_name_is_told(tmp_path: Path) -> None:
    root = make_celeba(tmp_path / "c", {p: (0 if p <= 8 else 1 if p <= 10 else 2, 6) for p in range(1, 13)})
    make_folder(root / "val", {"ann": 3, "bob": 3})
    picture(1).save(root / "img_align_celeba" / "999999.jpg")
    words = passed(root, "celeba")
    assert words["val/: 2 people, 6 pictures"] == 6
    assert words["1 picture that the layout does not name"] == 1
    with pytest.raises(DataError, match=r"7 of 79 pictures cannot be used .*val/: 2 people, 6 pictures"):
        open_pack("celeba", root, SMALL, tmp_path / "cache", workers=1)


# ---- LFW at the public set


def lfw(root: Path, ending: str = ".png") -> list[str]:
    """Six people of four pictures below root, as aligners write them; their names."""
    names = [f"Person_{letter}" for letter in "ABCDEF"]
    for place, name in enumerate(names):
        for number in range(1, 5):
            file = root / name / f"{name}_{number:04d}{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(100 * place + number, 40, 40).save(file)
    return names


def public(root: Path, pairs: Path) -> PublicSet | None:
    values = {"verification__public_dir": str(root), "verification__public_pairs": str(pairs)}
    return open_public_set(settings_with(**values, data__image_size=32))


def test_lists_of_pairs_in_every_form_find_their_pictures(tmp_path: Path) -> None:
    a, b, c, *_ = lfw(tmp_path / "lfw" / "lfw-deepfunneled" / "lfw-deepfunneled")
    official, table, paths = (tmp_path / name for name in ("pairs.txt", "pairs.csv", "ann.txt"))
    write(official, ["2\t1", f"{a}\t1\t2", f"{a}\t1\t{b}\t2", f"{b}\t1\t2", f"{b}\t1\t{c}\t2"])
    write(table, ["name,imagenum1,imagenum2,", f"{a},1,2,", f"{a},1,{b},2", f"{b},1,2,", f"{b},1,{c},2"])
    genuine = [f"1 {a}/{a}_0001.jpg {a}/{a}_0002.jpg", f"0 {a}/{a}_0001.jpg {b}/{b}_0002.jpg"]
    write(paths, genuine * 10)
    one, other, third = (public(tmp_path / "lfw", file) for file in (official, table, paths))
    assert one is not None
    assert other is not None
    assert third is not None
    np.testing.assert_array_equal(one.pictures, other.pictures)
    np.testing.assert_array_equal(one.pairs.fold, other.pairs.fold)
    assert one.pairs.genuine.tolist() == other.pairs.genuine.tolist() == [True, False] * 2
    assert third.pairs.fold.tolist() == np.repeat(np.arange(10), 2).tolist()
    write(official, ["2\t1", f"{a}\t1\t9", f"{a}\t1\t{b}\t2", f"{b}\t1\t2", f"{b}\t1\t{c}\t2"])
    with pytest.raises(DataError, match=r"1 of 5 pictures .* There: 24 pictures in 6 folders, such as lfw-deep"):
        public(tmp_path / "lfw", official)


# ---- where it is told


def test_prepare_and_the_join_tell_what_is_not_used(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", {f"p{i}": 6 for i in range(12)})
    for number in range(3):
        (root / "p0" / f"{number}.cr2").write_bytes(b"raw")
    out = io.StringIO()
    option = ClientOption(name="mine", dataset="folder", data_dir=root)
    site = site_of(option, device="cpu", cache_dir=tmp_path / "packs", state_dir=tmp_path / "state")
    settings = settings_with(data__image_size=32)
    pack_at_the_door(site, settings, out)
    assert "mine: not used: 3 .cr2; facefed data audit lists them\n" in out.getvalue()
    assert join(site, settings).num_quarantined == 3
