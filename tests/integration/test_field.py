"""Each case of ../shared/field comes out as its expected.txt says: what users brought, and what is right.

A case is a folder with a program that makes the input.  Those of programs that meet (13 to 16) are run elsewhere, in
environments of the same kind; docs/FIELD.md names the test of each kind.
"""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from common.faces.pack import FacePack, load_pack
from common.system import runtime
from server.public_set import open_public_set
from simulation import cli, sites
from tests.another_account import as_another_account
from tests.conftest import ROOT, skip_or_fail
from tests.tiny_federation import settings_with

pytestmark = pytest.mark.shared
KEY_LENGTH = 64  # of a pack's folder: a SHA-256 in hexadecimal
NAMED_OTHERWISE = {
    "07-unreadable-subfolder": "test_a_folder_that_cannot_be_entered_and_a_link_to_itself",
    "13-http-proxy": "tests/e2e/test_resume.py",
    "14-long-tmpdir": "tests/e2e/test_simulation.py",
    "15-ray-address": "tests/e2e/test_simulation.py",
    "16-ipv6": "tests/e2e/test_resume.py",
}


@pytest.fixture(scope="module")
def field() -> Path:
    folder = ROOT.parent / "shared" / "field"
    if not folder.is_dir():
        skip_or_fail(f"the cases are not here ({folder.name} beside the checkout)")
    return folder


@pytest.fixture
def case(field, tmp_path, monkeypatch, capsys):
    """case(name) -> its input, made; and `facefed` in this process: case.facefed(...) -> (code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sites, "num_cores", lambda: 1)  # a few pictures: no process of its own is worth it
    monkeypatch.setattr(runtime, "go_silent", lambda: None)
    monkeypatch.setattr(cli, "go_silent", lambda: None)

    def made(name: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["make.py", str(tmp_path / "OUT")])
        runpy.run_path(str(field / name / "make.py"))
        return tmp_path / "OUT"

    def facefed(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        told = capsys.readouterr()
        return code, told.out, told.err

    made.facefed = facefed
    return made


def people_and_pictures(out: str) -> tuple[int, int]:
    found = re.search(r"(\d+) people, (\d+) pictures", out)
    assert found, out
    return int(found[1]), int(found[2])


def packs(folder: Path) -> list[FacePack]:
    return [load_pack(path) for path in sorted(folder.iterdir()) if path.is_dir() and len(path.name) == KEY_LENGTH]


def test_each_case_is_tried(field):
    own = Path(__file__).read_text(encoding="utf-8")
    for name in sorted(path.name for path in field.iterdir() if path.is_dir()):
        assert name in NAMED_OTHERWISE or f'case("{name}")' in own, name


def test_celeba_as_kaggle_hands_it_out(case):
    out = case("01-kaggle-celeba-csv")
    code, said, error = case.facefed("data", "prepare", "--client", "celeba", "--data-dir", out)
    assert (code, error) == (0, ""), said
    assert sum(map(len, packs(Path(".facefed/packs")))) == 72


def test_all_kinds_of_pictures(case):
    out = case("03-picture-types-ignored")
    code, said, _ = case.facefed("data", "audit", "--client", "mine:folder", "--data-dir", out)
    assert (code, people_and_pictures(said)) == (0, (12, 96))
    assert case.facefed("data", "prepare", "--client", "mine:folder", "--data-dir", out)[0] == 0
    assert sum(map(len, packs(Path(".facefed/packs")))) == 96


def test_pictures_a_folder_deeper(case):
    out = case("04-nested-folders-ignored")
    code, said, _ = case.facefed("data", "audit", "--client", "mine:folder", "--data-dir", out)
    assert (code, people_and_pictures(said)) == (0, (12, 72))


def test_photos_with_odd_exif_are_turned_upright(case):
    out = case("06-rotated-photo-odd-exif")
    code, said, _ = case.facefed("data", "audit", "--client", "mine:folder", "--data-dir", out)
    assert (code, people_and_pictures(said)) == (0, (8, 44))
    assert re.search(r"quarantined: 0 \(0\.00", said), said


AUDIT = """
import sys
from pathlib import Path
index = read_index("folder", Path(sys.argv[1]))
print(len(index.people), len(index.paths), [one.words for one in index.account.passed_over])
"""


def test_a_folder_that_cannot_be_entered_and_a_link_to_itself(case, tmp_path):
    out = case(
        "04-nested-folders-ignored"
    )  # which the shell script of 07-unreadable-subfolder runs: case("07-unreadable-subfolder")
    (out / "lost+found").mkdir(mode=0o700)
    (out / "papers").mkdir(mode=0o700)
    (out / "loop").symlink_to("loop")
    code, said, _ = case.facefed("data", "audit", "--client", "mine:folder", "--data-dir", out)
    assert (code, people_and_pictures(said)) == (0, (12, 72))
    for folder in (out, *out.parents):
        if folder.is_relative_to(tmp_path.parents[2]):
            folder.chmod(0o755)
    said = as_another_account(AUDIT, out, imports="from common.faces.index import read_index")
    assert said.startswith("12 72 "), said
    assert "1 folder that cannot be read (Permission denied)" in said
    assert "1 link to nowhere" in said


def test_people_are_chosen_among_those_with_pictures(case):
    out = case("08-max-people-before-missing")
    common = ("data", "prepare", "--client", "celeba", "--data-dir", out, "--set", "data.alignment=resize", "--set",
              "data.max_quarantined_fraction=1")  # fmt: skip
    for more, people, pictures in (((), 8, 48), (("--max-identities", 6), 6, 36)):
        code, said, error = case.facefed(*common, *more, "--cache-dir", f"packs-{people}")
        assert code == 0, (said, error)
        [packed] = packs(Path(f"packs-{people}"))
        assert (len(np.unique(packed.person)), len(packed)) == (people, pictures)


def test_two_spellings_of_a_name(case):
    out = case("09-nfc-nfd-person")
    code, said, _ = case.facefed("data", "audit", "--client", "mine:folder", "--data-dir", out)
    assert (code, people_and_pictures(said)) == (0, (12, 78))
    assert "two Unicode spellings" in said


def test_pairs_find_pictures_of_another_ending(case):
    out = case("10-lfw-pairs-png")
    values = {"verification__public_dir": str(out / "lfw"), "verification__public_pairs": str(out / "pairs.txt")}
    found = open_public_set(settings_with(**values, data__image_size=32))
    assert found is not None
    assert len(found.pairs.genuine) == 12


def test_deep_grey_pictures_are_scaled(case):
    out = case("11-png-16bit-dark")
    code, said, error = case.facefed(
        "data", "prepare", "--client", "mine:folder", "--data-dir", out, "--cache-dir", "OUT-packs"
    )
    assert code == 0, (said, error)
    [packed] = packs(Path("OUT-packs"))
    assert len(packed) == 74
    assert packed.pictures[:].reshape(len(packed), -1).max(axis=1).min() > 100


def test_celeba_as_png(case):
    out = case("18-celeba-other-endings")
    code, said, error = case.facefed(
        "data", "prepare", "--client", "celeba", "--data-dir", out, "--set", "data.alignment=resize"
    )
    assert code == 0, (said, error)
    assert sum(map(len, packs(Path(".facefed/packs")))) == 72
