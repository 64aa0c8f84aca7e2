"""A server that cheats at secure aggregation, against the sites' own protocol objects.

Each attack is played twice: against the sites as they are, where what the server can work out of one site's words
stays uniform; and with the one thing taken out that stops it, where the server reads them: so it is an attack.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest

import clients.secure_sum
from clients.policy import OWN_MACHINE, PolicyRefusal
from clients.secure_sum import MASKED, Keys, SecureSum, UnknownPeer, forget_others
from common import config
from common.errors import ConfigError, SecureSumRefused
from common.protocol.secure_words import KeysAsked, WorkAsked, digest_of_work, in_text
from common.secagg.keys import Identity, Secrets, _commitment, advertise, load_public, public_of
from common.secagg.masks import add_masks, pair_mask, self_seed
from common.secagg.shares import unseal
from tests.hostile.secure_server import MODEL, NAMES, RUN, SIZE, Server, Sites, chi_square, words_of_site
from tests.tiny_settings import TINY

VICTIM, OTHERS = "ada", NAMES[1:]
AS_IT_IS = pytest.mark.parametrize("protected", [True, False], ids=["as it is", "taken out"])


@pytest.fixture
def sites(tmp_path):
    return Sites(tmp_path)


@pytest.fixture
def server(sites):
    """One attempt of round 1, in which all five have sent their masked words."""
    server = Server(sites)
    server.exchange(1)
    server.work_all(1)
    return server


def learns(found, name=VICTIM):
    """Whether what was worked out is the site's own words; else it must look like noise, all of it."""
    if np.array_equal(found, words_of_site(name)):
        return True
    assert chi_square(found) < 450  # by chance above it: fewer than one of 10^12
    return False


def asked_again(server, attempt, survivors, voters):
    """How many of these sites answer that list."""
    answered = 0
    for name in voters:
        try:
            server.unmask(name, attempt, survivors)
            answered += 1
        except SecureSumRefused:
            pass
    return answered


def test_a_server_that_keeps_to_it_learns_the_sum_and_no_summand(server):
    for name in NAMES:
        server.unmask(name, 1, NAMES)
    assert not any(learns(server.opened(1, name), name) for name in NAMES)
    total = np.zeros(SIZE, np.uint32)
    for vector in server.words[1].values():
        total += vector
    for name in NAMES:
        total = server.opened(1, name, total)  # pairwise masks cancel, so no mask key is needed
    np.testing.assert_array_equal(total, sum(words_of_site(name).astype(np.uint64) for name in NAMES).astype(np.uint32))


@AS_IT_IS
@pytest.mark.parametrize("restarted", [False, True])
def test_both_lists_for_one_site(server, sites, protected, restarted, monkeypatch):
    """Everybody's words arrived; then, to the same sites, ada's did not: both her secrets.

    Taken out: what the sites wrote down before they answered, and that they kept no other share.
    """
    if not protected:
        monkeypatch.setattr(SecureSum, "_drop_secrets", lambda *_: None)
    for name in NAMES:
        server.unmask(name, 1, NAMES)
    if restarted:
        sites.restart()
    if not protected:
        for site in sites.by_name.values():
            site._kept.step, site._kept.before = MASKED, {}
    answered = asked_again(server, 1, OTHERS, OTHERS)
    assert answered == (0 if protected else 4)
    assert learns(server.opened(1, VICTIM)) is not protected


@AS_IT_IS
def test_different_lists_to_different_sites(tmp_path, protected):
    """Half is told that ada's words arrived, the other half that they did not; each site is asked once.

    Of six sites five must agree (`secagg.threshold`, more than two thirds).  Taken out: with a half, three do.
    """
    names = (*NAMES, "fay")
    server = Server(Sites(tmp_path, names, threshold=0.667 if protected else 0.5))
    server.exchange(1)
    server.work_all(1)
    assert asked_again(server, 1, names, names[:3]) == 3
    assert asked_again(server, 1, names[1:], names[3:]) == 3
    assert learns(server.opened(1, VICTIM)) is not protected


def test_no_run_may_lower_the_threshold():
    raw = config.to_mapping(TINY)
    raw["secagg"] |= {"enabled": True, "threshold": 0.5}
    with pytest.raises(ConfigError, match=r"secagg.threshold = 0.5"):
        config.from_mapping(raw)


@AS_IT_IS
def test_a_list_that_shrank(server, sites, protected, monkeypatch):
    """Each site is told that only ada's words and its own arrived: her self mask, and the others' mask keys.

    Taken out: the fewest that a list may have.
    """
    if not protected:
        monkeypatch.setattr(SecureSum, "_check_members", lambda *_: None)
        for site in sites.by_name.values():
            site._kept.threshold = 0
    answered = [asked_again(server, 1, sorted({VICTIM, name}), [name]) for name in NAMES]
    assert answered == [0 if protected else 1] * 5
    assert learns(server.opened(1, VICTIM)) is not protected


@AS_IT_IS
@pytest.mark.parametrize("about", ["round 1", "val 0123456789abcdef"])
def test_one_round_or_one_models_scores_over_two_lists_of_sites(sites, protected, about):
    """It is opened over all five, and repeated and opened without ada: the difference is hers.

    Taken out: over whom it was summed, as the sites remember it.
    """
    server = Server(sites)
    server.exchange(1)
    server.work_all(1, about=[about])
    for name in NAMES:
        server.unmask(name, 1, NAMES)
    first = total_of(server, 1, NAMES)
    server.exchange(2, server_round=2, names=OTHERS)
    server.work_all(2, about=[about])
    if not protected:
        for site in sites.by_name.values():
            site._kept.before = {}
    answered = asked_again(server, 2, OTHERS, OTHERS)
    assert answered == (0 if protected else 4)
    assert learns(first - total_of(server, 2, OTHERS)) is not protected


def total_of(server, attempt, names):
    """The sum of masked words, opened as far as the server can."""
    total = np.zeros(SIZE, np.uint32)
    for name in names:
        total += server.words[attempt][name]
    for name in names:
        total = server.opened(attempt, name, total)
    return total


@AS_IT_IS
def test_keys_that_were_swapped(sites, protected, monkeypatch):
    """The server stands between ada and all others, with keys of its own in their names.

    Taken out: that she checks signatures.
    """
    server = Server(sites)
    server.ask_keys(1, NAMES)
    made = {name: advertise(Identity.in_memory(name), server.contexts[1]) for name in OTHERS}
    adverts = {VICTIM: server.adverts[1][VICTIM]} | {name: advert for name, (advert, _) in made.items()}
    if protected:
        with pytest.raises(SecureSumRefused, match="not signed with the key that this site has of it"):
            server.ask_shares(VICTIM, 1, adverts)
        return
    monkeypatch.setattr(clients.secure_sum, "check_advert", lambda *_: None)
    server.ask_shares(VICTIM, 1, adverts)
    read_by_the_server(server, adverts, {name: kept for name, (_, kept) in made.items()})


@AS_IT_IS
def test_members_that_the_server_invented(tmp_path, protected):
    """Four members of five are the server: it knows their words, so a sum is ada's.

    Taken out: that a site sums with those alone whose keys it has.
    """
    invented = {name: Identity.in_memory(name) for name in OTHERS}
    sites = Sites(tmp_path, [VICTIM], trusted={} if protected else invented)
    server = Server(sites)
    if protected:
        with pytest.raises(SecureSumRefused, match="no key of 'ben'"):
            server.ask_keys(1, NAMES)
        return
    server.ask_keys(1, NAMES)
    made = {name: advertise(identity, server.contexts[1]) for name, identity in invented.items()}
    adverts = {**server.adverts[1], **{name: advert for name, (advert, _) in made.items()}}
    server.ask_shares(VICTIM, 1, adverts)
    read_by_the_server(server, adverts, {name: kept for name, (_, kept) in made.items()})


def read_by_the_server(server, adverts, kept: dict[str, Secrets]):
    """It has the secrets of all members but ada: she shares hers out to it, and masks for it."""
    context = server.shares_context(1)
    server.adverts[1] = adverts
    for name, secrets in kept.items():
        pair = unseal(server.sealed_bytes(1, VICTIM, name), secrets, adverts[VICTIM], name, context)
        server.shown.setdefault((1, "self", VICTIM), {})[pair.of_self_secret.x] = pair.of_self_secret
    server.work(VICTIM, 1, shares=server.sealed_by(1, kept, VICTIM))
    of_masks = context.with_model(MODEL)
    masks = [(self_seed(server.secret(1, "self", VICTIM), VICTIM, of_masks), -1)]
    masks += [pair_mask(secrets.mask_key, name, adverts[VICTIM], of_masks) for name, secrets in kept.items()]
    vector = server.words[1][VICTIM].copy()
    add_masks(vector, masks)
    np.testing.assert_array_equal(vector, words_of_site(VICTIM))


@AS_IT_IS
def test_shares_of_an_earlier_attempt(server, sites, protected, monkeypatch):
    """Attempt 1 is opened; in attempt 2 the sites get ada's shares of attempt 1, and are told that she is lost.

    Taken out: that shares open in their own attempt alone.
    """
    old = {name: Secrets.from_bytes(sites.secrets(name)) for name in NAMES}
    for name in NAMES:
        server.unmask(name, 1, NAMES)
    server.exchange(2)
    replayed = {
        name: {one: server.sealed[1 if one == VICTIM else 2][one][name] for one in NAMES if one != name}
        for name in NAMES
    }
    if not protected:
        of_old = {"context": server.shares_context(1), "adverts": server.adverts[1]}

        def unseal_any(sealed, kept, sender, receiver, context):
            try:
                return unseal(sealed, kept, sender, receiver, context)
            except SecureSumRefused:
                return unseal(sealed, old[receiver], of_old["adverts"][sender.name], receiver, of_old["context"])

        monkeypatch.setattr(clients.secure_sum, "unseal", unseal_any)
    for name in OTHERS:
        if protected:
            with pytest.raises(SecureSumRefused, match="cannot be opened"):
                server.work(name, 2, shares=replayed[name], about=["round 1 again"])
        else:
            server.work(name, 2, shares=replayed[name], about=["round 1 again"])
            server.unmask(name, 2, OTHERS)
    server.shown = {(1, kind, owner): found for (_, kind, owner), found in server.shown.items()}
    assert learns(server.opened(1, VICTIM)) is not protected


@AS_IT_IS
def test_a_first_reply_that_comes_after_the_round_was_tried_again(tmp_path, protected, monkeypatch):
    """ada's words of attempt 1 are kept back and she is said to be lost; in attempt 2 hers are in the sum.

    Attempt 1 shows her mask key, attempt 2 her self secret.  Taken out: that each attempt has secrets of its own.
    """
    if not protected:
        first: dict[str, Secrets] = {}

        def same_again(identity, context):
            again = first.setdefault(identity.name, advertise(identity, context)[1])
            return advert_of(identity, context, again), again

        monkeypatch.setattr(clients.secure_sum, "advertise", same_again)
    sites = Sites(tmp_path)
    server = Server(sites)
    server.exchange(1)
    server.work_all(1)
    for name in OTHERS:
        server.unmask(name, 1, OTHERS)
    server.exchange(2, server_round=2)
    server.work_all(2)
    for name in NAMES:
        server.unmask(name, 2, NAMES)
    server.shown[(1, "self", VICTIM)] = server.shown[(2, "self", VICTIM)]
    assert learns(server.opened(1, VICTIM)) is not protected


def advert_of(identity, context, kept):
    """An advert of secrets that were used before."""
    advert, _ = advertise(identity, context)
    advert = replace(
        advert,
        mask_public=public_of(kept.mask_key),
        share_public=public_of(kept.share_key),
        self_commitment=_commitment(kept.self_secret),
    )
    return replace(advert, signature=identity.sign(advert.message()))


@AS_IT_IS
def test_another_model_for_one_site(sites, protected):
    """Four sites get a model to which their answer is known, ada a real one: the sum would be hers.

    Taken out: that masks follow from the model.
    """
    server = Server(sites)
    server.exchange(1)
    asked = WorkAsked(attempt=1, members=NAMES, shares={}, most_examples=1, most_pictures=0)
    digests = {
        name: digest_of_work(asked, words={}, model_sha256=("real" if name == VICTIM else "crafted")) for name in NAMES
    }
    for name in NAMES:
        words = None if name == VICTIM else np.zeros(SIZE, np.uint32)
        server.work(name, 1, words=words, digest=digests[name] if protected else MODEL)
    for name in NAMES:
        server.unmask(name, 1, NAMES)
    assert digests["ada"] != digests["ben"] == digests["cyd"]
    assert learns(total_of(server, 1, NAMES)) is not protected


def test_a_stranger_is_refused_or_pinned_and_swapped_afterwards_is_refused(tmp_path, caplog):
    """Of eve nobody has a key.  Where the policy lets it be pinned it is kept, told, and another one is refused."""
    (tmp_path / "strict").mkdir()
    with pytest.raises(UnknownPeer, match="no key of 'eve'"):
        Server(Sites(tmp_path / "strict", strangers=["eve"])).exchange(1)
    sites = Sites(tmp_path, strangers=["eve"], pins=tmp_path / "pins")
    server = Server(sites)
    server.exchange(1)
    assert [path.name for path in (tmp_path / "pins").iterdir()] == ["eve.pub"]
    assert load_public(tmp_path / "pins" / "eve.pub") == sites.identities["eve"].public_key
    assert caplog.text.count("came through the server and is kept from now on") == 1
    server.exchange(2)  # the same key again
    server.ask_keys(3, NAMES)
    advert, _ = advertise(Identity.in_memory("eve"), server.contexts[3])
    with pytest.raises(SecureSumRefused, match="not signed with the key that this site has of it"):
        server.ask_shares(VICTIM, 3, {**server.adverts[3], "eve": advert})


def test_keys_of_which_one_is_wrong_pin_nothing(tmp_path):
    sites = Sites(tmp_path, strangers=["dan", "eve"], pins=tmp_path / "pins")
    server = Server(sites)
    server.ask_keys(1, NAMES)
    own, _ = advertise(Identity.in_memory("eve"), server.contexts[1])
    swapped = replace(server.adverts[1]["eve"], mask_public=own.mask_public)
    for bad in (swapped, replace(swapped, lasting_public=bytes(49))):
        with pytest.raises(SecureSumRefused, match=r"not signed|no point of P-384"):
            server.ask_shares(VICTIM, 1, {**server.adverts[1], "eve": bad})
    assert not (tmp_path / "pins").exists()


def test_what_a_site_may_answer_once_it_answers_once(server, sites):
    """Keys, shares and masked words of one attempt, asked for a second time, also after a kill -9; and an older one."""
    for again in (False, True):
        if again:
            sites.restart()
        with pytest.raises(SecureSumRefused, match="not begun twice"):
            server.ask_keys(1, NAMES)
        with pytest.raises(SecureSumRefused, match="answered already"):
            server.ask_shares(VICTIM, 1, server.adverts[1])
        with pytest.raises(SecureSumRefused, match="answered already"):
            server.work(VICTIM, 1)
    server.exchange(2)
    with pytest.raises(SecureSumRefused, match="is none that this site is in; its newest is 2"):
        server.unmask(VICTIM, 1, NAMES)


@pytest.mark.usefixtures("server")
def test_a_site_whose_memory_is_damaged_shows_nothing(sites, tmp_path):
    """To begin anew it would show the second list too."""
    path = tmp_path / VICTIM / clients.secure_sum.FILE
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SecureSumRefused, match="is damaged"):
        sites.restart()


@pytest.mark.parametrize("survivors", [["ada", "ben", "cyd", "zoe"], ["ben", "ada", "cyd", "dan"], list(OTHERS)])
def test_a_list_that_cannot_be(server, survivors):
    """With a stranger, out of order, or to ada without herself."""
    with pytest.raises(SecureSumRefused, match="not in order, names a site that the sum is not over, or not this"):
        server.unmask(VICTIM, 1, survivors)
    assert not server.shown


def test_fewer_than_the_threshold_and_a_second_list_are_told_so(server):
    with pytest.raises(SecureSumRefused, match="the words of 3 sites arrived, and 4 must stay"):
        server.unmask(VICTIM, 1, NAMES[:3])
    server.unmask(VICTIM, 1, NAMES)
    with pytest.raises(SecureSumRefused, match="was opened for another list of sites"):
        server.unmask(VICTIM, 1, NAMES[:4])
    server.unmask(VICTIM, 1, NAMES)  # the same again: an answer that was lost


@pytest.mark.parametrize("here", [NAMES, NAMES[:4]], ids=["all arrived", "one is lost"])
def test_a_site_that_answered_keeps_nothing_that_it_did_not_answer(sites, here, tmp_path):
    """After the last sum of a run: not its secrets, and of each site one share, that which it showed."""
    server = Server(sites)
    server.exchange(1)
    server.work_all(1)
    file, secrets = tmp_path / VICTIM / clients.secure_sum.FILE, in_text(sites.secrets(VICTIM))
    assert secrets in file.read_text()
    server.unmask(VICTIM, 1, here)
    kept = vars(sites.made(VICTIM)._kept)
    assert (kept["secrets"], kept["own_shares"]) == ("", {})
    assert {name: list(pair) for name, pair in kept["pairs"].items()} == {
        name: ["self" if name in here else "mask"] for name in NAMES
    }
    assert secrets not in file.read_text()


def test_another_runs_secrets_go_and_what_it_answered_once_stays(server, sites, tmp_path):
    """Attempt 1 is opened, attempt 2 is not; then the site joins another run, and this one is gone on with."""
    for name in NAMES:
        server.unmask(name, 1, NAMES)
    server.exchange(2)
    path = tmp_path / "state" / "private" / RUN / clients.secure_sum.FILE
    path.parent.mkdir(parents=True)
    shutil.copy(tmp_path / VICTIM / clients.secure_sum.FILE, path)
    before = path.read_bytes()
    assert in_text(sites.secrets(VICTIM)).encode() in before
    forget_others(tmp_path / "state", RUN)
    assert path.read_bytes() == before  # its own
    forget_others(tmp_path / "state", "another")
    assert in_text(sites.secrets(VICTIM)) not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    left = SecureSum(path.parent, RUN, Keys(sites.identities[VICTIM], sites._peer), threshold=0.667, policy=OWN_MACHINE)
    assert (left._kept.number, list(left._kept.before)) == (2, ["round 1"])
    with pytest.raises(SecureSumRefused, match="not begun twice"):
        left.keys(KeysAsked(attempt=2, members=NAMES), 1)
    path.write_text("damaged")
    forget_others(tmp_path / "state", "another")
    assert path.read_text() == "damaged"


def test_keys_of_a_site_that_was_not_asked_for_are_refused(server):
    server.ask_keys(2, OTHERS)
    with pytest.raises(SecureSumRefused, match="of a site that was no member when the attempt began"):
        server.ask_shares("ben", 2, {**server.adverts[2], VICTIM: server.adverts[1][VICTIM]})


def test_a_site_may_ask_for_more_company(tmp_path):
    server = Server(Sites(tmp_path, policy=replace(OWN_MACHINE, min_secagg_sites=6)))
    with pytest.raises(PolicyRefusal, match="min_secagg_sites"):
        server.exchange(1)
