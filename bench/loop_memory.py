"""Peak memory of the server's loop with 2 and with 16 clients: real messages of ResNet-18 (45 MB), made on demand.

    python -m bench.loop_memory [--clients 2 16] [--rounds 2]

Each count runs in a process of its own. The clients are stand-ins that answer one at a time, as the SuperLink hands
replies out; each answer is read from a file, so that it takes no more memory than what comes from a socket.
`bench.server_memory` measures real processes. A run of a tiny model before the measured one imports all there is, so
what is told is what this model needs above a server that is ready: in MiB, and in models.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Array, ArrayRecord, Message, RecordDict

from bench.replies import answer, enter_run, reply, site
from bench.watch import run_side
from common import config
from common.protocol import wire
from common.settings import Settings
from server.app import Surroundings, federate, initial_model

RESET_HIGH_WATER = "5"  # proc(5), clear_refs


class StandIns:
    """A mailbox behind which `count` clients answer everything with made-up replies of full size."""

    def __init__(self, count: int, size: int, folder: Path) -> None:
        self._count, self._size, self._folder = count, size, folder
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[Message, wire.Task]] = {}
        self._kept: dict[tuple[str, str], RecordDict] = {}  # by kind and splits; arrays of it are in files

    def node_ids(self) -> list[int]:
        return list(range(1, self._count + 1))

    def send(self, messages: Iterable[Message]) -> list[str]:
        """Keeps no more of a message than the task and whom it is from, like a SuperLink that is another process."""
        ids = []
        for message in messages:
            ids.append(str(next(self._numbers)))
            task = wire.Task(**dict(message.content[wire.TASK]))
            message.content = RecordDict()
            self._waiting[ids[-1]] = (message, task)
        return ids

    def receive(self, message_id: str, deadline: float | None = None) -> Message | None:  # noqa: ARG002
        original, task = self._waiting.pop(message_id)
        if task.kind == "join":
            return answer(wire.site_content(site(original.metadata.dst_node_id)), original)
        return answer(self._content(task), original)

    def is_short(self, _message_id: str) -> bool:
        return False

    def _content(self, task: wire.Task) -> RecordDict:
        key = (task.kind, task.splits)
        if key not in self._kept:
            self._kept[key] = self._with_arrays_in_files(wire.reply_content(reply(task, 1)), len(self._kept))
        kept, content = self._kept[key], RecordDict()
        for name, record in kept.items():
            content[name] = record
        content[wire.SUMS] = type(kept[wire.SUMS])(dict(kept[wire.SUMS]) | {"server-round": task.server_round})
        arrays = {
            name: Array(dtype=a.dtype, shape=a.shape, stype=a.stype, data=Path(a.data.decode()).read_bytes())
            for name, a in kept[wire.ARRAYS].items()
        }
        content[wire.ARRAYS] = ArrayRecord(arrays)
        return content

    def _with_arrays_in_files(self, content: RecordDict, number: int) -> RecordDict:
        """The same content, in whose arrays the name of a file stands for the bytes; the change gets its full size.

        That one is a file of zeros without blocks: made here, it would count as the server's memory.
        """
        arrays = {}
        for name, array in content[wire.ARRAYS].items():
            path = self._folder / f"{number}-{name}"
            path.write_bytes(array.data)
            shape = array.shape
            if name == wire.CHANGE:
                shape = (self._size,)
                with path.open("r+b") as file:
                    file.truncate(self._size * len(array.data))
            arrays[name] = Array(dtype=array.dtype, shape=shape, stype=array.stype, data=str(path).encode())
        content[wire.ARRAYS] = ArrayRecord(arrays)
        return content


def _status_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:")) / 1024


def federate_here(count: int, rounds: int, model: dict) -> int:
    """Federate in this process; returns the model's bytes."""
    raw = config.to_mapping(Settings())
    raw["federation"] |= {"rounds": rounds, "min_clients": count}
    raw["tracking"] |= {"enabled": False, "plots": "none", "tensorboard": "none"}
    raw["model"] |= model
    settings = config.from_mapping(raw)
    manifest = initial_model(settings)[1]  # its first model is freed before the run begins
    with tempfile.TemporaryDirectory() as folder:
        surroundings = Surroundings(
            run_folder=Path(folder), stopped=lambda: False, all_nodes_are_here=lambda: True, git_commit="bench"
        )
        (Path(folder) / "clients").mkdir()
        federate(settings, StandIns(count, manifest.size, Path(folder) / "clients"), surroundings)
        outcome = json.loads((Path(folder) / "outcome.json").read_text())
    if outcome["exit_code"] != 0:
        sys.exit(outcome["line"])
    return manifest.num_bytes


def measure_here(count: int, rounds: int) -> dict[str, float]:
    """What this process needs for the run, in MiB and in models."""
    enter_run()
    federate_here(count, rounds, {"backbone": "cnn", "width": 0.125, "embedding_size": 8})
    Path("/proc/self/clear_refs").write_text(RESET_HIGH_WATER)
    before = _status_mib("VmRSS")
    model_mib = federate_here(count, rounds, {}) / 2**20
    peak = _status_mib("VmHWM")
    return {
        "peak_mib": peak, "ready_mib": before, "model_mib": model_mib, "above_mib": peak - before,
        "models": (peak - before) / model_mib,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure_here(arguments.here, arguments.rounds)))
        return
    for count in arguments.clients:
        command = [sys.executable, "-m", "bench.loop_memory", "--rounds", str(arguments.rounds), "--here", str(count)]
        found = run_side(command, cwd=Path.cwd())
        print(
            f"{count:3d} clients: {found['above_mib']:6.0f} MiB above the {found['ready_mib']:.0f} of a server that is"
            f" ready: {found['models']:.2f} models of {found['model_mib']:.1f} MiB"
        )


if __name__ == "__main__":
    main()
