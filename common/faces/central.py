"""Pictures without landmarks or boxes: the central square of each, decoded as everywhere else."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.decode import Job, Recipe, decode_job
from common.runtime import num_cores

_PICTURES_PER_JOB = 64


def central_pictures(
    paths: Sequence[str], root: Path, *, image_size: int, crop: float, advice: str
) -> NDArray[np.uint8]:
    """The central part of each picture, [N, image_size, image_size, 3] uint8 RGB.

    paths: relative to `root`, or absolute.  crop: fraction of the shorter side that is used. Each picture is resized so
    that this part is image_size px wide, then cut; the rim is a whole number of px, so the part used is exact to 1 px
    of the result.
    Raises DataError that names the first bad picture and ends with `advice`.
    """
    rim = round((image_size / crop - image_size) / 2)
    recipe = Recipe(alignment="resize", image_size=image_size + 2 * rim, box_margin=0.0)
    starts = range(0, len(paths), _PICTURES_PER_JOB)
    jobs = [
        Job(root=root, paths=tuple(paths[at : at + _PICTURES_PER_JOB]), points=None, recipe=recipe) for at in starts
    ]
    pictures = np.empty((len(paths), image_size, image_size, 3), dtype=np.uint8)
    with ThreadPoolExecutor(num_cores()) as threads:  # decoding and resizing leave Python's lock alone
        for at, job, done in zip(starts, jobs, threads.map(decode_job, jobs), strict=True):
            for path, reason in zip(job.paths, done.reasons, strict=True):
                if reason:
                    raise DataError(f"{root / path}: {reason}; {advice}")
            pictures[at : at + len(job.paths)] = done.pictures[:, rim : rim + image_size, rim : rim + image_size]
    return pictures
