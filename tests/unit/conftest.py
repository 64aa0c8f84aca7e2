"""Fixtures of the unit tests."""

import warnings

import pytest
from pseudo_terminal import Terminal

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click for a name that click will drop
    import typer  # noqa: F401


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with Terminal() as opened:
        yield opened
