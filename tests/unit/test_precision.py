"""How `auto` is resolved: what is set is not tried, and what was tried on this machine is not tried again."""

import json

import pytest
import torch

from common import config, precision
from common.precision import resolve_compute, threads_for

BASE = config.from_mapping(
    {"data": {"image_size": 32}, "model": {"backbone": "cnn", "embedding_size": 16, "width": 0.25}}
)
FASTEST = {"float32/contiguous": 0.3, "float32/channels_last": 0.1, "bfloat16/channels_last": 0.2}


def with_training(settings=BASE, **values):
    for key, value in values.items():
        settings = config.with_value(settings, "training", key, value)
    return settings


@pytest.fixture
def trials(monkeypatch):
    """Stands in for the measurement; returns the candidates that were asked for."""
    asked = []

    def measure(_settings, candidates, *, device, threads):
        asked.append((candidates, device, threads))
        return {f"{p}/{m}": FASTEST[f"{p}/{m}"] for p, m in candidates}

    monkeypatch.setattr(precision, "measure", measure)
    return asked


def resolve(settings, tmp_path, device="cpu", threads=1):
    return resolve_compute(settings, device=device, threads=threads, cache_dir=tmp_path)


@pytest.mark.parametrize("number", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_set_is_taken_without_a_trial(number, layout, tmp_path, trials):
    compute = resolve(with_training(precision=number, memory_format=layout), tmp_path, threads=3)
    assert (compute.precision, compute.memory_format, compute.device, compute.threads) == (number, layout, "cpu", 3)
    assert trials == []
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_the_fastest(tmp_path, trials):
    compute = resolve(BASE, tmp_path)
    assert (compute.precision, compute.memory_format) == ("float32", "channels_last")
    assert trials == [(list(precision.CANDIDATES), "cpu", 1)]


@pytest.mark.parametrize(
    ("values", "candidates"),
    [
        ({"precision": "float32"}, [("float32", "contiguous"), ("float32", "channels_last")]),
        ({"memory_format": "channels_last"}, [("float32", "channels_last"), ("bfloat16", "channels_last")]),
    ],
)
def test_a_half_set_pair_is_tried_among_what_fits(values, candidates, tmp_path, trials):
    resolve(with_training(**values), tmp_path)
    assert [asked[0] for asked in trials] == [candidates]


@pytest.mark.parametrize("values", [{"precision": "bfloat16"}, {"memory_format": "contiguous"}])
def test_a_single_candidate_needs_no_trial(values, tmp_path, trials):
    compute = resolve(with_training(**values), tmp_path)
    assert trials == []
    assert all(getattr(compute, key) == value for key, value in values.items())


def test_mps_computes_in_float32(tmp_path, trials):
    assert resolve(BASE, tmp_path, device="mps").precision == "float32"
    assert all(number == "float32" for number, _ in trials[0][0])


def test_a_trial_serves_the_next_run_and_the_next_client(tmp_path, trials):
    first = resolve(BASE, tmp_path)
    assert resolve(config.with_value(BASE, "run", "seed", 9), tmp_path) == first
    assert len(trials) == 1
    # and the record decides, not the code
    path = tmp_path / "trials.json"
    known = json.loads(path.read_text())
    (key,) = known
    known[key]["bfloat16/channels_last"] = 0.001
    path.write_text(json.dumps(known))
    assert resolve(BASE, tmp_path).precision == "bfloat16"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "backbone", "resnet18"),
        ("model", "embedding_size", 32),
        ("model", "width", 0.5),
        ("data", "image_size", 64),
    ],
)
def test_another_model_is_tried_anew_and_both_are_kept(section, key, value, tmp_path, trials):
    resolve(BASE, tmp_path)
    resolve(config.with_value(BASE, section, key, value), tmp_path)
    resolve(BASE, tmp_path, threads=2)
    assert len(trials) == 3
    resolve(BASE, tmp_path)
    assert len(trials) == 3
    assert len(json.loads((tmp_path / "trials.json").read_text())) == 3


def test_another_machine_or_torch_is_tried_anew(tmp_path, trials, monkeypatch):
    resolve(BASE, tmp_path)
    monkeypatch.setattr(precision, "machine_digest", lambda: "other")
    resolve(BASE, tmp_path)
    monkeypatch.setattr(torch, "__version__", "9.9")
    resolve(BASE, tmp_path)
    assert len(trials) == 3


@pytest.mark.parametrize("content", ["", '{"a": ', "[]"])
def test_a_damaged_record_is_made_anew(content, tmp_path, trials):
    (tmp_path / "trials.json").write_text(content)
    resolve(BASE, tmp_path)
    assert len(trials) == 1
    resolve(BASE, tmp_path)
    assert len(trials) == 1


def test_the_real_trial_measures_every_candidate_and_leaves_no_trace():
    before = torch.random.get_rng_state()
    seconds = precision.measure(BASE, list(precision.CANDIDATES), device="cpu", threads=1)
    assert set(seconds) == {"float32/contiguous", "float32/channels_last", "bfloat16/channels_last"}
    assert all(0 < value < 60 for value in seconds.values())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("setting", "clients", "cores", "expected"),
    [("auto", 1, 8, 8), ("auto", 2, 8, 4), ("auto", 3, 8, 2), ("auto", 16, 8, 1), ("auto", 0, 4, 4), (3, 16, 2, 3)],
)
def test_cores_are_divided_among_the_clients_of_a_machine(setting, clients, cores, expected):
    assert threads_for(with_training(threads=setting), clients, cores) == expected
