"""What `pip install .` and the wheel give: four programs that work outside the checkout, with the configurations.

Nothing is downloaded: the wheel is built without isolation, and what it needs is this environment's.
"""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAMS = ("facefed", "flower-client", "flower-server", "flower-simulation")
BUILT_FROM = ("common", "server", "clients", "simulation", "facefed", "configs")
KINDS = (".py", ".toml", ".typed", ".html", ".css", ".js", ".svg")  # of files that are installed
UV = Path(sys.executable).with_name("uv")  # Flower brings it
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def done(*command: object, cwd: Path) -> str:
    """What a command prints.  Fails with all of it when it does."""
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel") / "checkout"
    for name in BUILT_FROM:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index")
    done(*pip, "--wheel-dir", checkout.parent, cwd=checkout)
    [built] = checkout.parent.glob("*.whl")
    return built


def environment(folder: Path) -> Path:
    """A new one with this one's packages but FaceFed, whose sources a plain path does not bring; returns its bin."""
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def test_the_wheel_has_all_packages_configurations_and_programs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        [about] = [name for name in names if name.endswith("entry_points.txt")]
        told = files.read(about).decode()
    ours = [path for name in BUILT_FROM for path in (ROOT / name).rglob("*") if path.suffix in KINDS]
    assert {str(path.relative_to(ROOT)) for path in ours} == {n for n in names if n.partition("/")[0] in BUILT_FROM}
    assert {name.partition("/")[0] for name in names} == {*BUILT_FROM, about.partition("/")[0]}
    assert sorted(line.partition(" ")[0] for line in told.splitlines() if "=" in line) == sorted(PROGRAMS)


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_each_tool_gives_the_four_programs(tool: str, wheel: Path, checkout: Path, tmp_path: Path) -> None:
    """pip of the wheel: that of a folder is to build this wheel and to install it; uv of the folder."""
    programs = environment(tmp_path / "new")
    python, offline = programs / "python", ("--no-deps", "--no-build-isolation")
    if tool == "uv":
        done(UV, "pip", "install", "--offline", "--python", python, *offline, checkout, cwd=tmp_path)
    else:
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-compile", *offline)
        done(*pip, wheel, cwd=tmp_path)
    for name in PROGRAMS:
        assert done(programs / name, "--version", cwd=tmp_path).startswith(name)
    where = done(python, "-c", "import common.config as c; print(c.find_config('demo'))", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "new")
