"""Workload W, the same for every side: ResNet-18 at 64 px, 2 clients, 512 training and 128 scored pictures each.

The pictures are synthetic and made once into a scratch folder: as JPEG files, one folder a person, for FaceFed; and as
arrays of the very same aligned pictures, with the same split, for the peers, which so pay for neither decoding nor
augmentation.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PROGRAMS = Path(sys.executable).parent
CLIENTS = ("north", "south")
SIDE_PX, BATCH, LR, MOMENTUM = 64, 32, 0.01, 0.9
NUM_PEOPLE, PICTURES_EACH = 40, 16
NUM_TRAINING, NUM_SCORED = 512, 128  # of a client's 640 pictures
# Of 40 people 2 + 2 are never trained on: 64 pictures; of the 576 of the others 32 + 32 are held back.
SETTINGS = (
    f"data.image_size={SIDE_PX}", "data.fraction_val_people=0.05", "data.fraction_test_people=0.05",
    f"data.fraction_val_pictures={32 / 576}", f"data.fraction_test_pictures={32 / 576}",
    "model.backbone=resnet18", "model.width=1.0", "model.embedding_size=512",
    "training.optimiser=sgd", f"training.lr={LR}", f"training.momentum={MOMENTUM}", f"training.batch_size={BATCH}",
    "federation.local_epochs=1", "federation.min_clients=2",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much a federation of ours has to do: pictures that are drawn for each client, and settings in W's place."""

    people: int = NUM_PEOPLE
    pictures: int = PICTURES_EACH  # of each
    instead: Mapping[str, str] = field(default_factory=dict)


# `tiny` goes through all programs in seconds, on the CPU too, and measures nothing.
LOADS = {
    "workload": Load(),
    "tiny": Load(
        people=12,
        pictures=6,
        instead={
            "data.image_size": "32", "data.fraction_val_people": "0.2", "data.fraction_test_people": "0.2",
            "model.backbone": "cnn", "model.width": "0.25", "model.embedding_size": "32",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Where W's pictures are."""

    folder: Path

    @property
    def cache(self) -> Path:
        """Of FaceFed's packs and measured choices."""
        return self.folder / "cache"

    def pictures(self, client: str) -> Path:
        """The folder of JPEG files, one folder a person."""
        return self.folder / "pictures" / client

    def arrays(self, client: str) -> Path:
        """The .npz file of the peers."""
        return self.folder / f"{client}.npz"

    def counts(self) -> str:
        """What each side trains on and scores, for the report."""
        parts = []
        for client in CLIENTS:
            with np.load(self.arrays(client)) as held:
                parts.append(f"{client}: {len(held['train_labels'])} trained, {len(held['test_labels'])} scored")
        return "; ".join(parts)


def settings_of(load: str) -> dict[str, str]:
    """The settings of one of LOADS, by their dotted names."""
    return dict(setting.split("=") for setting in SETTINGS) | LOADS[load].instead


def settings_arguments(load: str = "workload") -> list[str]:
    """W, or another of LOADS, as arguments of flower-server and flower-simulation."""
    return [part for name, value in settings_of(load).items() for part in ("--set", f"{name}={value}")]


def settings():
    """W as typed settings of FaceFed."""
    from common import config

    raw = config.to_mapping(config.from_mapping({}))
    for setting in SETTINGS:
        name, value = setting.split("=")
        section, key = name.split(".")
        raw[section][key] = type(raw[section][key])(value)
    return config.from_mapping(raw)


def _draw(client: str, seed: int, folder: Path, load: Load) -> None:
    """JPEG files in the layout of a data set of one's own: one folder a person."""
    drawn = folder.with_name(f"{client}-drawn")
    shutil.rmtree(drawn, ignore_errors=True)
    command = [str(PROGRAMS / "facefed"), "data", "synth", "--layout", "vggface2", "--out", str(drawn)]
    size = ["--people", str(load.people), "--pictures", str(load.pictures), "--seed", str(seed)]
    subprocess.run([*command, *size], stdout=subprocess.DEVNULL, check=True)
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        for person in sorted((drawn / part).iterdir()):
            person.rename(folder / person.name)
    shutil.rmtree(drawn)


def _export(workload: Workload, client: str) -> None:
    """The same pictures and split as arrays: train [512, 64, 64, 3] uint8, test [128, ...], and labels."""
    from common.faces.pack import open_pack
    from common.faces.splits import Split

    pack = open_pack("folder", workload.pictures(client), settings().data, workload.cache, workers=1)
    train = pack.indices(Split.TRAIN)
    test = np.concatenate([pack.indices(split) for split in Split if split not in (Split.TRAIN, Split.UNUSED)])
    if (len(train), len(test)) != (NUM_TRAINING, NUM_SCORED):
        raise ValueError(f"{client} has {len(train)} training and {len(test)} other pictures, not W's 512 and 128")
    np.savez(
        workload.arrays(client),
        train_pictures=np.asarray(pack.pictures[train]),
        train_labels=pack.training_labels[train],
        test_pictures=np.asarray(pack.pictures[test]),
        # People never trained on have no label; a peer that scores accuracy needs one, whichever it is.
        test_labels=np.maximum(pack.training_labels[test], 0),
    )


def draw(scratch: Path, load: str = "workload") -> Workload:
    """The pictures of one of LOADS, as files in `scratch`, made where they are missing."""
    workload = Workload(folder=scratch.resolve() / load)
    for seed, client in enumerate(CLIENTS, start=1):
        if not workload.pictures(client).is_dir():
            _draw(client, seed, workload.pictures(client), LOADS[load])
    return workload


def prepare(scratch: Path) -> Workload:
    """W's pictures in `scratch`, as files and as arrays, made where they are missing."""
    workload = draw(scratch)
    for client in CLIENTS:
        if not workload.arrays(client).is_file():
            _export(workload, client)
    return workload
