"""Fixtures of the unit tests."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click for a name that click will drop
    import typer  # noqa: F401
