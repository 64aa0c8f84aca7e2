"""What crosses the wire: nothing is lost on the way, and whatever else comes is refused in one line."""

import dataclasses
import hashlib

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from tiny_federation import site_named

from common.errors import ReplyRefused
from common.metrics.folds import FOLD_BINS, NUM_FOLDS
from common.metrics.sums import CLOSED_FIELDS, NUM_BINS, ClosedSetSums, EvaluationSums
from common.protocol import wire
from common.protocol.codec import decode, encode, num_bytes
from common.protocol.ledger import parts_of
from common.protocol.wire import TRAIN_FIELDS, Reply, Site, Task

pytestmark = pytest.mark.usefixtures("in_a_run")
SHARED = np.linspace(-1, 1, 7, dtype=np.float32)
HEADER = ("dtype", "shape", "stype", "data")
PAIRS = np.arange(2 * NUM_BINS, dtype=np.int64).reshape(2, NUM_BINS)
FOLDS = np.arange(NUM_FOLDS * 2 * FOLD_BINS, dtype=np.int64).reshape(NUM_FOLDS, 2, FOLD_BINS)
CONFUSION = np.arange(9, dtype=np.int64).reshape(3, 3)


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
    return site_named("celeba", dataset="celeba", num_people=10)


def reply() -> Reply:
    return Reply(
        server_round=3,
        manifest="ab" * 32,
        num_examples=50,
        train={name: float(number) for number, name in enumerate(TRAIN_FIELDS)},
        evaluations={
            split: EvaluationSums(
                closed=ClosedSetSums(**{name: n + 1 for n, name in enumerate(CLOSED_FIELDS)}),
                pairs=PAIRS + shift,
                folds=FOLDS + shift,
                confusion=CONFUSION + shift,
            )
            for shift, split in enumerate(("val", "test"))
        },
        change=encode(SHARED, "float32"),
    )


def message_with(content: RecordDict) -> Message:
    return Message(content, 7, MessageType.TRAIN)


# -------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("kind", ["join", "train", "evaluate"])
def test_a_task_comes_back_as_it_went(kind):
    shared = None if kind == "join" else wire.pack_shared(encode(SHARED, "float32"))
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


def test_each_kind_with_a_model_has_a_message_type_of_its_own_and_all_others_have_that_of_a_query():
    queries = dict.fromkeys(("join", "keys", "shares", "unmask"), "query")
    expected = {"train": "train", "evaluate": "evaluate", **queries}
    assert dict(wire.MESSAGE_TYPES) == expected


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


@pytest.mark.parametrize("read", [wire.read_site, lambda message: wire.read_reply(message, "val")])
def test_a_client_that_went_is_told_of_in_our_words(read):
    request = wire.task_message(task("join"), None, node_id=7, ttl_s=5)
    gone = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="Error: Node Unavailable")
    with pytest.raises(ReplyRefused, match=r"^the connection to the client was lost$"):
        read(Message(gone, reply_to=request))


# ------------------------------------------------------------------------------------------------------------ replies


def test_a_reply_comes_back_as_it_went():
    back = wire.read_reply(message_with(wire.reply_content(reply())), "val test")
    assert (back.server_round, back.manifest, back.num_examples) == (3, "ab" * 32, 50)
    assert isinstance(back.num_examples, int)
    assert back.train == reply().train
    assert back.change == encode(SHARED, "float32")
    np.testing.assert_array_equal(decode(back.change), SHARED)
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
    with pytest.raises(ReplyRefused, match="val-counts has"):
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
        {"dtype": "int32"},
        {"dtype": "float64"},
        {"dtype": ">i8"},
        {"dtype": "object"},
        {"shape": (4,)},
        {"shape": (2**62,)},
        {"shape": (-1,)},
        {"shape": ()},
        {"shape": (1, 7)},
        {"stype": "numpy.ndarray"},
        {"stype": wire.FLAT},
        {"data": b""},
    ],
)
def test_counts_under_another_header_are_refused(spoil):
    content = wire.reply_content(reply())
    good = content["arrays"]["val-counts"]
    content["arrays"]["val-counts"] = Array(**({name: getattr(good, name) for name in HEADER} | spoil))
    with pytest.raises(ReplyRefused, match=r"val-counts"):
        wire.read_reply(message_with(content), "val")


def counts_array(counts):
    return Array(dtype=str(counts.dtype), shape=counts.shape, stype=wire.PLAIN, data=counts.tobytes())


@pytest.mark.parametrize("size", [0, 100, 53247, 53250, 53248 + 65**2])
def test_another_number_of_counts_is_refused(size):
    """53,248 and a square: 2 x 8,192, 10 x 2 x 1,024 and 2 x 8,192 counts, and the confusion of groups."""
    content = wire.reply_content(reply())
    content["arrays"]["val-counts"] = counts_array(np.zeros(size, dtype=np.uint8))
    with pytest.raises(ReplyRefused, match="val-counts has the shape"):
        wire.read_reply(message_with(content), "val")


def test_counts_below_zero_are_refused():
    content = wire.reply_content(reply())
    content["arrays"]["val-counts"] = counts_array(np.full(53248, -1, dtype=np.int64))
    with pytest.raises(ReplyRefused, match="val-counts holds -1, not counts"):
        wire.read_reply(message_with(content), "val")


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(255, "uint8"), (256, "uint16"), (65_536, "uint32"), (2**32 - 1, "uint32"), (2**32, "int64"), (2**62, "int64")],
)
def test_counts_travel_in_the_smallest_numbers_that_hold_them(largest, dtype):
    pairs = np.zeros_like(PAIRS)
    pairs[1, 3] = largest
    sums = dataclasses.replace(reply().evaluations["val"], pairs=pairs, folds=np.zeros_like(FOLDS))
    answer = dataclasses.replace(reply(), evaluations={"val": sums})
    content = wire.reply_content(answer)
    array = content["arrays"]["val-counts"]
    assert array.dtype == dtype
    assert len(array.data) == wire.counts_nbytes(answer) == array.shape[0] * np.dtype(dtype).itemsize
    assert wire.read_reply(message_with(content), "val").evaluations["val"].pairs[1, 3] == largest


BAD_HEADERS = {
    "too few bytes": {"data": SHARED.tobytes()[:-1]},
    "too many bytes": {"data": SHARED.tobytes() + b"x"},
    "no bytes": {"data": b""},
    "more elements than bytes": {"shape": (8,)},
    "2**62 elements": {"shape": (2**62,)},
    "fewer than none": {"shape": (-7,)},
    "two dimensions": {"shape": (7, 1)},
    "no dimension": {"shape": ()},
    "another codec's size": {"dtype": "int8"},
    "no codec of ours": {"dtype": "zstd"},
    "a dtype that is no codec": {"dtype": "float64"},
    "Flower's own format": {"stype": "numpy.ndarray"},
    "another library's": {"stype": "torch"},
    "counts": {"stype": wire.PLAIN},
}


def header_of(array):
    """What makes an equal array."""
    return {name: getattr(array, name) for name in HEADER} | {"data": bytes(array.data)}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_change_whose_header_does_not_fit_its_bytes_is_refused_before_it_is_decoded(what, monkeypatch):
    monkeypatch.setattr(wire.codec, "decode", None)
    content = wire.reply_content(reply())
    good = content["arrays"]["change"]
    arrays = dict(content["arrays"])
    arrays["change"] = Array(**(header_of(good) | BAD_HEADERS[what]))
    content["arrays"] = ArrayRecord(arrays)
    with pytest.raises(ReplyRefused, match="'change'"):
        wire.read_reply(message_with(content), "val")


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_model_whose_header_does_not_fit_its_bytes_is_refused(what):
    """What the server sends is checked like what it gets."""
    shared = wire.pack_shared(encode(SHARED, "float32"))
    shared["shared"] = Array(**(header_of(shared["shared"]) | BAD_HEADERS[what]))
    message = wire.task_message(task("train"), shared, node_id=7, ttl_s=5)
    with pytest.raises(ReplyRefused, match="'shared'"):
        wire.read_task(message.content)


def test_an_unknown_codec_is_named_with_those_that_are_known():
    content = wire.reply_content(reply())
    content["arrays"]["change"] = Array(dtype="zstd", shape=(7,), stype=wire.FLAT, data=bytes(28))
    with pytest.raises(ReplyRefused, match="in the codec 'zstd'; this version knows float32, float16, int8"):
        wire.read_reply(message_with(content), "val")


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_a_model_and_a_change_travel_in_each_codec(codec):
    coded = encode(SHARED, codec)
    message = wire.task_message(task("train"), wire.pack_shared(coded), node_id=7, ttl_s=5)
    np.testing.assert_array_equal(wire.read_task(message.content)[1], decode(coded))
    content = wire.reply_content(dataclasses.replace(reply(), change=coded))
    assert len(content["arrays"]["change"].data) == num_bytes(codec, len(SHARED))
    assert wire.read_reply(message_with(content), "val").change == coded


# ------------------------------------------------------------------------------------------------------- what leaves


def test_a_reply_is_at_most_three_arrays_and_holds_what_the_ledger_says():
    content = wire.reply_content(reply())
    assert len(content["arrays"]) == 3
    parts = {part["name"]: part for part in parts_of(content)}
    assert parts["arrays.change"]["shape"] == [7]
    assert parts["arrays.change"]["sha256"] == hashlib.sha256(SHARED.tobytes()).hexdigest()
    assert parts["arrays.change"]["dtype"] == "float32"
    assert parts["arrays.val-counts"]["dtype"] == "uint16"
    assert parts["arrays.val-counts"]["num_bytes"] == 2 * parts["arrays.val-counts"]["shape"][0]
    assert parts["sums.num-examples"]["sha256"] == hashlib.sha256(b"50").hexdigest()
    total = sum(len(record) for record in content.values())
    assert len(parts) == total, "every value of every record is named"
