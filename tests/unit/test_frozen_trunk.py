"""The bench's stand-in for a trunk that does not learn gives each picture its own features, whatever is done to it."""

import numpy as np
import pytest
import torch

from bench.frozen_trunk import FeaturesByRow, features, numbered
from common.faces.batches import augment, to_float
from common.faces.pack import FacePack
from common.models.recogniser import build_backbone
from common.settings import AugmentationSettings
from tests.tiny_settings import TINY

STILL = AugmentationSettings(flip=0.0, crop=0.0, rotation_rad=0.0, colour=0.0)


@pytest.mark.usefixtures("one_thread")
def test_training_behind_it_sees_what_it_would_see_behind_the_trunk():
    pictures = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    pack = FacePack(
        pictures=pictures,
        person=np.arange(5),
        people=tuple("abcde"),
        split=np.zeros(5, dtype=np.int8),
        key="five",
        quarantined=(),
        dataset="folder",
    )
    backbone = build_backbone(TINY.model, 32).eval()
    table = torch.zeros(70_000, backbone.linear.in_features)
    rows = np.array([0, 1, 256, 65_535, 69_999])  # each digit of a number carries
    table[rows] = features(backbone, pack)
    stream = torch.Generator()
    with torch.no_grad():
        wanted = backbone(augment(to_float(torch.from_numpy(pictures)), STILL, stream))
        backbone.trunk = FeaturesByRow(table)
        seen = backbone(augment(to_float(torch.from_numpy(numbered(rows))), STILL, stream))
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-5)
