"""The app bundle that travels to the nodes: our code, all of it, and nothing else."""

import io
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

import common
from server.flower.launch import write_bundle

ROOT = Path(common.__file__).parents[1]

# Flower 1.41 asks pathspec for patterns by their old name.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Written over the leavings of an earlier one."""
    folder = tmp_path_factory.mktemp("flwr") / "facefed"
    (folder / "common").mkdir(parents=True)
    (folder / "common" / "stale.py").write_text("raise SystemExit\n")
    return write_bundle(folder, "1.2.3")


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_every_module_of_the_three_packages_and_nothing_else(bundle):
    root = Path(common.__file__).parent.parent
    wanted = {
        path.relative_to(root).as_posix()
        for package in ("common", "server", "clients")
        for path in (root / package).rglob("*.py")
    }
    assert files_in(bundle) == wanted | {"pyproject.toml"}
    assert {"common/faces/pack.py", "server/rounds.py", "clients/app.py"} <= wanted


def test_flower_builds_it_with_both_apps_and_without_pictures_data_or_tests(bundle):
    """Flower checks the project file and that the two apps exist, and drops what its filters leave out."""
    fab = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(bundle)))
    names = {name for name in fab.namelist() if not name.startswith(".info")}
    assert names == files_in(bundle)
    assert {Path(name).suffix for name in names} == {".py", ".toml"}
    assert not {name.split("/")[0] for name in names} & {"tests", "data", "runs", "simulation", "docs"}


def test_a_version_that_is_unknown_is_still_one_that_flower_takes(tmp_path):
    folder = write_bundle(tmp_path / "facefed", "unknown")
    assert 'version = "0.0.0"' in (folder / "pyproject.toml").read_text()
    assert build_fab_from_disk(folder)


# ---- what `flwr run` and `flwr build` make of the checkout


@pytest.fixture(scope="module")
def of_checkout():
    return zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT)))


def test_flwr_build_takes_the_app_its_configurations_and_its_project_file_and_nothing_else(of_checkout):
    found = {name for name in of_checkout.namelist() if not name.startswith(".info")}
    code = {
        path.relative_to(ROOT).as_posix()
        for package in ("common", "server", "clients", "configs")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".toml") and "__pycache__" not in path.parts
    }
    assert found == code | {"pyproject.toml", "README.md", "LICENSE"}
    assert sum(len(of_checkout.read(name)) for name in of_checkout.namelist()) < 10e6


def test_the_bundle_declares_what_it_imports(of_checkout):
    """`tests/unit/test_declared_dependencies.py` holds these against the imports."""
    project = tomllib.loads(of_checkout.read("pyproject.toml").decode())["project"]
    assert project["dependencies"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_both_apps_load_from_the_bundle_alone(of_checkout, tmp_path):
    of_checkout.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import clients.app, server.stock\n"
        "from common import config\n"
        "files = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in ('common', 'server', 'clients')]\n"
        "assert all(file.startswith(sys.argv[1]) for file in files), files\n"
        "assert config.find_config('demo').is_relative_to(sys.argv[1])\n"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
