"""`facefed certs`, and what server and sites refuse of their folders."""

import datetime as dt
import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import clients.cli
import simulation.cli
from common.faces.datasets import DATASETS
from common.system import certs
from common.system.certs import CertificateError, accepted_keys, read_client_folder, read_server_folder
from simulation.admin import certs as new_certs

NAME = "fl.example.org"
SECRET_FILES = ("ca.key", "server.key", "celeba/client.key", "vggface2/client.key")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs") / "tls"
    new_certs.make_folder(folder, [NAME, "192.0.2.7"], ["celeba", "vggface2"])
    return folder


@pytest.fixture
def tls(made, tmp_path):
    """A folder of this test's own."""
    return shutil.copytree(made, tmp_path / "tls")


def facefed(*arguments):
    return simulation.cli.main(["certs", *map(str, arguments)])


def refused(work, *arguments):
    with pytest.raises(CertificateError) as found:
        work(*arguments)
    assert "\n" not in str(found.value)
    return str(found.value)


def public_keys(folder):
    return {path.name: path.read_bytes() for path in (folder / "clients").iterdir()}


def peers_of(site):
    return {path.name: path.read_bytes() for path in (site / "peers").iterdir()}


def modes(folder):
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in folder.rglob("*")}


def test_the_commands_for_the_sites_are_ones_that_flower_client_takes(tmp_path, capsys):
    folder = tmp_path / "tls"
    assert facefed("init", folder, "--server-name", NAME, "--client", "north", "--client", "celeba") == 0
    said = capsys.readouterr().out
    commands = [line.split()[1:] for line in said.splitlines() if line.split()[:1] == ["flower-client"]]
    assert [command[1] for command in commands] == ["DATASET", "celeba"]
    assert f"for DATASET write how its pictures lie: {', '.join(sorted(DATASETS))};" in said
    for command, name in zip(commands, ("north", "celeba"), strict=True):
        found = clients.cli.parser().parse_args(["folder" if word == "DATASET" else word for word in command])
        assert (found.tls, found.server) == (f"{folder}/{name}", f"{NAME}:443")


def test_init_makes_what_server_and_sites_need(tmp_path, capsys):
    folder = tmp_path / "tls"
    assert facefed("init", folder, "--server-name", NAME) == 0
    said = capsys.readouterr().out
    for words in (f"{folder}/ca.key", f"{folder}/twins/", "clients/", "flower-server --tls", "flower-client"):
        assert words in said
    found = read_server_folder(folder, NAME)
    assert list(accepted_keys(found.clients)) == ["celeba", "twins", "vggface2"]
    for name, key in accepted_keys(found.clients).items():
        assert read_client_folder(folder / name).fingerprint == certs.fingerprint(key)
    assert certs.names_of(certs.read_certificate(found.certificate)) == [NAME, "localhost", "127.0.0.1"]


def test_keys_are_their_owners_and_folders_too(made):
    found = modes(made)
    assert {found[name] for name in SECRET_FILES} == {0o600}
    assert {found[name] for name in ("clients", "celeba", "vggface2")} == {0o700}
    assert made.stat().st_mode & 0o777 == 0o700


def test_a_site_gets_the_authoritys_certificate_its_own_key_and_public_ones_only(made):
    assert sorted(path.name for path in (made / "celeba").iterdir()) == ["ca.crt", "client.key", "name", "peers"]
    assert peers_of(made / "celeba") == peers_of(made / "vggface2") == public_keys(made)
    assert (made / "celeba" / "ca.crt").read_bytes() == (made / "ca.crt").read_bytes()
    assert len({path.read_bytes() for path in made.rglob("*.key")}) == len(SECRET_FILES)


def test_openssl_and_openssh_agree(made):
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", made / "ca.crt"]
    for name in ("-verify_hostname", NAME), ("-verify_ip", "192.0.2.7"), ("-verify_hostname", "localhost"):
        subprocess.run([*verify, *name, made / "server.crt"], check=True, capture_output=True, timeout=60)
    if shutil.which("ssh-keygen"):
        show = ["ssh-keygen", "-l", "-f", made / "clients" / "celeba.pub"]
        listed = subprocess.run(show, capture_output=True, text=True, check=True, timeout=60).stdout
        assert listed.split()[:3] == ["384", read_client_folder(made / "celeba").fingerprint, "celeba"]


def test_a_sites_folder_says_whose_it_is_and_a_wrong_file_is_told(tls):
    assert [read_client_folder(tls / name).name for name in ("celeba", "vggface2")] == ["celeba", "vggface2"]
    (tls / "celeba" / "name").write_text("../x\n")
    assert "name does not hold a site's name" in refused(read_client_folder, tls / "celeba")
    (tls / "celeba" / "name").unlink()
    assert read_client_folder(tls / "celeba").name == ""


@pytest.mark.parametrize("name", ["celebа", "Celeba", "ce1eba"])  # noqa: RUF001 - Cyrillic
def test_no_key_is_made_for_a_name_that_looks_like_anothers(tls, name):
    assert "looks like 'celeba', whose key is accepted" in refused(new_certs.add_client, tls, name)
    assert not (tls / name).exists()


def test_nothing_is_overwritten(tls, capsys):
    before = {path: path.read_bytes() for path in tls.rglob("*") if path.is_file()}
    assert facefed("init", tls, "--server-name", NAME) == 2
    assert facefed("add", tls, "celeba") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("nothing is overwritten" in line for line in said)
    assert {path: path.read_bytes() for path in tls.rglob("*") if path.is_file()} == before


def test_a_failed_init_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(new_certs, "add_client", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        new_certs.make_folder(tmp_path / "tls", [NAME], ["celeba"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fl.example.org:443", "https://fl.example.org", "", "a b", "-a.org", "*.example.org"])
def test_a_server_name_is_a_host(tmp_path, capsys, name):
    assert facefed("init", tmp_path / "tls", f"--server-name={name}") == 2
    assert "give the host name or IP address" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["clients", "ca.key", "../evil", "a/b", "", ".", "revoked"])
def test_a_clients_name_is_no_path_and_no_file_of_ours(tls, capsys, name):
    before = modes(tls)
    assert facefed("add", tls, name) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert modes(tls) == before


def test_add_and_revoke(tls, capsys):
    assert facefed("add", tls, "north clinic") == 0
    assert "north clinic" in accepted_keys(tls / "clients")
    key = (tls / "clients" / "north clinic.pub").read_bytes()
    assert facefed("revoke", tls, "north clinic") == 0
    assert "within seconds" in capsys.readouterr().out
    assert "north clinic" not in accepted_keys(tls / "clients")
    assert [path.read_bytes() for path in (tls / "revoked").iterdir()] == [key]
    assert facefed("revoke", tls, "north clinic") == 2
    assert "accepted are: celeba, vggface2." in capsys.readouterr().err


def test_every_site_that_is_here_gets_the_accepted_keys_and_no_other(tls, capsys):
    shutil.rmtree(tls / "vggface2")  # it was given away
    assert facefed("add", tls, "north") == 0
    assert "To each other site: the same file, into the peers/ of its folder" in capsys.readouterr().out
    assert peers_of(tls / "celeba") == peers_of(tls / "north") == public_keys(tls)
    assert set(public_keys(tls)) == {"celeba.pub", "north.pub", "vggface2.pub"}
    former = (tls / "clients" / "north.pub").read_bytes()
    assert facefed("revoke", tls, "north") == 0
    assert "Each other site deletes peers/north.pub" in capsys.readouterr().out
    assert set(peers_of(tls / "celeba")) == {"celeba.pub", "vggface2.pub"}
    (tls / "north").rename(tls / "north.old")
    (tls / "celeba" / "peers" / "north.pub").write_bytes(former)  # as if it had been kept
    assert facefed("add", tls, "north") == 0
    assert peers_of(tls / "celeba") == public_keys(tls)
    assert former not in peers_of(tls / "celeba").values()
    assert not (tls / "vggface2").exists()


def test_a_site_may_make_its_key_itself_and_the_operator_never_has_it(tls, tmp_path, capsys):
    for name in ("north", "south"):
        assert facefed("key", tmp_path / name, name) == 0
    assert capsys.readouterr().out.count("SHA256:") == 2
    assert set(modes(tmp_path / "north")) == {"client.key", "name", "north.pub"}
    assert modes(tmp_path / "north")["client.key"] == 0o600
    sent = [tmp_path / name / f"{name}.pub" for name in ("north", "south")]
    assert facefed("add", tls, "north", "--client-key", sent[0]) == 0
    assert f"{tls}/north/ca.crt and peers/, into the folder of its own key" in capsys.readouterr().out
    new = tmp_path / "new"
    assert facefed("init", new, "--server-name", NAME, "--client-key", sent[0], "--client-key", sent[1]) == 0
    assert not list(new.rglob("client.key"))
    assert set(public_keys(new)) == {"north.pub", "south.pub"}
    for folder in (tls, new):
        for part in ("ca.crt", "name"):
            shutil.copy(folder / "north" / part, tmp_path / "north")
        found = read_client_folder(tmp_path / "north")
        assert (found.name, found.fingerprint) == (
            "north",
            certs.fingerprint(accepted_keys(folder / "clients")["north"]),
        )
        assert peers_of(folder / "north")["north.pub"] == (folder / "clients" / "north.pub").read_bytes()


def test_an_own_key_that_cannot_be_is_one_line_and_nothing_is_made(tls, tmp_path, capsys):
    before = modes(tls)
    bad = tmp_path / "south.pub"
    bad.write_text("ssh-ed25519 AAAA")
    taken = tls / "clients" / "celeba.pub"
    for given, line in ((bad, "is not a P-384 public key"), (taken, "is the key of 'celeba'"), ("no.pub", "cannot be")):
        assert facefed("add", tls, "south", "--client-key", given) == 2
        said = capsys.readouterr().err
        assert line in said
        assert len(said.splitlines()) == 1
    assert facefed("key", tls, "south") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert modes(tls) == before


def test_renew_keeps_authority_names_and_the_former_pair(tls, capsys):
    former = (tls / "server.crt").read_bytes()
    assert facefed("renew", tls) == 0
    assert "192.0.2.7" in capsys.readouterr().out
    assert (tls / "server.crt").read_bytes() != former
    assert former in [path.read_bytes() for path in tls.glob("server.*.crt")]
    read_server_folder(tls, NAME)
    assert facefed("renew", tls, "--server-name", "other.example.org") == 0
    read_server_folder(tls, "other.example.org")
    assert f"not for {NAME}" in refused(read_server_folder, tls, NAME)


def test_renewing_needs_the_authoritys_key(tls, capsys):
    (tls / "ca.key").unlink()
    before = modes(tls)
    assert facefed("renew", tls) == 2
    assert "ca.key is missing" in capsys.readouterr().err
    assert modes(tls) == before


# ---- at the door


def test_a_servers_key_that_others_can_read_is_refused(tls):
    (tls / "server.key").chmod(0o640)
    assert "can be read by others (mode 0640)" in refused(read_server_folder, tls, NAME)


def test_a_sites_key_that_others_can_read_is_refused(tls):
    (tls / "celeba" / "client.key").chmod(0o604)
    assert "can be read by others (mode 0604)" in refused(read_client_folder, tls / "celeba")


def test_the_other_sides_folder_is_named(tls):
    assert "is one site's folder" in refused(read_server_folder, tls / "celeba", NAME)
    assert "is the server's folder" in refused(read_client_folder, tls)


def test_what_is_missing_is_named(tls):
    (tls / "celeba" / "ca.crt").unlink()
    assert "ca.crt is missing" in refused(read_client_folder, tls / "celeba")
    (tls / "server.crt").unlink()
    assert "server.crt is missing" in refused(read_server_folder, tls, NAME)


@pytest.mark.parametrize(("days", "said"), [(+2, "is not valid before"), (-4000, "expired on")])
def test_certificates_of_another_time_are_refused(tmp_path, monkeypatch, days, said):
    then = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    monkeypatch.setattr(new_certs, "_now", lambda: then)
    new_certs.make_folder(tmp_path / "tls", [NAME], ["celeba"])
    assert said in refused(read_server_folder, tmp_path / "tls", NAME)
    assert said in refused(read_client_folder, tmp_path / "tls" / "celeba")


def test_a_certificate_for_another_name_is_refused_where_the_name_is_known(tls):
    assert f"is for {NAME}, 192.0.2.7, localhost, 127.0.0.1, not for 198.51.100.1" in refused(
        read_server_folder, tls, "198.51.100.1"
    )
    read_server_folder(tls, "0.0.0.0")  # noqa: S104 - any name may lead there
    read_server_folder(tls, NAME.upper())


def test_a_pair_of_two_authorities_or_keys_is_refused(tls, tmp_path):
    new_certs.make_folder(tmp_path / "other", [NAME], ["celeba"])
    shutil.copy(tmp_path / "other" / "ca.crt", tls / "ca.crt")
    assert "was not issued by" in refused(read_server_folder, tls, NAME)
    shutil.copy(tmp_path / "other" / "server.key", tls / "server.key")
    assert "is not the key of" in refused(read_server_folder, tls, NAME)


def test_files_that_are_something_else_are_refused(tls):
    ed = ed25519.Ed25519PrivateKey.generate()
    openssh = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    key = tls / "celeba" / "client.key"
    key.write_bytes(ed.private_bytes(serialization.Encoding.PEM, *openssh))
    assert "is not a P-384 key" in refused(read_client_folder, tls / "celeba")
    key.write_bytes(b"nothing")
    assert "is not a private key of OpenSSH's format" in refused(read_client_folder, tls / "celeba")
    key.unlink()
    key.mkdir(0o700)
    assert "client.key cannot be read: Is a directory" in refused(read_client_folder, tls / "celeba")
    small = ec.generate_private_key(ec.SECP256R1()).public_key()
    (tls / "clients" / "small.pub").write_bytes(
        small.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    assert "small.pub is not a P-384 public key" in refused(read_server_folder, tls, NAME)
    (tls / "clients" / "small.pub").unlink()
    (tls / "server.crt").write_text("nothing")
    assert "is not a PEM certificate" in refused(read_server_folder, tls, NAME)


def test_a_server_that_would_accept_nobody_is_refused(tls):
    for path in (tls / "clients").iterdir():
        path.unlink()
    assert "holds no client's key" in refused(read_server_folder, tls, NAME)
