"""One attempt at a sum on the server, over sites' own protocol objects: which of their answers it takes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_federation import MANIFEST, settings_with, site_named, sums_with
from tiny_federation import task_for as any_task_for

from clients.policy import OWN_MACHINE
from clients.secure_sum import Keys, SecureSum, UnknownPeer
from common.errors import CheckpointError, NotEnoughClients, SecureSumRefused, UserError
from common.metrics.sums import NOTHING
from common.privacy.shared_noise import fewest_noises, grid_of_sum
from common.protocol.codec import MASKED, Coded
from common.protocol.parameters import Part, buffer_sha256, trainable_spans
from common.protocol.secure_vector import Sums
from common.protocol.secure_words import (
    KeysAsked,
    SharesAsked,
    UnmaskAsked,
    digest_of_work,
    in_text,
    of_text,
    read,
    read_answer,
    write,
)
from common.protocol.wire import words_of
from common.secagg.keys import Advert, Context, Identity, advertise
from common.secagg.shamir import PRIME, Share
from server.exchange.roster import Member
from server.exchange.roster import Share as Counted
from server.secure_sum import ATTEMPTS_FILE, ROUNDING, Asked, SecureSums, _most, _possible

NAMES = ("ada", "ben", "cyd", "dan", "eve")
PART = Part(whole=MANIFEST, part=MANIFEST, spans=trainable_spans(MANIFEST, {e.name for e in MANIFEST.entries}))
RECEIVED = np.full(MANIFEST.size, 0.25, dtype=np.float32)
SETTINGS = settings_with(secagg__enabled=True, federation__min_clients=3)
ASKED = Asked(kind="train", step=1, splits=["val"], change=PART, received=RECEIVED)
TASK = any_task_for(MANIFEST, SETTINGS, splits="val")


class Sites:
    """Sites in this process that answer as `server.secure_sum.Ask` has them asked."""

    def __init__(self, folder, names):
        identities = {name: Identity.in_memory(name) for name in names}

        def peer(name):
            if name not in identities:
                raise UnknownPeer(name)
            return identities[name].public_key

        self.by_name = {}
        for name, identity in identities.items():
            (folder / name).mkdir()
            self.by_name[name] = SecureSum(
                folder / name, "run-1", Keys(identity, peer), threshold=0.667, policy=OWN_MACHINE
            )
        self.refused = {}  # name -> why its answer was not taken
        self.spoil = {}  # (kind, name) -> what becomes of its answer; None: it is lost
        self.asked = []

    def ask(self, kind, texts):
        self.asked.append((kind, sorted(texts)))
        found = {}
        for name, text in texts.items():
            answer = self.answer(kind, self.by_name[name], text)
            answer = self.spoil.get((kind, name), lambda one: one)(answer)
            if answer is not None:
                found[name] = answer
        return found

    @staticmethod
    def answer(kind, site, text):
        if kind == "keys":
            return write({"advert": site.keys(read(KeysAsked, text), 1)})
        if kind == "shares":
            return write(site.shares(read(SharesAsked, text), 1))
        return write(site.unmask(read(UnmaskAsked, text), 1))

    def refuse(self, name, reason):
        self.refused[name] = reason


def members_of(names, **pictures):
    return {
        name: Member(node_id=number, site=site_named(name, num_training_pictures=pictures.get(name, 10)))
        for number, name in enumerate(names)
    }


def begun(folder, names=NAMES, share=None, spoil=None, settings=SETTINGS, **pictures):
    """An attempt whose keys and shares came, and its sites."""
    sites = Sites(folder, names)
    sites.spoil = spoil or {}
    attempt = SecureSums(settings, "run-1", folder).begin(ASKED, members_of(names, **pictures), share, sites)
    return attempt, sites


def send_words(attempt, sites, name, change=0.5, num_examples=10, sums=None):
    """A site's masked words, added."""
    asked = attempt.work(name)
    own = sums or Sums(evaluations={"val": sums_with(0.6)}, content={"correct": 1.0})
    share = min(1.0, num_examples / asked.most_examples)
    coded = attempt.layout.in_words(np.full(MANIFEST.size, change, np.float32), RECEIVED, share)
    words = attempt.layout.words(coded, own)
    digest = digest_of_work(asked, words=words_of(TASK), model_sha256=buffer_sha256(RECEIVED))
    masked = sites.by_name[name].mask(asked, 1, words, ["round 1"], digest)
    coded = Coded(codec=MASKED, size=len(masked), data=masked.astype("<u4").view(np.uint8).data)
    attempt.add(coded, num_examples, name)


def altered(kind, owner, change):
    """Of a site's answer to unmask one share, changed."""

    def spoil(answer):
        shown = json.loads(answer)
        share = Share.from_bytes(of_text(shown[kind][owner]))
        shown[kind][owner] = in_text(change(share).to_bytes())
        return json.dumps(shown)

    return spoil


def other_value(share):
    return Share(share.x, (share.y + 1) % PRIME)


def test_the_mean_is_over_whose_words_arrived_each_by_its_pictures_up_to_the_most(tmp_path):
    attempt, sites = begun(tmp_path, share=Counted(num_examples=20, num_pictures=7), ada=100)
    assert attempt.most == (20, 7)
    for name, change, pictures in (("ada", 0.1, 100), ("ben", 0.2, 10), ("cyd", 0.4, 5), ("eve", 0.3, 20)):
        send_words(attempt, sites, name, change, pictures)
    attempt.open(TASK, sites)
    assert sites.asked[-1] == ("unmask", ["ada", "ben", "cyd", "eve"])
    wanted = (0.1 * 20 + 0.2 * 10 + 0.4 * 5 + 0.3 * 20) / 55
    np.testing.assert_allclose(attempt.mean(), wanted, atol=3e-9, rtol=0)
    assert attempt.sums.evaluations["val"].closed.num_examples == 16
    assert attempt.sums.content["correct"] == 4.0
    assert attempt.outliers() == {}


@pytest.mark.parametrize(
    ("kind", "owner", "lost"), [("self", "ada", "dan"), ("mask", "dan", "dan"), ("self", "ben", "")]
)
@pytest.mark.parametrize("liar", ["ada", "eve"])
def test_one_sites_wrong_share_is_left_out_where_enough_others_are_there(kind, owner, lost, liar, tmp_path):
    names = (*NAMES, "fay", "gus")  # five of these seven give a secret back, and six answer
    attempt, sites = begun(tmp_path, names)
    for name in names:
        if name != lost:
            send_words(attempt, sites, name, 0.5)
    sites.spoil = {("unmask", liar): altered(kind, owner, other_value)}
    attempt.open(TASK, sites)
    np.testing.assert_allclose(attempt.mean(), 0.5, atol=1e-8)


def test_where_shares_are_just_enough_a_wrong_one_opens_nothing(tmp_path):
    attempt, sites = begun(tmp_path)
    for name in NAMES[:4]:  # four of five are needed
        send_words(attempt, sites, name)
    sites.spoil = {("unmask", "ben"): altered("mask", "eve", other_value)}
    with pytest.raises(
        NotEnoughClients, match=r"cannot be opened \(the shares of a secret of eve do not belong"
    ) as told:
        attempt.open(TASK, sites)
    assert "round 1: the sum over ada, ben, cyd, dan " in str(told.value)


def test_two_wrong_shares_of_one_secret_open_nothing(tmp_path):
    attempt, sites = begun(tmp_path)
    for name in NAMES:
        send_words(attempt, sites, name)
    more = lambda share: Share(share.x, (share.y + 2) % PRIME)  # noqa: E731 - by one each, they would undo each other
    sites.spoil = {
        ("unmask", "ada"): altered("self", "cyd", other_value),
        ("unmask", "ben"): altered("self", "cyd", more),
    }
    with pytest.raises(NotEnoughClients, match="the shares of a secret of cyd do not belong"):
        attempt.open(TASK, sites)


def without(kind, owner):
    return lambda shown: shown[kind].pop(owner)


def added(kind, owner, source):
    return lambda shown: shown[kind].update({owner: next(iter(shown[source].values()))})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without("self", "ada"), "of other sites than it was asked for"),
        (without("mask", "eve"), "of other sites than it was asked for"),
        (added("self", "eve", "self"), "of other sites than it was asked for"),
        (added("mask", "ada", "self"), "of other sites than it was asked for"),
        (lambda shown: shown.pop("mask"), "texts by names are missing"),
        (lambda shown: shown["self"].update(ada="?"), "is not base64"),
        (lambda shown: shown["self"].update(ada=""), "a share of a secret is malformed"),
    ],
)
def test_an_answer_that_shows_anything_else_is_refused_and_told(change, why, tmp_path):
    names = (*NAMES, "fay")  # five of six are needed
    attempt, sites = begun(tmp_path, names)
    for name in names:
        if name != "eve":
            send_words(attempt, sites, name)

    def spoil(answer):
        shown = json.loads(answer)
        change(shown)
        return json.dumps(shown)

    sites.spoil = {("unmask", "ben"): spoil}
    with pytest.raises(NotEnoughClients, match=r"round 1: 4 of 5 clients showed what opens the sum, 5 are needed"):
        attempt.open(TASK, sites)
    assert list(sites.refused) == ["ben"]
    assert why in sites.refused["ben"]


@pytest.mark.parametrize("kind", ["self", "mask"])
def test_a_share_of_another_place_is_refused(kind, tmp_path):
    """The secret would be put together wrongly, and nobody could say by whom."""
    attempt, sites = begun(tmp_path, (*NAMES, "fay"))
    for name in (*NAMES[:4], "fay"):
        send_words(attempt, sites, name)
    owner = "ada" if kind == "self" else "eve"
    sites.spoil = {("unmask", "ben"): altered(kind, owner, lambda share: Share(share.x + 1, share.y))}
    with pytest.raises(NotEnoughClients, match="4 of 5 clients showed what opens the sum"):
        attempt.open(TASK, sites)
    assert sites.refused == {"ben": "it shows shares of another site's place."}


def test_a_site_that_sent_keys_and_no_shares_is_not_in_the_sum_and_places_stay(tmp_path):
    attempt, sites = begun(tmp_path, spoil={("shares", "ada"): lambda _answer: None})
    assert attempt.members == NAMES[1:]
    assert sorted(attempt.work("ben").shares) == ["cyd", "dan", "eve"]
    for name in NAMES[1:]:
        send_words(attempt, sites, name, 0.25)
    attempt.open(TASK, sites)
    np.testing.assert_allclose(attempt.mean(), 0.25, atol=1e-8)


def test_fewer_than_the_threshold_are_told_at_each_step(tmp_path):
    gone = lambda _answer: None  # noqa: E731
    for number, (spoil, line) in enumerate(
        [
            ({("keys", name): gone for name in NAMES[:3]}, "2 of 5 clients sent keys, 3 are needed"),
            ({("shares", name): gone for name in NAMES[:2]}, "3 of 5 clients shared their secrets, 4 are needed"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(NotEnoughClients, match=rf"round 1: {line} \(secagg.threshold\)"):
            begun(tmp_path / str(number), spoil=spoil)
    attempt, sites = begun(tmp_path)
    for name in NAMES[:3]:
        send_words(attempt, sites, name)
    with pytest.raises(NotEnoughClients, match="3 of 5 clients sent their masked words, 4 are needed"):
        attempt.open(TASK, sites)
    assert sites.asked[-1][0] == "shares"  # nobody was asked to show anything


def test_three_keys_of_three_are_enough_and_three_shares(tmp_path):
    attempt, _ = begun(tmp_path, spoil={("keys", name): lambda _answer: None for name in NAMES[:2]})
    assert (attempt.members, attempt.threshold) == (NAMES[2:], 3)


def test_keys_of_another_site_or_attempt_and_shares_for_others_are_refused(tmp_path):
    """Whose keys are not its own for this attempt is left out; so is who shares with others than it was to."""
    stranger = {}

    def of_ben(answer):
        stranger["advert"] = answer
        return answer

    def old(_answer):
        advert, _ = advertise(Identity.in_memory("cyd"), Context(run_id="run-1", server_round=1, attempt=7))
        return write({"advert": in_text(advert.to_bytes())})

    names = (*NAMES, "fay", "gus", "hal")
    spoil = {
        ("keys", "ben"): of_ben,
        ("keys", "dan"): lambda _answer: stranger["advert"],
        ("keys", "cyd"): old,
        ("keys", "eve"): lambda _answer: write({"advert": None}),
        ("shares", "fay"): lambda answer: write(
            {"cyd" if k == "ada" else k: v for k, v in read_answer(answer).items()}
        ),
    }
    attempt, sites = begun(tmp_path, names, spoil=spoil)
    assert attempt.members == ("ada", "ben", "gus", "hal")
    assert (attempt.threshold, sorted(attempt.adverts)) == (4, ["ada", "ben", "fay", "gus", "hal"])
    assert sorted(sites.refused) == ["cyd", "dan", "eve", "fay"]
    assert sites.refused["cyd"] == sites.refused["dan"] == "the keys are another site's, or of another attempt."
    assert sites.refused["fay"] == "the shares are not one for each other site."
    assert all(isinstance(advert, Advert) for advert in attempt.adverts.values())


def test_more_members_than_a_sum_may_have_are_told_before_anything_is_asked(tmp_path):
    names = [f"site-{number:02d}" for number in range(65)]
    sites = SimpleNamespace(ask=None, refuse=None)
    with pytest.raises(UserError, match=r"3 to 64 sites"):
        SecureSums(SETTINGS, "run-1", tmp_path).begin(ASKED, members_of(names), None, sites)
    assert not (tmp_path / ATTEMPTS_FILE).exists()


def test_attempts_are_counted_from_one_on_the_disk_and_a_damaged_count_ends_the_run(tmp_path):
    numbers = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        sites = Sites(tmp_path / str(number), NAMES)
        attempt = SecureSums(SETTINGS, "run-1", tmp_path).begin(ASKED, members_of(NAMES), None, sites)
        numbers.append(attempt.work("ada").attempt)
    assert numbers == [1, 2]
    (tmp_path / ATTEMPTS_FILE).write_text("{}")
    with pytest.raises(CheckpointError):
        SecureSums(SETTINGS, "run-1", tmp_path).begin(ASKED, members_of(NAMES), None, sites)


def test_without_a_bound_a_site_counts_for_what_the_largest_has():
    members = members_of(NAMES, dan=40)
    assert _most(members, None) == (40, 0)
    assert _most(members, Counted(num_examples=15, num_pictures=30)) == (15, 30)
    assert _most(members, Counted(num_examples=400, num_pictures=30)) == (40, 30)


def with_closed(**values):
    sums = sums_with(0.6)
    usual = {"num_examples": 10, "correct": 5, "num_classes": 2}
    return Sums(
        evaluations={"val": sums, "test": replace(sums, closed=replace(sums.closed, **(usual | values)))}, content={}
    )


@pytest.mark.parametrize(
    ("name", "most"), [("correct", 10), ("precision_sum", 2.0), ("recall_sum", 2.0), ("f1_sum", 2.0)]
)
def test_a_sum_may_be_as_large_as_pictures_give_and_what_rounding_adds_is_cut(name, most):
    assert getattr(_possible(with_closed(**{name: most})).evaluations["test"].closed, name) == most
    beyond = 1 if name == "correct" else 2 * ROUNDING
    with pytest.raises(SecureSumRefused, match=f"test-{name} of all is {most + beyond}, which no pictures give"):
        _possible(with_closed(**{name: most + beyond}))
    with pytest.raises(SecureSumRefused, match=f"test-{name} of all is"):
        _possible(with_closed(**{name: -beyond}))
    if name != "correct":
        for rounded, wanted in ((most + ROUNDING / 2, most), (-ROUNDING / 2, 0.0)):
            assert getattr(_possible(with_closed(**{name: rounded})).evaluations["test"].closed, name) == wanted


def test_a_loss_may_be_large_and_not_below_nothing():
    assert _possible(with_closed(loss_sum=1e9)).evaluations["test"].closed.loss_sum == 1e9
    assert _possible(with_closed(loss_sum=-ROUNDING / 2)).evaluations["test"].closed.loss_sum == 0.0
    for bad in (-2 * ROUNDING, float("nan")):
        with pytest.raises(SecureSumRefused, match="test-loss_sum of all is"):
            _possible(with_closed(loss_sum=bad))


@pytest.mark.parametrize("values", [{"num_classes": -1}, {"num_examples": -1, "correct": -1}])
def test_a_count_below_nothing_is_refused(values):
    with pytest.raises(SecureSumRefused, match="of all is -1, which no pictures give"):
        _possible(with_closed(**values))


def test_pictures_without_a_class_and_more_twins_than_pairs_are_refused():
    nobody = with_closed(num_classes=0, precision_sum=0.0, recall_sum=0.0, f1_sum=0.0)
    with pytest.raises(SecureSumRefused, match="the test sums of all are none that pictures give"):
        _possible(nobody)
    found = with_closed()
    test = found.evaluations["test"]
    twins = test.twins.copy()
    twins[1, 4000] = test.pairs[1, 4000]
    whole = replace(found, evaluations=dict(found.evaluations) | {"test": replace(test, twins=twins)})
    assert np.array_equal(_possible(whole).evaluations["test"].twins, twins)
    twins = twins.copy()
    twins[0, 7] = 1
    with pytest.raises(SecureSumRefused, match="the test sums of all are none"):
        _possible(replace(found, evaluations={"test": replace(test, twins=twins)}))
    assert _possible(Sums(evaluations={"val": NOTHING}, content={})).evaluations["val"].closed == NOTHING.closed


def test_sums_of_training_below_nothing_or_without_end_are_refused():
    sums = Sums(evaluations={}, content={"correct": 3.0, "loss_sum": -ROUNDING / 2}, saturated=5)
    assert _possible(sums) == Sums(evaluations={}, content={"correct": 3.0, "loss_sum": 0.0}, saturated=5)
    for bad in (-2 * ROUNDING, float("inf"), float("nan")):
        with pytest.raises(SecureSumRefused, match="the training sums of all"):
            _possible(replace(sums, content={"loss_sum": bad, "correct": 1.0}))


def test_words_of_a_site_that_was_asked_something_else_open_to_nothing(tmp_path):
    attempt, sites = begun(tmp_path)
    for name in NAMES:
        send_words(attempt, sites, name)
    with pytest.raises(NotEnoughClients, match="cannot be opened"):
        attempt.open(replace(TASK, splits="test"), sites)


def test_of_an_evaluation_there_is_no_mean(tmp_path):
    attempt, _ = begun(tmp_path)
    attempt.asked = replace(ASKED, change=None)
    with pytest.raises(ValueError, match="no change was asked for"):
        attempt.mean()


def with_shared_noise(**values):
    shared = {"privacy__unit": "person", "privacy__noise": "shared", "privacy__group_people": 3, "privacy__clip": 0.5}
    usual = {"model__backbone": "vit_tiny", "secagg__enabled": True, "federation__min_clients": 3}
    return settings_with(**(usual | shared | values))


def test_shared_noise_is_for_whose_people_move_the_sum_furthest_and_for_as_many_sites_as_are_sure(tmp_path):
    """Six people a site are two groups: a person of a site that counts whole moves the sum by 2 C / 2 = 0.5."""
    (tmp_path / "all").mkdir()
    settings = with_shared_noise()
    attempt, _ = begun(tmp_path / "all", settings=settings, cyd=20)
    assert attempt.noise == (0.5, 3)  # cyd has the most pictures, and so counts whole
    work = attempt.work("ada")
    assert (work.sensitivity, work.noises) == attempt.noise
    assert attempt.layout.step == grid_of_sum(settings.privacy, settings.federation.rounds, sensitivity=0.5, noises=3)
    (tmp_path / "few").mkdir()
    lost = {("shares", "cyd"): lambda _answer: None}  # of whom keys are out, and who is not in the sum
    attempt, _ = begun(tmp_path / "few", settings=settings, spoil=lost, cyd=20)
    assert attempt.noise == (0.25, 2)
    (tmp_path / "bound").mkdir()
    bound = Counted(num_examples=15, num_pictures=9)
    attempt, _ = begun(tmp_path / "bound", settings=settings, share=bound, dan=100, eve=5)
    assert attempt.noise == (0.5, 3)  # nobody counts for more than once


def test_a_sum_in_which_no_noise_is_sure_is_not_begun(tmp_path):
    settings = with_shared_noise(privacy__colluding_sites=2, federation__min_clients=6)
    assert fewest_noises(5, num_keys=5, threshold=4, colluding=2) == 2
    attempt, _ = begun(tmp_path, settings=settings)
    assert attempt.noise[1] == 2
    (tmp_path / "three").mkdir()
    attempt, _ = begun(tmp_path / "three", NAMES[:3], settings=settings)
    assert attempt.noise[1] == 1  # no better than its own, and not less
    (tmp_path / "four").mkdir()
    with pytest.raises(NotEnoughClients, match=r"of 4 clients no noise is sure .* where 2 tell theirs"):
        begun(tmp_path / "four", NAMES[:4], settings=settings)


def test_without_shared_noise_and_in_an_evaluation_nothing_of_it_is_asked(tmp_path):
    attempt, _ = begun(tmp_path)
    assert (attempt.noise, attempt.layout.step) == ((0.0, 0), 0.0)
    (tmp_path / "scored").mkdir()
    sites = Sites(tmp_path / "scored", NAMES)
    asked = replace(ASKED, kind="evaluate", change=None)
    attempt = SecureSums(with_shared_noise(), "run-1", tmp_path / "scored").begin(asked, members_of(NAMES), None, sites)
    assert (attempt.noise, attempt.layout.step) == ((0.0, 0), 0.0)


def test_sites_are_named_in_order_whoever_came_first(tmp_path):
    """A site takes a list of members in order of names only."""
    sites = Sites(tmp_path, NAMES)
    attempt = SecureSums(SETTINGS, "run-1", tmp_path).begin(ASKED, members_of(NAMES[::-1]), None, sites)
    assert attempt.members == attempt.work("ada").members == NAMES
    for name in NAMES[::-1]:
        send_words(attempt, sites, name)
    attempt.open(TASK, sites)
    np.testing.assert_allclose(attempt.mean(), 0.5, atol=1e-8)
