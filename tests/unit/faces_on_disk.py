"""Small face data sets on disk, in the official layouts, for the tests of common.faces."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.faces.pack import FacePack, open_pack
from common.faces.shards import PLACE, ShardWriter
from common.settings import DataSettings

POINTS = "70 112 108 111 88 131 72 153 106 154"  # a face in CelebA's aligned place
SMALL = DataSettings(image_size=32)


def picture(seed: int, width: int = 178, height: int = 218) -> Image.Image:
    """A picture of its own: smooth noise, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_celeba(root: Path, people: dict[int, tuple[int, int]], *, ending: str = "\r\n") -> Path:
    """people: number -> (official part, pictures).  Pictures are numbered in the order given."""
    (root / "img_align_celeba").mkdir(parents=True)
    names, identity, partition = [], [], []
    for person, (part, count) in people.items():
        for _ in range(count):
            names.append(f"{len(names) + 1:06d}.jpg")
            identity.append(f"{names[-1]} {person}")
            partition.append(f"{names[-1]} {part}")
            picture(len(names)).save(root / "img_align_celeba" / names[-1])
    write(root / "identity_CelebA.txt", identity, ending)
    write(root / "list_eval_partition.txt", partition, ending)
    rows = [f"{name}   {POINTS}" for name in names]
    write(root / "list_landmarks_align_celeba.txt", [str(len(names)), "lefteye_x lefteye_y ...", *rows], "\n")
    return root


def make_folder(root: Path, people: dict[str, int], *, suffix: str = ".jpg", size: int = 64) -> Path:
    """people: name -> number of pictures."""
    seed = 0
    for person, count in people.items():
        (root / person).mkdir(parents=True)
        for number in range(count):
            seed += 1
            picture(seed, size, size).save(root / person / f"{number:03d}{suffix}")
    return root


def write(file: Path, lines: list[str], ending: str = "\n") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes("".join(line + ending for line in lines).encode())


def people_in(root: Path) -> Path:
    """A folder of twelve people with six pictures each."""
    return make_folder(root / "faces", {f"p{i:02d}": 6 for i in range(12)})


def opened(folder: Path, data: DataSettings = SMALL, *, workers: int = 1) -> FacePack:
    """The pack of a data set of folders, in the cache beside it."""
    return open_pack("folder", folder, data, folder.parent / "cache", workers=workers)


def pixels(pack: FacePack) -> bytes:
    """All pictures of a pack, one after the other."""
    return pack.pictures[np.arange(len(pack))].tobytes()


def in_cache(folder: Path) -> set[str]:
    """What lies in that cache, locks and unfinished packs aside."""
    return {path.name for path in (folder.parent / "cache").iterdir() if not path.name.startswith(".")}


def unfinished_in(folder: Path) -> list[Path]:
    """The unfinished packs in that cache."""
    return sorted((folder.parent / "cache").glob(".*.tmp"))


def write_shard(folder: Path, pictures: "np.ndarray[Any, Any]") -> dict[str, object]:
    """One raw shard, 00000, and places.npy of these pictures [N, S, S, 3].  Returns what a manifest says of them."""
    writer = ShardWriter(folder, 0)
    none = [""] * len(pictures)
    entries = np.arange(2 * len(pictures), dtype=np.uint64).reshape(-1, 2)
    writer.add(entries, [one.tobytes() for one in pictures], [b""] * len(pictures), none, none)
    writer.close()
    places = np.zeros(len(pictures), dtype=PLACE)
    places["size"] = pictures[0].size
    places["start"] = np.arange(len(pictures)) * pictures[0].size
    np.save(folder / "places.npy", places)
    return {"image_size": pictures.shape[1], "coding": "raw"}
