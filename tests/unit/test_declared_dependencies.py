"""A package that is installed by hand hides a missing line: what our packages import must be declared."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "clients", "server", "simulation", "configs")
IMPORTED_AS = {"PIL": "pillow", "grpc": "grpcio", "sklearn": "scikit-learn"}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _normal(name: str) -> str:
    """The name as PyPI compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_the_packages_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[\[<>=~! ]", line)[0] for line in project["dependencies"]}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    imported = set().union(*map(_imported, files)) - set(sys.stdlib_module_names) - set(PACKAGES)

    missing = {IMPORTED_AS.get(name, name) for name in imported} - declared

    assert not missing, f"add to [project] dependencies: {sorted(missing)}"


def test_what_is_declared_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    pinned = {_normal(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}

    missing = {_normal(re.split(r"[\[<>=~! ]", line)[0]) for line in lines} - pinned

    assert not missing, f"add to constraints.txt: {sorted(missing)}"
