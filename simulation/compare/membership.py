"""`facefed privacy audit`: whether a run's model gives away whom a site trained on, tried on the site's own people.

Beside it stands the model before any training, which knows nobody: what it reaches is the data's doing.  Where a site's
last reply is kept here, whoever received it is played too: they know the model that they sent and the change that
came back, so they see how training moved each person, whatever that person looks like (arXiv:2111.08440 calibrates by
difficulty likewise).

What was found stays with the model: `common/tracking/audited.py`.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from clients.own_machine import ClientOption, site_of
from clients.private_state import REPLY_FILE, load_reply
from common.errors import EXIT_DONE, CheckpointError, UserError
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.membership import Estimate, Membership, membership, person_scores
from common.models.recogniser import Recogniser, moving_names, shared_names, trainable_names
from common.protocol.codec import Coded, decode
from common.protocol.parameters import Part, load_shared, manifest_of
from common.settings import Settings
from common.system.runtime import num_cores, resolve_device
from common.tracking.address import resolve_uri
from common.tracking.audited import MEMBERSHIP, keep_in_cards, keep_in_run, registered_of_run
from common.training.autotune import threads_for
from common.training.evaluation import embed
from common.training.loop import Compute
from simulation.compare.model_loading import ModelFiles
from simulation.compare.model_lookup import FoundModel, find_model, untrained
from simulation.sites import data_options, pack_at_the_door

log = logging.getLogger("facefed.evaluate")

MODEL, UNTRAINED = "the run's model", "the model before training"
REPLY = "its own reply of round {round}, to whoever received it"
SITES = Path(".facefed/clients")  # of flower-client, in the folder where it was started


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """The flags of `facefed privacy audit`."""

    run: str  # a run's id or folder, or models:/...
    clients: Sequence[str]
    data_dirs: Sequence[str]
    device: str
    cache_dir: Path
    address: str = field(default="", repr=False)  # of the tracking, with its password; "": the settings' own is whole
    state_dir: Path | None = None  # what the one client got as --state-dir; None: the usual folders


def audit_privacy(settings: Settings, request: AuditRequest, out: TextIO, *, shape: str) -> int:
    """Print, and keep with the model, what the attack reaches at each site; shape: text or json.  Raises UserError."""
    address = resolve_uri(request.address or settings.tracking.uri, Path.cwd()) if settings.tracking.enabled else ""
    found = find_model(settings, request.run, f"--run {request.run}", address)
    clients = request.clients or ([] if request.data_dirs else found.clients)
    told = out if shape == "text" else _Nowhere()
    results: dict[str, dict[str, Membership]] = {}
    options = data_options(clients, request.data_dirs)
    if request.state_dir is not None and len(options) != 1:
        raise UserError(
            f"--state-dir is of one client, and {len(options)} are asked for; name it with --client NAME=DIR."
        )
    unkept = []
    for option in options:
        results[option.name] = _at_one_site(found, request, option, told)  # type: ignore[arg-type]
        if len(results[option.name]) == len((MODEL, UNTRAINED)):
            unkept.append(option.name)
    kept = _keep(found, address, results)
    privacy = found.settings.privacy
    if shape == "json":
        content = {"run": found.source, "round": found.step, "privacy": dataclasses.asdict(privacy)}
        content |= {"clients": _as_json(results), "no_reply_kept": unkept, "kept": kept}
        out.write(json.dumps(content, indent=2) + "\n")
        return EXIT_DONE
    guarantee = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} of a {privacy.unit}"
    out.write(f"{found.source}, step {found.step}: {guarantee if privacy.is_on else 'no differential privacy'}\n")
    out.writelines(f"{line}\n" for line in _lines(results))
    out.writelines(f"{name}: no reply of its own is kept here, so none was tried (--state-dir)\n" for name in unkept)
    out.write(f"kept in {', '.join(kept)}\n" if kept else "kept nowhere; the warnings say why\n")
    return EXIT_DONE


def _at_one_site(found: FoundModel, request: AuditRequest, option: ClientOption, told: TextIO) -> dict[str, Membership]:
    """What the attack reaches with the run's model, the untrained one, and the site's last reply where it is kept."""
    site = site_of(option, device=request.device, cache_dir=request.cache_dir, state_dir=request.cache_dir)
    pack = pack_at_the_door(site, found.settings, told)
    compute = _compute(found.settings, request.device)

    def recogniser_of(model: FoundModel) -> Recogniser:
        return ModelFiles(model).at(option.name, pack, {option.name: pack.num_classes}).recogniser

    models = {MODEL: found, UNTRAINED: untrained([found])}
    results = {name: attacked(recogniser_of(model), pack, compute) for name, model in models.items()}
    kept = kept_reply(found, option.name, request.state_dir)
    if kept is not None:
        server_round, received, change = kept
        attack = attacked_reply(recogniser_of(found), found.settings, received, change, pack, compute)
        results[REPLY.format(round=server_round)] = attack
    return results


def _keep(found: FoundModel, address: str, results: Mapping[str, Mapping[str, Membership]]) -> list[str]:
    """Write what was found into the run's folder and the cards of its registered model; returns where it stands now."""
    kept = []
    uris = [] if found.registered is None else [found.registered.uri]
    if found.folder is not None:
        try:
            kept.append(str(keep_in_run(found.folder, found.step, results)))
        except OSError as error:
            log.warning("%s cannot be written (%s)", found.folder / MEMBERSHIP, error.strerror)
        uris = registered_of_run(address, found.folder, found.step) if address else []
    return kept + [f"the card of {uri}" for uri in keep_in_cards(address, uris, results)]


class _Nowhere:
    """Takes text and keeps none."""

    def write(self, text: str) -> int:
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for _ in lines:
            pass

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def _compute(settings: Settings, device: str) -> Compute:
    return Compute(
        device=resolve_device(device),
        precision="float32",
        memory_format="contiguous",
        threads=threads_for(settings, 1, num_cores()),
    )


def kept_reply(found: FoundModel, client: str, state_dir: Path | None) -> tuple[int, NDArray[np.float32], Coded] | None:
    """The round, the received model and the change of the last reply of a site's in this run; None: it is not here."""
    if found.folder is None:
        return None
    usual = (SITES / client, found.folder.parent / "clients" / client)
    for folder in (state_dir,) if state_dir is not None else usual:
        place = folder / "private" / found.folder.name
        if (place / REPLY_FILE).exists():
            return load_reply(place)
    return None


def attacked_reply(
    recogniser: Recogniser,
    settings: Settings,
    received: NDArray[np.float32],
    change: Coded,
    pack: FacePack,
    compute: Compute,
) -> Membership:
    """The attack of whoever has the model that a site received and the change that it sent.

    A person's score is how much the change moved it.  recogniser: of the run, which gets other weights here.
    Raises CheckpointError where they are of another model; UserError as `attacked`.
    """
    tensors, normalisation = recogniser.state_dict(), settings.model.normalisation
    manifest = manifest_of({name: tensors[name] for name in shared_names(recogniser, normalisation)})
    trainable = settings.training.trainable
    moving = moving_names(recogniser, normalisation, trainable)
    part = Part.of(manifest, moving=moving, trainable=trainable_names(recogniser, trainable))
    if len(received) != manifest.size or change.size != part.part.size:
        raise CheckpointError(
            f"the kept reply is of a model of {len(received):,} numbers, this one has {manifest.size:,}."
        )
    load_shared(recogniser, received, manifest)
    people, before = _scores(recogniser, pack, compute)
    load_shared(recogniser, received + part.spread(decode(change)), manifest)
    _, after = _scores(recogniser, pack, compute)
    return _membership(pack, people, after - before)


def attacked(recogniser: Recogniser, pack: FacePack, compute: Compute) -> Membership:
    """The attack on a model at one site: its training people, threshold from validation people, tried on test people.

    Raises UserError where there are fewer than two of any with two pictures.
    """
    return _membership(pack, *_scores(recogniser, pack, compute))


def _scores(recogniser: Recogniser, pack: FacePack, compute: Compute) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    shown = np.flatnonzero(np.isin(pack.split, (Split.TRAIN, Split.VAL_PEOPLE, Split.TEST_PEOPLE)))
    return person_scores(embed(recogniser, pack, shown, compute).numpy(), pack.person[shown])


def _membership(pack: FacePack, people: NDArray[np.int64], scores: NDArray[np.float64]) -> Membership:
    parts = []
    for split, what in (
        (Split.TRAIN, "to train on"),
        (Split.VAL_PEOPLE, "to validate on"),
        (Split.TEST_PEOPLE, "to test on"),
    ):
        here = scores[np.isin(people, pack.person[pack.indices(split)])]
        if len(here) < 2:
            raise UserError(
                f"{pack.dataset}: {len(here)} people {what} have two pictures; an attack needs two or more."
            )
        parts.append(here)
    return membership(*parts)


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def _lines(results: Mapping[str, Mapping[str, Membership]]) -> Iterator[str]:
    for client, models in results.items():
        first = models[MODEL]
        yield (
            f"{client}: {first.num_members} people trained on; held out: {first.num_calibrating} set the threshold,"
            f" {first.num_held_out} test it (in brackets 95 % intervals)"
        )
        for name, found in models.items():
            yield (
                f"{client}: {name}: membership AUC {_shown(found.auc)}; true positives {_shown(found.tpr)} at 1 % false"
                f" ones, of which there were {_shown(found.fpr)}"
            )
        if first.num_calibrating < 1 / 0.01:
            yield f"{client}: 1 % of {first.num_calibrating} is nobody: the threshold is the highest score held out"
        verdict = "at chance" if first.is_at_chance else "above chance: the model shows whom it was trained on"
        yield f"{client}: {verdict}"
        for name, found in models.items():
            if name not in (MODEL, UNTRAINED):
                verdict = "at chance" if found.is_at_chance else "above chance: it shows whom the site trained on"
                yield f"{client}: {name}: {verdict}"


def _as_json(results: Mapping[str, Mapping[str, Membership]]) -> dict[str, Any]:
    return {client: {name: found.to_json() for name, found in models.items()} for client, models in results.items()}
