"""`facefed data synth|prepare|audit`: what they print and leave."""

import json

import pytest
from programs import assert_one_line

pytestmark = pytest.mark.e2e


def test_synth_says_what_it_drew(faces):
    assert "celeba layout" in faces.synth[0].out
    assert "12 people, 8 pictures each, vggface2 layout" in faces.synth[1].out
    assert len(list(faces.celeba.rglob("*.jpg"))) == len(list(faces.vggface2.rglob("*.jpg"))) == 96
    assert all(ended.err == "" for ended in faces.synth)


def test_synth_again_draws_nothing_and_another_size_is_refused(faces, programs):
    def synth(people):
        return programs.run(
            "facefed", "data", "synth", "--layout", "celeba", "--people", people, "--pictures", 8, "--out", faces.celeba
        )

    before = {path: path.stat().st_mtime_ns for path in faces.celeba.rglob("*.jpg")}
    assert synth(12).code == 0
    assert_one_line(synth(20), "facefed", "num_people 12", "choose another folder or delete this one")
    assert {path: path.stat().st_mtime_ns for path in faces.celeba.rglob("*.jpg")} == before


def test_prepare_packs_once(faces, programs):
    arguments = ("facefed", "data", "prepare", *faces.clients, *faces.small)
    first = programs.run(*arguments)
    assert first.code == 0, first
    assert "packing celeba: 96 pictures" in first.out
    again = programs.run(*arguments)
    assert again.code == 0, again
    assert "packing" not in again.out
    packed = [line for line in first.out.splitlines() if ": packed as " in line]
    assert len(packed) == 2
    assert [line for line in again.out.splitlines() if ": packed as " in line] == packed
    assert not (programs.cwd / "runs").exists()


def test_audit_of_two_data_sets_together(faces, programs):
    ended = programs.run("facefed", "data", "audit", *faces.clients)
    assert ended.code == 0, ended
    told = [
        line for line in ended.err.splitlines() if " of 96 pictures, " not in line
    ]  # on a busy machine: how far it is
    assert told == ["reading celeba: 96 pictures", "reading vggface2: 96 pictures"]
    for text in ("== celeba", "== vggface2", "12 people, 96 pictures", "test_people", "== shared between data sets",
                 "equal pictures in two data sets: 0"):  # fmt: skip
        assert text in ended.out
    as_json = programs.run("facefed", "data", "audit", "--json", *faces.clients)
    content = json.loads(as_json.out)
    assert set(content) == {"celeba", "vggface2", "overlap"}
    assert content["celeba"]["num_pictures"] == 96
    assert sum(content["celeba"]["pictures"].values()) == 96
