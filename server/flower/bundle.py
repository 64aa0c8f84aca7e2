"""The app bundle that Flower wants from whoever submits a run: the packages as they are installed here."""

import importlib.util
import shutil
from pathlib import Path

PACKAGES = ("common", "server", "clients")  # by name: the server's code never imports the clients'
PYPROJECT = """\
[project]
name = "facefed"
version = "{version}"
description = "Federated face recognition"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "facefed"
fab-include = ["server/**/*.py", "clients/**/*.py", "common/**/*.py"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
settings = ""
run-folder = ""
git-commit = ""
"""


def write_bundle(folder: Path, version: str) -> Path:
    """Copy the installed packages' Python files and a project file into `folder`; returns it.

    Submitting a copy, and not the current folder, works from a checkout and from an installed wheel alike, and leaves
    data, runs and pictures out by construction.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        source = Path(str(found.origin if found else "")).parent
        for path in sorted(source.rglob("*.py")):
            target = folder / source.name / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    plain = version if version != "unknown" else "0.0.0"
    (folder / "pyproject.toml").write_text(PYPROJECT.format(version=plain), encoding="utf-8")
    return folder
