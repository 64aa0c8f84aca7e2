"""The server's checkpoints: which rounds are kept, and that the state file never names what is not there."""

import json

import numpy as np
import pytest
import torch
from tiny_federation import MANIFEST

import server.record.checkpoint
from common.errors import CheckpointError
from common.protocol.parameters import buffer_sha256, manifest_of
from server.record.checkpoint import RunCheckpoints
from server.record.history import History


def model_of(step):
    return np.arange(MANIFEST.size, dtype=np.float32) + step


def moments_of(step):
    return {"first": model_of(step) / 3, "second": model_of(step) ** 2}


def rounds_in(folder, kind="round"):
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob(f"{kind}-*"))


def saved(folder, last, best=0):
    checkpoints, history = RunCheckpoints(folder, MANIFEST), History(best_round=best)
    for step in range(last + 1):
        checkpoints.save(step, model_of(step), moments_of(step), history, {})
    return checkpoints


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, MANIFEST)
    model = np.float32([0.1, -0.0, 1e-45, 3e38, 1 / 3, 2, -7])
    sha256 = checkpoints.save(3, model, {}, History(), {})
    assert checkpoints.load(3).tobytes() == model.tobytes()
    assert sha256 == buffer_sha256(checkpoints.load(3))


def test_the_last_two_rounds_and_the_best_are_kept(tmp_path):
    saved(tmp_path, 6, best=2)
    assert rounds_in(tmp_path) == [2, 5, 6]
    assert rounds_in(tmp_path, "moments") == [5, 6]  # nothing goes on from the best


def test_the_state_file_names_round_best_model_and_layout(tmp_path):
    saved(tmp_path, 4, best=3)
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["round"], state["best_round"], state["model"]) == (4, 3, "round-000004.safetensors")
    assert state["sha256"] == buffer_sha256(model_of(4))
    assert state["manifest"] == MANIFEST.digest
    assert state["moments"] == "moments-000004.safetensors"


def test_the_moments_are_loaded_bit_for_bit_with_their_model_only(tmp_path):
    checkpoints = saved(tmp_path, 4)
    moments = checkpoints.load_moments(4, buffer_sha256(model_of(4)))
    assert {k: v.tobytes() for k, v in moments.items()} == {k: v.tobytes() for k, v in moments_of(4).items()}
    with pytest.raises(CheckpointError, match=r"moments-000004\.safetensors does not go with the model of round 4"):
        checkpoints.load_moments(4, buffer_sha256(model_of(3)))
    checkpoints.moments_path(4).write_bytes(checkpoints.moments_path(4).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        checkpoints.load_moments(4, buffer_sha256(model_of(4)))


def test_a_strategy_without_moments_writes_no_file_of_them(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, MANIFEST)
    checkpoints.save(1, model_of(1), {}, History(), {})
    assert rounds_in(tmp_path, "moments") == []
    assert json.loads((tmp_path / "state.json").read_text())["moments"] == ""
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.load_moments(1, buffer_sha256(model_of(1)))


@pytest.mark.parametrize("breaks", ["write_tensors", "write_sealed_json"])
def test_a_crash_while_saving_leaves_the_earlier_round_whole(tmp_path, monkeypatch, breaks):
    checkpoints = saved(tmp_path, 4)

    def crash(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(server.record.checkpoint, breaks, crash)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(5, model_of(5), moments_of(5), History(), {})
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["round"] == 4
    assert buffer_sha256(checkpoints.load(state["round"])) == state["sha256"]
    moments = checkpoints.load_moments(4, state["sha256"])  # of round 4 too, not of the round that broke off
    assert moments["first"].tobytes() == moments_of(4)["first"].tobytes()


def test_no_half_written_file_is_left(tmp_path):
    saved(tmp_path, 2)
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_of_another_model_is_refused_by_the_tensors_name(tmp_path):
    saved(tmp_path, 1)
    other = manifest_of({"backbone.a": torch.zeros(3), "backbone.b": torch.zeros(4)})
    with pytest.raises(
        CheckpointError, match=r"backbone\.b is F32 of shape \(2, 2\); the model needs it with shape \(4,\)"
    ):
        RunCheckpoints(tmp_path, other).load(1)


def test_a_missing_and_a_damaged_checkpoint_are_refused_by_their_path(tmp_path):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"round-000009\.safetensors does not exist"):
        checkpoints.load(9)
    content = checkpoints.path(1).read_bytes()
    checkpoints.path(1).write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match=r"round-000001\.safetensors is not a whole safetensors file"):
        checkpoints.load(1)
