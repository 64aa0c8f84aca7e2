"""A face pack in memory for the tests of training and evaluation: noise around one picture for each person."""

import numpy as np
import torch

from common.faces.pack import FacePack
from common.faces.splits import Split
from common.models.recogniser import Recogniser, build_recogniser
from common.settings import ModelSettings
from common.training.loop import Compute

SIDE = 32
CPU = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=1)
MODEL = ModelSettings(backbone="cnn", embedding_size=16, width=0.25, head_scale=8.0, head_margin=0.1)


def memory_pack(train: int = 5, *, closed: int = 1, people: int = 4, seed: int = 0) -> FacePack:
    """`people` with `train` TRAIN pictures and `closed` of VAL_PICTURES and TEST_PICTURES; 2 + 2 unseen with 3 each."""
    random = np.random.default_rng(seed)
    kinds = [Split.TRAIN] * train + [Split.VAL_PICTURES, Split.TEST_PICTURES] * closed
    rows = [(who, kind) for who in range(people) for kind in kinds]
    rows += [(people + who, Split.VAL_PEOPLE if who < 2 else Split.TEST_PEOPLE) for who in range(4) for _ in range(3)]
    person = np.array([who for who, _ in rows], dtype=np.int64)
    base = random.integers(0, 256, (people + 4, SIDE, SIDE, 3))
    noise = random.integers(-40, 41, (len(rows), SIDE, SIDE, 3))
    return FacePack(
        pictures=np.clip(base[person] + noise, 0, 255).astype(np.uint8),
        person=person,
        people=tuple(f"p{number}" for number in range(people + 4)),
        split=np.array([kind for _, kind in rows], dtype=np.int8),
        key="key",
        quarantined=(),
        dataset="folder",
    )


def recogniser_for(pack: FacePack, model: ModelSettings = MODEL) -> Recogniser:
    return build_recogniser(model, num_people=pack.num_classes, image_size=SIDE, backbone_seed=1, head_seed=2)


def same_bits(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())
