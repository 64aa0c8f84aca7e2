"""A site's masked reply: what of it the server still sees, and what went into the words."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_federation import MANIFEST, reply_to, settings_with, sums_with, task_for

from clients.masked_reply import MaskedReply, answer_small, is_masked, ledger_words, secure_sum_of
from clients.policy import OWN_MACHINE
from clients.site import MadeKeys
from common.errors import ConfigError, ReplyRefused, SecureSumRefused
from common.protocol.codec import MASKED, decode
from common.protocol.parameters import Part, buffer_sha256, trainable_spans
from common.protocol.secure_vector import CONTENT, Layout, Sums
from common.protocol.secure_words import (
    KeysAsked,
    SharesAsked,
    UnmaskAsked,
    WorkAsked,
    digest_of_work,
    read_answer,
    write,
)
from common.protocol.wire import TRAIN_FIELDS, words_of
from simulation.engine.run import made_keys

NAMES = ("ada", "ben", "cyd")
PART = Part(whole=MANIFEST, part=MANIFEST, spans=trainable_spans(MANIFEST, {e.name for e in MANIFEST.entries}))
SHARED = np.full(MANIFEST.size, 0.25, dtype=np.float32)
SETTINGS = settings_with(secagg__enabled=True, federation__min_clients=3)
ASKED = WorkAsked(attempt=1, members=NAMES, shares={}, most_examples=20, most_pictures=0)
TASK = task_for(MANIFEST, SETTINGS, splits="val test", secure=write(ASKED))


class Seen:
    """A site's part in a sum that masks nothing, and keeps what it was given."""

    def mask(self, asked, server_round, words, about, digest, *, lanes):
        self.lanes = lanes
        self.given = (asked, server_round, list(about), digest)
        return words


def masked(task=TASK, asked=ASKED, settings=SETTINGS, **values):
    """Returns the reply, what was to be masked, and the sums in it."""
    seen, task = Seen(), dataclasses.replace(task, secure=write(asked))
    reply = reply_to(task, **{"change": 0.5, **values})
    state = SimpleNamespace(part=PART, settings=settings)
    found = MaskedReply(state, task, SHARED, seen).of(reply)
    words = np.frombuffer(found.change.data, dtype="<u4")
    part = PART if task.kind == "train" else None
    return found, seen, words, Layout(change=part, splits=tuple(task.splits.split()), num_members=3)


def test_of_a_masked_reply_no_sum_and_no_change_is_left_in_the_clear():
    found, seen, words, layout = masked()
    assert found.evaluations == {}
    assert found.withheld == {}
    assert set(found.train) == set(TRAIN_FIELDS) - set(CONTENT)
    assert (found.change.codec, found.change.size) == (MASKED, layout.size) == (MASKED, len(words))
    asked, server_round, about, digest = seen.given
    sha256 = buffer_sha256(SHARED)
    assert (asked, server_round) == (ASKED, 1)
    assert about == ["round 1", f"val {sha256[:16]}", f"test {sha256[:16]}"]
    assert digest == digest_of_work(ASKED, words=words_of(TASK), model_sha256=sha256)
    sums = layout.sums(words)
    assert sums.content == dict.fromkeys(CONTENT, 1.0)
    assert sums.evaluations["val"].closed.num_examples == 4


@pytest.mark.parametrize(("pictures", "share"), [(5, 0.25), (20, 1.0), (30, 1.0)])
def test_a_sites_change_counts_by_its_pictures_and_once_at_most(pictures, share):
    _, _, words, layout = masked(num_examples=pictures)
    np.testing.assert_allclose(layout.mean(words, SHARED, 1.0), 0.5 * share, atol=1e-8)


def test_scores_count_for_so_many_pictures_at_most_where_a_bound_was_told():
    """Of 4 pictures of the closed set and 200 pairs: 2 pictures have one pair, 21 pictures 210."""
    _, _, words, layout = masked(asked=dataclasses.replace(ASKED, most_pictures=2))
    sums = layout.sums(words).evaluations["val"]
    assert sums.closed.num_examples == 2
    assert sums.pairs.sum() <= 1
    for most in (0, 21):
        _, _, words, layout = masked(asked=dataclasses.replace(ASKED, most_pictures=most))
        sums = layout.sums(words).evaluations["val"]
        assert (sums.closed.num_examples, sums.pairs.sum()) == (4, 200)


def test_of_an_evaluation_the_words_are_its_sums_alone():
    task = dataclasses.replace(TASK, kind="evaluate", splits="test")
    found, seen, words, layout = masked(task)
    assert seen.given[2] == [f"test {buffer_sha256(SHARED)[:16]}"]  # no round: that was summed before
    assert len(words) == layout.size
    assert layout.sums(words).evaluations["test"].closed == sums_with(0.6).closed
    assert found.train == {}


def test_a_change_that_the_server_would_refuse_if_it_saw_it_is_refused_at_the_site():
    settings = settings_with(secagg__enabled=True, federation__min_clients=3, federation__max_change_factor=2.0)
    masked(settings=settings, change=0.5)  # twice the model's norm
    with pytest.raises(ReplyRefused, match=r"federation\.max_change_factor"):
        masked(settings=settings, change=0.51)


@pytest.mark.parametrize(
    ("enabled", "kind", "splits", "says", "wanted"),
    [
        (True, "train", "val", True, True),
        (True, "train", "", True, True),
        (True, "evaluate", "test", True, True),
        (True, "evaluate", "", False, False),  # the best model, handed out for good: nothing is scored
        (True, "join", "", False, False),
        (False, "train", "val", False, False),
        (False, "evaluate", "val", False, False),
        (True, "train", "val", False, "in the clear"),
        (True, "evaluate", "val", False, "in the clear"),
        (True, "evaluate", "", True, "which this run does not have"),
        (False, "train", "val", True, "which this run does not have"),
    ],
)
def test_whether_an_answer_is_masked_follows_from_the_run_and_not_from_the_task(enabled, kind, splits, says, wanted):
    settings = settings_with(secagg__enabled=enabled, federation__min_clients=3)
    task = dataclasses.replace(TASK, kind=kind, splits=splits, secure=TASK.secure if says else "")
    if isinstance(wanted, bool):
        assert is_masked(task, settings) is wanted
    else:
        with pytest.raises(ReplyRefused, match=wanted):
            is_masked(task, settings)


def test_a_whole_attempt_by_its_texts(tmp_path):
    """Three sites by the texts of their tasks alone: keys, shares, unmask; each answered by the one that it is for."""
    keys = made_keys(list(NAMES))
    assert isinstance(keys["ada"], MadeKeys)
    sums = {}
    for name in NAMES:
        site = SimpleNamespace(name=name, keys=keys[name], state_dir=tmp_path / name, policy=OWN_MACHINE)
        (tmp_path / name / "private" / TASK.run_id).mkdir(parents=True)
        sums[name] = secure_sum_of(site, TASK, SETTINGS)
    asked = {"keys": write(KeysAsked(attempt=1, members=NAMES))}

    def answers(kind):
        task = dataclasses.replace(TASK, kind=kind, secure=asked[kind])
        return {name: read_answer(answer_small(secure, task)) for name, secure in sums.items()}

    asked["shares"] = write(SharesAsked(attempt=1, adverts={n: one["advert"] for n, one in answers("keys").items()}))
    shares = answers("shares")
    assert {name: sorted(one) for name, one in shares.items()} == {
        name: [other for other in NAMES if other != name] for name in NAMES
    }
    nothing = Sums(evaluations={}, content={})
    layout = Layout(change=PART, splits=(), num_members=3)
    words = layout.words(layout.in_words(np.zeros_like(SHARED), SHARED, 1.0), nothing)
    for name, secure in sums.items():
        own = {other: shares[other][name] for other in NAMES if other != name}
        secure.mask(dataclasses.replace(ASKED, shares=own), 1, words, ["round 1"], bytes(32))
    asked["unmask"] = write(UnmaskAsked(attempt=1, survivors=NAMES))
    assert {name: sorted(one["self"]) for name, one in answers("unmask").items()} == {
        name: list(NAMES) for name in NAMES
    }
    with pytest.raises(SecureSumRefused, match="malformed"):
        answer_small(sums["ada"], dataclasses.replace(TASK, kind="unmask", secure=asked["keys"]))


def test_the_ledger_says_with_whom_and_of_which_model_and_nothing_of_other_tasks():
    sha256 = buffer_sha256(SHARED)
    masked_words = {"attempt": 1, "with": list(NAMES), "model": sha256}
    assert ledger_words(TASK, SHARED) == {"masked": masked_words}
    frozen = dataclasses.replace(TASK, frozen="ab")
    assert ledger_words(frozen, SHARED) == {"masked": masked_words | {"frozen": "ab"}}
    assert ledger_words(TASK, None) == {}
    assert ledger_words(dataclasses.replace(TASK, secure=""), SHARED) == {}


def test_what_is_masked_is_what_the_site_decodes_of_its_own_change():
    """With a codec that loses something the words are those of what the server would have got."""
    reply = reply_to(TASK, change=np.linspace(-0.1, 0.1, MANIFEST.size), codec="int8")
    seen = Seen()
    found = MaskedReply(SimpleNamespace(part=PART, settings=SETTINGS), TASK, SHARED, seen).of(reply)
    layout = Layout(change=PART, splits=("val", "test"), num_members=3)
    mean = layout.mean(np.frombuffer(found.change.data, "<u4"), SHARED, 0.5)
    np.testing.assert_allclose(mean, decode(reply.change), atol=2e-9)


IN_LANES = settings_with(secagg__enabled=True, federation__min_clients=3, federation__upload_codec="int8")


def test_a_site_puts_its_change_in_lanes_once_and_keeps_what_they_lack():
    """Two tensors of one block each: limits 1 and 1 / 8, of three members 10,922 steps."""
    asked = dataclasses.replace(ASKED, shifts="03")
    task = dataclasses.replace(TASK, secure=write(asked))
    pack = SimpleNamespace(indices=lambda _split: range(10))
    state = SimpleNamespace(part=PART, settings=IN_LANES, pack=pack, site=SimpleNamespace(name="ada"))
    change = np.array([0.5, 1e-5, 1.0, 0.1, 0.2, 0.3, 1e-7], np.float32)
    seen = Seen()
    reply = MaskedReply(state, task, SHARED, seen)
    lost = reply.code(change)
    found = reply.of(reply_to(task, change=change, num_examples=10))
    layout = Layout(change=PART, splits=("val", "test"), num_members=3, shifts="03")
    assert seen.lanes == layout.lanes == 4
    assert found.change.size == layout.size
    words = np.frombuffer(found.change.data, "<u4")
    steps = np.repeat([1.0, 0.125], [3, 4]) / 10922 / 0.5  # by its weight
    sent = np.minimum(np.rint(change / steps), 10922) * steps
    np.testing.assert_allclose(layout.mean(words, SHARED, 0.5), sent, rtol=1e-6)
    np.testing.assert_allclose(lost, change - sent, atol=1e-8)
    assert layout.sums(words).saturated == 1  # 0.3 by half is beyond an eighth


def test_a_change_that_is_too_long_is_refused_before_what_it_lacks_is_kept():
    settings = settings_with(
        secagg__enabled=True,
        federation__min_clients=3,
        federation__upload_codec="int8",
        federation__max_change_factor=2.0,
    )
    pack = SimpleNamespace(indices=lambda _split: range(10))
    state = SimpleNamespace(part=PART, settings=settings, pack=pack, site=SimpleNamespace(name="ada"))
    with pytest.raises(ReplyRefused, match=r"federation\.max_change_factor"):
        MaskedReply(state, TASK, SHARED, Seen()).code(np.full(MANIFEST.size, 0.51, np.float32))


def test_halves_of_floats_have_no_sum_and_are_refused_at_the_door():
    with pytest.raises(ConfigError, match=r'upload_codec = "float16": masked words are whole numbers; .* use "int8"'):
        settings_with(secagg__enabled=True, federation__min_clients=3, federation__upload_codec="float16")


def test_lanes_in_a_run_that_has_none_are_refused():
    task = dataclasses.replace(TASK, secure=write(dataclasses.replace(ASKED, shifts="03")))
    with pytest.raises(SecureSumRefused, match="words of 16 bits, which this run does not have"):
        MaskedReply(SimpleNamespace(part=PART, settings=SETTINGS), task, SHARED, Seen())
