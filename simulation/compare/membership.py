"""`facefed privacy audit`: whether a run's model gives away whom a site trained on, tried on the site's own people.

Beside it stands the model before any training, which knows nobody: what it reaches is the data's doing.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from common.errors import EXIT_DONE, UserError
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.membership import Estimate, Membership, membership, person_scores
from common.models.recogniser import Recogniser
from common.settings import Settings
from common.system.runtime import num_cores, resolve_device
from common.training.autotune import threads_for
from common.training.evaluation import embed
from common.training.loop import Compute
from simulation.compare.model_loading import ModelFiles
from simulation.compare.model_lookup import find_model, untrained
from simulation.sites import data_options, pack_at_the_door, site_of

MODEL, UNTRAINED = "the run's model", "the model before training"


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """The flags of `facefed privacy audit`."""

    run: str  # a run's id or folder, or models:/...
    clients: Sequence[str]
    data_dirs: Sequence[str]
    device: str
    cache_dir: Path


def audit_privacy(settings: Settings, request: AuditRequest, out: TextIO, *, shape: str) -> int:
    """Print what the attack reaches at each site; shape: text or json.  Raises UserError."""
    found = find_model(settings, request.run, f"--run {request.run}")
    clients = request.clients or ([] if request.data_dirs else found.clients)
    told = out if shape == "text" else _Nowhere()
    results: dict[str, dict[str, Membership]] = {}
    for option in data_options(clients, request.data_dirs):
        site = site_of(option, device=request.device, cache_dir=request.cache_dir, state_dir=request.cache_dir)
        pack = pack_at_the_door(site, found.settings, told)  # type: ignore[arg-type]
        compute = _compute(found.settings, request.device)
        models = {MODEL: found, UNTRAINED: untrained([found])}
        results[option.name] = {
            name: attacked(ModelFiles(model).at(option.name, pack, {}).recogniser, pack, compute)
            for name, model in models.items()
        }
    privacy = found.settings.privacy
    if shape == "json":
        content = {"run": found.source, "round": found.step, "privacy": dataclasses.asdict(privacy)}
        out.write(json.dumps(content | {"clients": _as_json(results)}, indent=2) + "\n")
        return EXIT_DONE
    guarantee = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} of a {privacy.unit}"
    out.write(f"{found.source}, step {found.step}: {guarantee if privacy.is_on else 'no differential privacy'}\n")
    out.writelines(f"{line}\n" for line in _lines(results))
    return EXIT_DONE


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


def attacked(recogniser: Recogniser, pack: FacePack, compute: Compute) -> Membership:
    """The attack on a model at one site: its training people, threshold from validation people, tried on test people.

    Raises UserError where there are fewer than two of any with two pictures.
    """
    shown = np.flatnonzero(np.isin(pack.split, (Split.TRAIN, Split.VAL_PEOPLE, Split.TEST_PEOPLE)))
    people, scores = person_scores(embed(recogniser, pack, shown, compute).numpy(), pack.person[shown])
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


def _as_json(results: Mapping[str, Mapping[str, Membership]]) -> dict[str, Any]:
    return {
        client: {
            name: {**dataclasses.asdict(found), "is_at_chance": found.is_at_chance} for name, found in models.items()
        }
        for client, models in results.items()
    }
