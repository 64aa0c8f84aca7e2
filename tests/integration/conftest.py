"""Fixtures of the integration tests."""

import pytest


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """The pack of tiny_twins."""
    from tiny_twins import twins_pack

    return twins_pack(tmp_path_factory.mktemp("twins"))
