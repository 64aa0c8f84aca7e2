"""A client's name: which may be one, and which two a person may take for one another."""

from types import SimpleNamespace

import pytest

from clients.cli import _name
from common.errors import UserError
from common.names import CLIENT_NAME, look_alike, looks_of


@pytest.mark.parametrize("name", ["a", "celeba", "Hôpital Nord 2", "a.b_c-d", "Zürich", "x" * 64, "a.", "7"])
def test_what_may_be_a_name(name):
    assert CLIENT_NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", " a", "a ", "a\n", "a/b", "../x", "x" * 65, "a\x1b[31m", "-a", "a\u200bb"])
def test_what_may_not(name):
    assert not CLIENT_NAME.fullmatch(name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("celeba", "сeleba"),  # noqa: RUF001 - Cyrillic
        ("celeba", "CELEBA"),
        ("clinic 1", "clinic  1"),
        ("clinic-1", "clinic-l"),
        ("site0", "siteO"),
        ("modern", "modem"),
        ("omega", "οmega"),  # noqa: RUF001 - Greek
        ("ZEN", "ΖΕΝ"),  # noqa: RUF001 - Greek, every letter
        ("Zürich", "Zurich"),
        ("ﬁeld", "field"),
        ("site", "si\u3164te"),
    ],
)
def test_names_that_look_alike(one, other):
    assert look_alike(one, other)


def test_names_that_do_not():
    names = ["celeba", "vggface2", "celeba-2", "celeba 3", "celeb", "site-i", "site-ii", "北医院", "клиника"]
    assert not any(look_alike(one, other) for one in names for other in names if one != other)
    numbered = {look for number in range(3000) for look in looks_of(f"client-{number:04d}")}
    assert len(numbered) == 6000


@pytest.mark.parametrize(
    ("given", "key", "name"),
    [(None, "", "folder"), ("a", "", "a"), (None, "north", "north"), ("north", "north", "north")],
)
def test_a_site_has_its_keys_name(given, key, name):
    """So two sites with keys and one data set join without --name."""
    assert _name(SimpleNamespace(name=given, dataset="folder", tls="federation/north"), key) == name


def test_a_site_with_another_name_than_its_keys_is_told_at_once():
    with pytest.raises(UserError, match=r"--name south: the key in .* is that of 'north'.* Leave --name out"):
        _name(SimpleNamespace(name="south", dataset="folder", tls="federation/north"), "north")
