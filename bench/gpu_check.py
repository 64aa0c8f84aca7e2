"""What only a GPU shows, in under six minutes on one: a JSON file with every figure, and a line for each check.

    python -m bench.gpu_check [NAME ...] [--list] [--device auto] [--tiny] [--scratch FOLDER] [--out FOLDER]

Without a GPU nothing is checked, and that is said; the exit code is 0, since nothing failed. `--device cuda:0` insists
on one (exit code 2 without it). `--device cpu --tiny` goes through the same code on the CPU: what it writes are no
figures of speed. The exit code is 1 where a check failed.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe

LIMIT_S = 360.0
NONE = "GPU: not measured: torch sees no CUDA device here"
# How far the mean loss of a few steps may be from float32's: 8 bits of mantissa, 11, 11, and another order of adding.
TOLERANCES = {"bfloat16": 5e-2, "float16": 2e-2, "tf32": 1e-2, "float32": 2e-3}
ROOM = (0.75, 0.65, 0.55)  # of what a whole batch takes beyond the model; half a batch fits into the last

Figures = dict[str, Any]


class CheckFailed(Exception):
    """What was seen instead of what should be; one line."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how large."""

    device: str
    scratch: Path
    backbone: str = "resnet50"
    width: float = 1.0
    side_px: int = 112
    people: int = 64
    pictures: int = 48  # of each person
    batch: int = 128
    repeats: int = 3
    rounds: int = 2
    load: str = "workload"  # of the federations; of bench.workload.LOADS

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")


TINY = {
    "backbone": "cnn",
    "width": 0.25,
    "side_px": 32,
    "people": 4,
    "pictures": 4,
    "batch": 8,
    "repeats": 1,
    "rounds": 1,
    "load": "tiny",
}


# -- what is trained ---------------------------------------------------------------------------------------------------


def settings_of(place: Place) -> Any:
    """The run's settings; small steps, so that precisions stay comparable for an epoch."""
    from common import config

    raw = config.to_mapping(config.from_mapping({}))
    raw["data"]["image_size"] = place.side_px
    raw["model"] |= {"backbone": place.backbone, "width": place.width, "embedding_size": 64 if place.width < 1 else 512}
    raw["training"] |= {"batch_size": place.batch, "lr": 0.005, "optimiser": "sgd", "head_warmup_epochs": 0}
    return config.from_mapping(raw)


def pack_of(place: Place) -> Any:
    """Noise around one picture for each person, in memory."""
    from common.faces.pack import FacePack
    from common.faces.splits import Split

    random, count = np.random.default_rng(1), place.people * place.pictures
    person = np.repeat(np.arange(place.people, dtype=np.int64), place.pictures)
    base = random.integers(40, 216, (place.people, place.side_px, place.side_px, 3), dtype=np.int16)
    pictures = np.empty((count, place.side_px, place.side_px, 3), dtype=np.uint8)
    for row, who in enumerate(person):
        pictures[row] = base[who] + random.integers(-40, 40, base[who].shape, dtype=np.int16)
    return FacePack(
        pictures=pictures,
        person=person,
        people=tuple(f"p{number}" for number in range(place.people)),
        split=np.full(count, Split.TRAIN, dtype=np.int8),
        key="gpu-check",
        quarantined=(),
        dataset="folder",
    )


class Trainee:
    """One model and its optimiser, trained by our own loop as a client trains it."""

    def __init__(self, place: Place, pack: Any, *, device: str = "", **compute: Any) -> None:
        from common.models.recogniser import build_recogniser
        from common.system.runtime import num_cores
        from common.training.loop import Compute, make_optimiser

        self.settings, self.pack = settings_of(place), pack
        chosen = {"precision": "float32", "memory_format": "contiguous", "threads": num_cores()} | compute
        self.compute = Compute(device=device or place.device, **chosen)
        self.recogniser = build_recogniser(
            self.settings.model, num_people=pack.num_classes, image_size=place.side_px, backbone_seed=1, head_seed=2
        )
        self.compute.place(self.recogniser)
        self._optimiser = make_optimiser(self.recogniser, self.settings.training)
        self._epochs = 0

    def epoch(self) -> Any:
        """One more; returns its sums, when the device has done all of it."""
        from common.training.loop import train_epochs

        now, self._epochs = self._epochs, self._epochs + 1
        return train_epochs(
            self.recogniser, self._optimiser, self.pack, settings=self.settings, compute=self.compute,
            epochs=range(now, now + 1), total_epochs=100, stream_name="gpu-check",
        )  # fmt: skip


def loss_of(place: Place, pack: Any, **compute: Any) -> float:
    """The mean loss of the first epoch."""
    sums = Trainee(place, pack, **compute).epoch()
    return sums.loss_sum / sums.num_pictures


# -- memory ------------------------------------------------------------------------------------------------------------


def forget(place: Place) -> None:
    """Give back what nobody holds, and count the peak anew."""
    import gc

    import torch

    gc.collect()
    if place.is_gpu:
        torch.cuda.synchronize(place.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)


def peak_mib(place: Place) -> float | None:
    """Of tensors since the last `forget`; None on the CPU, which has no such count."""
    import torch

    return round(torch.cuda.max_memory_allocated(place.device) / 2**20, 1) if place.is_gpu else None


@contextmanager
def short_of_memory(place: Place, trainee: Trainee, limit_bytes: int) -> Iterator[None]:
    """In here a whole batch finds no memory: by a limit on the GPU, by an error that is raised for it on the CPU."""
    import torch

    if place.is_gpu:
        whole = torch.cuda.get_device_properties(place.device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit_bytes / whole, place.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, place.device)
        return

    def refuse(_module: Any, inputs: Any) -> None:
        if len(inputs[0]) > place.batch // 2:
            raise torch.OutOfMemoryError("made up on the CPU")

    handle = trainee.recogniser.backbone.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


# -- the checks --------------------------------------------------------------------------------------------------------


def check_precisions(place: Place) -> Figures:
    """Each precision and memory format beside float32 of the CPU: the mean loss of an epoch of a few steps."""
    import torch

    few = dataclasses.replace(place, pictures=max(2, min(place.pictures, 4)), batch=min(place.batch, 32))
    pack = pack_of(few)
    wanted = loss_of(few, pack, device="cpu")
    formats = [("float32", "contiguous"), ("float32", "channels_last"), ("bfloat16", "channels_last")]
    if place.is_gpu:
        formats += [("tf32", "contiguous"), ("tf32", "channels_last"), ("float16", "channels_last")]
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            formats.remove(("bfloat16", "channels_last"))
    found, wrong = {}, []
    for precision, memory_format in formats:
        loss = loss_of(few, pack, precision=precision, memory_format=memory_format)
        found[f"{precision}/{memory_format}"] = loss / wanted - 1.0
        if not abs(loss / wanted - 1.0) <= TOLERANCES[precision]:
            wrong.append(f"{precision}/{memory_format} {loss:.5f}")
    if wrong:
        raise CheckFailed(f"the loss is {', '.join(wrong)}, and {wanted:.5f} in float32 on the CPU")
    return {"loss": wanted, "relative_difference": found}


def check_compile(place: Place) -> Figures:
    """torch.compile: the same loss as without, no giving up, and what it saves."""
    from common.training.compute import is_given_up

    pack = pack_of(dataclasses.replace(place, pictures=max(2, place.pictures // 4)))
    fast = {"precision": "bfloat16", "memory_format": "channels_last"}
    losses, seconds = {}, {}
    for name, compiled in (("eager", False), ("compiled", True)):
        trainee = Trainee(place, pack, compiled=compiled, **fast)
        began = time.perf_counter()
        sums = trainee.epoch()
        first = time.perf_counter() - began
        losses[name] = sums.loss_sum / sums.num_pictures
        began = time.perf_counter()
        trainee.epoch()
        seconds[name] = {"first_epoch": first, "epoch": time.perf_counter() - began}
    if is_given_up():
        raise CheckFailed("torch.compile failed and training went on without it; the log above says why")
    if not abs(losses["compiled"] / losses["eager"] - 1.0) <= TOLERANCES["bfloat16"]:
        raise CheckFailed(f"the loss is {losses['compiled']:.5f} compiled and {losses['eager']:.5f} eager")
    return {"loss": losses, "seconds": seconds}


def check_memory(place: Place) -> Figures:
    """A batch that does not fit is halved once, and training ends."""
    pack = pack_of(dataclasses.replace(place, pictures=max(2, place.pictures // 8)))
    forget(place)
    held = Trainee(place, pack)
    held.epoch()
    whole = _reserved(place)
    del held
    forget(place)
    for share in ROOM:
        trainee = Trainee(place, pack)
        trainee.recogniser.zero_grad(set_to_none=True)
        own = _reserved(place)
        with short_of_memory(place, trainee, own + int(share * (whole - own))):
            sums = trainee.epoch()
        if sums.num_halvings:
            break
        del trainee
        forget(place)
    if sums.num_halvings != 1 or not np.isfinite(sums.loss_sum):
        raise CheckFailed(f"batches were halved {sums.num_halvings} times instead of once, loss {sums.loss_sum}")
    return {
        "room": share,
        "num_halvings": sums.num_halvings,
        "whole_batch_mib": whole / 2**20,
        "model_mib": own / 2**20,
    }


def _reserved(place: Place) -> int:
    """Bytes that torch holds of the device; 0 on the CPU."""
    import torch

    return torch.cuda.max_memory_reserved(place.device) if place.is_gpu else 0


def check_input(place: Place) -> Figures:
    """What comes to the device is what was read, though a thread reads ahead into pinned memory; and how fast."""
    from common.faces.batches import epoch_batches

    settings, pack = settings_of(place), pack_of(place)
    stream = partial(epoch_batches, pack, settings, stream_name="gpu-check", epoch=0)
    for there, here in zip(stream(device=place.device), stream(device="cpu"), strict=True):
        if there.pictures.device.type != place.device.split(":")[0]:
            raise CheckFailed(f"a batch is on {there.pictures.device}")
        far = float((there.pictures.cpu() - here.pictures).abs().max())
        if far > 1e-3 or not bool((there.labels.cpu() == here.labels).all()):
            raise CheckFailed(f"a batch differs by {far:g} from what was read")
    began, count = time.perf_counter(), 0
    for batch in stream(device=place.device):
        count += len(batch.labels)
    forget(place)  # waits
    return {"pictures_per_second": count / (time.perf_counter() - began)}


def check_speed(place: Place) -> Figures:
    """An epoch by our loop beside a plain AMP loop of the same network, in turns: pictures a second, peak memory."""
    pack = pack_of(place)
    fast = {"precision": "bfloat16", "memory_format": "channels_last"}
    sides: dict[str, Callable[[], Callable[[], Any]]] = {
        "ours": lambda: Trainee(place, pack, **fast).epoch,
        "plain": lambda: plain_loop(place, pack),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float | None] = {}
    for _ in range(place.repeats):
        for name, make in sides.items():
            forget(place)
            epoch = make()
            epoch()  # what is chosen and reserved once
            began = time.perf_counter()
            epoch()
            rates[name].append(len(pack) / (time.perf_counter() - began))
            peaks[name] = peak_mib(place)
            del epoch
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    return {
        "what": f"{place.backbone}, {place.side_px} px, batches of {place.batch}, {len(pack)} pictures, bfloat16",
        "pictures_per_second": rates,
        "ours_of_plain": medians["ours"] / medians["plain"],
        "peak_mib": peaks,
    }


def plain_loop(place: Place, pack: Any) -> Callable[[], None]:
    """An epoch as one writes it by hand: a DataLoader into pinned memory, autocast, SGD; no augmentation.

    The network, its head and the pictures are those of our side.
    """
    import torch
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset

    trainee = Trainee(place, pack, precision="bfloat16", memory_format="channels_last")
    recogniser, training = trainee.recogniser, trainee.settings.training
    pictures = torch.from_numpy(np.asarray(pack.pictures[np.arange(len(pack))])).permute(0, 3, 1, 2).contiguous()
    loader = DataLoader(
        TensorDataset(pictures, torch.from_numpy(pack.training_labels)), batch_size=place.batch, shuffle=True,
        pin_memory=place.is_gpu,
    )  # fmt: skip
    optimiser = torch.optim.SGD(
        recogniser.parameters(), lr=training.lr, momentum=0.9, weight_decay=training.weight_decay, nesterov=True
    )
    device = place.device

    def epoch() -> None:
        recogniser.train()
        for read, labels in loader:
            batch = read.to(device, non_blocking=True).float().div_(127.5).sub_(1.0)
            targets = labels.to(device, non_blocking=True)
            with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
                embeddings = recogniser.branch_embeddings(batch.contiguous(memory_format=torch.channels_last), None)
            logits = recogniser.branch_logits("sa", embeddings["sa"].float(), targets)
            optimiser.zero_grad(set_to_none=True)
            functional.cross_entropy(logits, targets).backward()
            torch.nn.utils.clip_grad_norm_(recogniser.parameters(), training.clip_norm)
            optimiser.step()
        if place.is_gpu:
            torch.cuda.synchronize(device)

    return epoch


def check_federation(place: Place) -> Figures:
    """`flower-simulation` on two synthetic data sets: two clients that train on the device at the same time."""
    from bench.comparison import Place as BenchPlace
    from bench.sides import our_simulation

    found = our_simulation(BenchPlace(scratch=place.scratch, quick=True), rounds=place.rounds, load=place.load)
    return found | _where_it_ran(place)


def check_processes(place: Place) -> Figures:
    """The same data through `flower-server` and two `flower-client` processes, which share the device."""
    from bench.comparison import Place as BenchPlace
    from bench.sides import our_deployment

    bench = BenchPlace(scratch=place.scratch, quick=True)
    found = our_deployment(bench, rounds=place.rounds, codec="float32", load=place.load)
    return found | _where_it_ran(place)


def _where_it_ran(place: Place) -> Figures:
    """The devices that the newest run's clients told of; they are to be this check's."""
    from bench.our_run import newest_run

    run = newest_run(place.scratch / "ours")
    told = [json.loads(line) for line in (run / "spool.jsonl").read_text().splitlines()]
    devices = sorted({line["tags"]["device"] for line in told if "device" in line.get("tags", {})})
    if devices != [place.device.split(":")[0]]:
        raise CheckFailed(f"its clients trained on {', '.join(devices) or 'nothing that they told'}")
    return {"devices": devices, "outcome": json.loads((run / "outcome.json").read_text())}


CHECKS: dict[str, Callable[[Place], Figures]] = {
    "precisions": check_precisions,
    "input": check_input,
    "memory": check_memory,
    "speed": check_speed,
    "compile": check_compile,
    "federation": check_federation,
    "processes": check_processes,
}


# -- the report --------------------------------------------------------------------------------------------------------


def gpu_of(device: str) -> dict[str, Any] | None:
    """The device's name and memory; None where it is none."""
    if not device.startswith("cuda"):
        return None
    import torch

    about = torch.cuda.get_device_properties(device)
    return {"name": about.name, "memory_gib": round(about.total_memory / 2**30, 1), "cuda": torch.version.cuda}


def run_checks(place: Place, names: list[str]) -> dict[str, Any]:
    """Each by itself, a failure stops no other: {"input": {"ok": True, "seconds": 3.1, "figures": {...}}}."""
    report: dict[str, Any] = {}
    for name in names:
        began = time.perf_counter()
        try:
            told: dict[str, Any] = {"ok": True, "figures": CHECKS[name](place)}
        except Exception as error:  # whatever a device may end with is what this is for
            lines = str(error).strip().splitlines() or [""]
            told = {"ok": False, "failed": f"{type(error).__name__}: {lines[0][:400]}"}
        report[name] = told | {"seconds": round(time.perf_counter() - began, 2)}
        forget(place)
        ending = "ok" if told["ok"] else told["failed"]
        print(f"{name:12} {report[name]['seconds']:6.1f} s  {ending}", file=sys.stderr, flush=True)
    return report


def write(out: Path, report: dict[str, Any]) -> Path:
    """The report as a file of its own; returns it."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"gpu-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    return file


def resolve(wanted: str) -> str:
    """A device, "" where `auto` finds no GPU; exits with 2 where another is not there."""
    import torch

    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else ""
    if wanted != "cpu" and not torch.cuda.is_available():
        print(f"--device {wanted} is not on this machine: torch sees no CUDA device; leave it out.", file=sys.stderr)
        raise SystemExit(2)
    return "cuda:0" if wanted == "cuda" else wanted


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--tiny", action="store_true", help="so small that nothing is measured")
    parser.add_argument(
        "--scratch", type=Path, default=Path(".facefed/bench/gpu"), help="where pictures and runs are kept"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(f"{name:12} {check.__doc__}" for name, check in CHECKS.items()))
        return 0
    if unknown := [name for name in arguments.names if name not in CHECKS]:
        print(f"{unknown[0]!r} is no check; choose {', '.join(CHECKS)}.", file=sys.stderr)
        return 2
    device = resolve(arguments.device)
    report: dict[str, Any] = {"machine": describe(), "device": device or "none", "gpu": gpu_of(device), "checks": {}}
    if not device:
        print(f"{NONE}. {write(arguments.out, report | {'note': NONE})} says so too.")
        return 0
    place = Place(device=device, scratch=arguments.scratch.resolve(), **(TINY if arguments.tiny else {}))
    began = time.perf_counter()
    report["checks"] = run_checks(place, arguments.names or list(CHECKS))
    report |= {"seconds": round(time.perf_counter() - began, 1), "limit_s": LIMIT_S, "tiny": arguments.tiny}
    print(f"every value: {write(arguments.out, report)}")
    return 0 if all(check["ok"] for check in report["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
