"""How `auto` is resolved: what is set is not tried, and what was tried on this machine is not tried again."""

import json
import math

import pytest
import torch

from common import config
from common.errors import UserError
from common.training import autotune as precision
from common.training import compute as computing
from common.training.autotune import resolve_compute, threads_for
from common.training.compute import Compute
from simulation.engine.cluster import resources_of_actor

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


# ---- compiling


@pytest.fixture
def compiling(monkeypatch, trials):  # noqa: ARG001 - no real measurement is made
    """Stands in for the measurement of the compiler: 60 s for a step of 0.15 s instead of the 0.2 s of bfloat16."""
    asked = []

    def measure_compiling(_settings, compute):
        asked.append(compute)
        return {"compile": 60.0, "compiled": 0.15}

    monkeypatch.setattr(precision, "measure_compiling", measure_compiling)
    return asked


def compiles(tmp_path, *, pictures, rounds=1, **values):
    settings = config.with_value(
        with_training(precision="bfloat16", batch_size=32, **values), "federation", "rounds", rounds
    )
    settings = config.with_value(settings, "federation", "local_epochs", 1)
    return resolve_compute(
        settings, device="cpu", threads=1, cache_dir=tmp_path, num_training_pictures=pictures
    ).compiled


def test_compiling_is_off_by_default_and_on_as_set_without_a_trial(tmp_path, trials, compiling):
    assert not compiles(tmp_path, pictures=10**6)
    assert not compiles(tmp_path, pictures=10**6, compile="off")
    assert compiles(tmp_path, pictures=10, compile="on")
    assert not compiles(tmp_path, pictures=10, compile="on", activation_checkpointing=True)
    assert (trials, compiling) == ([], [])


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("pictures", "rounds", "expected"),
    [
        # A step of 32 pictures saves 2 x 0.05 s, so compiling pays back after 600 of them.
        (599 * 32, 1, False),
        (601 * 32, 1, True),
        (640, 29, False),
        (640, 31, True),
    ],
)
def test_auto_compiles_where_it_pays_back_within_the_run(tmp_path, pictures, rounds, expected):
    assert compiles(tmp_path, pictures=pictures, rounds=rounds, compile="auto") == expected


def test_a_short_run_does_not_even_try_the_compiler(tmp_path, compiling):
    """100 steps of 2 x 0.2 s: were 30 % of them saved, 12 s would be gained; no compiler is done by then."""
    assert not compiles(tmp_path, pictures=3200, compile="auto")
    assert compiling == []


def test_the_trial_of_the_compiler_is_made_once(tmp_path, compiling):
    for _ in range(2):
        assert compiles(tmp_path, pictures=100_000, compile="auto")
    assert len(compiling) == 1
    assert not compiling[0].compiled, "it is asked for by what it is compared with"


def test_a_machine_without_a_compiler_is_known_not_to_have_one(monkeypatch, tmp_path):
    monkeypatch.setattr(computing, "_gave_up", False)

    def network(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(precision, "compiled", lambda: network)
    compute = resolve_compute(
        with_training(precision="float32", memory_format="contiguous"), device="cpu", threads=1, cache_dir=tmp_path
    )
    assert precision.measure_compiling(BASE, compute) == {"compile": math.inf, "compiled": math.inf}
    assert computing.is_given_up()


# ---- CUDA, by what is asked of it


def candidates_on_cuda(monkeypatch, tmp_path, trials, *, has_bfloat16=True, **values):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bfloat16)
    monkeypatch.setattr(
        precision, "measure", lambda _s, candidates, **_: trials.append(candidates) or {"/".join(candidates[-1]): 1.0}
    )
    found = resolve(with_training(**values), tmp_path, device="cuda:0")
    return trials[-1] if trials else [], (found.precision, found.memory_format)


def test_on_cuda_auto_is_tf32_or_bfloat16(monkeypatch, tmp_path, trials):
    tried, taken = candidates_on_cuda(monkeypatch, tmp_path, trials)
    assert tried == [("tf32", "contiguous"), ("tf32", "channels_last"), ("bfloat16", "channels_last")]
    assert taken == ("bfloat16", "channels_last")


def test_a_gpu_without_bfloat16_takes_float16(monkeypatch, tmp_path, trials):
    _, taken = candidates_on_cuda(monkeypatch, tmp_path, trials, has_bfloat16=False)
    assert taken == ("float16", "channels_last")


@pytest.mark.parametrize("number", ["float32", "float16"])
def test_on_cuda_what_is_set_is_taken(monkeypatch, tmp_path, trials, number):
    assert candidates_on_cuda(monkeypatch, tmp_path, trials, precision=number) == ([], (number, "channels_last"))


@pytest.mark.parametrize("number", ["tf32", "float16"])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_precision_that_only_cuda_has_is_refused_elsewhere(number, device, tmp_path):
    line = (
        f"training.precision = '{number}' needs a CUDA device, and this client's is {device}; choose float32, bfloat16"
    )
    with pytest.raises(UserError, match=line):
        resolve(with_training(precision=number), tmp_path, device=device)


@pytest.mark.parametrize(("number", "products"), [("tf32", "tf32"), ("float32", "ieee"), ("bfloat16", "ieee")])
def test_tf32_is_switched_as_the_precision_says(monkeypatch, number, products):
    """What PyTorch is told, without a GPU: the switches are its own and work anywhere."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    threads = torch.get_num_threads()
    try:
        compute = Compute(device="cuda:0", precision=number, memory_format="channels_last", threads=1)
        compute.place(torch.nn.Linear(2, 2))
        after = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
        assert after == (products, products)
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("clients", [1, 2, 3, 5, 50])
def test_an_actor_of_the_simulation_has_the_cores_that_its_threads_need(cores, clients):
    """Otherwise actors would take turns on a core with more threads than it has, or leave cores idle."""
    actor = resources_of_actor(clients, num_cpus=cores, num_gpus=0)
    assert actor.num_cpus == threads_for(BASE, clients, cores)
