"""A found model as one client would use it: its tensors in a recogniser, with the head over that client's people.

A model without a head for the client (trained elsewhere, or its head stayed where it was trained) is still scored on
people never seen; why the closed set is left out is said.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from clients.private_state import load_private
from common.errors import CheckpointError, UserError
from common.faces.pack import FacePack
from common.models.backbone import Backbone
from common.models.dcal import VitBackbone
from common.models.recogniser import Recogniser, build_recogniser, for_people, private_names, shared_names
from common.system.checkpoints import read_tensors
from common.system.runtime import stream_seed
from common.tracking.registry import load_state
from simulation.compare.model_lookup import UNTRAINED, FoundModel

_HEAD, _BACKBONE = "head.", "backbone."


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A recogniser to be scored on one client's people."""

    recogniser: Recogniser
    no_head: str = ""  # why the closed set cannot be scored; empty: it can


@dataclass(frozen=True)
class ModelFiles:
    """The files of one found model, each read once."""

    found: FoundModel

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint, or of the registered model.  Raises CheckpointError or TrackingError."""
        if self.found.registered is not None:
            return load_state(self.found.registered)
        return read_tensors(self.found.checkpoint)[0]

    @property
    def where(self) -> str:
        """What an error names."""
        return self.found.source if self.found.registered is not None else str(self.found.checkpoint)

    def at(self, client: str, pack: FacePack, num_people: Mapping[str, int]) -> Ready:
        """The model for one client.

        pack: the client's own, with this model's data settings.  num_people: training people of each client at hand.
        Raises CheckpointError when the tensors are not this model's, UserError when private normalisation is missing.
        """
        wanted = self.found.wanted
        if wanted.kind == UNTRAINED:
            return Ready(recogniser=self._untrained(pack), no_head="it is untrained")
        if self.found.registered is not None:
            return self._without_head(pack, "MLflow holds no heads")
        if wanted.mode == "federated":
            return self._federated(client, pack)
        if client not in self.found.clients:
            return self._without_head(pack, f"it was not trained on {client}")
        num_rows = next((len(tensor) for name, tensor in sorted(self.tensors.items()) if name.startswith(_HEAD)), 0)
        rows = _rows_of(client, self.found.clients, num_people, num_rows)
        if rows is None:
            why = f"its head has {num_rows:,} people, which are not those of the data now"
            return self._without_head(pack, why)
        whole = self._build(pack.image_size, num_rows)
        self._fill(whole, _floating(whole))
        return Ready(recogniser=for_people(whole, rows))

    def backbone(self) -> Backbone | VitBackbone:
        """The backbone alone, in evaluation mode: all that a picture's embedding needs.

        Raises CheckpointError when the tensors are not this model's, UserError when part of them stayed with the
        clients, TrackingError when the registry cannot hand them out.
        """
        settings = self.found.settings
        if self.found.wanted.mode == "federated" and settings.model.normalisation == "private":
            raise UserError(
                f"{self.found.source} has private normalisation, so there is no single model: its layers are with each"
                " client; name a run with shared normalisation, or one of a client alone."
            )
        whole = self._build(settings.data.image_size, 2)  # its head is not used
        self._fill(whole, [name for name in _floating(whole) if name.startswith(_BACKBONE)])
        return whole.backbone.eval()

    def _without_head(self, pack: FacePack, why: str) -> Ready:
        recogniser = self._build(pack.image_size, pack.num_classes)
        self._fill(recogniser, [name for name in _floating(recogniser) if name.startswith(_BACKBONE)])
        return Ready(recogniser=recogniser, no_head=why)

    def _untrained(self, pack: FacePack) -> Recogniser:
        """As training began, of a federation or without.  Raises ConfigError or CheckpointError for given weights."""
        settings = self.found.settings
        seed = stream_seed(settings.run.seed, "backbone")
        return build_recogniser(
            settings.model, num_people=pack.num_classes, image_size=pack.image_size, backbone_seed=seed, head_seed=0
        )

    def _build(self, image_size: int, num_people: int) -> Recogniser:
        return build_recogniser(
            dataclasses.replace(self.found.settings.model, pretrained="none"),  # all of it comes from the checkpoint
            num_people=num_people,
            image_size=image_size,
            backbone_seed=0,
            head_seed=0,
        )

    def _fill(self, recogniser: Recogniser, names: Iterable[str]) -> None:
        """Copy the named tensors of the checkpoint into the recogniser.  Raises CheckpointError."""
        state = recogniser.state_dict()
        with torch.no_grad():
            for name in names:
                saved = self.tensors.get(name)
                if saved is None or saved.shape != state[name].shape:
                    seen = "missing" if saved is None else f"of shape {tuple(saved.shape)}"
                    raise CheckpointError(
                        f"{self.where}: {name} is {seen}, {self.found.settings.model.backbone} with this run's settings"
                        f" has {tuple(state[name].shape)}; it is of another model."
                    )
                state[name].copy_(saved)

    def _federated(self, client: str, pack: FacePack) -> Ready:
        """Shared tensors from the checkpoint, private ones from the client's own state, where it is here."""
        normalisation = self.found.settings.model.normalisation
        recogniser = self._build(pack.image_size, pack.num_classes)
        private = private_names(recogniser, normalisation)
        self._fill(recogniser, shared_names(recogniser, normalisation))
        folder = self._private_folder(client)
        found_round = load_private(folder, self.found.step, recogniser, None, private) if folder.is_dir() else -1
        if found_round > 0 or (found_round == 0 and self.found.step == 0):
            return Ready(recogniser=recogniser)
        why = f"the head of {client} is not in {folder}"
        if normalisation == "private":
            raise UserError(
                f"{self.found.name} ({self.found.source}) has private normalisation, and that of {client} is not in"
                f" {folder}; compare it on its own clients, after a simulation on this machine."
            )
        return Ready(recogniser=recogniser, no_head=why)

    def _private_folder(self, client: str) -> Path:
        if self.found.folder is None:
            raise ValueError(f"{self.found.source} has no run folder")
        return self.found.folder.parent / "clients" / client / "private" / self.found.folder.name


def _floating(recogniser: Recogniser) -> list[str]:
    """The tensors that a checkpoint must hold; counters are not read in evaluation."""
    return [name for name, tensor in recogniser.state_dict().items() if tensor.is_floating_point()]


def _rows_of(client: str, clients: Sequence[str], num_people: Mapping[str, int], num_rows: int) -> slice | None:
    """Which rows of a head are one client's people; None when the counts contradict each other, or one is unknown.

    The head has the people of `clients` one client after the other. The first and the last client's rows are known
    without the counts of the others.
    """
    if set(clients) <= set(num_people):
        start = sum(num_people[name] for name in clients[: clients.index(client)])
        fits = sum(num_people[name] for name in clients) == num_rows
        return slice(start, start + num_people[client]) if fits else None
    own = num_people[client]
    if own >= num_rows:
        return None
    if client == clients[0]:
        return slice(0, own)
    return slice(num_rows - own, num_rows) if client == clients[-1] else None
