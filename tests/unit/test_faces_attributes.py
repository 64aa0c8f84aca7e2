"""Who is in which group, as CelebA's and VGGFace2's own lists say it."""

import pytest
from faces_on_disk import make_celeba, make_folder, write

from clients.own_machine import ClientOption
from common.errors import DataError, UserError
from common.faces import celeba, vggface2
from simulation.compare.groups import read_groups


@pytest.fixture
def celeba_root(tmp_path):
    """People 1, 2 and 3; of two pictures of person 3 one is Young."""
    root = make_celeba(tmp_path / "celeba", {1: (0, 2), 2: (2, 3), 3: (2, 2)})
    values = ["1 1", "1 1", "-1 1", "-1 1", "-1 -1", "1 1", "1 -1"]
    rows = [f"{number:06d}.jpg  {value}" for number, value in enumerate(values, start=1)]
    write(root / "list_attr_celeba.txt", [str(len(rows)), "Male Young", *rows], "\r\n")
    return root


def test_a_person_is_what_most_of_their_pictures_are(celeba_root):
    found = celeba.read_attributes(celeba_root, ["Young", "Male"])
    assert found == {"Young": {"1": True, "2": True}, "Male": {"1": True, "2": False, "3": True}}


def test_comma_separated_copies_are_read_too(celeba_root):
    lines = (celeba_root / "list_attr_celeba.txt").read_text().split("\n")[1:]
    (celeba_root / "list_attr_celeba.txt").unlink()
    csv = ["image_id," + ",".join(lines[0].split()), *(",".join(line.split()) for line in lines[1:] if line.strip())]
    write(celeba_root / "list_attr_celeba.csv", csv)
    assert celeba.read_attributes(celeba_root, ["Male"])["Male"] == {"1": True, "2": False, "3": True}


def test_what_the_lists_do_not_say_is_told(celeba_root, tmp_path):
    with pytest.raises(DataError, match="attribute = 'Old' is unknown; choices: Male, Young"):
        celeba.read_attributes(celeba_root, ["Old"])
    write(celeba_root / "list_attr_celeba.txt", ["1", "Male Young", "000001.jpg 1"])
    with pytest.raises(DataError, match=r"list_attr_celeba\.txt, line 3: .* is malformed; expected a file name and 2"):
        celeba.read_attributes(celeba_root, ["Male"])
    (celeba_root / "list_attr_celeba.txt").unlink()
    with pytest.raises(DataError, match=r"no list_attr_celeba\.txt there, so nothing is known of its people"):
        celeba.read_attributes(celeba_root, ["Male"])
    with pytest.raises(DataError, match=r"no identity_meta\.csv there"):
        vggface2.read_attributes(tmp_path, ["Male"])


def test_vggface2_knows_who_is_male(tmp_path):
    lines = ["Class_ID, Name, Sample_Num, Flag, Gender", 'n000001, "A_B", 4, 1, m', 'n000002, "C, D", 4, 0, f']
    write(tmp_path / "identity_meta.csv", [*lines, 'n000003, "E", 4, 0, '])
    assert vggface2.read_attributes(tmp_path, ["Male"]) == {"Male": {"n000001": True, "n000002": False}}
    with pytest.raises(DataError, match="attribute = 'Young' is unknown; choices: Male"):
        vggface2.read_attributes(tmp_path, ["Young"])


def test_each_attribute_makes_two_groups_and_a_folder_none(celeba_root, tmp_path):
    option = ClientOption(name="north", dataset="celeba", data_dir=celeba_root)
    groups = read_groups([option], ["Male", "Young"])["north"]
    assert groups == {"Male": ["1", "3"], "not Male": ["2"], "Young": ["1", "2"], "not Young": []}
    folder = ClientOption(name="mine", dataset="folder", data_dir=make_folder(tmp_path / "own", {"a": 1}))
    with pytest.raises(UserError, match=r"--by: mine \(folder\) says nothing of its people; celeba, vggface2 do"):
        read_groups([option, folder], ["Male"])
