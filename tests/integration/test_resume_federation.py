"""A federation that is killed and goes on: the same model, bit for bit, and each point of its record exactly once."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from in_process import LocalMailbox, federate_in, site_at
from PIL import Image
from tiny_federation import enter_run

from clients.privacy_budget import budget_file
from common.protocol.spending import releases_in
from common.system import checkpoints
from common.system.files import read_json
from common.tracking.record import TrackedRun
from server.app import Surroundings, federate
from tests.tiny_settings import TINY, changed

pytestmark = pytest.mark.usefixtures("one_thread", "in_a_run")
SETTINGS = changed(
    TINY,
    data__fraction_val_people=0.3,
    data__fraction_test_people=0.3,
    training__momentum=0.9,
    federation__rounds=4,
    federation__min_clients=2,
    federation__join_timeout_s=20.0,
    federation__strategy="fedadam",
)
MOMENT = 30  # of a run with privacy: in its second half, with a round under way
TIMES = ("_seconds", "images_per_second")  # what two runs of the same differ in


class Killed(BaseException):
    """The process is gone: nothing catches it."""


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Two folders of seven people, random pictures of 40 px."""
    root = tmp_path_factory.mktemp("faces")
    random = np.random.default_rng(0)
    for client in ("alpha", "beta"):
        for person in range(7):
            (root / client / f"p{person}").mkdir(parents=True)
            for number in range(5):
                pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / client / f"p{person}" / f"{number}.png")
    return root


def sites_in(folder: Path, faces: Path):
    return [site_at(folder, "folder", faces / name, name=name) for name in ("alpha", "beta")]


def points(folder: Path) -> Counter:
    """(run, metric, step) -> how often it stands in the record."""
    rows = [json.loads(line) for line in (folder / "spool.jsonl").read_text().splitlines()]
    return Counter((row["run"], row["key"], row["step"]) for row in rows if "key" in row)


def values(folder: Path) -> dict:
    """(run, metric, step) -> value, of what two runs of the same have in common."""
    rows = [json.loads(line) for line in (folder / "spool.jsonl").read_text().splitlines()]
    told = {(r["run"], r["key"], r["step"]): r["value"] for r in rows if "key" in r}
    return {key: value for key, value in told.items() if not key[1].endswith(TIMES)}


class Fate:
    """Counts what happens to a server, and ends it at the n-th time."""

    def __init__(self, monkeypatch, at: int | None) -> None:
        self.count, self.at = 0, at
        self.seen: list[str] = []
        for owner, name in (
            (LocalMailbox, "send"), (LocalMailbox, "receive"), (checkpoints, "write_parts"),
            (TrackedRun, "log_metrics"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._wrapped(name, getattr(owner, name)))
        monkeypatch.setattr(TrackedRun, "finish", self._finish(TrackedRun.finish))

    def _wrapped(self, name, work):
        def call(*arguments, **more):
            self.count += 1
            self.seen.append(name)
            if self.count == self.at:
                raise Killed(f"{name} {self.count}")
            return work(*arguments, **more)

        return call

    def _finish(self, finish):
        def call(run, status, *rest):  # a killed process says no goodbye; its files are closed all the same
            if status == "FINISHED" or self.at is None or self.count < self.at:
                return finish(run, status, *rest)
            return run._spool.close()

        return call


def reference_run(folder, faces, settings, monkeypatch):
    with monkeypatch.context() as patch:
        fate = Fate(patch, None)
        federate_in(folder / "run", settings, LocalMailbox(sites_in(folder, faces)))
    return fate


@pytest.fixture(scope="module")
def uninterrupted(faces, tmp_path_factory):
    """(settings by codec, folder, number of moments) of whole runs."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        enter_run(patch)
        for codec in ("float32", "int8"):
            folder = tmp_path_factory.mktemp(codec)
            settings = changed(SETTINGS, federation__upload_codec=codec, federation__download_codec=codec)
            made[codec] = (settings, folder / "run", reference_run(folder, faces, settings, patch))
    return made


def killed_and_resumed(folder, faces, settings, moments, monkeypatch):
    """Kill the server at each of the moments, one after the other, and let it go on; returns the run's folder."""
    sites = sites_in(folder, faces)
    run = folder / "run"
    for at in moments:
        with monkeypatch.context() as patch:
            Fate(patch, at)
            with pytest.raises(Killed):
                federate_in(run, settings, LocalMailbox(sites))
        (run / "outcome.json").unlink(missing_ok=True)
    return federate_in(run, settings, LocalMailbox(sites))


def check_equal(run: Path, whole: Path) -> None:
    assert read_json(run / "outcome.json") == {"exit_code": 0, "line": ""}
    ours, theirs = read_json(run / "metrics.json"), read_json(whole / "metrics.json")
    assert ours["model_sha256"] == theirs["model_sha256"]
    assert {name for name in points(run) if points(run)[name] > 1} == set(), "told twice"
    assert values(run) == values(whole)
    for name in ("best", "untrained", "last", "clients", "best_round", "num_pictures_processed"):
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("part", range(12))
def test_a_server_killed_at_any_moment_ends_with_the_same_model_and_record(
    part, uninterrupted, faces, tmp_path, monkeypatch
):
    """Twelve of all moments, spread evenly; clients keep running, as they do."""
    settings, whole, fate = uninterrupted["float32"]
    at = 1 + part * fate.count // 12 + (part * 7) % (fate.count // 12)
    check_equal(killed_and_resumed(tmp_path, faces, settings, [at], monkeypatch), whole)


def test_a_server_killed_again_and_again_with_coded_messages_too(uninterrupted, faces, tmp_path, monkeypatch):
    """What the codecs have not sent yet goes on as well: the residues of the clients, the exact model of the server."""
    settings, whole, fate = uninterrupted["int8"]
    check_equal(killed_and_resumed(tmp_path, faces, settings, [fate.count // 3] * 3, monkeypatch), whole)


def test_privacy_is_not_paid_twice_for_a_round_that_a_killed_server_asks_for_again(faces, tmp_path, monkeypatch):
    """Each site sends the bits again that it sent: a second noise would be a second answer about the same people."""
    private = {"privacy__unit": "person", "privacy__group_people": 2, "privacy__clip": 0.01}
    settings = changed(SETTINGS, model__backbone="vit_tiny", model__depth=1, **private)
    run = killed_and_resumed(tmp_path, faces, settings, [MOMENT], monkeypatch)
    assert read_json(run / "outcome.json") == {"exit_code": 0, "line": ""}
    for site in sites_in(tmp_path, faces):
        assert [line["round"] for line in releases_in(budget_file(site))] == [1, 2, 3, 4]
        lines = map(json.loads, (site.state_dir / "egress" / "run.jsonl").read_text().splitlines())
        sent: dict[int, list[str]] = {}
        for line in lines:
            changes = [part["sha256"] for part in line.get("parts", ()) if part["name"] == "arrays.change"]
            sent.setdefault(line.get("round"), []).extend(changes)
        assert max(len(hashes) for hashes in sent.values()) == 2  # a round was asked for again
        assert all(len(set(hashes)) == 1 for hashes in sent.values() if hashes)


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("name", ["state.json", "round-*", "moments-*", "scores-*"])
@pytest.mark.parametrize("spoil", [lambda c: c[: len(c) // 2], lambda c: c[:-9] + bytes([c[-9] ^ 1]) + c[-8:]])
def test_a_damaged_file_is_left_aside_and_its_round_repeated(spoil, name, uninterrupted, faces, tmp_path, monkeypatch):
    """Cut short, or with a single bit that is another; the newest of its kind."""
    settings, whole, fate = uninterrupted["float32"]
    sites = sites_in(tmp_path, faces)
    with monkeypatch.context() as patch:
        Fate(patch, fate.count * 3 // 4)
        with pytest.raises(Killed):
            federate_in(tmp_path / "run", settings, LocalMailbox(sites))
    path = newest(tmp_path / "run" / "checkpoints", name)
    path.write_bytes(spoil(path.read_bytes()))
    check_equal(federate_in(tmp_path / "run", settings, LocalMailbox(sites)), whole)


def test_a_run_that_was_about_to_end_goes_on_without_its_last_model(uninterrupted, faces, tmp_path):
    """Its last two states name the same model."""
    settings, whole, _ = uninterrupted["float32"]
    shutil.copytree(whole, tmp_path / "run")
    newest(tmp_path / "run" / "checkpoints", "round-000004*").write_bytes(b"x")
    run = federate_in(tmp_path / "run", settings, LocalMailbox(sites_in(whole.parent, faces)))
    check_equal(run, whole)


def test_what_cannot_be_gone_on_from_is_said_in_one_line(uninterrupted, faces, tmp_path):
    settings, whole, _ = uninterrupted["float32"]
    run = tmp_path / "run"
    kept = run / "checkpoints"
    for spoil, said in (
        (lambda: [path.write_text("{") for path in kept.glob("state*")], "state.json cannot be read"),
        (lambda: [path.write_text("{}") for path in kept.glob("state*")], "is of another model"),
        (lambda: [path.write_bytes(b"x") for path in kept.glob("round-*")], "not a whole safetensors file"),
        (lambda: [path.unlink() for path in kept.glob("moments-*")], "does not exist"),
    ):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        spoil()
        surroundings = Surroundings(
            run_folder=run, stopped=lambda: False, all_nodes_are_here=lambda: False, git_commit="unknown"
        )
        federate(settings, LocalMailbox(sites_in(tmp_path, faces)), surroundings)
        outcome = read_json(run / "outcome.json")
        assert outcome["exit_code"] != 0
        assert said in outcome["line"], outcome
        assert len(outcome["line"].splitlines()) == 1
