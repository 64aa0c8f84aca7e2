"""Evaluation: sums against a computation by hand, in evaluation mode, with nothing left behind."""

import math

import numpy as np
import pytest
import torch
from packs_in_memory import CPU, memory_pack, recogniser_for, same_bits
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score
from torch.nn import functional as F

from common.errors import TrainingFailed
from common.faces.batches import to_float
from common.faces.splits import Split
from common.metrics.figures import scores as all_scores
from common.training.evaluation import SPLITS, embed, evaluate
from common.training.loop import Compute


@pytest.fixture(scope="module")
def pack():
    return memory_pack(5, closed=3, people=5)


@pytest.fixture(scope="module")
def recogniser(pack):
    torch.set_num_threads(1)
    return recogniser_for(pack)


def by_hand(recogniser, pack, split: Split) -> torch.Tensor:
    """Raw embeddings in one batch."""
    recogniser.eval()
    with torch.no_grad():
        return recogniser.embed(to_float(torch.from_numpy(pack.pictures[pack.indices(split)])))


def test_embeddings_are_those_of_one_batch_in_order(pack, recogniser):
    expected = by_hand(recogniser, pack, Split.TEST_PEOPLE)
    recogniser.train()
    embeddings = embed(recogniser, pack, pack.indices(Split.TEST_PEOPLE), CPU)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-4)
    assert embeddings.dtype == torch.float32
    assert not embeddings.requires_grad


def test_batch_borders_leave_no_trace(pack, recogniser, monkeypatch):
    whole = embed(recogniser, pack, np.arange(len(pack)), CPU)
    monkeypatch.setattr("common.training.evaluation.EVALUATION_BATCH", 7)
    torch.testing.assert_close(embed(recogniser, pack, np.arange(len(pack)), CPU), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("split", SPLITS)
def test_both_sets_against_scikit_learn(pack, recogniser, split):
    sums = evaluate(recogniser, pack, split, CPU)
    pictures, people = SPLITS[split]
    labels = pack.training_labels[pack.indices(pictures)]
    with torch.no_grad():
        logits = recogniser.class_logits(by_hand(recogniser, pack, pictures))
    predicted = logits.argmax(1).numpy()
    scores = all_scores(sums)
    macro = {"average": "macro", "zero_division": 0}
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert scores["precision"] == pytest.approx(precision_score(labels, predicted, **macro))
    assert scores["recall"] == pytest.approx(recall_score(labels, predicted, **macro))
    assert scores["f1"] == pytest.approx(f1_score(labels, predicted, **macro))
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits, torch.from_numpy(labels))), rel=1e-4)

    unit = F.normalize(by_hand(recogniser, pack, people)).numpy().astype(np.float64)
    who = pack.person[pack.indices(people)]
    first, second = np.triu_indices(len(who), 1)
    assert sums.pairs.sum() == len(first)
    bins = np.floor(((unit[first] * unit[second]).sum(1) + 1) * 4096)  # of 54 comparisons one may be at a bin's edge
    assert scores["roc_auc"] == pytest.approx(roc_auc_score(who[first] == who[second], bins), abs=1 / 54)


def test_the_closed_set_in_blocks_is_that_of_all_logits_at_once(pack, recogniser, monkeypatch):
    whole = evaluate(recogniser, pack, "test", CPU)
    blocks = []
    class_logits = recogniser.class_logits
    monkeypatch.setattr("common.training.evaluation.CLOSED_BLOCK", 2 * pack.num_classes + 1)  # two pictures
    monkeypatch.setattr(recogniser, "class_logits", lambda e: blocks.append(len(e)) or class_logits(e))
    parts = evaluate(recogniser, pack, "test", CPU)
    assert blocks == [2] * 7 + [1]
    np.testing.assert_array_equal(parts.confusion, whole.confusion)
    assert parts.closed.correct == whole.closed.correct
    assert parts.closed.loss_sum == pytest.approx(whole.closed.loss_sum, rel=1e-6)


def test_validation_and_test_are_different_pictures_and_people(pack):
    parts = [set(pack.indices(part).tolist()) for split in SPLITS.values() for part in split]
    assert sum(len(part) for part in parts) == len(set().union(*parts))


def test_sums_of_two_clients_add_up(pack, recogniser):
    one, other = evaluate(recogniser, pack, "val", CPU), evaluate(recogniser, memory_pack(closed=2, seed=1), "val", CPU)
    both = one + other
    np.testing.assert_array_equal(both.pairs, one.pairs + other.pairs)
    assert both.closed.num_examples == one.closed.num_examples + other.closed.num_examples
    assert both.closed.f1_sum == pytest.approx(one.closed.f1_sum + other.closed.f1_sum)


def test_nothing_is_learned_while_evaluating(pack):
    recogniser, fresh = recogniser_for(pack), recogniser_for(pack)
    recogniser.train()
    evaluate(recogniser, pack, "test", CPU)
    assert same_bits(recogniser, fresh), "batch statistics stay as they are"


def test_people_with_too_few_pictures_for_a_closed_set_are_scored_on_the_open_one():
    pack = memory_pack(2, closed=0)
    sums = evaluate(recogniser_for(pack), pack, "val", CPU)
    assert (sums.closed.num_examples, sums.closed.loss_sum, sums.closed.num_classes) == (0, 0.0, 0)
    assert sums.pairs.sum() == 15  # six pictures of two people


def test_embeddings_that_are_not_finite_stop_it(pack):
    recogniser = recogniser_for(pack)
    with torch.no_grad():
        recogniser.backbone.linear.weight[0, 0] = math.nan
    with pytest.raises(TrainingFailed, match="not finite on folder's pictures"):
        evaluate(recogniser, pack, "val", CPU)


def test_bfloat16_scores_nearly_the_same(pack, recogniser):
    compute = Compute(device="cpu", precision="bfloat16", memory_format="channels_last", threads=1)
    half, full = evaluate(recogniser, pack, "test", compute), evaluate(recogniser, pack, "test", CPU)
    assert all_scores(half)["roc_auc"] == pytest.approx(all_scores(full)["roc_auc"], abs=0.1)
    assert not np.array_equal(half.pairs, full.pairs)
