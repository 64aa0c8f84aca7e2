"""Every picture of an index through the decoder, in order, in this process or several; and what must be left out."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, FaceFedError
from common.faces.decode import Done, Job, Recipe, decode_job
from common.faces.index import FaceIndex
from common.settings import DataSettings

JOB_PICTURES = 32  # 1.2 MB of result at 112 px: small enough for a smooth progress bar and little memory
_NEEDED_FILES = {
    ("celeba", "landmarks"): "list_landmarks_align_celeba.txt",
    ("vggface2", "landmarks"): "bb_landmark/loose_landmark_{train,test}.csv",
    ("vggface2", "box"): "bb_landmark/loose_bb_{train,test}.csv",
}
_WITHOUT_POINTS = ("folder", "twins")  # layouts that never hold landmarks or boxes
logger = logging.getLogger("facefed.faces")


def plan(index: FaceIndex, data: DataSettings) -> tuple[Recipe, NDArray[np.float32] | None]:
    """How the pictures of this data set are aligned, and the landmarks or boxes [N, ...] that takes.

    A plain folder and the twins' layout never have landmarks or boxes: their pictures are cut to the centre square.
    Elsewhere a missing file is a DataError, for a silent change of alignment would ruin a comparison.
    """
    points = {"landmarks": index.landmarks, "box": index.boxes, "resize": None}[data.alignment]
    alignment = data.alignment
    if points is None and alignment != "resize":
        if index.dataset not in _WITHOUT_POINTS:
            file = _NEEDED_FILES[index.dataset, alignment]
            raise DataError(
                f"{index.root}: data.alignment = {alignment!r} needs {file}, which is not there; add the file or "
                'choose data.alignment = "resize".'
            )
        logger.info("%s: this layout has no %s; pictures are cut to their centre square", index.root, alignment)
        alignment = "resize"
    return Recipe(alignment=alignment, image_size=data.image_size, box_margin=data.box_margin), points


def scan(
    index: FaceIndex,
    recipe: Recipe,
    points: NDArray[np.float32] | None,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[Done, None, None]:
    """Decode all pictures, JOB_PICTURES at a time, results in the index's order whatever the number of workers.

    progress: called with (pictures done, pictures in all).
    """
    jobs = [
        Job(
            root=index.root,
            paths=index.paths[start : start + JOB_PICTURES],
            points=None if points is None else points[start : start + JOB_PICTURES],
            recipe=recipe,
        )
        for start in range(0, len(index), JOB_PICTURES)
    ]
    done = 0
    for result in _in_processes(jobs, workers) if min(workers, len(jobs)) > 1 else map(decode_job, jobs):
        done += len(result.reasons)
        if progress is not None:
            progress(done, len(index))
        yield result


def _in_processes(jobs: Sequence[Job], workers: int) -> Iterator[Done]:
    """Results in order; only a few jobs are ahead, so that memory stays bounded when the writer is slow."""
    # spawn: a fork of a process that runs threads (torch, gRPC) can deadlock
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_start_worker)
    try:
        ahead: deque[Future[Done]] = deque()
        for job in jobs:
            ahead.append(pool.submit(decode_job, job))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        raise FaceFedError(
            "a process that decodes pictures was killed, perhaps for want of memory; use fewer workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed outright."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def with_duplicates(
    index: FaceIndex, split: NDArray[np.int8], reasons: Sequence[str], digests: Sequence[bytes]
) -> list[str]:
    """The reasons [N] with those of exact duplicates (equal file bytes) added.

    Copies under one person: one stays, in the strictest split (test, validation, training), there the first by path.
    Under two people: none stays, for who is on it is not known.
    """
    copies: dict[bytes, list[int]] = {}
    for row, (reason, digest) in enumerate(zip(reasons, digests, strict=True)):
        if not reason:
            copies.setdefault(digest, []).append(row)
    found = list(reasons)
    for rows in copies.values():
        if len(rows) == 1:
            continue
        if len({int(index.person[row]) for row in rows}) > 1:
            for row in rows:
                other = next(o for o in rows if index.person[o] != index.person[row])
                found[row] = f"one picture under two people: also {index.paths[other]}"
            continue
        kept = max(rows, key=lambda row: (split[row], -row))
        for row in rows:
            if row != kept:
                found[row] = f"duplicate: of {index.paths[kept]}"
    return found


def quarantine(index: FaceIndex, reasons: Sequence[str]) -> tuple[NDArray[np.bool_], tuple[tuple[str, str], ...]]:
    """Which pictures are kept, [N] bool, and (path, reason) of the others, by path.  reasons: [N], "" where usable."""
    kept = np.array([not reason for reason in reasons], dtype=np.bool_)
    return kept, tuple((index.paths[i], reasons[i]) for i in np.flatnonzero(~kept).tolist())


def check_quarantine(index: FaceIndex, quarantined: Sequence[tuple[str, str]], total: int, limit: float) -> None:
    """Raise DataError when more than `limit` of `total` pictures are quarantined; each entry is (path, reason)."""
    if len(quarantined) <= limit * total:
        return
    kinds = Counter(reason.split(":")[0] for _, reason in quarantined)
    counts = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())
    first = ", ".join(path for path, _ in quarantined[:3])
    raise DataError(
        f"{index.root}: {len(quarantined)} of {total} pictures cannot be used ({counts}), more than "
        f"data.max_quarantined_fraction = {limit:g} allows; the first: {first}; repair them or raise the limit."
    )
