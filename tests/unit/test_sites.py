"""`--client` and `--data-dir`: every way to name a data set and its folder, and every way to get it wrong."""

from pathlib import Path

import pytest

from clients.own_machine import ClientOption, parse_client, parse_clients, site_of
from common.errors import UserError
from common.system.files import write_json
from simulation.commands import _what_is_kept
from simulation.sites import data_options


def option(name: str, dataset: str, folder: str) -> ClientOption:
    return ClientOption(name=name, dataset=dataset, data_dir=Path(folder))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("celeba=data/c", option("celeba", "celeba", "data/c")),
        ("site-1:folder=/x", option("site-1", "folder", "/x")),
        ("a.b_c:vggface2=d=e", option("a.b_c", "vggface2", "d=e")),
        ("Zürich:folder=C", option("Zürich", "folder", "C")),
    ],
)
def test_a_client(text, expected):
    assert parse_client(text) == expected


def test_the_home_folder_is_understood(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_client("celeba=~/c").data_dir == Path("/home/me/c")


@pytest.mark.parametrize("text", ["", "celeba", "=data", "celeba=", ":celeba=data"])
def test_a_client_says_how_it_is_written(text):
    with pytest.raises(UserError, match=r"write NAME=DIR or NAME:DATASET=DIR"):
        parse_client(text)


def test_an_unknown_data_set_suggests_the_nearest():
    with pytest.raises(UserError, match=r"'celebs' is unknown; did you mean 'celeba'\?.*write NAME:DATASET=DIR"):
        parse_client("celebs=data")
    with pytest.raises(UserError, match=r"'' is unknown"):
        parse_client("mine:=data")


@pytest.mark.parametrize("name", ["../up", "/etc", "a/b", ".", "..", "a\n", "-x"])
def test_a_name_cannot_leave_its_folder(name):
    """It names the folder of the client's state, its run and its metrics."""
    with pytest.raises(UserError, match="may hold letters, digits"):
        parse_client(f"{name}:folder=data")


def test_clients_come_in_the_order_of_their_names():
    texts = ["vggface2=v", "b:folder=b", "celeba=c"]
    assert [client.name for client in parse_clients(texts)] == ["b", "celeba", "vggface2"]
    assert parse_clients(texts) == parse_clients(texts[::-1])


def test_no_client_and_two_of_a_name():
    with pytest.raises(UserError, match="no clients: give at least one --client"):
        parse_clients([])
    with pytest.raises(UserError, match="two clients claim the name 'celeba'"):
        parse_clients(["celeba=a", "celeba:folder=b"])


@pytest.mark.parametrize(
    ("clients", "folders", "expected"),
    [
        (["celeba"], [], [option("celeba", "celeba", "data/celeba")]),
        (["celeba"], ["d"], [option("celeba", "celeba", "d")]),
        (["celeba"], ["celeba=d"], [option("celeba", "celeba", "d")]),
        (["celeba=e"], [], [option("celeba", "celeba", "e")]),
        ([], ["celeba=d"], [option("celeba", "celeba", "d")]),
        (["mine:folder"], ["d"], [option("mine", "folder", "d")]),
        (["mine:folder"], ["mine=d"], [option("mine", "folder", "d")]),
        (["mine:folder"], [], [option("mine", "folder", "data/mine")]),
        (
            ["vggface2", "celeba=e"],
            ["vggface2=v"],
            [option("celeba", "celeba", "e"), option("vggface2", "vggface2", "v")],
        ),
        (
            [],
            ["vggface2=v", "celeba=c"],
            [option("celeba", "celeba", "c"), option("vggface2", "vggface2", "v")],
        ),
    ],
)
def test_data_dirs(clients, folders, expected):
    assert data_options(clients, folders) == expected


@pytest.mark.parametrize(
    ("clients", "folders", "told"),
    [
        ([], [], "no clients"),
        ([], ["d"], "with 0 clients write --data-dir NAME=DIR"),
        (["celeba", "vggface2"], ["d"], "with 2 clients write --data-dir NAME=DIR"),
        (["celeba"], ["d", "e"], "write --data-dir NAME=DIR"),
        (["celeba"], ["vggface2=d"], "there is no --client vggface2"),
        (["celeba=a"], ["d"], "names its folder already; leave --data-dir out"),
        (["celeba=a"], ["celeba=d"], "names its folder already; leave --data-dir out"),
        (["mine:folder=a"], ["mine=d"], "names its folder already; leave --data-dir out"),
    ],
)
def test_data_dirs_that_do_not_fit(clients, folders, told):
    with pytest.raises(UserError, match=told):
        data_options(clients, folders)


def test_a_sites_folders_are_absolute(tmp_path, monkeypatch):
    """Ray's workers run in another folder."""
    monkeypatch.chdir(tmp_path)
    site = site_of(option("a", "folder", "d"), device="cpu", cache_dir=Path("c"), state_dir=Path("s"))
    assert (site.data_dir, site.cache_dir, site.state_dir) == (tmp_path / "d", tmp_path / "c", tmp_path / "s/a")
    assert site.device == "cpu"
    assert site.pack_workers >= 1
    with pytest.raises(UserError, match="--device tpu is not on this machine"):
        site_of(option("a", "folder", "d"), device="tpu", cache_dir=Path("c"), state_dir=Path("s"))


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path):
    """As Hive's, Spark's and DVC's do (split=train)."""
    folder = tmp_path / "split=train" / "celeba"
    folder.mkdir(parents=True)
    [option] = parse_clients([f"celeba={folder}"])
    assert option.data_dir == folder
    for given in (str(folder), f"celeba={folder}"):
        [option] = data_options(["celeba"], [given])
        assert option.data_dir == folder


def test_a_folder_here_may_have_one_too(tmp_path, monkeypatch):
    (tmp_path / "split=train").mkdir()
    monkeypatch.chdir(tmp_path)
    [option] = data_options(["celeba"], ["split=train"])
    assert str(option.data_dir) == "split=train"
    with pytest.raises(UserError, match=r"--data-dir split=\.\.\.: there is no --client split"):
        data_options(["celeba"], ["split=nowhere"])


def test_a_stopped_simulation_says_what_it_keeps_and_that_it_does_not_go_on(tmp_path):
    folder = tmp_path / "run"
    assert _what_is_kept(folder).startswith("No round had ended: a simulation cannot be resumed")
    write_json(folder / "checkpoints" / "state.json", {"round": 7})
    assert _what_is_kept(folder) == (
        f"Kept in {folder}: the model of round 7 and the record up to it; a simulation cannot be resumed, and the same"
        " command begins a new run."
    )
