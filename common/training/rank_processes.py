"""The processes of a model that is trained on several devices: this one is rank 0, and starts the others.

They are started when they are first needed, serve one training after the other (a round, an epoch), and end with this
process, also when it is killed. Each is told what to do through a socket that only the two have, in `multiprocessing`'s
own form, and meets the others by a file in a folder of this user's. Model and optimiser come from rank 0 before each
training and its own are what remains of it, so the others hold nothing that could be lost.
"""

import atexit
import dataclasses
import datetime as dt
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.errors import FaceFedError, TrainingFailed, one_line
from common.faces.pack import FacePack
from common.models.recogniser import Recogniser, build_recogniser
from common.settings import ModelSettings, Settings
from common.system.files import short_private_folder
from common.system.processes import be_killed_with_parent, child_environment, start, stop
from common.system.runtime import go_silent, meet_on_loopback
from common.training.compute import Compute
from common.training.optimiser import make_optimiser, settle
from common.training.ranks import Ranks, slots_of, take_state

Given = TypeVar("Given")
MEETING, OUTPUT = "meeting", "output-{}"
THERE_WITHIN = dt.timedelta(minutes=10)  # all ranks, at the first and at each later sum
LAST_WORDS_S = 10.0  # after a sum failed here, for the rank that is to blame to say why
END_GRACE_S = 1.0
log = logging.getLogger("facefed.training")


def on_every_device(
    work: Callable[..., Given],
    recogniser: Recogniser,
    optimiser: torch.optim.Optimizer | None,
    pack: FacePack,
    *,
    settings: Settings,
    compute: Compute,
    own_only: Mapping[str, Any] | None = None,
    **told: Any,  # noqa: ANN401 - what the work takes
) -> Given:
    """Do a training's work here, and where `compute` has further devices on each of them too, in step.

    work: a function of a module, so that it has a name there too; called as work(recogniser, optimiser, pack,
    settings=, compute=, **told, **own_only), with ranks= where there are several.
    optimiser: as `make_optimiser` gives it for the recogniser; None: the work makes its own.
    told: what each process needs to know.  own_only: for this one.
    Raises TrainingFailed with one line where another process fails, and what the work raises.
    """
    alone = own_only or {}
    if not compute.others:
        return work(recogniser, optimiser, pack, settings=settings, compute=compute, **told, **alone)
    processes = _processes_of((compute.device, *compute.others))
    try:
        return processes.do(work, recogniser, optimiser, pack, settings, compute, told, alone)
    except BaseException:
        _end()  # whoever is still in the middle of something would wait for us
        raise


class RankProcesses:
    """Rank 0's view of the others, while they live."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        """Start them and meet them.  devices: of all ranks, this one's first.  Raises TrainingFailed."""
        self.devices = devices
        self._folder = short_private_folder("facefed-", OUTPUT)
        self._known_pack: FacePack | None = None
        self._links: list[Connection] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._answers: dict[int, str] = {}  # rank -> why it failed; empty: it is done
        try:
            for rank in range(1, len(devices)):
                self._start(rank)
            listener = self._listen()
            self._guarded(listener, lambda: _meet(self._folder, devices, 0))
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int) -> None:
        ours, theirs = Pipe()
        with theirs, (self._folder / OUTPUT.format(rank)).open("wb") as output:
            child = start(
                [sys.executable, "-P", "-m", "common.training.rank_processes", str(self._folder), str(rank),
                 str(theirs.fileno()), str(os.getpid()), *self.devices],
                environment=child_environment(self._folder),
                output=output,
                sockets=[theirs.fileno()],
            )  # fmt: skip
        self._links.append(ours)
        self._children.append(child)

    def do(
        self,
        work: Callable[..., Given],
        recogniser: Recogniser,
        optimiser: torch.optim.Optimizer | None,
        pack: FacePack,
        settings: Settings,
        compute: Compute,
        told: Mapping[str, Any],
        alone: Mapping[str, Any],
    ) -> Given:
        """See `on_every_device`."""
        mine = compute.of_rank(0)
        mine.place(recogniser)
        if optimiser is not None:
            settle(optimiser)
        slots = None if optimiser is None else slots_of(optimiser)
        same_pack = pack is self._known_pack
        people = recogniser.head.identity_vectors.shape[0]
        kept = recogniser.keeps_statistics
        job = (work, slots, None if same_pack else pack, settings, compute, people, kept, dict(told))
        self._known_pack = pack
        for rank, link in enumerate(self._links, 1):
            try:
                link.send(job)
            except OSError:
                raise TrainingFailed(self._last_words(rank)) from None
        ranks = Ranks(rank=0, size=len(self.devices))

        def own() -> Given:
            take_state(recogniser, optimiser, slots or [])
            return work(recogniser, optimiser, pack, settings=settings, compute=mine, ranks=ranks, **told, **alone)

        return self._guarded(self._listen(), own)

    def _listen(self) -> threading.Thread:
        self._answers.clear()
        listener = threading.Thread(target=self._await, name="ranks", daemon=True)
        listener.start()
        return listener

    def _await(self) -> None:
        """Until each has answered, or one has failed: then the sums that this process waits in end as well."""
        waiting = dict(zip(self._links, range(1, len(self.devices)), strict=True))
        while waiting:
            ready = wait(list(waiting))
            for link in [one for one in waiting if one in ready]:
                rank = waiting.pop(link)
                try:
                    self._answers[rank] = link.recv()
                except (EOFError, OSError):
                    self._answers[rank] = self._last_words(rank)
                if self._answers[rank]:
                    _give_up_waiting()
                    return

    def _guarded(self, listener: threading.Thread, own: Callable[[], Given]) -> Given:
        """What `own` gives, once all others are done too; the line of another one that failed first."""
        try:
            given = own()
        except FaceFedError:
            raise
        except RuntimeError as error:
            listener.join(LAST_WORDS_S)
            for reason in self._answers.values():
                if reason:
                    raise TrainingFailed(reason) from None
            if isinstance(error, dist.DistError):
                raise TrainingFailed(f"the devices lost each other: {one_line(str(error))}") from None
            raise
        listener.join()
        for reason in self._answers.values():
            if reason:
                raise TrainingFailed(reason)
        return given

    def _last_words(self, rank: int) -> str:
        child, file = self._children[rank - 1], self._folder / OUTPUT.format(rank)
        try:
            code = child.wait(timeout=LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return f"the process of {self.devices[rank]} does not answer any more."
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
        how = f"was killed by signal {-code}, perhaps for want of memory" if code < 0 else f"ended with code {code}"
        return f"the process of {self.devices[rank]} {how}" + (f": {one_line(lines[-1])}" if lines else ".")

    def close(self) -> None:
        """End them."""
        for child in self._children:
            stop(child, END_GRACE_S)
        for link in self._links:
            link.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        shutil.rmtree(self._folder, ignore_errors=True)


_current: RankProcesses | None = None  # of this process, which trains one model at a time


def _processes_of(devices: tuple[str, ...]) -> RankProcesses:
    global _current
    if _current is not None and _current.devices != devices:
        _end()
    if _current is None:
        _current = RankProcesses(devices)
        atexit.register(_end)
    return _current


def _end() -> None:
    global _current
    ended, _current = _current, None
    if ended is not None:
        atexit.unregister(_end)
        ended.close()


def _meet(folder: Path, devices: tuple[str, ...], rank: int) -> None:
    """Join the others' group; sums go by NCCL between GPUs and by Gloo on the CPU, on this machine's loopback."""
    meet_on_loopback()
    on_gpu = devices[rank].startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(devices[rank])
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(  # type: ignore[attr-defined]
            str(folder / MEETING), len(devices)
        ),
        rank=rank,
        world_size=len(devices),
        timeout=THERE_WITHIN,
    )


def _give_up_waiting() -> None:
    """NCCL would wait for one that is gone; Gloo's connections to it are closed and fail by themselves."""
    if dist.is_initialized() and dist.get_backend() == "nccl" and (group := dist.group.WORLD) is not None:
        group.abort()


class _Rank:
    """One of the others."""

    def __init__(self, rank: int, devices: tuple[str, ...]) -> None:
        self._ranks = Ranks(rank=rank, size=len(devices))
        self._pack: FacePack | None = None
        self._recogniser: Recogniser | None = None
        self._made_for: tuple[ModelSettings, int, int, str] | None = None

    def _model(self, settings: Settings, num_people: int, memory_format: str) -> Recogniser:
        """One of these settings; its numbers come from rank 0."""
        wanted = (settings.model, num_people, settings.data.image_size, memory_format)
        if self._recogniser is None or self._made_for != wanted:
            self._recogniser = build_recogniser(
                dataclasses.replace(settings.model, pretrained="none"),
                num_people=num_people,
                image_size=settings.data.image_size,
                backbone_seed=0,
                head_seed=0,
            )
            self._made_for = wanted
        return self._recogniser

    def do(self, job: tuple[Any, ...]) -> None:
        """Its part of one training."""
        work, slots, pack, settings, compute, num_people, keeps_statistics, told = job
        self._pack = pack or self._pack
        recogniser = self._model(settings, num_people, compute.memory_format)
        recogniser.keeps_statistics = keeps_statistics
        own = compute.of_rank(self._ranks.rank)
        own.place(recogniser)
        optimiser = None if slots is None else make_optimiser(recogniser, settings.training)
        take_state(recogniser, optimiser, slots or [])
        work(recogniser, optimiser, self._pack, settings=settings, compute=own, ranks=self._ranks, **told)


def main(folder: Path, rank: int, link: Connection, parent: int, devices: tuple[str, ...]) -> None:
    """Serve rank 0, the process `parent`, until it ends."""
    be_killed_with_parent()
    if os.getppid() != parent:
        return  # it has gone already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    go_silent()
    try:
        _meet(folder, devices, rank)
        link.send("")
        own = _Rank(rank, devices)
        while True:
            own.do(link.recv())
            link.send("")
    except (EOFError, BrokenPipeError):
        return  # rank 0 has closed its end
    except FaceFedError as error:
        link.send(f"{devices[rank]}: {error}")
    except Exception as error:
        log.exception("rank %d", rank)
        link.send(f"{devices[rank]}: {one_line(f'{type(error).__name__}: {error}')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Connection(int(sys.argv[3])), int(sys.argv[4]), tuple(sys.argv[5:]))
