"""A gallery on disk: whole or unchanged, bound to its model, closed to others, and without what was removed."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import CheckpointError, UserError
from simulation.recognition import gallery as store
from simulation.recognition.gallery import Binding, add_people, open_gallery, remove_people

ONE, OTHER = Binding(sha256="1" * 64, source="models:/cnn_local/3"), Binding(sha256="2" * 64, source="run-2")
AGAIN = "facefed enrol g people --model run-2 --mode replace"


def keep_model(path: Path) -> None:
    path.write_bytes(b"a model")


def rows(seed, number=1, width=8):
    drawn = np.random.default_rng(seed).normal(size=(number, width)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def add(folder, people, *, binding=ONE, mode="add"):
    return add_people(folder, binding, people, keep_model=keep_model, again=AGAIN, mode=mode)


def content(folder):
    """Name -> templates."""
    found = open_gallery(folder)
    return {one.name: np.array(found.templates_of(number)) for number, one in enumerate(found.people)}


@pytest.fixture
def folder(tmp_path):
    add(tmp_path / "g", {"Ann": rows(1), "Ben": rows(2, 3), "Cleo": rows(3)})
    return tmp_path / "g"


def test_what_is_added_is_there(folder):
    found = open_gallery(folder)
    assert [(one.name, one.num_templates) for one in found.people] == [("Ann", 1), ("Ben", 3), ("Cleo", 1)]
    assert found.first_rows.tolist() == [0, 1, 4]
    np.testing.assert_array_equal(found.templates, np.concatenate([rows(1), rows(2, 3), rows(3)]))
    assert found.binding == ONE
    assert found.model_file.read_bytes() == b"a model"
    assert len({one.key for one in found.people}) == 3


def test_its_templates_are_a_safetensors_file(folder):
    [path] = folder.glob("templates-*.safetensors")
    np.testing.assert_array_equal(load_file(path)["templates"], open_gallery(folder).templates)


def test_further_pictures_of_a_person_are_added_and_known_ones_are_not(folder):
    key = open_gallery(folder).people[1].key
    added = add(folder, {"Ben": np.concatenate([rows(2, 3)[:2], rows(9, 2)]), "Dan": rows(4)})
    assert (added.new, added.extended, added.num_templates, added.num_known) == (("Dan",), ("Ben",), 3, 2)
    assert list(content(folder)) == ["Ann", "Ben", "Cleo", "Dan"]
    np.testing.assert_array_equal(content(folder)["Ben"], np.concatenate([rows(2, 3), rows(9, 2)]))
    np.testing.assert_array_equal(content(folder)["Cleo"], rows(3))
    assert open_gallery(folder).people[1].key == key


def test_the_same_again_changes_nothing(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "lock"}
    added = add(folder, {"Ann": rows(1)})
    assert (added.new, added.extended, added.num_templates, added.num_known) == ((), (), 0, 1)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "lock"} == before


def test_replaced_templates_are_gone(folder):
    add(folder, {"Ben": rows(9)}, mode="replace")
    np.testing.assert_array_equal(content(folder)["Ben"], rows(9))
    np.testing.assert_array_equal(content(folder)["Ann"], rows(1))
    assert not holds(folder, rows(2, 3)[0].tobytes())


def holds(folder, needle: bytes) -> bool:
    return any(needle in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_no_file_holds_who_was_removed(folder):
    assert holds(folder, b"Ben")
    assert holds(folder, rows(2, 3)[1].tobytes())
    remove_people(folder, ["Ben"])
    assert not holds(folder, b"Ben")
    assert not any(holds(folder, row.tobytes()) for row in rows(2, 3))
    assert list(content(folder)) == ["Ann", "Cleo"]
    np.testing.assert_array_equal(content(folder)["Cleo"], rows(3))


def test_everybody_can_be_removed_and_others_added(folder):
    remove_people(folder, ["Ann", "Ben", "Cleo"])
    assert content(folder) == {}
    add(folder, {"Dan": rows(4)})
    assert list(content(folder)) == ["Dan"]


def test_a_mistyped_name_removes_nobody(folder):
    with pytest.raises(UserError, match=r"'Cleoo' is not enrolled in .*; did you mean 'Cleo'\?"):
        remove_people(folder, ["Ann", "Cleoo"])
    assert list(content(folder)) == ["Ann", "Ben", "Cleo"]


def test_another_model_is_refused_with_the_command_that_enrols_again(folder):
    with pytest.raises(UserError) as refused:
        add(folder, {"Dan": rows(4)}, binding=OTHER)
    assert AGAIN in str(refused.value)
    assert "models:/cnn_local/3 (SHA-256 111111111111)" in str(refused.value)
    assert list(content(folder)) == ["Ann", "Ben", "Cleo"]


def test_it_becomes_one_of_another_model_only_with_everybody(folder):
    with pytest.raises(UserError, match=r"2 of the people enrolled got no template \(Ann, Cleo\)"):
        add(folder, {"Ben": rows(4, width=6)}, binding=OTHER, mode="replace")
    assert open_gallery(folder).binding == ONE
    anew = {name: rows(number, width=6) for number, name in enumerate(("Ann", "Ben", "Cleo"), start=20)}
    add(folder, anew, binding=OTHER, mode="replace")
    found = open_gallery(folder)
    assert found.binding == OTHER
    assert found.templates.shape == (3, 6)
    assert [path.name for path in folder.glob("model-*")] == [found.model_file.name]


def test_all_of_it_is_this_accounts_alone(folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_change_that_was_cut_leaves_the_former_gallery(folder, monkeypatch):
    def cut(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_bytes", cut)
    with pytest.raises(KeyboardInterrupt):
        remove_people(folder, ["Ann"])
    monkeypatch.undo()
    assert list(content(folder)) == ["Ann", "Ben", "Cleo"]
    remove_people(folder, ["Cleo"])
    assert len(list(folder.glob("templates-*"))) == 1  # what the cut one left is gone


def test_two_that_change_it_at_once_wait_for_each_other(folder, monkeypatch):
    monkeypatch.setattr(store, "_LOCKED_FOR_S", 0.0)
    with store._alone(folder), pytest.raises(UserError, match="being changed by another program"):
        add(folder, {"Dan": rows(4)})


def test_a_gallery_that_changes_while_it_is_opened_is_looked_at_again(folder, monkeypatch):
    stale = json.loads((folder / "gallery.json").read_text())
    del stale["seal"]
    add(folder, {"Dan": rows(4)})
    read, seen = store.read_sealed_json, []

    def first_stale(path):
        seen.append(path)
        return stale if len(seen) == 1 else read(path)

    monkeypatch.setattr(store, "read_sealed_json", first_stale)
    assert len(open_gallery(folder).people) == 4


@pytest.mark.parametrize("damage", ["bit", "cut", "index", "missing"])
def test_damage_is_told(folder, damage):
    [path] = folder.glob("templates-*")
    whole = path.read_bytes()
    if damage == "bit":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(whole[:-4])
    elif damage == "missing":
        path.unlink()
    else:
        text = (folder / "gallery.json").read_text()
        (folder / "gallery.json").write_text(text.replace("Ann", "Eve"))
    with pytest.raises(CheckpointError, match=r"restore|damaged"):
        open_gallery(folder)


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 201, "a\x1b[31m"])
def test_what_cannot_be_shown_is_no_name(folder, name):
    with pytest.raises(UserError, match="cannot be a name"):
        add(folder, {name: rows(4)})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no gallery and not empty"):
        add(tmp_path, {"Ann": rows(1)})
    with pytest.raises(UserError, match="is no gallery"):
        open_gallery(tmp_path)
    with pytest.raises(UserError, match="is no gallery"):
        remove_people(tmp_path, ["Ann"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_templates_that_are_none_are_refused(tmp_path):
    for bad in (rows(1) * 2, rows(1) * np.nan, np.zeros((0, 8))):
        with pytest.raises(ValueError, match="templates"):
            add(tmp_path / "g", {"Ann": bad})


def test_its_state_is_another_one_after_each_change(folder):
    before = store.state_of(folder)
    assert store.state_of(folder) == before
    add(folder, {"Dan": rows(4)})
    assert store.state_of(folder) != before
