"""What crosses the wire: nothing is lost on the way, and whatever else comes is refused in one line."""

import dataclasses
import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from common import wire
from common.errors import ReplyRefused
from common.metrics.folds import FOLD_BINS, NUM_FOLDS
from common.metrics.verification import NUM_BINS
from common.wire import CLOSED_FIELDS, TRAIN_FIELDS, Reply, Site, SplitSums, Task

SHARED = np.linspace(-1, 1, 7, dtype=np.float32)
PAIRS = np.arange(2 * NUM_BINS, dtype=np.int64).reshape(2, NUM_BINS)
FOLDS = np.arange(NUM_FOLDS * 2 * FOLD_BINS, dtype=np.int64).reshape(NUM_FOLDS, 2, FOLD_BINS)
CONFUSION = np.arange(9, dtype=np.int64).reshape(3, 3)


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch):
    """Flower's Message asks which run it is made in; outside of one it must be told."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def task(kind: str = "train") -> Task:
    return Task(
        kind=kind,
        run_id="20250101-000000-abcdef",
        server_round=3,
        settings='{"run": {}}',
        manifest="ab" * 32,
        splits="val test",
        best_round=2,
        precision="bfloat16",
        memory_format="channels_last",
        threads=4,
        last=True,
    )


def site() -> Site:
    return Site(
        name="celeba",
        dataset="celeba",
        num_people=10,
        num_pictures=100,
        num_training_people=6,
        num_training_pictures=50,
        num_quarantined=0,
        val_people="0123",
        test_pairs="4567",
        machine="here",
        cores=2,
        device="cpu",
        precision="float32",
        memory_format="contiguous",
    )


def reply() -> Reply:
    return Reply(
        server_round=3,
        manifest="ab" * 32,
        num_examples=50,
        train={name: float(number) for number, name in enumerate(TRAIN_FIELDS)},
        evaluations={
            split: SplitSums(
                closed={name: n + 1 for n, name in enumerate(CLOSED_FIELDS)},
                pairs=PAIRS + shift,
                folds=FOLDS + shift,
                confusion=CONFUSION + shift,
            )
            for shift, split in enumerate(("val", "test"))
        },
        change=SHARED,
    )


def message_with(content: RecordDict) -> Message:
    return Message(content, 7, MessageType.TRAIN)


# -------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("kind", ["join", "train", "evaluate"])
def test_a_task_comes_back_as_it_went(kind):
    shared = None if kind == "join" else wire.pack_shared(SHARED)
    message = wire.task_message(task(kind), shared, node_id=7, ttl_s=12.5)
    assert message.metadata.dst_node_id == 7
    assert message.metadata.message_type == wire.MESSAGE_TYPES[kind]
    assert message.metadata.ttl == 12.5
    back, array = wire.read_task(message.content)
    assert back == task(kind)
    assert (array is None) == (kind == "join")
    if array is not None:
        np.testing.assert_array_equal(array, SHARED)
        assert array.dtype == np.float32


def test_each_kind_has_a_message_type_of_its_own():
    assert len(set(wire.MESSAGE_TYPES.values())) == len(wire.MESSAGE_TYPES) == 3


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"task": ConfigRecord({"kind": "train"})}),
        RecordDict({"task": ConfigRecord(dataclasses.asdict(task()) | {"surprise": 1})}),
        RecordDict({"task": ConfigRecord(dataclasses.asdict(task())), "arrays": ArrayRecord({})}),
    ],
)
def test_a_message_of_another_program_is_refused(content):
    with pytest.raises(ReplyRefused, match="is not one of FaceFed's"):
        wire.read_task(message_with(content).content)


# --------------------------------------------------------------------------------------------------------------- join


def test_a_site_comes_back_as_it_went():
    assert wire.read_site(message_with(wire.site_content(site()))) == site()


@pytest.mark.parametrize(
    ("key", "value"),
    [("cores", "2"), ("cores", -1), ("cores", 2.5), ("num_training_pictures", True), ("name", b"x"), ("device", [1])],
)
def test_a_site_of_wrong_types_is_refused(key, value):
    """The round loop divides by cores and compares counts: a client must not be able to stop it."""
    content = RecordDict({"site": ConfigRecord(dataclasses.asdict(site()) | {key: value})})
    with pytest.raises(ReplyRefused, match=f"malformed: {key} is "):
        wire.read_site(message_with(content))


def test_a_site_with_fields_missing_or_added_is_refused():
    fields = dataclasses.asdict(site())
    for wrong in ({}, {k: v for k, v in fields.items() if k != "cores"}, fields | {"surprise": 1}):
        with pytest.raises(ReplyRefused, match="malformed"):
            wire.read_site(message_with(RecordDict({"site": ConfigRecord(wrong)})))
    with pytest.raises(ReplyRefused, match="malformed"):
        wire.read_site(message_with(RecordDict({})))


@pytest.mark.parametrize("read", [wire.read_site, lambda message: wire.read_reply(message, "val")])
def test_an_error_reply_is_its_reason(read):
    request = wire.task_message(task("join"), None, node_id=7, ttl_s=5)
    with pytest.raises(ReplyRefused, match=r"^celeba: no pictures$"):
        read(wire.error_message("celeba: no pictures", request))


# ------------------------------------------------------------------------------------------------------------ replies


def test_a_reply_comes_back_as_it_went():
    back = wire.read_reply(message_with(wire.reply_content(reply())), "val test")
    assert (back.server_round, back.manifest, back.num_examples) == (3, "ab" * 32, 50)
    assert isinstance(back.num_examples, int)
    assert back.train == reply().train
    assert back.change.dtype == np.float32
    np.testing.assert_array_equal(back.change, SHARED)
    for split in ("val", "test"):
        assert back.evaluations[split].closed == reply().evaluations[split].closed
        for name in ("pairs", "folds", "confusion"):
            sent, came = getattr(reply().evaluations[split], name), getattr(back.evaluations[split], name)
            np.testing.assert_array_equal(came, sent)


def test_an_evaluation_reply_holds_no_change_and_no_training():
    answer = dataclasses.replace(reply(), change=None, train={})
    back = wire.read_reply(message_with(wire.reply_content(answer)), "val test")
    assert back.change is None
    assert back.train == {}


def test_only_what_was_asked_for_is_read():
    back = wire.read_reply(message_with(wire.reply_content(reply())), "val")
    assert list(back.evaluations) == ["val"]
    only_val = dataclasses.replace(reply(), evaluations={"val": reply().evaluations["val"]})
    with pytest.raises(ReplyRefused, match="malformed"):
        wire.read_reply(message_with(wire.reply_content(only_val)), "val test")


def with_sums(**values) -> RecordDict:
    content = wire.reply_content(reply())
    sums = dict(content["sums"]) | {name.replace("__", "-"): value for name, value in values.items()}
    content["sums"] = MetricRecord({name: value for name, value in sums.items() if value is not None})
    return content


@pytest.mark.parametrize(
    "values",
    [
        {"val__num_examples": [1, 2]},
        {"val__loss_sum": [0.5]},
        {"val__num_examples": None},
        {"server__round": float("inf")},
        {"server__round": float("nan")},
        {"server__round": None},
        {"num__examples": None},
        {"train__loss_sum": [1.0, 2.0]},
    ],
)
def test_malformed_numbers_are_refused(values):
    with pytest.raises(ReplyRefused, match="the reply is malformed"):
        wire.read_reply(message_with(with_sums(**values)), "val test")


def test_a_confusion_matrix_of_more_groups_than_agreed_is_refused():
    bad = dataclasses.replace(reply().evaluations["val"], confusion=np.zeros((65, 65), dtype=np.int64))
    content = wire.reply_content(dataclasses.replace(reply(), evaluations={"val": bad}))
    with pytest.raises(ReplyRefused, match="val-counts is"):
        wire.read_reply(message_with(content), "val")


@pytest.mark.parametrize("record", ["sums", "arrays", "task"])
def test_a_missing_record_is_refused(record):
    content = wire.reply_content(reply())
    rest = RecordDict({name: value for name, value in content.items() if name != record})
    with pytest.raises(ReplyRefused, match="malformed"):
        wire.read_reply(message_with(rest), "val")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda counts: counts.astype(np.int32),
        lambda counts: counts.astype(np.float64),
        lambda counts: counts.astype(">i8"),
        lambda counts: counts[:-1],
        lambda counts: counts[:100],
        lambda counts: counts.reshape(1, -1),
        lambda counts: np.where(counts == 5, -1, counts),
    ],
)
def test_an_array_that_is_no_counts_is_refused(spoil):
    content = wire.reply_content(reply())
    good = content["arrays"]["val-counts"].numpy()
    content["arrays"]["val-counts"] = Array(spoil(good))
    with pytest.raises(ReplyRefused, match=r"val-counts (is|holds) .*, not"):
        wire.read_reply(message_with(content), "val")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=SHARED)
    return file.getvalue()


def huge() -> bytes:
    """A header that asks for 2**62 bytes."""
    return npy(np.zeros(4, dtype=np.uint8)).replace(b"(4,), ", f"({2**62},), ".encode(), 1)


BAD_BYTES = {
    "empty": b"",
    "cut": npy(SHARED)[:-3],
    "no header": b"\x93NUMPY\x01\x00",
    "a zip": npz(),
    "half a zip": npz()[:40],
    "a pickle": b"\x80\x04N.",
    "noise": bytes(range(256)),
    "bad header": npy(SHARED).replace(b"'fortran", b"((fortran", 1),
    "huge": huge(),
}


@pytest.mark.parametrize("what", BAD_BYTES)
@pytest.mark.parametrize("name", ["change", "val-counts"])
def test_bytes_that_are_no_array_are_refused(name, what):
    content = wire.reply_content(reply())
    arrays = dict(content["arrays"])
    arrays[name] = Array("float32", (7,), "numpy.ndarray", BAD_BYTES[what])
    content["arrays"] = ArrayRecord(arrays)
    with pytest.raises(ReplyRefused) as caught:
        wire.read_reply(message_with(content), "val")
    assert name in str(caught.value)


def test_an_array_in_another_library_format_is_refused():
    content = wire.reply_content(reply())
    content["arrays"] = ArrayRecord(dict(content["arrays"]) | {"change": Array("f", (7,), "torch", npy(SHARED))})
    with pytest.raises(ReplyRefused, match="change"):
        wire.read_reply(message_with(content), "val")


# ------------------------------------------------------------------------------------------------------- what leaves


def test_a_reply_is_at_most_three_arrays_and_holds_what_the_ledger_says():
    content = wire.reply_content(reply())
    assert len(content["arrays"]) == 3
    rows = {row["name"]: row for row in wire.describe(content)}
    assert rows["arrays.change"]["shape"] == [7]
    assert rows["arrays.change"]["data"] == SHARED.tobytes()
    assert rows["arrays.val-counts"]["dtype"] == "int64"
    assert rows["sums.num-examples"] == {"name": "sums.num-examples", "shape": [], "dtype": "int", "data": b"50"}
    total = sum(len(record) for record in content.values())
    assert len(rows) == total, "every value of every record is named"
