"""What training does not move comes to each site once, and models have the bits of a run that sends all each time."""

import json
from pathlib import Path

import numpy as np
import pytest
from in_process import LocalMailbox, federate_in, site_at
from PIL import Image

import clients.message_handler
from clients.frozen_part import FILE
from common.protocol import wire
from common.system.files import read_json
from server.exchange.messages import Exchange
from tests.tiny_settings import TINY, changed

pytestmark = pytest.mark.usefixtures("one_thread", "in_a_run")
NAMES = ("alpha", "beta")
SETTINGS = changed(
    TINY,
    data__fraction_val_people=0.3,
    data__fraction_test_people=0.3,
    training__trainable="head_side",
    federation__rounds=3,
    federation__min_clients=1,
    federation__join_timeout_s=20.0,
)


@pytest.fixture(autouse=True)
def no_workplaces(monkeypatch):
    monkeypatch.setattr(clients.message_handler, "_workplaces", {})


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Two folders of seven people, random pictures of 40 px."""
    root = tmp_path_factory.mktemp("faces")
    random = np.random.default_rng(0)
    for client in NAMES:
        for person in range(7):
            (root / client / f"p{person}").mkdir(parents=True)
            for number in range(4):
                pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / client / f"p{person}" / f"{number}.png")
    return root


class Watched(LocalMailbox):
    """Notes of each model that is sent to whom, for which task, and whether all of it came; and may do more."""

    def __init__(self, sites, before=lambda _name, _task: None) -> None:
        super().__init__(sites)
        self.sent: list[tuple[str, str, bool]] = []
        self._before = before

    def send(self, messages):
        messages = list(messages)
        for message in messages:
            task, _ = wire.read_task(message.content)
            name = self._sites[message.metadata.dst_node_id].name
            if task.kind != "join":
                at = f"{task.kind} {task.server_round}{' last' * task.last}"
                self.sent.append((name, at, wire.read_frozen(message.content) is not None))
                self._before(name, task)
        return super().send(messages)


def run(
    folder: Path, faces: Path, settings, before=lambda _name, _task: None
) -> tuple[dict, list[tuple[str, str, bool]]]:
    """A whole run; returns its summary and what was sent."""
    clients.message_handler._workplaces.clear()
    mailbox = Watched([site_at(folder, "folder", faces / name, name=name) for name in NAMES], before)
    summary = federate_in(folder / "run-1", settings, mailbox)
    assert read_json(summary / "outcome.json") == {"exit_code": 0, "line": ""}
    return read_json(summary / "metrics.json"), mailbox.sent


def bytes_down(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "run-1" / "spool.jsonl").read_text().splitlines()]
    return [row["value"] for row in rows if row.get("key") == "bytes/down" and row["run"] == ""]


def always_whole(monkeypatch) -> None:
    """As it was before: every message has all of the model."""
    records = Exchange._records

    def forgets(exchange, tasks, model):
        exchange.keeps.clear()
        return records(exchange, tasks, model)

    monkeypatch.setattr(Exchange, "_records", forgets)


VARIANTS = {
    "fedavg": {},
    "int8": {"federation__download_codec": "int8", "federation__upload_codec": "int8"},
    "float16": {"federation__download_codec": "float16", "training__trainable": "norm"},
    "fedadam": {"federation__strategy": "fedadam", "training__trainable": "last_block"},
    "fedmedian": {"federation__strategy": "fedmedian", "training__trainable": "last_block"},
    "fedbn": {"model__normalisation": "private", "training__trainable": "last_block"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_comes_once_and_the_bits_are_those_of_a_run_that_sends_it_each_time(variant, faces, tmp_path, monkeypatch):
    settings = changed(SETTINGS, **VARIANTS[variant])
    summary, sent = run(tmp_path / "once", faces, settings)
    assert [at for name, at, whole in sent if whole and name == "alpha"] == ["train 1"]
    assert [at for name, at, whole in sent if not whole and name == "beta"][:3] == ["train 2", "train 3", "evaluate 3"]
    with monkeypatch.context() as patch:
        always_whole(patch)
        whole, all_sent = run(tmp_path / "each", faces, settings)
    assert all(came for _, _, came in all_sent)
    assert summary["model_sha256"] == whole["model_sha256"]
    for name in ("best", "untrained", "last", "best_round"):
        assert summary[name] == whole[name], name
    first, *later = bytes_down(tmp_path / "once")
    assert [first] * 3 == bytes_down(tmp_path / "each")
    assert later[0] == later[1] < first


def test_the_record_has_the_bytes_that_came_and_the_ledger_what_is_kept(faces, tmp_path):
    run(tmp_path, faces, SETTINGS)
    kept = np.load(tmp_path / "alpha" / "private" / "run-1" / FILE)
    first, later, _ = bytes_down(tmp_path)
    assert first - later == 2 * kept.nbytes
    ledger = [json.loads(line) for line in (tmp_path / "alpha" / "egress" / "run-1.jsonl").read_text().splitlines()]
    said = [[part["num_bytes"] for part in line.get("parts", []) if part["name"] == "task.frozen"] for line in ledger]
    assert said.count([66]) == 5  # three rounds, the last model's evaluation and the best one's: a digest in quotes


def test_who_lost_it_says_so_once_and_gets_it_again(faces, tmp_path):
    def loses(name, task) -> None:
        if name == "alpha" and (task.kind, task.server_round) == ("train", 2):
            (tmp_path / "alpha" / "private" / "run-1" / FILE).unlink()

    summary, sent = run(tmp_path, faces, SETTINGS, before=loses)
    assert [at for name, at, whole in sent if whole and name == "alpha"] == ["train 1", "train 3"]
    assert [at for name, at, whole in sent if whole and name == "beta"] == ["train 1"]
    assert "is not here any more" in summary["refusals"]["2"]["alpha"]
    assert list(summary["refusals"]) == ["2"]


def test_a_part_that_was_altered_on_the_disk_is_not_used(faces, tmp_path):
    def alters(name, task) -> None:
        if name == "alpha" and (task.kind, task.server_round) == ("train", 2):
            path = tmp_path / "alpha" / "private" / "run-1" / FILE
            values = np.load(path)
            values[0] += 1.0
            np.save(path, values)

    summary, sent = run(tmp_path, faces, SETTINGS, before=alters)
    assert "is not here any more" in summary["refusals"]["2"]["alpha"]
    assert ("alpha", "train 3", True) in sent


class Killed(BaseException):
    """The server is gone."""


def test_a_server_that_goes_on_sends_it_once_more_and_comes_to_the_same_model(faces, tmp_path):
    whole, _ = run(tmp_path / "undisturbed", faces, SETTINGS)

    def dies(_name, task) -> None:
        if (task.kind, task.server_round) == ("train", 3):
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", faces, SETTINGS, before=dies)
    (tmp_path / "killed" / "run-1" / "outcome.json").unlink(missing_ok=True)
    summary, sent = run(tmp_path / "killed", faces, SETTINGS)
    assert sum(came for name, _, came in sent if name == "alpha") == 1
    assert summary["model_sha256"] == whole["model_sha256"]


def test_nothing_is_kept_where_all_of_it_moves(faces, tmp_path):
    _, sent = run(tmp_path, faces, changed(SETTINGS, training__trainable="all", federation__rounds=1))
    assert not any(came for _, _, came in sent)
    assert not (tmp_path / "alpha" / "private" / "run-1" / FILE).exists()
