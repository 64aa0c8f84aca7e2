"""The texts of secure aggregation's messages: what is written is read again, and nothing else is read."""

import json

import pytest

from common.errors import SecureSumRefused
from common.protocol.secure_words import (
    LARGEST_COUNT,
    LONGEST_TEXT,
    KeysAsked,
    SharesAsked,
    UnmaskAsked,
    WorkAsked,
    digest_of_work,
    in_text,
    of_text,
    read,
    read_answer,
    share_of,
    texts_by_name,
    write,
)
from common.secagg.sites import threshold_of

WORK = WorkAsked(attempt=2, members=("a", "b", "c"), shares={"b": "eA==", "c": ""}, most_examples=9, most_pictures=0)


def words(**changed):
    """WORK as text, with other values."""
    return json.dumps(json.loads(write(WORK)) | changed)


@pytest.mark.parametrize(
    "message",
    [
        KeysAsked(attempt=0, members=("a", "b")),
        KeysAsked(attempt=LARGEST_COUNT - 1, members=tuple(f"s{number:02d}" for number in range(64))),
        SharesAsked(attempt=1, adverts={"a": "x" * LONGEST_TEXT, "b": ""}),
        WORK,
        UnmaskAsked(attempt=3, survivors=()),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_is_read_as_it_was_written(message):
    assert read(type(message), write(message)) == message


def test_equal_messages_are_one_text_whatever_the_order_of_their_parts():
    assert write({"b": 1, "a": {"d": 2, "c": 3}}) == write({"a": {"c": 3, "d": 2}, "b": 1})
    assert read_answer(write({"self": {}, "mask": {"a": "x"}})) == {"self": {}, "mask": {"a": "x"}}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "it is no object"),
        ("{}", "it has nothing"),
        (json.dumps({"attempt": 1, "members": []}), "it has attempt, members"),
        (words(more=1), "it has attempt, members, more, most_examples"),
        (words(attempt=-1), "attempt is no number of ours"),
        (words(attempt=2**53), "attempt is no number of ours"),
        (words(attempt=True), "attempt is no number of ours"),
        (words(attempt=1.0), "attempt is no number of ours"),
        (words(most_pictures=None), "most_pictures is no number of ours"),
        (words(members={"a": 1}), "a list of names is none"),
        (words(members=[f"s{number:02d}" for number in range(65)]), "a list of names is none, or too long"),
        (words(members=["a", 1]), "1 is no site's name"),
        (words(members=["a", "../b"]), "'../b' is no site's name"),
        (words(members=["a\n"]), r"'a\\n' is no site's name"),
        (words(shares=["a"]), "texts by names are missing"),
        (words(shares={"../b": "x"}), "'../b' is no site's name"),
        (words(shares={f"s{number:02d}": "" for number in range(65)}), "a list of names is none, or too long"),
        (words(shares={"b": 1}), "a text is none, or too long"),
        (words(shares={"b": "x" * (LONGEST_TEXT + 1)}), "a text is none, or too long"),
        (words(shares={"b": "", "c": None}), "a text is none, or too long"),
    ],
)
def test_what_is_no_message_of_ours_is_refused_in_one_line(text, why):
    with pytest.raises(SecureSumRefused, match=why) as refused:
        read(WorkAsked, text)
    assert "use equal versions of FaceFed" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_answer_that_is_no_object_and_texts_that_are_missing_are_refused():
    for text in ("", "1", "null", '"x"', "[{}]"):
        with pytest.raises(SecureSumRefused, match="malformed"):
            read_answer(text)
    for value in (None, [], "a"):
        with pytest.raises(SecureSumRefused, match="texts by names are missing"):
            texts_by_name(value)
    assert texts_by_name({}) == {}


def test_bytes_travel_as_base64_and_nothing_else_is_bytes():
    data = bytes(range(256))
    assert of_text(in_text(data)) == data
    assert of_text("") == b""
    for text in ("=", "eA", "eA==\n", "e A==", "\u00e9A=="):
        with pytest.raises(SecureSumRefused, match="is not base64"):
            of_text(text)


@pytest.mark.parametrize(
    ("fraction", "members", "needed"),
    [
        *((0.667, members, needed) for members, needed in ((1, 3), (3, 3), (4, 3), (5, 4), (6, 5), (30, 21), (64, 43))),
        *((1.0, 10, 10), (0.75, 8, 6), (0.76, 8, 7)),
    ],
)
def test_the_threshold_is_rounded_up_and_three_at_least(fraction, members, needed):
    assert threshold_of(fraction, members) == needed
    assert needed == 3 or 3 * needed > 2 * members  # more than two thirds


def test_the_digest_follows_from_all_that_is_equal_for_honest_sites_and_from_nothing_else():
    about = {"words": {"kind": "train", "splits": "val"}, "model_sha256": "ab"}
    first = digest_of_work(WORK, **about)
    assert len(first) == 32
    own = WorkAsked(attempt=7, members=("a", "b"), shares={}, most_examples=9, most_pictures=0)
    assert digest_of_work(own, words={"splits": "val", "kind": "train"}, model_sha256="ab") == first
    others = [
        digest_of_work(WORK, words=about["words"] | {"splits": "val test"}, model_sha256="ab"),
        digest_of_work(WORK, words={"kind": "train"}, model_sha256="ab"),
        digest_of_work(WORK, words=about["words"], model_sha256="ac"),
        digest_of_work(WorkAsked(**vars(WORK) | {"most_examples": 8}), **about),
        digest_of_work(WorkAsked(**vars(WORK) | {"most_pictures": 1}), **about),
        digest_of_work(WorkAsked(**vars(WORK) | {"most_examples": 0, "most_pictures": 9}), **about),
    ]
    assert len({first, *others}) == 7


def test_a_sites_weight_is_its_share_of_the_most_and_one_at_most():
    assert [share_of(number, WORK) for number in (3, 9, 10)] == [1 / 3, 1.0, 1.0]
    with pytest.raises(SecureSumRefused, match="no picture at most"):
        share_of(3, WorkAsked(**vars(WORK) | {"most_examples": 0}))


def test_the_digest_follows_from_the_noise_that_sites_count_on():
    about = {"words": {"kind": "train"}, "model_sha256": "ab"}
    asked = [(0.0, 0), (0.1, 2), (0.1, 3), (0.2, 2)]
    found = [WorkAsked(**vars(WORK) | {"sensitivity": much, "noises": many}) for much, many in asked]
    assert len({digest_of_work(work, **about) for work in found}) == 4
