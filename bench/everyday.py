"""What a user waits for: indexing, drawing, packing, reopening a pack, and `--help`; medians of interleaved runs.

    python -m bench.everyday [--celeba-lists DIR]

DIR holds the official identity_CelebA.txt and list_eval_partition.txt, for the time to index 202,599 pictures.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common.faces.index import read_index
from common.faces.pack import open_pack
from common.settings import DataSettings
from simulation.data.synthetic import SynthSettings, write_dataset

PROGRAMS = Path(sys.executable).parent
REPEATS = 5
NUM_PEOPLE, NUM_PICTURES = 40, 12


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def help_of(program: str) -> Callable[[], object]:
    return lambda: subprocess.run([str(PROGRAMS / program), "--help"], stdout=subprocess.DEVNULL, check=True)


def draw(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    settings = SynthSettings(layout="celeba", num_people=NUM_PEOPLE, pictures_per_person=NUM_PICTURES)
    write_dataset(settings, folder, num_processes=1)


def pack(data: Path, cache: Path) -> None:
    open_pack("celeba", data, DataSettings(), cache, workers=1)


def pack_afresh(data: Path, cache: Path) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    pack(data, cache)


def official_lists(source: Path, folder: Path) -> Path:
    """A CelebA tree with the official lists and no pictures."""
    (folder / "img_align_celeba").mkdir(parents=True)
    for name in ("identity_CelebA.txt", "list_eval_partition.txt"):
        shutil.copyfile(source / name, folder / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--celeba-lists", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        draw(folder / "data")
        jobs: dict[str, Callable[[], object]] = {
            f"draw {NUM_PEOPLE * NUM_PICTURES} pictures, one core": lambda: draw(folder / "drawn"),
            f"pack {NUM_PEOPLE * NUM_PICTURES} pictures, one core": lambda: pack_afresh(
                folder / "data", folder / "packs"
            ),
            "open the pack again": lambda: pack(folder / "data", folder / "packs"),
        }
        if arguments.celeba_lists:
            tree = official_lists(arguments.celeba_lists, folder / "official")
            jobs["index 202,599 pictures"] = lambda: read_index("celeba", tree)
        for program in ("flower-server", "flower-client", "flower-simulation", "facefed"):
            jobs[f"{program} --help"] = help_of(program)
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(REPEATS):
            for name, job in jobs.items():
                seconds[name].append(timed(job))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:40} {median:8.3f} s  (min {min(seconds[name]):.3f}, max {max(seconds[name]):.3f})")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
