"""`facefed train twins`: what a run tells of twins and strangers, checked pair by pair, and what it refuses."""

import dataclasses
import io
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny_twins
import torch
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_federation import site_settings

from common import config
from common.errors import DataError
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.system.checkpoints import read_tensors
from common.training.evaluation import embed
from simulation.alone.baselines import run_twins
from simulation.alone.trainee import local_trainee
from tests.tiny_settings import changed

SETTINGS = changed(
    tiny_twins.SETTINGS, model__width=0.25, model__dropout=0.0, model__inference="both", tracking__plots="all"
)


def trained(settings, pack, folder: Path) -> tuple[dict, list[dict]]:
    """metrics.json and the spool of a run."""
    folder.mkdir()
    run_twins(settings, site_settings("twins", folder.parent), pack, folder, io.StringIO())
    spool = [json.loads(line) for line in (folder / "spool.jsonl").read_text().splitlines()]
    return json.loads((folder / "metrics.json").read_text()), spool


@pytest.fixture(scope="module")
def run(twins, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, *trained(SETTINGS, twins, folder)


def scored_pairs(folder: Path, pack: FacePack, split: Split) -> list[tuple[str, float]]:
    """Each pair of a split's people never seen: what it is, and its cosine."""
    trainee = local_trainee(SETTINGS, site_settings("twins", folder.parent), pack)
    trainee.recogniser.load_state_dict(read_tensors(folder / "checkpoints" / "best.safetensors")[0])
    indices = pack.indices(split)
    unit = torch.nn.functional.normalize(embed(trainee.recogniser, pack, indices, trainee.compute).double(), dim=1)
    assert pack.family is not None
    pairs = []
    for one, other in combinations(range(len(indices)), 2):
        a, b = pack.person[indices[one]], pack.person[indices[other]]
        kind = "genuine" if a == b else "twin" if pack.family[a] == pack.family[b] else "stranger"
        pairs.append((kind, float(unit[one] @ unit[other])))
    return pairs


def accuracy(pairs: list[tuple[str, float]], threshold: float) -> float:
    right = {True: [], False: []}
    for kind, score in pairs:
        right[kind == "genuine"].append((score >= threshold) == (kind == "genuine"))
    return float(np.mean([np.mean(right[True]), np.mean(right[False])]))


def test_every_figure_is_that_of_its_pairs_at_the_threshold_of_validation(run, twins):
    folder, results, _ = run
    val, test = (scored_pairs(folder, twins, split) for split in (Split.VAL_PEOPLE, Split.TEST_PEOPLE))
    threshold, figures = results["twins"]["threshold"], results["twins"]["figures"]
    best = max(accuracy(val, score) for _, score in val)
    assert accuracy(val, threshold) == pytest.approx(best, abs=0.01)
    # With two siblings each everybody has a twin, so the genuine pairs are the same for all kinds.
    for kind, impostors in (("all", {"twin", "stranger"}), ("twins", {"twin"}), ("strangers", {"stranger"})):
        shown = [(name, score) for name, score in test if name == "genuine" or name in impostors]
        auc = roc_auc_score([name == "genuine" for name, _ in shown], [score for _, score in shown])
        assert figures[kind]["roc_auc"]["value"] == pytest.approx(auc, abs=1e-3)
        assert figures[kind]["accuracy"]["value"] == pytest.approx(accuracy(shown, threshold), abs=0.01)
        assert figures[kind]["num_impostor_pairs"]["value"] == sum(name in impostors for name, _ in shown)


def test_the_record_says_what_it_is(run):
    folder, results, spool = run
    [start] = [line for line in spool if line.get("event") == "start"]
    assert start["experiment"] == "twin-face-verification"
    assert start["tags"]["model_type"] == "vit_tiny_dcal"
    assert start["tags"]["dataset_size"] == str(24 * 4)
    logged = {line["key"]: line["value"] for line in spool if "key" in line}
    assert logged["test_twins_roc_auc"] == results["twins"]["figures"]["twins"]["roc_auc"]["value"]
    assert {
        "test_strangers_eer_low",
        "test_all_accuracy",
        "test_threshold",
        "val_eer",
        "val_twins_roc_auc",
    } <= logged.keys()
    assert (folder / "plots" / "roc_twins.png").stat().st_size > 0
    assert json.loads((folder / "run.json").read_text())["mode"] == "twins"


def test_where_the_model_looks_is_shown_while_it_trains_and_never_sent(twins, tmp_path):
    settings = config.with_value(SETTINGS, "tracking", "tensorboard", str(tmp_path / "logs"))
    _, spool = trained(settings, twins, tmp_path / "run")
    assert (tmp_path / "run" / "plots" / "attention.png").stat().st_size > 0
    sent = [line["name"] for line in spool if line.get("event") == "artifact"]
    assert "plots/roc_twins.png" in sent
    assert "plots/attention.png" not in sent  # it shows faces
    events = EventAccumulator(str(tmp_path / "logs" / "run"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("plots/attention")] == [1, 2]
    assert any("encoder_layer_0" in node.name for node in events.Graph().node)


def test_self_attention_alone_is_the_baseline(twins, tmp_path):
    settings = changed(SETTINGS, model__attention="sa", model__inference="sa")
    _, spool = trained(settings, twins, tmp_path / "run")
    [start] = [line for line in spool if line.get("event") == "start"]
    assert start["experiment"] == "twin-verification-baseline"
    assert start["tags"]["model_type"] == "vit_tiny"


def test_siblings_of_one_picture_each_are_refused_before_training(twins, tmp_path):
    """Every test person keeps a single picture, so no pair of test pictures is genuine."""
    keep = np.ones(len(twins), dtype=bool)
    for person in np.unique(twins.person[twins.indices(Split.TEST_PEOPLE)]):
        keep[np.flatnonzero(twins.person == person)[1:]] = False
    few = twins_subset(twins, keep)
    with pytest.raises(DataError, match=r"test has 0 genuine and \d+ impostor pairs of all") as caught:
        trained(SETTINGS, few, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "spool.jsonl").exists()


def test_a_data_set_without_families_is_refused(twins, tmp_path):
    with pytest.raises(DataError, match="says nothing of families"):
        trained(SETTINGS, dataclasses.replace(twins, family=None), tmp_path / "run")


def twins_subset(pack: FacePack, keep: np.ndarray) -> FacePack:
    return dataclasses.replace(pack, pictures=pack.pictures[keep], person=pack.person[keep], split=pack.split[keep])
