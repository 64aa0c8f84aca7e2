"""Fixtures of the unit tests."""

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click for a name that click will drop
    import typer  # noqa: F401


@pytest.fixture
def in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Flower's Message be made outside a run."""
    from tiny_federation import enter_run

    enter_run(monkeypatch)
