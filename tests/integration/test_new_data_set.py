"""A data set that nobody knows yet is a reader and a row in DATASETS: everything else reads the table."""

import json
from pathlib import Path

import numpy as np
import pytest
from in_process import LocalMailbox, federate_in, site_at
from PIL import Image
from tiny_federation import enter_run

from clients import cli as client_cli
from common import config
from common.faces.datasets import DATASETS, DataSet
from common.faces.index import FaceIndex, build_index
from common.system.files import read_json
from simulation.cli import main

TINY = {
    "data": {"image_size": 32},
    "model": {"backbone": "cnn", "embedding_size": 16, "width": 0.25},
    "training": {"batch_size": 16, "precision": "float32", "memory_format": "contiguous", "threads": 1},
    "federation": {"rounds": 1, "local_epochs": 1, "min_clients": 1, "join_timeout_s": 5.0},
    "tracking": {"enabled": False, "plots": "none", "tensorboard": "none", "system_metrics_s": "off"},
}
PEOPLE, SHOTS = 8, 4


def read_toy(dataset: str, root: Path) -> FaceIndex:
    """All pictures in one folder, PERSON-NUMBER.png; without landmarks, boxes or official parts."""
    paths = [path.name for path in root.glob("*.png")]
    return build_index(dataset, root, paths, [path.split("-")[0] for path in paths])


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table with the new row, and a folder for it."""
    row = DataSet(reader=f"{__name__}:read_toy", needs="toys need the folder of pictures PERSON-NUMBER.png")
    monkeypatch.setitem(DATASETS, "toy", row)
    monkeypatch.setattr("simulation.cli.go_silent", lambda: None)  # it changes the process
    monkeypatch.chdir(tmp_path)
    enter_run(monkeypatch)
    random = np.random.default_rng(0)
    root = tmp_path / "toys"
    root.mkdir()
    for person in range(PEOPLE):
        for number in range(SHOTS):
            pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{person:02d}-{number}.png")
    return root


def test_it_is_audited_packed_and_federated(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "toy" in client_cli.parser().format_help()
    given = ["--client", "toy", "--data-dir", str(toy), "--set", "data.image_size=32", "--no-mlflow"]
    assert main(["data", "audit", "--json", *given]) == 0
    found = json.loads(capsys.readouterr().out)["toy"]
    assert (found["num_people"], found["num_pictures"], found["problem"]) == (PEOPLE, PEOPLE * SHOTS, "")
    assert main(["data", "prepare", *given]) == 0
    assert "toy: packed as " in capsys.readouterr().out
    site = site_at(tmp_path / "sites", "toy", toy)
    run = read_json(federate_in(tmp_path / "run", config.from_mapping(TINY), LocalMailbox([site])) / "metrics.json")
    for name in ("val_roc_auc", "round_test_roc_auc"):
        assert 0.0 <= run["rounds_table"][-1][name] <= 1.0


def test_its_own_line_says_what_the_folder_should_hold(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "audit", "--client", f"toy={toy / 'nowhere'}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("nowhere: no such folder; toys need the folder of pictures PERSON-NUMBER.png.")


@pytest.mark.usefixtures("toy")
def test_what_has_no_drawing_is_no_layout_to_draw(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "synth", "--layout", "toy", "--out", "made"])
    assert end.value.code == 2
    assert "invalid choice: 'toy'" in capsys.readouterr().err
