"""Of the small models that end-to-end tests train: which version is the best, and whether it is the champion.

Trained for seconds on a few people, a model may end below the untrained one; then it is held back, and says so.
"""


def best_version(client, name: str) -> str:
    """The newest version that is not only the last."""
    found = [version for version in client.search_model_versions(f"name = '{name}'") if version.tags["role"] != "last"]
    return str(max(int(version.version) for version in found))


def assert_crowned_unless_held_back(client, name: str) -> None:
    """The best version is the champion, or there is none and its tag says why."""
    version = best_version(client, name)
    champion = client.get_registered_model(name).aliases.get("champion")
    if "held_back" in client.get_model_version(name, version).tags:
        assert champion is None
    else:
        assert str(champion) == version
