"""The twins' histogram on its way: counted at the client, sent, checked, added up, scored only where twins are."""

import dataclasses

import numpy as np
import pytest
from flwr.app import Array, Message
from packs_in_memory import CPU, memory_pack, recogniser_for
from sklearn.metrics import roc_auc_score
from tiny_federation import MANIFEST, reply_to, site_named, sums_with
from torch.nn import functional as F

from common.errors import DataError, ReplyRefused
from common.faces.splits import Split
from common.metrics.figures import twin_scores
from common.metrics.folds import FOLD_BINS, NUM_FOLDS
from common.metrics.pairs import pair_histograms
from common.metrics.sums import NUM_BINS, EvaluationSums, pooled
from common.protocol import wire
from common.protocol.wire import Task, read_reply
from common.training.evaluation import embed, evaluate, people_digest
from server.exchange.guard import check_train_reply
from server.record.history import client_metrics, round_metrics

pytestmark = pytest.mark.usefixtures("one_thread", "in_a_run")
TASK = Task(kind="train", run_id="run", server_round=3, settings="{}", manifest=MANIFEST.digest, splits="val test")
TWIN_NAMES = {"twins_roc_auc", "twins_eer", "strangers_roc_auc"}


@pytest.fixture(scope="module")
def pack():
    """Four test people of three pictures: 6 and 7 are twins, 4 and 5 (validation, made test people here) are not."""
    plain = memory_pack(people=4)
    split = np.where(plain.split == Split.VAL_PEOPLE, Split.TEST_PEOPLE, plain.split).astype(np.int8)
    return dataclasses.replace(plain, split=split, family=np.array([0, 1, 2, 3, 4, 5, 6, 6]))


@pytest.fixture(scope="module")
def recogniser(pack):
    return recogniser_for(pack)


def test_the_client_counts_the_twins_among_its_pairs(pack, recogniser):
    sums = evaluate(recogniser, pack, "test", CPU)
    indices = pack.indices(Split.TEST_PEOPLE)
    person = pack.person[indices]
    unit = F.normalize(embed(recogniser, pack, indices, CPU)).numpy()
    np.testing.assert_array_equal(sums.twins, pair_histograms(unit, person, pack.families[person])[1])
    assert sums.twins.sum(axis=1).tolist() == [3 + 3, 3 * 3]
    plain = evaluate(recogniser, dataclasses.replace(pack, family=None), "test", CPU)
    np.testing.assert_array_equal(plain.pairs, sums.pairs)
    assert not plain.twins.any()
    with pytest.raises(DataError, match="twins: scores of 0"):
        twin_scores(plain)

    first, second = np.triu_indices(len(person), 1)
    bins = np.floor((np.clip((unit[first] * unit[second]).sum(1), -1, 0.9999) + 1) * NUM_BINS / 2)
    genuine, of_twins = person[first] == person[second], (person[first] >= 6) & (person[second] >= 6)
    scores = twin_scores(sums)
    expected = {
        "twins_roc_auc": roc_auc_score(genuine[of_twins], bins[of_twins]),
        "strangers_roc_auc": roc_auc_score(genuine[genuine | ~of_twins], bins[genuine | ~of_twins]),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1 / 54), "one comparison may be at a bin's edge"
    assert set(scores) == TWIN_NAMES


def test_the_digest_of_the_pairs_tells_families_apart_and_is_as_before_without(pack):
    digests = {people_digest(one, "test") for one in (pack, dataclasses.replace(pack, family=None))}
    digests.add(people_digest(dataclasses.replace(pack, family=np.array([0, 1, 2, 3, 4, 4, 6, 7])), "test"))
    assert len(digests) == 3
    assert people_digest(memory_pack(people=4), "test") == "0182e72c007945d2"  # made before packs had families


def with_twins(auc: float = 0.6, twins_auc: float = 0.5) -> EvaluationSums:
    """`sums_with(auc)` and 20 genuine and 20 impostor pairs of twins among them, of that AUC."""
    sums, twins = sums_with(auc), np.zeros((2, NUM_BINS), dtype=np.int64)
    twins[1, 4000] = 20
    twins[0, 5000], twins[0, 3000] = round(20 * twins_auc), 20 - round(20 * twins_auc)
    return dataclasses.replace(sums, twins=twins)


def received(sums: EvaluationSums):
    """The sums after their way over the wire."""
    reply = dataclasses.replace(reply_to(TASK), evaluations={"val": sums, "test": sums_with(0.5)})
    return read_reply(Message(wire.reply_content(reply), 7, "train"), "val test")


def test_every_part_of_the_counts_arrives_where_it_belongs():
    start = 0
    parts = {}
    for name, shape in (("pairs", (2, NUM_BINS)), ("folds", (NUM_FOLDS, 2, FOLD_BINS)), ("twins", (2, NUM_BINS)),
                        ("confusion", (3, 3))):  # fmt: skip
        size = int(np.prod(shape))
        parts[name] = np.arange(start, start + size).reshape(shape)
        start += size
    sent = dataclasses.replace(sums_with(0.5), **parts)
    came = received(sent).evaluations["val"]
    for name, part in parts.items():
        np.testing.assert_array_equal(getattr(came, name), part)


def test_an_answer_has_the_documented_size():
    content = wire.reply_content(dataclasses.replace(reply_to(TASK), evaluations={"val": with_twins()}))
    cells = with_twins().confusion.size
    assert len(content["arrays"]["val-counts"].data) == 53_248 + cells  # none is above 255 here


def test_counts_of_a_version_without_twins_are_refused():
    content = wire.reply_content(dataclasses.replace(reply_to(TASK), evaluations={"val": sums_with(0.5)}))
    counts = content["arrays"]["val-counts"]
    old = counts.data[: 2 * NUM_BINS + NUM_FOLDS * 2 * FOLD_BINS] + counts.data[-4:]
    content["arrays"]["val-counts"] = Array(dtype="uint8", shape=(len(old),), stype=counts.stype, data=old)
    with pytest.raises(ReplyRefused, match="val-counts has the shape"):
        read_reply(Message(content, 7, "train"), "val")


@pytest.mark.parametrize("row", [0, 1])
def test_more_pairs_of_twins_than_pairs_are_refused(row):
    """Strangers are all pairs without those of twins: fewer than none would be nonsense that is added up."""
    check = {"server_round": 3, "manifest": MANIFEST, "site": site_named("alpha"), "codec": "float32"}
    good = with_twins()
    check_train_reply(received(good), **check)
    place = np.flatnonzero(good.pairs[row])[0]
    for count in (good.pairs[row, place], good.pairs[row, place] + 1):
        twins = good.twins.copy()
        twins[row, place] = count
        reply = received(dataclasses.replace(good, twins=twins))
        if count == good.pairs[row, place]:
            check_train_reply(reply, **check)
        else:
            with pytest.raises(ReplyRefused, match="the val histogram counts more pairs of twins than pairs"):
                check_train_reply(reply, **check)


def test_the_server_scores_merged_twins_and_not_the_mean_of_clients():
    """10 of 20 and 20 of 20 genuine pairs lie above the twins: together 30 of 40.  Strangers: all 300 genuine pairs."""
    one, other, none = with_twins(twins_auc=0.5), with_twins(0.8, 1.0), sums_with(0.9)
    by_client = {"a": one, "b": other, "c": none}
    total = pooled(by_client)
    metrics = round_metrics("test", total)
    assert metrics["round_test_twins_roc_auc"] == pytest.approx(0.75)
    assert metrics["round_test_strangers_roc_auc"] == pytest.approx((60 + 80 + 90) / 300)
    assert 0 <= metrics["round_test_twins_eer"] <= 1
    assert {f"round_test_{name}" for name in TWIN_NAMES} <= client_metrics("test", by_client["a"]).keys()
    assert client_metrics("test", by_client["a"])["round_test_twins_roc_auc"] == pytest.approx(0.5)
    assert not [name for name in client_metrics("test", by_client["c"]) if "twins" in name or "strangers" in name]
    assert not [name for name in round_metrics("val", by_client["c"]) if "twins" in name or "strangers" in name]


def test_one_family_alone_has_no_strangers():
    sums = sums_with(0.6)
    one_family = dataclasses.replace(sums, twins=sums.pairs)
    assert set(twin_scores(one_family)) == {"twins_roc_auc", "twins_eer"}


def test_the_clients_own_sums_are_what_it_sends(pack, recogniser):
    sums = evaluate(recogniser, pack, "test", CPU)
    np.testing.assert_array_equal(received(sums).evaluations["val"].twins, sums.twins)
