"""docs/EXTENDING.md: its examples, put where it says into a copy of the sources, make one federation of them all."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

GUIDE = (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n# (\S+?)(?:, (above|in) (\w+))?\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
PACKAGES = ("common", "clients", "server", "simulation", "configs")
PEOPLE, SHOTS = 8, 4
# With what the page adds, by the names that it gives: a federation of one client in this process, without Ray.
PROGRAM = """\
import sys
from pathlib import Path

import common
from common import config
from common.system.files import read_json
from flwr.supercore.task_identity import TaskIdentity
from in_process import LocalMailbox, federate_in, site_at

here = Path.cwd()
assert Path(common.__path__[0]).parent == here, common.__path__
for name in ("_run_id", "_node_id", "_task_id"):
    setattr(TaskIdentity, name, 1)
settings = config.from_mapping({
    "data": {"image_size": 32},
    "model": {"backbone": "plain", "embedding_size": 16},
    "training": {"batch_size": 16, "precision": "float32", "memory_format": "contiguous", "threads": 1},
    "federation": {"strategy": "fedsign", "rounds": 1, "local_epochs": 1, "min_clients": 1, "join_timeout_s": 5.0},
    "tracking": {"enabled": False, "plots": "none", "tensorboard": "none", "system_metrics_s": "off"},
})
run = federate_in(here / "run", settings, LocalMailbox([site_at(here / "sites", "flat", here / "faces")]))
metrics = read_json(run / "metrics.json")
print(metrics["rounds_table"][-1]["val_youden"], metrics["best"]["youden"])
"""


def add(tree: Path, path: str, where: str, table: str, code: str) -> None:
    """Do with a block what its first line says."""
    file = tree / path
    if not where:
        assert not file.exists(), f"{path} is there"
        file.write_text(code)
        return
    text = file.read_text()
    rows = re.search(rf"^{table}\b[^\n]*[({{]\n.*?^(?=[)}}])", text, re.DOTALL | re.MULTILINE)
    assert rows, f"{path} has no table {table}"
    at, code = (rows.start(), f"{code}\n\n") if where == "above" else (rows.end(), code)
    file.write_text(text[:at] + code + text[at:])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as they are after the page."""
    folder = tmp_path_factory.mktemp("extended")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for block in BLOCKS:
        add(folder, *block)
    return folder


def run(tree: Path, *arguments: str) -> str:
    """What Python prints there, in which no other FaceFed is found before the tree's."""
    paths = f"{tree}:{ROOT / 'tests' / 'integration'}"
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": paths, "HOME": str(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_no_block_is_left_out() -> None:
    assert len(BLOCKS) == GUIDE.count("```python") == 9
    assert [where for _, where, _, _ in BLOCKS].count("in") == 4


def test_a_federation_uses_all_that_the_page_adds(tree: Path) -> None:
    random = np.random.default_rng(0)
    (tree / "faces").mkdir()
    for person in range(PEOPLE):
        for number in range(SHOTS):
            pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tree / "faces" / f"{person:02d}-{number}.png")
    of_round, best = map(float, run(tree, "-c", PROGRAM).split())
    assert 0.0 <= of_round <= 1.0
    assert 0.0 <= best <= 1.0


def test_help_and_a_wrong_word_know_what_was_added(tree: Path) -> None:
    told = run(tree, "-m", "clients.cli", "--help") + run(tree, "-m", "server.cli", "--help")
    for name in ("plain", "flat", "fedsign"):
        assert re.search(rf"\b{name}\b", told), name
