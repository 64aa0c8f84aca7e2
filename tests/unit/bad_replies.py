"""Made-up faults of replies: each is a place in a reply, what is put there, and whether that reply may still count."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import strategies as st
from tiny_federation import MANIFEST, site_named

from common.metrics.folds import FOLD_BINS, NUM_FOLDS
from common.metrics.sums import CLOSED_FIELDS, NUM_BINS
from common.protocol import wire
from common.protocol.codec import encode, num_bytes
from common.protocol.wire import TRAIN_FIELDS
from server.exchange.guard import LARGEST_CHANGE

SITE = site_named("any")
SIZE = MANIFEST.size
HUGE = st.builds(lambda: "x" * 100_000)  # drawn so that it stays out of strategies' own texts
TRAINING_ONLY = ("num-examples", "train-", "change")
nan, inf = float("nan"), float("inf")


@dataclasses.dataclass(frozen=True, repr=False)
class Fault:
    """What is done to a reply's content at one place; two of a reply are of two places."""

    place: str
    what: str
    is_valid: bool
    apply: Callable[[RecordDict], None]
    by_training: bool = False  # nothing of an evaluation
    order: int = 0  # of application: whole records go last

    def __repr__(self):
        return f"<{'valid' if self.is_valid else 'bad'} {self.place:.60}: {self.what:.60}>"


def _put(record: str, name: str, value: Any, *, is_valid: bool) -> Fault:
    def apply(content):
        content[record][name] = value

    place = f"{record}.{name}"
    training = name.startswith(TRAINING_ONLY)
    return Fault(place, f"{value!r:.60}", is_valid, apply, by_training=training)


def _drop(record: str, name: str) -> Fault:
    def apply(content):
        del content[record][name]

    return Fault(f"{record}.{name}", "missing", False, apply, by_training=name.startswith(TRAINING_ONLY))


# ---- numbers

NUMBER_NAMES = [f"train-{name}" for name in TRAIN_FIELDS] + [
    f"{split}-{name}" for split in ("val", "test") for name in CLOSED_FIELDS
]
no_numbers = st.one_of(
    st.sampled_from([nan, inf, -inf, -1.0, -5e-324, 2.0**53, 1.8e308, -(2**63), 2**63 - 1, [], [nan], [1.0]]),
    st.floats(max_value=-1e-300, allow_nan=False),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
whole = {"num_examples": 100, "correct": 4, "num_classes": 6}  # the largest that a site of 100 pictures may say


@st.composite
def numbers(draw):
    name = draw(st.sampled_from(NUMBER_NAMES))
    field = name.partition("-")[2]
    if name.startswith("train-"):
        good = st.one_of(st.floats(0, 1e15), st.integers(0, 2**53 - 1), st.sampled_from([5e-324, 0.0, -0.0]))
    elif field == "loss_sum":
        good = st.one_of(st.floats(0, 1e15), st.integers(0, 10**9))
    elif field in ("precision_sum", "recall_sum", "f1_sum"):
        good = st.floats(0, 2)
    else:
        low = {"num_examples": 4, "correct": 0, "num_classes": 2}[field]  # no less than what bounds the others
        good = st.integers(low, whole[field])
        bad = st.one_of(no_numbers, st.sampled_from([2.5, 2.0, whole[field] + 1000]))
        return draw(_one(wire.SUMS, name, good, bad))
    return draw(_one(wire.SUMS, name, good, no_numbers))


@st.composite
def _one(draw, record, name, good, bad):
    if draw(st.integers(0, 3)) == 0:
        return _put(record, name, draw(good), is_valid=True)
    if draw(st.integers(0, 5)) == 0:
        return _drop(record, name)
    return _put(record, name, draw(bad), is_valid=False)


num_examples = _one(
    wire.SUMS,
    "num-examples",
    st.integers(1, SITE.num_training_pictures),
    st.one_of(
        st.sampled_from([0, -1, 51, 10.0, 0.5, nan, inf, -inf, 1e300, 2**63 - 1, -(2**63), [10], []]),
        st.integers(min_value=51, max_value=2**63 - 1),
        st.floats(),
    ),
)
rounds = _one(
    wire.SUMS,
    "server-round",
    st.just(1),
    st.one_of(st.sampled_from([0, 2, -1, 1.0, 1.5, nan, inf, 2**63 - 1, [1]]), st.integers(2, 10**9)),
)
manifests = _one(
    wire.TASK,
    "manifest",
    st.just(MANIFEST.digest),
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(["", MANIFEST.digest[:-1], MANIFEST.digest.upper() + " ", 7, 1.5, True, b"\xff"]),
        HUGE,
        st.lists(st.text(max_size=3), max_size=3),
    ).filter(lambda value: value != MANIFEST.digest),
)
odd_names = st.one_of(
    st.sampled_from(["head.weight", "change ", "Change", "val-embeddings", "../change", "train-", "a\nb", "\x1b[31m"]),
    HUGE,
    st.text(min_size=1, max_size=12),
).filter(lambda name: all(name not in known for known in wire._REPLY_NAMES.values()))


@st.composite
def extra_names(draw):
    record, name = draw(st.sampled_from([wire.SUMS, wire.ARRAYS, wire.TASK])), draw(odd_names)
    value: Any = {wire.SUMS: 1.0, wire.ARRAYS: Array(np.zeros(2)), wire.TASK: "x" * draw(st.sampled_from([1, 10**5]))}[
        record
    ]
    return _put(record, name, value, is_valid=False)


@st.composite
def renamed(draw):
    record, name = draw(
        st.sampled_from([(wire.ARRAYS, "val-counts"), (wire.SUMS, "val-correct"), (wire.TASK, "manifest")])
    )
    other = draw(odd_names)

    def apply(content):
        value = content[record][name]
        del content[record][name]
        content[record][other] = value

    return Fault(f"{record}.{name}", f"renamed {other!r:.40}", False, apply)


# ---- the change


def _array(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


@st.composite
def values(draw, codec, *, only_valid=False):
    """Seven numbers as the codec carries them: finite and not too large, or not."""
    is_valid = only_valid or draw(st.booleans())
    ordinary = st.floats(-1e4, 1e4, width=32)
    odd = [0.0, -0.0, 1e-45, -1e-38] if codec == "float32" else [0.0, -0.0, 6e-8]
    numbers = draw(st.lists(st.one_of(ordinary, st.sampled_from(odd)), min_size=SIZE, max_size=SIZE))
    if codec == "int8":
        return draw(_int8(is_valid))
    kind = {"float32": "<f4", "float16": "<f2"}[codec]
    if is_valid and codec == "float32":
        numbers[draw(st.integers(0, SIZE - 1))] = draw(st.sampled_from([LARGEST_CHANGE * 0.99, -1e14, 1.0]))
    if not is_valid:
        limit = [3e38, -1e30, 2e15] if codec == "float32" else []
        numbers[draw(st.integers(0, SIZE - 1))] = draw(st.sampled_from([nan, inf, -inf, *limit]))
    data = np.array(numbers).astype(kind).tobytes()
    return _put(wire.ARRAYS, "change", _array(codec, (SIZE,), wire.FLAT, data), is_valid=is_valid)


@st.composite
def _int8(draw, is_valid):
    codes = draw(st.lists(st.integers(-127, 127), min_size=SIZE, max_size=SIZE))
    codes[draw(st.integers(0, SIZE - 1))] = 100
    scale = draw(st.sampled_from([1e-3, 1.0, 0.0, 1e-40, 1e12] if is_valid else [nan, inf, -inf, -1.0, 1e30, -1e-3]))
    data = np.array([scale]).astype("<f4").tobytes() + np.array(codes).astype("i1").tobytes()
    return _put(wire.ARRAYS, "change", _array("int8", (SIZE,), wire.FLAT, data), is_valid=is_valid)


@st.composite
def headers(draw, codec):
    """A lying header over the right bytes, the right header over other bytes, or the change in another codec."""
    data = bytes(encode(np.full(SIZE, 0.5, dtype=np.float32), codec).data)
    how = draw(st.sampled_from(["shape", "length", "dtype", "stype", "codec"]))
    if how == "shape":
        shapes = [(), (0,), (1,), (6,), (8,), (SIZE, 1), (1, SIZE), (-SIZE,), (2**40,), (2**63,), (10**30,)]
        array = _array(codec, draw(st.sampled_from(shapes)), wire.FLAT, data)
    elif how == "length":
        wrong = draw(st.integers(0, 80).filter(lambda number: number != num_bytes(codec, SIZE)))
        array = _array(codec, (SIZE,), wire.FLAT, bytes(wrong))
    elif how == "dtype":
        kinds = ["float64", "float", "int32", "", "object", "float32 ", "U3", "<f4", "O"]
        array = _array(draw(st.one_of(st.sampled_from(kinds), HUGE)), (SIZE,), wire.FLAT, data)
    elif how == "stype":
        kinds = ["numpy.ndarray", "", wire.PLAIN, "pickle", wire.FLAT + " ", "\x00"]
        array = _array(codec, (SIZE,), draw(st.one_of(st.sampled_from(kinds), HUGE)), data)
    else:
        other = draw(st.sampled_from([name for name in ("float32", "float16", "int8") if name != codec]))
        right = bytes(encode(np.full(SIZE, 0.5, dtype=np.float32), other).data)
        array = _array(other, (SIZE,), wire.FLAT, draw(st.sampled_from([right, data])))
    return _put(wire.ARRAYS, "change", array, is_valid=False)


# ---- counts

counts_size = 2 * (2 * NUM_BINS) + NUM_FOLDS * 2 * FOLD_BINS
PARTS = {"pairs": (0, 4950), "folds": (2 * NUM_BINS, 4950), "confusion": (counts_size, 100)}


def _counts(name: str, counts: np.ndarray, what: str, *, is_valid: bool) -> Fault:
    array = _array(str(counts.dtype), counts.shape, wire.PLAIN, counts.astype(counts.dtype).tobytes())
    fault = _put(wire.ARRAYS, name, array, is_valid=is_valid)
    return dataclasses.replace(fault, what=what)


@st.composite
def histograms(draw, *, only_valid=False):
    name = draw(st.sampled_from(["val-counts", "test-counts"]))
    hows = ["valid", "size", "negative", "too many", "twins", "dtype", "length"]
    how = draw(st.sampled_from(hows[:1] if only_valid else hows))
    counts = np.zeros(counts_size + 4, dtype=np.int64)
    if how == "valid":
        groups = draw(st.integers(0, 6))
        counts = np.zeros(counts_size + groups**2, dtype=draw(st.sampled_from(["uint8", "uint16", "uint32", "int64"])))
        counts[draw(st.integers(0, 2 * NUM_BINS - 1))] = draw(st.integers(0, 200))
        return _counts(name, counts, "other counts", is_valid=True)
    if how == "size":
        sizes = [0, 1, counts_size - 1, counts_size + 2, counts_size + 5, counts_size + 65**2, 2 * counts_size]
        return _counts(name, np.zeros(draw(st.sampled_from(sizes)), dtype=np.uint8), "size", is_valid=False)
    if how == "negative":
        counts[draw(st.integers(0, len(counts) - 1))] = draw(st.integers(-(2**63), -1))
    elif how == "too many":
        begin, most = PARTS[draw(st.sampled_from(sorted(PARTS)))]
        counts[begin] = draw(st.one_of(st.integers(most + 1, most + 3), st.integers(2**40, 2**63 - 1)))
    elif how == "twins":
        counts[2 * NUM_BINS + 20 * FOLD_BINS] = draw(st.integers(1, 9))  # of pairs of which there are none
    elif how == "dtype":
        return _counts(name, counts.astype(draw(st.sampled_from(["f8", "f4", "i4", "u8", "?"]))), how, is_valid=False)
    else:
        array = _array("int64", (len(counts),), wire.PLAIN, bytes(draw(st.sampled_from([0, 8, 8 * len(counts) - 1]))))
        return _put(wire.ARRAYS, name, array, is_valid=False)
    return _counts(name, counts, how, is_valid=False)


# ---- whole records, and the message around them

other_records = st.sampled_from(
    [MetricRecord({"x": 1.0}), ConfigRecord({"manifest": MANIFEST.digest}), ArrayRecord({"change": Array(np.zeros(7))})]
)


@st.composite
def records(draw):
    record = draw(st.sampled_from([wire.SUMS, wire.ARRAYS, wire.TASK]))
    how = draw(st.sampled_from(["missing", "other kind", "empty", "extra", "renamed"]))
    other = draw(other_records)

    def apply(content):
        kind = type(content[record])
        if how == "extra":
            content["head"] = other
        elif how == "empty":
            content[record] = kind()
        elif how == "other kind" and not isinstance(other, kind):
            content[record] = other
        else:
            kept = content[record]
            del content[record]
            if how == "renamed":
                content[record.upper()] = kept

    return Fault(f"record {record}", how, False, apply, order=1)


@dataclasses.dataclass(frozen=True)
class Around:
    """What is wrong with the message and not with what it holds."""

    what: str
    is_valid: bool = False

    def __call__(self, content: RecordDict, request: Message) -> Message:
        """The reply."""
        if self.what.startswith("error"):
            reason = {
                "error": "no power",
                "error empty": "",
                "error long": "x" * 10**6,
                "error lines": "Traceback\n  file\n\x1b[31mred\r\nValueError: \u202eodd\n",
            }[self.what]
            return Message(Error(code=500, reason=reason), reply_to=request)
        message = Message(content, reply_to=request)
        if self.what == "other node":
            message.metadata.__dict__["_src_node_id"] = 1
        return message


GOOD = Around("", is_valid=True)
arounds = st.sampled_from(
    [Around("other node"), Around("error"), Around("error empty"), Around("error long"), Around("error lines")]
)


@dataclasses.dataclass(frozen=True)
class Bad:
    """One client's misbehaviour: what it does to one of its replies."""

    kind: str  # of the task whose answer is changed
    faults: tuple[Fault, ...]
    around: Around

    @property
    def is_valid(self) -> bool:
        """Whether the reply may count nevertheless."""
        return self.around.is_valid and all(fault.is_valid for fault in self.faults)

    def reply(self, content: RecordDict, request: Message) -> Message:
        """The changed reply to that request."""
        for fault in sorted(self.faults, key=lambda one: one.order):
            fault.apply(content)
        return self.around(content, request)


@st.composite
def bad_replies(draw, codec):
    """One to three faults of a good reply, in different places; of every fifth nothing is bad."""
    if draw(st.integers(0, 4)) == 0:
        odd = draw(st.one_of(values(codec, only_valid=True), histograms(only_valid=True)))
        return Bad("train", (odd,), GOOD)
    kind = draw(st.sampled_from(["train", "train", "train", "evaluate"]))
    known = st.one_of(
        numbers(), num_examples, rounds, manifests, extra_names(), renamed(), values(codec), headers(codec),
        histograms(), records(),
    )  # fmt: skip
    suits = known.filter(lambda fault: kind == "train" or not fault.by_training)
    faults = draw(st.lists(suits, min_size=1, max_size=3, unique_by=lambda fault: fault.place))
    around = draw(arounds) if draw(st.integers(0, 11)) == 0 else GOOD
    return Bad(kind, tuple(faults), around)
