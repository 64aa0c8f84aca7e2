"""Exact search in a large gallery: seconds for one face, and memory.

    python -m bench.gallery_search [--templates 1000000] [--width 512] [--work DIR]

Templates are random directions, one a person, written and opened as a gallery has them: the file is mapped, its pages
are the system's and can be given back.  Told are the first search after opening and the median of ten, and the highest
memory of this process that is not the file's.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from bench.machine import describe
from simulation.recognition.gallery import _mapped, _template_parts
from simulation.recognition.search import best_matches

ROWS_AT_ONCE = 50_000


def drawn(num_rows: int, width: int):
    """Random templates, some at a time."""
    stream = np.random.default_rng(0)
    for begin in range(0, num_rows, ROWS_AT_ONCE):
        rows = stream.normal(size=(min(ROWS_AT_ONCE, num_rows - begin), width)).astype(np.float32)
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


def own_mib() -> float:
    """Memory of this process without what is mapped from files, MiB."""
    usage = psutil.Process().memory_info()
    return (usage.rss - usage.shared) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    number, width = arguments.templates, arguments.width
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        path = Path(folder) / "templates.safetensors"
        with path.open("wb") as file:
            head = True
            for rows in drawn(number, width):
                for part in _template_parts([rows], number, width, lambda _seen: None):
                    if head or not isinstance(part, bytes):
                        file.write(part)
                    head = False
        templates, first_rows = _mapped(path, number, width), np.arange(number)
        before, peak, seconds, cpu_seconds = own_mib(), 0.0, [], []
        for trial in range(11):
            wanted = int(np.random.default_rng(trial).integers(number))
            face = np.array(templates[wanted : wanted + 1])
            began, cpu_began = time.perf_counter(), time.process_time()
            found = best_matches(templates, first_rows, face, top=5)
            seconds.append(time.perf_counter() - began)
            cpu_seconds.append(time.process_time() - cpu_began)
            peak = max(peak, own_mib())
            assert found.people[0, 0] == wanted
    print(json.dumps(describe()))
    print(f"{number:,} templates of {width} numbers, {4 * number * width / 2**20:,.0f} MiB on disk")
    print(f"first search {seconds[0]:.2f} s, median of 10 more {statistics.median(seconds[1:]):.2f} s")
    print(f"CPU: first {cpu_seconds[0]:.2f} CPU-s, median {statistics.median(cpu_seconds[1:]):.2f} CPU-s")
    print(f"memory beside the file: {peak - before:.0f} MiB more than before")


if __name__ == "__main__":
    main()
