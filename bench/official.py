"""A set of VGGFace2's layout and people at size: index, pack, kill and go on, open again, read, score, beside peers.

    python -m bench.official --pictures 300000 [--source DIR] [--meta identity_meta.csv] [--folder DIR] [--side 112]

The set has the official 9,131 people (8,631 + 500) with the official counts (where --meta has them, else drawn) in
proportion to --pictures. Its files are those below --source (JPEG; without it, blurred noise of 250 px), each
stamped with a comment of its own, so that no two are equal. Every step is a process of its own: CPU-seconds and
peak memory are its and its children's. A round's scoring is that of the official set whatever --pictures is: random
embeddings of as many pictures and people (`bench.scoring`). Peers: torchvision's ImageFolder and, where it is
installed, webdataset. What is extrapolated to 3,311,286 pictures is said to be. Each figure is printed as it is found;
everything made is deleted at the end.
"""

import argparse
import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from common.faces.align import TEMPLATE_112_PX

OFFICIAL = 3_311_286
TRAIN_PEOPLE, TEST_PEOPLE = 8_631, 500
SMALLEST, USUAL, LARGEST = 80, 362, 843  # pictures of a person, arXiv:1710.08092
NUM_RANDOM, BATCH = 4_000, 32


def counts(meta: Path | None, total: int) -> list[tuple[str, bool, int]]:
    """(person, trained on, pictures) in official order; counts in proportion to `total`, at least three each."""
    random = np.random.default_rng(1)
    people = [(f"n{number:06d}", number > TEST_PEOPLE, 0) for number in range(1, TRAIN_PEOPLE + TEST_PEOPLE + 1)]
    if meta is not None:
        with meta.open(encoding="utf-8") as file:
            rows = [row for row in csv.reader(file, skipinitialspace=True) if row and row[0].strip().startswith("n")]
        people = []
        for row in rows:
            numbers = [field.strip() for field in row[2:4] if field.strip().isdigit()]
            people.append((row[0].strip(), numbers[-1:] == ["1"], int(numbers[0]) if len(numbers) == 2 else 0))
    drawn = np.clip(random.normal(USUAL, 110, len(people)), SMALLEST, LARGEST)
    size = np.array([count or guess for (_, _, count), guess in zip(people, drawn, strict=True)], dtype=np.float64)
    scaled = np.maximum(3, np.floor(size * total / size.sum() + random.random(len(size)))).astype(int)
    return [(name, trained, int(count)) for (name, trained, _), count in zip(people, scaled, strict=True)]


def sources(folder: Path | None) -> list[bytes]:
    """The content of the pictures that are stamped."""
    if folder is not None:
        return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:1000]]
    random, found = np.random.default_rng(2), []
    for _ in range(200):
        picture = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((250, 250), 3)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def make(root: Path, options: argparse.Namespace) -> int:
    """Write the set; returns its number of pictures."""
    random, contents, number = np.random.default_rng(3), sources(options.source), 0
    rows: dict[str, list[str]] = {"train": [], "test": []}
    lists: dict[str, list[str]] = {"train": [], "test": []}
    middle = TEMPLATE_112_PX - 56
    for person, trained, count in counts(options.meta, options.pictures):
        part = "train" if trained else "test"
        (root / part / person).mkdir(parents=True)
        for k in range(1, count + 1):
            payload = contents[number % len(contents)]
            stamp = b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big")  # a comment segment
            (root / part / person / f"{k:04d}_01.jpg").write_bytes(payload[:2] + stamp + payload[2:])
            turn, scale = random.normal(0, 0.12), random.uniform(1.05, 1.35)
            linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            points = (middle @ linear.T + 125).ravel()
            rows[part].append(f'"{person}/{k:04d}_01",' + ",".join(f"{value:.3f}" for value in points))
            lists[part].append(f"{person}/{k:04d}_01.jpg")
            number += 1
    (root / "bb_landmark").mkdir()
    for part in rows:
        head = "NAME_ID," + ",".join(f"P{i}X,P{i}Y" for i in range(1, 6))
        (root / "bb_landmark" / f"loose_landmark_{part}.csv").write_text("\n".join([head, *rows[part], ""]))
        (root / f"{part}_list.txt").write_text("\n".join([*lists[part], ""]))
    return number


def index_step(root: Path, _cache: Path, _options: argparse.Namespace) -> dict:
    from common.faces.index import read_index

    return {"pictures": len(read_index("vggface2", root))}


def _open(root: Path, cache: Path, options: argparse.Namespace, progress=None):
    from common.faces.pack import open_pack
    from common.settings import DataSettings

    data = DataSettings(image_size=options.side, pack=options.pack)
    return open_pack("vggface2", root, data, cache, workers=options.workers, progress=progress)


def pack_step(root: Path, cache: Path, options: argparse.Namespace) -> dict:
    seen: list[int] = []

    def tell(done: int, _: int) -> None:
        seen.append(done)
        print(done, flush=True, file=sys.stderr)

    began = time.perf_counter()
    pack = _open(root, cache, options, tell)
    on_disk = sum(file.stat().st_size for file in (cache / pack.key).iterdir())
    return {
        "pictures": len(pack), "began_at": seen[0] if seen else len(pack), "quarantined": len(pack.quarantined),
        "bytes": on_disk, "img_per_s": (len(pack) - (seen[0] if seen else 0)) / (time.perf_counter() - began),
    }  # fmt: skip


def open_step(root: Path, cache: Path, options: argparse.Namespace) -> dict:
    pack = _open(root, cache, options)
    return {"pictures": len(pack), "by_folders": any("no folder changed" in note for note in pack.account.notes)}


def batch_step(root: Path, cache: Path, options: argparse.Namespace) -> dict:
    """The first training batch, from the open pack on."""
    from common.faces.batches import epoch_batches
    from common.settings import Settings

    pack = _open(root, cache, options)
    began = time.perf_counter()
    next(epoch_batches(pack, Settings(), device="cpu", stream_name="vggface2", epoch=0))
    return {"first_batch_s": time.perf_counter() - began}


def read_step(root: Path, cache: Path, options: argparse.Namespace) -> dict:
    """Random pictures in batches, of a pack that the system has forgotten, and again."""
    pack = _open(root, cache, options)
    for file in (cache / pack.key).glob("*.pictures"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rows = np.random.default_rng(4).choice(len(pack), min(NUM_RANDOM, len(pack)), replace=False)
    found: dict[str, float] = {}
    for name in ("cold", "warm"):
        before, began, cpu = _read_bytes(), time.perf_counter(), time.process_time()
        total = sum(pack.pictures[np.sort(part)].nbytes for part in np.array_split(rows, max(1, len(rows) // BATCH)))
        found[f"{name}_img_per_s"] = len(rows) / (time.perf_counter() - began)
        found[f"{name}_img_per_cpu_s"] = len(rows) / (time.process_time() - cpu)
        if name == "cold":
            kept = sum(file.stat().st_size for file in (cache / pack.key).glob("*.pictures")) / len(pack)
            found["times_the_bytes"] = (_read_bytes() - before) / (kept * len(rows))
    return {**found, "decoded_bytes": total}


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def image_folder_step(root: Path, _cache: Path, options: argparse.Namespace) -> dict:
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)
    began = time.process_time()
    data = ImageFolder(
        str(root / "train"), transforms.Compose([transforms.Resize(options.side), transforms.ToTensor()])
    )
    index_cpu_s = time.process_time() - began
    told = _reading(lambda: iter(DataLoader(data, batch_size=BATCH, shuffle=True)))
    return {"pictures": len(data), "index_cpu_s": index_cpu_s, **told}


def webdataset_step(root: Path, cache: Path, options: argparse.Namespace) -> dict:
    """The first training pictures as one tar, read with a shuffled buffer, resized as ImageFolder's."""
    try:
        import webdataset
    except ImportError:
        return {"not compared": "webdataset is not installed"}
    import io
    import tarfile

    import torch
    from torchvision import transforms

    began = time.process_time()
    paths = sorted((root / "train").rglob("*.jpg"))[:NUM_RANDOM]
    with tarfile.open(cache / "peer.tar", "w") as tar:
        for number, path in enumerate(paths):
            for ending, content in (("jpg", path.read_bytes()), ("cls", b"0")):
                about = tarfile.TarInfo(f"{number:06d}.{ending}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    made_cpu_s = time.process_time() - began
    torch.set_num_threads(1)
    change = transforms.Compose([transforms.Resize(options.side), transforms.ToTensor()])
    data = webdataset.WebDataset(str(cache / "peer.tar"), shardshuffle=False).shuffle(1000).decode("pil")
    told = _reading(lambda: iter(data.to_tuple("jpg", "cls").map_tuple(change, int).batched(BATCH)))
    (cache / "peer.tar").unlink()
    return {"tar_of": len(paths), "tar_cpu_s": made_cpu_s, **told}


def _reading(begin: Callable[[], Iterator]) -> dict:
    """How a peer's batches come: seconds to the first one, then pictures a CPU-second over twenty."""
    began = time.perf_counter()
    batches = begin()
    next(batches)
    first_s = time.perf_counter() - began
    began = time.process_time()
    for _ in range(20):
        next(batches)
    return {"first_batch_s": first_s, "img_per_cpu_s": 20 * BATCH / (time.process_time() - began)}


def _scored(case: str) -> dict:
    from types import SimpleNamespace

    from bench import scoring

    options = SimpleNamespace(
        pictures=scoring.USUAL_PICTURES[case], people=scoring.USUAL_PEOPLE[case], max_pairs=10**9, head="cosface"
    )
    found = scoring.CASES[case](options)
    return {"pictures": options.pictures, "people": options.people, **found}


def closed_step(_root: Path, _cache: Path, _options: argparse.Namespace) -> dict:
    """A round's closed set of the official size."""
    return _scored("closed")


def pairs_step(_root: Path, _cache: Path, _options: argparse.Namespace) -> dict:
    """A round's pairs of the official size, by the design of the default settings."""
    return _scored("pairs")


STEPS = {
    "index": index_step, "pack": pack_step, "open": open_step, "first batch": batch_step, "read": read_step,
    "ImageFolder": image_folder_step, "webdataset": webdataset_step, "closed set": closed_step, "pairs": pairs_step,
}  # fmt: skip
AFTER_PACKING = ("open", "first batch", "read", "ImageFolder", "webdataset", "closed set", "pairs")


def measured(step: str, root: Path, cache: Path, options: argparse.Namespace, kill_at: int | None = None) -> dict:
    """One step in a process of its own; with kill_at it is killed outright after so many pictures."""
    command = [sys.executable, "-m", "bench.official", "--step", step, "--root", root, "--cache", cache, "--side",
               str(options.side), "--pack", options.pack, "--workers", str(options.workers)]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told, reached = [], 0
    for line in process.stderr:
        if line.strip().isdigit():
            reached = int(line)
            if kill_at is not None and reached >= kill_at:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return {"killed_at": reached, "wall_s": round(time.perf_counter() - began, 1)}
        else:
            told.append(line)
    out = process.stdout.read()
    if process.wait():
        raise SystemExit(f"{step}: exit code {process.returncode}: {''.join(told)[-2000:]}")
    return {**json.loads(out), "wall_s": round(time.perf_counter() - began, 2)}


def one_step(options: argparse.Namespace) -> None:
    found = STEPS[options.step](options.root, options.cache, options)
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    found["cpu_s"] = round(sum(usage.ru_utime + usage.ru_stime for usage in (own, children)), 2)
    found["peak_mib"] = round(own.ru_maxrss / 1024)
    print(json.dumps(found))


def report(found: dict, num_pictures: int) -> None:
    times = OFFICIAL / num_pictures
    print(json.dumps(found, indent=1))
    pack, index = found["go on"], found["index"]
    packed = pack["pictures"] - pack["began_at"]
    print(f"extrapolated to {OFFICIAL:,} pictures (x {times:.1f}), not measured:")
    print(f"  index {index['cpu_s'] * times:.0f} CPU-s; pack {pack['bytes'] * times / 1e9:.1f} GB,"
          f" {pack['cpu_s'] / max(packed, 1) * OFFICIAL / 3600:.2f} core-hours")  # fmt: skip
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300_000)
    parser.add_argument("--source", type=Path, help="a folder of JPEG pictures of 250 px; default: drawn")
    parser.add_argument("--meta", type=Path, help="the official identity_meta.csv")
    parser.add_argument("--folder", type=Path, help="where the set is made; default: a temporary folder")
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--pack", default="jpeg", choices=("raw", "jpeg"))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="where the figures go too")
    for hidden in ("--root", "--cache"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        one_step(options)
        return
    folder = Path(tempfile.mkdtemp(prefix="facefed-official-", dir=options.folder))
    try:
        root, cache = folder / "data", folder / "packs"
        began = time.perf_counter()
        number = make(root, options)
        found: dict = {"made": {"pictures": number, "wall_s": round(time.perf_counter() - began, 1)}}
        time.sleep(3)  # so that the folders' times are settled
        print("made", found["made"], flush=True)

        def take(name: str, step: str, kill_at: int | None = None) -> None:
            found[name] = measured(step, root, cache, options, kill_at)
            print(name, found[name], flush=True)

        take("index", "index")
        take("killed", "pack", number // 3)
        take("go on", "pack")
        found["lost"] = found["killed"]["killed_at"] - found["go on"]["began_at"]
        for step in AFTER_PACKING:
            take(step, step)
        report(found, number)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
