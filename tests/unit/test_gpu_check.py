"""The GPU check on the CPU, as far as that goes: checks of training at a tiny size, failures, the report, the ends."""

import json
from contextlib import nullcontext

import pytest
import torch

from bench import gpu_check
from bench.gpu_check import CHECKS, TINY, CheckFailed, Place, main, run_checks
from bench.workload import LOADS

HERE = ["precisions", "input", "memory", "speed"]  # the others start a compiler, or whole programs


@pytest.fixture
def place(tmp_path):
    return Place(device="cpu", scratch=tmp_path, **TINY)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def written(folder):
    (file,) = folder.glob("gpu-*.json")
    return json.loads(file.read_text())


def test_what_runs_on_the_cpu_is_all_right_there_and_all_of_it_is_in_one_file(tmp_path, capsys):
    assert main([*HERE, "--device", "cpu", "--tiny", "--scratch", str(tmp_path), "--out", str(tmp_path / "out")]) == 0

    report = written(tmp_path / "out")
    assert (report["device"], report["gpu"], report["tiny"]) == ("cpu", None, True)
    assert {name: check["ok"] for name, check in report["checks"].items()} == dict.fromkeys(HERE, True)
    figures = {name: check["figures"] for name, check in report["checks"].items()}
    assert figures["precisions"]["relative_difference"].keys() == {
        "float32/contiguous", "float32/channels_last", "bfloat16/channels_last",
    }  # fmt: skip
    assert figures["precisions"]["relative_difference"]["float32/contiguous"] == 0.0
    assert figures["memory"]["num_halvings"] == 1
    assert figures["speed"]["ours_of_plain"] > 0.0
    assert figures["speed"]["peak_mib"] == {"ours": None, "plain": None}
    assert "every value" in capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_says_so_and_that_is_no_failure(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 0

    assert "GPU: not measured" in capsys.readouterr().out
    report = written(tmp_path)
    assert (report["gpu"], report["checks"]) == (None, {})
    assert "not measured" in report["note"]


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_was_asked_for_and_is_not_here_is_the_users_mistake(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cuda:0", "--out", str(tmp_path)])
    assert "--device cuda:0 is not on this machine" in capsys.readouterr().err
    assert main(["speeed"]) == 2


def test_a_check_that_fails_is_named_ends_with_1_and_stops_no_other(tmp_path, monkeypatch):
    def failing(_place):
        raise torch.OutOfMemoryError("no room\nand a second line")

    monkeypatch.setattr(gpu_check, "CHECKS", {"bad": failing, "good": lambda _place: {"value": 1}})

    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1

    checks = written(tmp_path)["checks"]
    assert (checks["bad"]["ok"], checks["bad"]["failed"]) == (False, "OutOfMemoryError: no room")
    assert checks["good"]["figures"] == {"value": 1}


def test_a_precision_that_gives_another_loss_fails(place, monkeypatch):
    true = gpu_check.loss_of
    off = {"bfloat16": 1.2}
    monkeypatch.setattr(
        gpu_check, "loss_of", lambda *given, **how: true(*given, **how) * off.get(how.get("precision"), 1)
    )

    with pytest.raises(CheckFailed, match=r"the loss is bfloat16/channels_last"):
        CHECKS["precisions"](place)


def test_a_batch_that_always_fits_was_not_halved(place, monkeypatch):
    monkeypatch.setattr(gpu_check, "short_of_memory", lambda *_: nullcontext())

    with pytest.raises(CheckFailed, match="halved 0 times instead of once"):
        CHECKS["memory"](place)


def test_the_names_are_those_of_the_issue_and_a_tiny_run_is_marked():
    assert list(CHECKS) == ["precisions", "input", "memory", "speed", "compile", "federation", "processes"]
    assert all(check.__doc__ for check in CHECKS.values())
    assert run_checks(Place(device="cpu", scratch=None), []) == {}
    assert TINY["load"] == "tiny" in LOADS
    assert Place(device="cpu", scratch=None).load in LOADS
