"""TensorBoard's copy of a run, read back with TensorBoard's own reader: curves, pictures, texts, the graph."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from common import config
from common.models.recogniser import build_recogniser
from common.settings import Settings, TrackingSettings
from common.tracking.address import with_absolute_tracking
from common.tracking.run import open_run
from common.tracking.tensorboard import FILE_PREFIX, Board

ROOT = Path(__file__).resolve().parents[2]
SMALLEST_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000003000000020800000000b881391c"
    "0000000e49444154789c63606060600200000f00030108010161470000000049454e44ae426082"
)  # 3 px wide, 2 high


class Picture:
    """Stands in for a matplotlib figure."""

    def savefig(self, fname, *, format):  # noqa: A002
        fname.write_bytes(SMALLEST_PNG if format == "png" else b"another format")


@pytest.fixture
def boards(tmp_path):
    return tmp_path / "boards"


def opened(boards, folder, **params):
    return open_run(
        TrackingSettings(enabled=False, tensorboard=str(boards)),
        uri="",
        folder=folder,
        experiment="e",
        run_name="n",
        tags={},
        params=params,
    )


def read(folder):
    """What TensorBoard shows of a run."""
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    shown.Reload()
    return shown


def curve(folder, name):
    return [(point.step, round(point.value, 6)) for point in read(folder).Scalars(name)]


def spool(run):
    return [json.loads(line) for line in (run.folder / "spool.jsonl").read_text(encoding="utf-8").splitlines()]


def test_metrics_are_curves_at_once_with_the_times_of_the_spool(boards, tmp_path):
    run = opened(boards, tmp_path / "r1")
    run.log_metrics({"train_loss": 0.5, "val_auc": 0.75}, step=1)
    run.log_metrics({"train_loss": 0.25}, step=2)
    shown = read(boards / "r1")  # the run goes on
    assert [(p.step, p.value) for p in shown.Scalars("train_loss")] == [(1, 0.5), (2, 0.25)]
    assert [(p.step, p.value) for p in shown.Scalars("val_auc")] == [(1, 0.75)]
    times = [e["time_ms"] for e in spool(run) if e.get("key") == "train_loss"]
    assert [round(p.wall_time * 1000) for p in shown.Scalars("train_loss")] == times
    run.finish("FINISHED")


def test_a_step_that_comes_again_wipes_out_nothing(boards, tmp_path):
    """As a repeated round tells it, and as the figures of the best epoch come after the last one's."""
    run = opened(boards, tmp_path / "r1")
    for step in (1, 2, 3, 2):
        run.log_metrics({"loss": float(step)}, step=step)
    run.finish("FINISHED")
    assert curve(boards / "r1", "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (2, 2.0)]


def test_each_nested_run_has_a_folder_below(boards, tmp_path):
    run = opened(boards, tmp_path / "r1")
    run.log_metrics({"loss": 1.0}, step=1)
    run.child("celeba", {}).log_metrics({"loss": 2.0}, step=1)
    run.child("../out of here", {}).log_metrics({"loss": 3.0}, step=1)
    run.finish("FINISHED")
    assert curve(boards / "r1", "loss") == [(1, 1.0)]
    assert curve(boards / "r1" / "celeba", "loss") == [(1, 2.0)]
    assert {path.name for path in boards.iterdir()} == {"r1"}
    assert {path.name for path in (boards / "r1").iterdir() if path.is_dir()} == {"celeba", "_out of here"}


def test_a_figure_is_a_picture_at_the_latest_step(boards, tmp_path):
    run = opened(boards, tmp_path / "r1")
    for step in (3, 4):
        run.log_metrics({"loss": 1.0}, step=step)
        run.log_system_metrics({"system/cpu_utilization_percentage": 1.0})
        run.log_figure(Picture(), "plots/roc.png")
    run.log_figure(Picture(), "plots/roc.svg")
    run.finish("FINISHED")
    shown = read(boards / "r1")
    assert shown.Tags()["images"] == ["plots/roc"]
    images = shown.Images("plots/roc")
    assert [(image.step, image.width, image.height) for image in images] == [(3, 3, 2), (4, 3, 2)]
    assert images[0].encoded_image_string == SMALLEST_PNG


def test_parameters_are_one_table(boards, tmp_path):
    run = opened(boards, tmp_path / "r1", **{"model.backbone": "cnn"})
    run.log_params({"rounds": 3, "model.backbone": "kept as it was"})
    run.finish("FINISHED")
    (text,) = read(boards / "r1").Tensors("parameters/text_summary")[-1].tensor_proto.string_val
    assert sorted(text.decode().splitlines()[2:]) == ["| model.backbone | cnn |", "| rounds | 3 |"]


def test_a_resumed_run_continues_its_curves_without_double_points(boards, tmp_path):
    run = opened(boards, tmp_path / "r1", lr=0.1)
    run.log_metrics({"loss": 3.0}, step=1)
    run.log_metrics({"loss": 2.0}, step=2)
    run.log_system_metrics({"system/cpu_utilization_percentage": 5.0})
    run.finish("KILLED")
    (first,) = (boards / "r1").iterdir()
    with first.open("ab") as torn:
        torn.write(b"\x20\x00\x00\x00\x00\x00\x00\x00cut")  # as kill -9 leaves it
    again = opened(boards, tmp_path / "r1", lr=0.1)
    again.log_missing_metrics({"loss": 2.0, "val_auc": 0.5}, step=2)
    again.log_metrics({"loss": 1.0}, step=3)
    again.log_system_metrics({"system/cpu_utilization_percentage": 6.0})
    again.finish("FINISHED")
    assert curve(boards / "r1", "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert curve(boards / "r1", "val_auc") == [(2, 0.5)]
    assert curve(boards / "r1", "system/cpu_utilization_percentage") == [(0, 5.0), (1, 6.0)]
    assert len(list((boards / "r1").iterdir())) == 2


def test_a_folder_that_cannot_be_made_is_told_once_and_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    run = opened(tmp_path / "file" / "boards", tmp_path / "r1")
    for step in range(3):
        run.log_metrics({"loss": 1.0}, step=step)
        run.child("celeba", {}).log_metrics({"loss": 1.0}, step=step)
    run.log_figure(Picture(), "plots/roc.png")
    run.finish("FINISHED")
    told = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 1
    assert told[0].startswith(f"TensorBoard: {tmp_path}/file/boards/r1 cannot be written")
    assert len([e for e in spool(run) if "key" in e]) == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_told_once_and_curves_go_on_when_there_is_room(boards, tmp_path, caplog):
    run = opened(boards, tmp_path / "r1")
    run.log_metrics({"loss": 1.0}, step=1)
    board = run._board
    board._file.close()
    board._file = Path("/dev/full").open("ab")  # noqa: SIM115 - the board closes it
    run.log_metrics({"loss": 0.9}, step=2)
    time.sleep(0.001)
    run.log_metrics({"loss": 0.8}, step=3)
    run.finish("FINISHED")
    assert curve(boards / "r1", "loss") == [(1, 1.0), (3, 0.8)]
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "No space left" in caplog.text


def test_finishing_closes_every_file(boards, tmp_path):
    run = opened(boards, tmp_path / "r1")
    run.child("celeba", {}).log_metrics({"loss": 1.0}, step=1)
    run.log_metrics({"loss": 1.0}, step=1)
    files = [run._board._file, run.child("celeba", {})._board._file]
    assert [file.closed for file in files] == [False, False]
    run.finish("FINISHED")
    assert [file.closed for file in files] == [True, True]
    with pytest.raises(RuntimeError, match="has finished"):
        run.log_metrics({"loss": 1.0}, step=2)
    assert curve(boards / "r1", "loss") == [(1, 1.0)]


def test_two_threads_may_log_at_once(boards, tmp_path):
    run = opened(boards, tmp_path / "r1")

    def log(name):
        for step in range(200):
            run.log_metrics({name: float(step)}, step=step)

    threads = [threading.Thread(target=log, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.finish("FINISHED")
    for name in "ab":
        assert curve(boards / "r1", name) == [(step, float(step)) for step in range(200)]
        assert [e["value"] for e in spool(run) if e.get("key") == name] == [float(step) for step in range(200)]


def test_a_call_costs_less_than_a_millisecond(boards, tmp_path):
    run = opened(boards, tmp_path / "r1")
    values = {f"metric_{number}": 0.5 for number in range(12)}
    run.log_metrics(values, step=0)
    seconds = []
    for step in range(1, 201):
        started = time.perf_counter()
        run.log_metrics(values, step=step)
        seconds.append(time.perf_counter() - started)
    run.finish("FINISHED")
    assert sorted(seconds)[len(seconds) // 2] < 1e-3


def vit(**model):
    settings = config.from_mapping(
        {"model": {"backbone": "vit_tiny", "patch_size": 8, "depth": 2, **model}, "data": {"image_size": 32}}
    )
    return build_recogniser(settings.model, num_people=3, image_size=32, backbone_seed=1, head_seed=2).backbone


@pytest.mark.parametrize("model", [{"backbone": "resnet18", "width": 0.25}, {"attention": "dcal", "inference": "both"}])
def test_the_networks_graph_leaves_the_network_and_the_random_numbers_as_they_were(boards, tmp_path, model, capsys):
    run = opened(boards, tmp_path / "r1")
    backbone = vit(**model).train()
    next(backbone.children()).eval()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes, random = [part.training for part in backbone.modules()], torch.get_rng_state()
    run.log_graph(backbone, torch.zeros(2, 3, 32, 32))
    run.finish("FINISHED")
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert [part.training for part in backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert len(read(boards / "r1").Graph().node) > 20
    assert capsys.readouterr().out == ""


class Untraceable(nn.Module):
    """Cannot be traced."""

    def forward(self, _):
        raise RuntimeError("no\nsuch thing")


def test_a_network_that_cannot_be_traced_is_one_log_line(boards, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, "facefed.tracking")
    run = opened(boards, tmp_path / "r1")
    run.log_graph(Untraceable(), torch.zeros(1))
    run.log_metrics({"loss": 1.0}, step=1)
    run.finish("FINISHED")
    assert [record.getMessage() for record in caplog.records] == ["TensorBoard: no graph of Untraceable (no)."]
    assert capsys.readouterr().out == ""
    assert curve(boards / "r1", "loss") == [(1, 1.0)]


def test_a_graph_is_drawn_once(boards, tmp_path):
    for status in ("KILLED", "FINISHED"):
        run = opened(boards, tmp_path / "r1", lr=0.1)
        run.log_graph(vit(), torch.zeros(1, 3, 32, 32))
        run.finish(status)
    with_graph = [path for path in (boards / "r1").iterdir() if path.stat().st_size > 5000]
    assert len(with_graph) == 1


def test_none_writes_nothing_and_imports_nothing(tmp_path):
    """Seen red with a Board that is made anyway."""
    program = """
import sys
from pathlib import Path
from common.settings import TrackingSettings
from common.tracking.run import open_run
where = sys.argv[2] if len(sys.argv) > 2 else "none"
run = open_run(TrackingSettings(enabled=False, tensorboard=where), uri="", folder=Path(sys.argv[1]), experiment="e",
               run_name="n", tags={}, params={"a": 1})
run.log_metrics({"a": 1.0}, step=1)
run.log_graph(None, None) if where == "none" else None
run.finish("FINISHED")
print(" ".join(sorted({"tensorboard", "tensorflow", "torch", "grpc", "requests", "matplotlib"} & set(sys.modules))))
"""

    def imported(*arguments):
        command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "r"), *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert imported() == []
    assert {path.name for path in tmp_path.iterdir()} == {"r"}
    assert imported(str(tmp_path / "boards")) == ["tensorboard"]
    assert list((tmp_path / "boards" / "r").glob(f"{FILE_PREFIX}.*"))


def test_the_folder_means_the_same_in_every_process(tmp_path):
    def folder(**tracking):
        settings = config.from_mapping({"tracking": tracking})
        return with_absolute_tracking(settings, settings.tracking.uri, tmp_path)[0].tracking.tensorboard

    assert Settings().tracking.tensorboard == "logs/tensorboard"
    assert folder() == folder(enabled=False) == f"{tmp_path}/logs/tensorboard"
    assert folder(tensorboard="/elsewhere") == "/elsewhere"
    assert folder(tensorboard="none") == "none"


def test_a_board_that_is_closed_takes_nothing(tmp_path):
    board = Board(tmp_path / "r")
    board.scalars({"a": 1.0}, 1, 1000)
    board.close()
    board.scalars({"a": 1.0}, 2, 2000)
    assert curve(tmp_path / "r", "a") == [(1, 1.0)]
