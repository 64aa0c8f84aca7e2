"""A client with twins among others: twins-only figures arrive at the server, and only where there are twins."""

from pathlib import Path

import numpy as np
import pytest
from in_process import LocalMailbox, federate_in, site_at
from PIL import Image

from common.system.checkpoints import read_tensors
from common.system.files import read_json
from server.app import initial_model
from simulation.data.synthetic import SynthSettings, write_dataset
from tests.tiny_settings import TINY, changed

pytestmark = pytest.mark.usefixtures("one_thread", "in_a_run")
SETTINGS = changed(TINY, training__batch_size=16, federation__min_clients=2, federation__join_timeout_s=5.0)


def strangers(root: Path) -> Path:
    random = np.random.default_rng(0)
    for person in range(8):
        (root / f"p{person}").mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"p{person}/{number}.png")
    return root


def test_figures_of_twins_arrive_at_the_server(tmp_path: Path) -> None:
    write_dataset(SynthSettings(layout="twins", num_people=12, pictures_per_person=3), tmp_path / "twins")
    sites = [
        site_at(tmp_path / "sites", "twins", tmp_path / "twins", name="twins"),
        site_at(tmp_path / "sites", "folder", strangers(tmp_path / "faces"), name="faces"),
    ]
    run = read_json(federate_in(tmp_path / "run", SETTINGS, LocalMailbox(sites)) / "metrics.json")
    for row in run["rounds_table"]:
        for name in ("twins_roc_auc", "twins_eer", "strangers_roc_auc"):
            assert 0.0 <= row[f"val_{name}"] <= 1.0
            assert 0.0 <= row[f"round_test_{name}"] <= 1.0
    text = str(run)
    assert "test_twins_roc_auc" in text
    assert "test_strangers_roc_auc" in text


def test_nothing_of_twins_is_told_where_there_are_none(tmp_path: Path) -> None:
    settings = changed(SETTINGS, federation__min_clients=1)
    site = site_at(tmp_path / "sites", "folder", strangers(tmp_path / "faces"))
    run = read_json(federate_in(tmp_path / "run", settings, LocalMailbox([site])) / "metrics.json")
    assert "round_test_roc_auc" in str(run)
    assert "twins" not in str(run["rounds_table"])
    assert "twins_roc_auc" not in str(run)


def test_three_holders_share_dcals_branches_and_keep_their_heads(tmp_path: Path) -> None:
    settings = changed(
        SETTINGS, model__backbone="vit_tiny", model__depth=1, model__patch_size=8, model__attention="dcal",
        model__inference="both",
    )  # fmt: skip
    write_dataset(SynthSettings(layout="twins", num_people=12, pictures_per_person=3), tmp_path / "twins")
    sites = [
        site_at(tmp_path / "sites", "twins", tmp_path / "twins", name="twins"),
        site_at(tmp_path / "sites", "folder", strangers(tmp_path / "one"), name="one"),
        site_at(tmp_path / "sites", "folder", strangers(tmp_path / "two"), name="two"),
    ]
    folder = federate_in(tmp_path / "run", settings, LocalMailbox(sites))
    first, last = (
        initial_model(settings)[0].state_dict(),
        read_tensors(folder / "checkpoints/round-000002.safetensors")[0],
    )
    assert all(name.startswith("backbone.") for name in last)
    for part in ("backbone.glca.", "backbone.glca_closing.", "backbone.trunk."):
        learned = [name for name in last if name.startswith(part) and not np.array_equal(first[name], last[name])]
        assert learned, part
    for site in sites:
        [private] = [read_tensors(path)[0] for path in site.state_dir.rglob("round-000002.safetensors")]
        assert {"head.weight", "glca_head.weight", "loss_weights.sa", "loss_weights.glca", "loss_weights.pwca"} <= {
            name.removeprefix("model/") for name in private
        }
    assert "round_test_twins_roc_auc" in str(read_json(folder / "metrics.json")["rounds_table"])
