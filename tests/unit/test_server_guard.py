"""What a client can send wrongly: each is refused in words that name it, none ends the server or touches the model."""

import dataclasses

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_federation import MANIFEST, reply_to, site_named, sums_with

from common.errors import ReplyRefused
from common.metrics.sums import CLOSED_FIELDS, NUM_BINS
from common.protocol import wire
from common.protocol.codec import Coded, encode
from common.protocol.wire import TRAIN_FIELDS, Task, read_reply
from server.exchange.guard import check_evaluation_reply, check_train_reply, read_site

pytestmark = pytest.mark.usefixtures("in_a_run")

TASK = Task(kind="train", run_id="run", server_round=3, settings="{}", manifest=MANIFEST.digest, splits="val test")
SITE = site_named("alpha")


def check(reply):
    check_train_reply(reply, server_round=3, manifest=MANIFEST, site=SITE, codec="float32")


def good(**values):
    return dataclasses.replace(reply_to(TASK), **values)


def test_a_good_reply_passes():
    check(good())
    evaluation = reply_to(dataclasses.replace(TASK, kind="evaluate"))
    check_evaluation_reply(evaluation, server_round=3, manifest=MANIFEST, site=SITE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize(
    ("position", "name"), [(0, "backbone.a"), (2, "backbone.a"), (3, "backbone.b"), (6, "backbone.b")]
)
def test_a_number_that_cannot_be_averaged_names_its_tensor(position, name, value):
    """3e38 is finite, and is none any more once it counts for ten pictures."""
    change = np.zeros(MANIFEST.size, dtype=np.float32)
    change[position] = value
    with pytest.raises(ReplyRefused, match=f"in {name}$"):
        check(good(change=encode(change, "float32")))


@pytest.mark.parametrize("size", [0, 1, 6, 8])
def test_a_change_of_another_size_is_refused_also_where_it_would_broadcast(size):
    with pytest.raises(ReplyRefused, match=f"the change is float32 of {size} numbers; float32 of 7 were asked for"):
        check(good(change=encode(np.zeros(size, dtype=np.float32), "float32")))


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_a_change_in_another_codec_than_was_asked_for_is_refused(codec):
    change = encode(np.zeros(MANIFEST.size, dtype=np.float32), codec)
    with pytest.raises(ReplyRefused, match=f"the change is {codec} of 7 numbers; float32 of 7 were asked for"):
        check(good(change=change))
    check_train_reply(good(change=change), server_round=3, manifest=MANIFEST, site=SITE, codec=codec)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 1e30])
def test_an_int8_change_whose_scale_cannot_be_averaged_names_its_tensor(scale):
    """1e30 is a scale whose codes of 2 and more are beyond what can be added; NaN and infinity spoil zeros too."""
    data = np.float32([scale]).tobytes() + np.int8([0, 0, 0, 2, 0, 0, 0]).tobytes()
    change = Coded(codec="int8", size=7, data=data)
    with pytest.raises(ReplyRefused, match=r"the change holds .* in backbone"):
        check_train_reply(good(change=change), server_round=3, manifest=MANIFEST, site=SITE, codec="int8")


def test_a_large_scale_of_zeros_is_zeros():
    change = Coded(codec="int8", size=7, data=np.float32([1e30]).tobytes() + bytes(7))
    check_train_reply(good(change=change), server_round=3, manifest=MANIFEST, site=SITE, codec="int8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_float16_change_that_is_not_finite_names_its_tensor(value):
    halves = np.float16([0, 0, 0, 0, value, 0, 0])
    change = Coded(codec="float16", size=7, data=halves.tobytes())
    with pytest.raises(ReplyRefused, match=r"in backbone\.b$"):
        check_train_reply(good(change=change), server_round=3, manifest=MANIFEST, site=SITE, codec="float16")


@pytest.mark.parametrize("num_examples", [0, -1, 51, 10**30, True, 10.0, float("nan"), "10", [10], None])
def test_num_examples_is_a_count_of_at_most_what_the_client_joined_with(num_examples):
    with pytest.raises(ReplyRefused, match="num-examples is"):
        check(good(num_examples=num_examples))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"server_round": 2}, "of round 2, not of round 3"),
        ({"manifest": "other"}, "manifest digests differ"),
        ({"change": None}, "no change of the model"),
        ({"train": {}}, "lacks the training sum num_pictures"),
        ({"train": dict.fromkeys(TRAIN_FIELDS, 1.0) | {"loss_sum": float("nan")}}, "loss_sum is nan"),
        ({"train": dict.fromkeys(TRAIN_FIELDS, 1.0) | {"correct": -1.0}}, r"correct is -1\.0"),
    ],
)
def test_a_reply_of_another_round_or_model_or_with_impossible_training_sums_is_refused(values, said):
    with pytest.raises(ReplyRefused, match=said):
        check(good(**values))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("loss_sum", float("inf"), "val-loss_sum is inf"),
        ("loss_sum", -0.5, r"val-loss_sum is -0\.5"),
        ("loss_sum", [2.0], "must be a number"),
        ("loss_sum", True, "must be a number"),
        ("correct", 1.5, "must be a number"),
        ("correct", 5, "more than val-num_examples, 4"),
        ("f1_sum", 2.1, "more than val-num_classes, 2"),
        ("num_examples", -4, "val-num_examples is -4"),
        ("num_examples", 2**60, "val-num_examples is"),
    ],
)
def test_impossible_evaluation_sums_are_refused(name, value, said):
    sums = sums_with(0.5)
    bad = dataclasses.replace(sums, closed=dataclasses.replace(sums.closed, **{name: value}))
    for reply in (good(evaluations={"val": bad, "test": sums}), good(evaluations={"test": sums, "val": bad})):
        with pytest.raises(ReplyRefused, match=said):
            check(reply)
        scored = dataclasses.replace(reply, change=None, train={})
        with pytest.raises(ReplyRefused, match=said):
            check_evaluation_reply(scored, server_round=3, manifest=MANIFEST, site=SITE)


def test_pictures_of_no_class_are_refused_since_their_scores_would_end_the_run():
    sums = sums_with(0.5)
    closed = dataclasses.replace(sums.closed, num_classes=0, precision_sum=0, recall_sum=0, f1_sum=0)
    with pytest.raises(ReplyRefused, match="val-num_classes is 0 for 4 pictures"):
        check(good(evaluations={"val": dataclasses.replace(sums, closed=closed)}))


@pytest.mark.parametrize(
    ("name", "count", "told"), [("folds", 4951, "folds count more pairs"), ("confusion", 101, "more than 100")]
)
def test_more_counts_than_the_clients_pictures_have_are_refused(name, count, told):
    counts = np.zeros_like(getattr(sums_with(0.5), name))
    for number in (count - 1, count):
        counts.flat[0] = number
        reply = good(evaluations={"val": dataclasses.replace(sums_with(0.5), **{name: counts})})
        if number < count:
            check(reply)
        else:
            with pytest.raises(ReplyRefused, match=told):
                check(reply)


def test_more_pairs_than_are_scored_by_the_design_are_refused():
    for most, accepted in (("all", True), (200, True), (197, False)):  # 100 genuine and 100 impostor pairs
        asked = {"server_round": 3, "manifest": MANIFEST, "site": SITE, "max_pairs": most}
        evaluation = reply_to(dataclasses.replace(TASK, kind="evaluate"))
        for examine in (
            lambda asked=asked: check_train_reply(good(), codec="float32", **asked),
            lambda asked=asked, reply=evaluation: check_evaluation_reply(reply, **asked),
        ):
            if accepted:
                examine()
            else:
                with pytest.raises(ReplyRefused, match=r"more pairs than verification\.max_pairs, 197"):
                    examine()


def test_more_pairs_than_the_clients_pictures_have_are_refused():
    """100 pictures have 100 * 99 / 2 = 4,950 pairs; counts near 2**63 would turn the sum over clients negative."""
    for count, accepted in ((4950, True), (4951, False), (2**62, False)):
        pairs = np.zeros((2, NUM_BINS), dtype=np.int64)
        pairs[0, 1] = count
        reply = good(evaluations={"val": dataclasses.replace(sums_with(0.5), pairs=pairs)})
        if accepted:
            check(reply)
        else:
            with pytest.raises(ReplyRefused, match="more pairs than 100 pictures have"):
                check(reply)


def message_with(content):
    request = Message(RecordDict({}), 5, "train")
    return Message(content, reply_to=request)


def content_of(reply):
    return wire.reply_content(reply)


@pytest.mark.parametrize("key", ["num-examples", "server-round", "val-correct", "test-f1_sum"])
def test_a_missing_number_is_refused(key):
    content = content_of(good())
    del content["sums"][key]
    with pytest.raises(ReplyRefused, match=key):
        read_reply(message_with(content), "val test")


def test_a_missing_training_sum_is_refused():
    content = content_of(good())
    del content["sums"]["train-loss_sum"]
    with pytest.raises(ReplyRefused, match="lacks the training sum loss_sum"):
        check(read_reply(message_with(content), "val test"))


def test_an_error_reply_carries_the_clients_line():
    request = Message(RecordDict({}), 5, "train")
    with pytest.raises(ReplyRefused, match=r"^alpha: the loss is nan$"):
        read_reply(wire.error_message("alpha: the loss is nan", request), "val")


# ---- anything at all


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"noise",
        b"PK\x05\x06" + b"\0" * 18,  # an empty zip: numpy opens it as an archive, which has no dtype
        b"PK\x03\x04broken",
        b"\x80\x04K.",  # a pickle
        b"\x93NUMPY\x01\x00\x05\x00{'a':",
        b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999,)}",
    ],
)
def test_bytes_that_are_no_array_are_refused(data):
    content = content_of(good())
    content["arrays"]["change"] = Array(dtype="float32", shape=(7,), stype=wire.FLAT, data=data)
    with pytest.raises(ReplyRefused, match="change"):
        read_reply(message_with(content), "val test")


numbers = st.one_of(st.integers(-3, 60), st.floats(), st.integers(), st.lists(st.integers(0, 9), max_size=2))
blobs = st.one_of(
    st.binary(max_size=40),
    st.just(b"PK\x05\x06" + b"\0" * 18),  # an empty zip: numpy opens it as an archive, which has no dtype
    st.just(b"PK\x03\x04broken"),
    st.just(b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999,)}"),
)
arrays = st.one_of(
    st.builds(
        lambda blob, stype: Array(dtype="float32", shape=(7,), stype=stype, data=blob),
        blobs.filter(lambda blob: len(blob) != 28),  # seven numbers would be a change
        st.sampled_from(["numpy.ndarray", wire.FLAT, wire.PLAIN, "x"]),
    ),
    st.builds(
        lambda shape, dtype: Array(np.zeros(shape, dtype=dtype)),
        st.sampled_from([(1,), (6,), (7, 1), (2, 8)]),
        st.sampled_from(["f4", "f8", "i8", "U3"]),
    ),
)
foreign = st.one_of(
    st.builds(lambda v: MetricRecord({"x": v}), numbers),
    st.builds(
        lambda v: ConfigRecord({"manifest": v}),
        st.one_of(st.text(max_size=5), st.integers(-9, 9), st.binary(max_size=3)),
    ),
    st.builds(lambda a: ArrayRecord({"change": a}), arrays),
)
NUMBER_KEYS = ["num-examples", *(f"train-{n}" for n in TRAIN_FIELDS), *(f"val-{n}" for n in CLOSED_FIELDS)]


@st.composite
def broken_replies(draw):
    """A good reply with one thing in it that no client of ours sends."""
    content = content_of(good())
    how = draw(st.sampled_from(["drop record", "other record", "drop key", "number", "array", "nothing but noise"]))
    record = draw(st.sampled_from(["sums", "arrays", "task"]))
    if how == "drop record":
        del content[record]
    elif how == "other record":
        kind = type(content[record])
        content[record] = draw(foreign.filter(lambda value: not isinstance(value, kind)))
    elif how == "drop key":
        del content[record][draw(st.sampled_from(sorted(content[record])))]
    elif how == "number":
        impossible = numbers.filter(lambda v: isinstance(v, list) or not 0 <= v < 2**53)
        content["sums"][draw(st.sampled_from(NUMBER_KEYS))] = draw(impossible)
    elif how == "array":
        content["arrays"][draw(st.sampled_from(sorted(content["arrays"])))] = draw(arrays)
    else:
        content = RecordDict(draw(st.dictionaries(st.sampled_from(["sums", "arrays", "task", "x"]), foreign)))
    return content


@given(broken_replies())
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_whatever_a_client_sends_it_is_refused_and_nothing_else_is_raised(content):
    with pytest.raises(ReplyRefused):
        check(read_reply(message_with(content), "val test"))


# ---- the answer to join


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("name", "", "the name '' cannot be used"),
        ("name", "../escape", "cannot be used"),
        ("name", "red\x1b[31m", "cannot be used"),
        ("name", "two\nlines", "cannot be used"),
        ("name", "x" * 65, "cannot be used"),
        ("name", 5, "name is 5"),
        ("num_training_pictures", "50", "num_training_pictures is '50'"),
        ("num_training_pictures", -1, "num_training_pictures is -1"),
        ("num_pictures", True, "num_pictures is True"),
        ("cores", 1.5, "cores is 1.5"),
        ("cut", "by hand", "cut is 'by hand', none of"),
    ],
)
def test_an_answer_to_join_with_a_field_of_another_kind_is_refused(field, value, said):
    with pytest.raises(ReplyRefused) as seen:
        read_site(message_with(wire.site_content(site_named(**({"name": "alpha"} | {field: value})))))
    assert said in str(seen.value)
    assert len(str(seen.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["celeba", "vggface2", "Hôpital Nord 2", "a.b_c-d"])
def test_ordinary_names_are_fine(name):
    assert read_site(message_with(wire.site_content(site_named(name)))).name == name
