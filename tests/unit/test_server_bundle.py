"""The app bundle that travels to the nodes: our code, all of it, and nothing else."""

import io
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

import common
from server.flower.launch import write_bundle

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
