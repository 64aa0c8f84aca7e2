"""Two small synthetic data sets, a small configuration, and one simulated federation that many tests look at."""

import os
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from programs import Ended, Program, Programs

SMALL = """\
[data]
image_size = 32

[model]
backbone = "cnn"
embedding_size = 32

[training]
precision = "float32"
memory_format = "contiguous"
batch_size = 8

[federation]
rounds = 2
local_epochs = 1
"""


@dataclass(frozen=True)
class Faces:
    """The data sets, the configuration and a cache of packs for tests that are not about packing."""

    folder: Path
    synth: tuple[Ended, ...]  # how the programs that drew them ended

    @property
    def celeba(self) -> Path:
        return self.folder / "data" / "celeba"

    @property
    def vggface2(self) -> Path:
        return self.folder / "data" / "vggface2"

    @property
    def clients(self) -> tuple[str, ...]:
        return "--client", f"celeba={self.celeba}", "--client", f"vggface2={self.vggface2}"

    @property
    def small(self) -> tuple[object, ...]:
        return "--config", self.folder / "small.toml"

    @property
    def cache(self) -> tuple[object, ...]:
        return "--cache-dir", self.folder / "packs"


@pytest.fixture(scope="module", autouse=True)
def _own_environment():
    """MLflow writes the addresses that it is told into the environment; the next file's programs would find them."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    (folder / "small.toml").write_text(SMALL)
    programs = Programs(folder)
    drawn = [
        programs.run("facefed", "data", "synth", "--layout", name, "--people", 12, "--pictures", 8, "--out", out)
        for name, out in (("celeba", "data/celeba"), ("vggface2", "data/vggface2"))
    ]
    assert [ended.code for ended in drawn] == [0, 0], drawn
    yield Faces(folder, tuple(drawn))
    programs.close()


@pytest.fixture
def programs(tmp_path):
    made = Programs(tmp_path)
    yield made
    made.close()


@dataclass(frozen=True)
class Simulated:
    """A simulated federation that has ended."""

    cwd: Path
    program: Program
    ended: Ended


@pytest.fixture(scope="session")
def simulated(faces, tmp_path_factory):
    """FedAvg over both data sets in float32, two rounds, tracked; packs anew."""
    programs = Programs(tmp_path_factory.mktemp("simulated"))
    program = programs.start("flower-simulation", *faces.clients, *faces.small)
    yield Simulated(programs.cwd, program, program.ended())
    programs.close()
