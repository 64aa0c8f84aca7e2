"""A site's pack and model for one run: what every message of it works with, and how they are made."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clients.packs import open_site_pack
from clients.past_tasks import PastTasks
from clients.policy import against_data, require_none
from clients.private_state import load_residue
from clients.received_model import ModelWatch
from clients.site import OF_RUN, OF_SITE, SiteSettings
from common.errors import ReplyRefused
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.models.recogniser import (
    Recogniser,
    build_recogniser,
    moving_names,
    private_names,
    shared_names,
    trainable_names,
    with_new_heads,
)
from common.privacy.people import problem_of
from common.protocol.codec import Coded, encode, is_lossy, residue_of
from common.protocol.parameters import Manifest, Part, buffer_sha256, flatten, manifest_of
from common.protocol.wire import Task
from common.settings import Settings
from common.system.progress import Meter, telling
from common.system.runtime import stream_seed
from common.system.site_secret import keyed_seed, site_secret

# What is to leave, [part.size] float32, to what of it does not, likewise: with secure aggregation, in words of 16 bits.
Lose = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class ClientState:
    """A site's pack and model for one run, ready to work."""

    site: SiteSettings
    settings: Settings
    pack: FacePack
    recogniser: Recogniser
    manifest: Manifest
    private: tuple[str, ...]
    head_seed: int  # of the heads as they were built, for a site whose state was lost
    fresh: Mapping[str, Tensor]  # what of the backbone is private, as it was built, likewise
    watch: ModelWatch | None = None  # None: no received model is looked at, of a virtual client

    @functools.cached_property
    def part(self) -> Part:
        """What of the model training moves, and so what of a change travels."""
        trainable = self.settings.training.trainable
        moving = moving_names(self.recogniser, self.settings.model.normalisation, trainable)
        return Part.of(self.manifest, moving=moving, trainable=trainable_names(self.recogniser, trainable))

    def state_folder(self, run_id: str) -> Path:
        """Where this run's private state lies."""
        return self.site.state_dir / "private" / run_id


def open_client_state(site: SiteSettings, settings: Settings, former: ClientState | None = None) -> ClientState:
    """Open (or make) the pack and build the model.  Raises UserError when data or settings do not fit.

    former: another client's state of equal settings, which is not used any more: its backbone serves this one too,
    so that a process with many virtual clients holds one model.
    """
    return state_of_pack(site, settings, open_site_pack(site, settings.data), former)


def state_of_pack(
    site: SiteSettings, settings: Settings, pack: FacePack, former: ClientState | None = None
) -> ClientState:
    """Build the model for a pack that is open.  Raises UserError when data or settings do not fit."""
    require_enough(site, pack)
    require_private(settings, pack.num_classes)
    head_seed = _head_seed(site, settings)
    if former is not None:
        recogniser = with_new_heads(former.recogniser, settings.model, num_people=pack.num_classes, head_seed=head_seed)
    else:
        recogniser = build_recogniser(
            # The backbone arrives from the server before it is used; its first weights are the server's business.
            dataclasses.replace(settings.model, pretrained="none"),
            num_people=pack.num_classes,
            image_size=settings.data.image_size,
            backbone_seed=stream_seed(settings.run.seed, "backbone"),
            head_seed=head_seed,
        )
    state = recogniser.state_dict()
    names = shared_names(recogniser, settings.model.normalisation)
    private = private_names(recogniser, settings.model.normalisation)
    of_backbone = [name for name in private if name.startswith("backbone.")]
    # A former client's training has changed what of the backbone is private.
    fresh = former.fresh if former is not None else {name: state[name].clone() for name in of_backbone}
    return ClientState(
        site=site,
        settings=settings,
        pack=pack,
        recogniser=recogniser,
        manifest=manifest_of({name: state[name] for name in names}) if former is None else former.manifest,
        private=private,
        head_seed=head_seed,
        fresh=fresh,
    )


def _head_seed(site: SiteSettings, settings: Settings) -> int:
    """Of the first weights of this site's heads in a run; a number of one's own gives those of a run with that seed."""
    if site.seed == OF_SITE:
        known = f"{settings.run.seed}\n{site.name}"
        return keyed_seed(site_secret(site.cache_dir), "head", known) % 2**63
    return stream_seed(settings.run.seed if site.seed == OF_RUN else site.seed, site.name, "head")


def watched(state: ClientState, record: PastTasks | None) -> ClientState:
    """The state for one message of the run of this record, whose model is looked at; None: it is not."""
    if record is None:
        return state
    trainable = trainable_names(state.recogniser, state.settings.training.trainable)
    watch = ModelWatch(record, state.settings, state.manifest, lambda: _first_model(state), trainable)
    return dataclasses.replace(state, watch=watch)


def _first_model(state: ClientState) -> NDArray[np.float32]:
    """The run's first model as the server makes it of the seed and the settings, [size] float32."""
    settings = state.settings
    recogniser = build_recogniser(
        dataclasses.replace(settings.model, pretrained="none"),
        num_people=2,
        image_size=settings.data.image_size,
        backbone_seed=stream_seed(settings.run.seed, "backbone"),
        head_seed=0,
    )
    return flatten(recogniser.state_dict(), state.manifest)


def require_enough(site: SiteSettings, pack: FacePack) -> None:
    """Raises PolicyRefusal where the site's policy wants an update to be made of more people or pictures."""
    num_pictures = len(pack.indices(Split.TRAIN))
    require_none(against_data(site.policy, num_people=pack.num_classes, num_pictures=num_pictures))


def require_private(settings: Settings, num_people: int) -> None:
    """Raises ReplyRefused where so few people cannot be protected as the run wants."""
    problem = problem_of(settings.privacy, num_people) if settings.privacy.unit == "person" else ""
    if problem:
        raise ReplyRefused(problem)


def telling_of(state: ClientState, task: Task, work: str, num_pictures: int) -> AbstractContextManager[Meter]:
    """What is to be called after each step of one part of a task."""
    return telling(num_pictures, who=state.site.name, run=task.run_id, server_round=task.server_round, work=work)


def coded_change(
    state: ClientState, folder: Path, found: int, change: NDArray[np.float32], lose: Lose | None = None
) -> tuple[Coded, NDArray[np.float32] | None]:
    """A change as it travels, and what is lost by that.

    change: [size], which may be written to.  lose: where words of a masked sum lose it, and not the codec; the change
    comes as it is then.
    """
    codec = state.settings.federation.upload_codec
    if state.watch is not None:
        state.watch.trained(change)
    change = state.part.taken(change)
    if not is_lossy(codec):
        return encode(change, codec), None
    change += load_residue(folder, found, len(change))
    if lose is not None:
        return encode(change, "float32"), lose(change)
    coded = encode(change, codec)
    return coded, residue_of(change, coded)


def question_of(state: ClientState, task: Task, received: NDArray[np.float32], also: str = "") -> str:
    """A digest of all that a round's change follows from; of two that differ in anything neither has the other's.

    also: what else it follows from.
    """
    asked = (task.settings, task.server_round, task.precision, task.memory_format, task.compiled, task.threads)
    words = [*asked, state.manifest.digest, state.pack.key, buffer_sha256(received), state.site.name, task.run_id, also]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()
