"""The keys that a site has of its peers, as `facefed certs` laid them into its folder."""

import dataclasses

import pytest

from clients.policy import OWN_MACHINE
from clients.secure_sum import UnknownPeer, keys_of
from common.errors import SecureSumRefused
from common.secagg.keys import Advert, Context, advertise, load_identity
from simulation.admin.certs import make_folder
from tests.tiny_federation import site_settings

NAMES = ("ada", "ben", "cyd")
CONTEXT = Context(run_id="run", server_round=1, attempt=1, members=NAMES, threshold=3)


@pytest.fixture
def tls(tmp_path):
    make_folder(tmp_path / "tls", ["localhost"], NAMES)
    return tmp_path / "tls"


@pytest.fixture
def adverts(tls):
    made = {name: advertise(load_identity(tls / name), CONTEXT)[0] for name in NAMES}
    return {name: Advert.from_bytes(advert.to_bytes()) for name, advert in made.items()}


@pytest.fixture
def site(tls, tmp_path):
    return dataclasses.replace(site_settings("ada", tmp_path), keys=tls / "ada", policy=OWN_MACHINE)


def pinning(site):
    return dataclasses.replace(site, policy=dataclasses.replace(OWN_MACHINE, pin_secagg_peers=True))


def test_the_folder_of_certs_is_all_that_is_needed(site, adverts):
    keys = keys_of(site)
    assert keys.own.name == "ada"
    for name in NAMES:
        keys.require(name)
    keys.check(adverts, CONTEXT)


def test_a_peer_whose_key_is_missing_is_named(site, tls, adverts):
    (tls / "ada" / "peers" / "ben.pub").unlink()
    keys = keys_of(site)
    for ask in (lambda: keys.require("ben"), lambda: keys.check(adverts, CONTEXT)):
        with pytest.raises(UnknownPeer, match=r"no key of 'ben'; put its ben.pub into peers of the keys"):
            ask()


def test_a_file_that_is_no_key_is_told_here_only(site, tls, adverts, caplog):
    (tls / "ada" / "peers" / "ben.pub").write_text("ssh-ed25519 AAAA")
    for one in (site, pinning(site)):  # what is broken is not pinned over
        with pytest.raises(SecureSumRefused, match="a key of this site cannot be used") as refused:
            keys_of(one).check(adverts, CONTEXT)
        assert "ben" not in str(refused.value)
    assert "ben.pub is not a P-384 public key" in caplog.text


def test_a_pinned_key_stays_over_starts_and_is_told_with_its_fingerprint(site, tls, adverts, caplog):
    known = tls / "ada" / "peers" / "ben.pub"
    kept = known.read_bytes().split()[:2]
    known.unlink()
    keys_of(pinning(site)).check(adverts, CONTEXT)
    pin = site.state_dir / "peers" / "ben.pub"
    assert pin.read_bytes().split()[:2] == kept
    assert "SHA256:" in caplog.text
    other, _ = advertise(load_identity(tls / "cyd", "ben"), CONTEXT)
    with pytest.raises(SecureSumRefused, match="not signed with the key that this site has of it"):
        keys_of(pinning(site)).check({**adverts, "ben": other}, CONTEXT)
    assert pin.read_bytes().split()[:2] == kept


def test_a_site_without_a_folder_of_keys_says_what_to_do(site):
    with pytest.raises(SecureSumRefused, match="start it with --tls DIR"):
        keys_of(dataclasses.replace(site, keys=None))
