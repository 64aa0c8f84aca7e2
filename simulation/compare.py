"""The comparison of models as plain values: who was scored on whom, the gaps that answer the user's question, notes."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulation.found_models import TWINS, FoundModel
from simulation.scoring import Gap, Scored, gap
from simulation.tested import POOLED, TestSet

AUC = "roc_auc"
GAP_FIGURES = (AUC, "eer", "tar_at_far_1e-2", "tar_at_far_1e-3", "twins_roc_auc", "twins_eer", "strangers_roc_auc")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models side by side on equal test sets."""

    mode: str  # single | all
    backbone: str
    seed: int  # of the bootstrap
    models: Sequence[FoundModel]
    test_sets: Mapping[str, TestSet]  # in order of names; with several clients POOLED comes first
    scored: Mapping[str, Mapping[str, Scored]]  # model -> test set
    gaps: Sequence[Gap]
    notes: Sequence[str]

    @property
    def main(self) -> str:
        """The test set of the first table: POOLED, or the only client."""
        return next(iter(self.test_sets))


def with_pooled(clients: Mapping[str, TestSet]) -> dict[str, TestSet]:
    """The clients' test sets, before them their sum when there are several."""
    if len(clients) == 1:
        return dict(clients)
    return {POOLED: functools.reduce(operator.add, clients.values()), **clients}


def gaps_of(
    models: Sequence[FoundModel], test_sets: Sequence[str], scored: Mapping[str, Mapping[str, Scored]]
) -> list[Gap]:
    """Each federated model minus the centralised one, that of twins, and the best local one, on each test set.

    On a client's own test set the local model is that client's; on the pooled one it is the local model with the
    highest test AUC, a choice made on the test set and in favour of training alone.
    """
    locals_ = [model for model in models if model.wanted.kind == "local"]
    found = []
    for test_set in test_sets:
        others = [model.name for model in models if model.wanted.kind in ("centralized", TWINS)]
        own = [model.name for model in locals_ if model.wanted.client == test_set]
        best = max(locals_, key=lambda model: scored[model.name][test_set].figures[AUC].value, default=None)
        others += own or ([best.name] if best is not None else [])
        for model in models:
            if model.wanted.mode == "federated":
                found += [
                    gap(scored, model.name, other, test_set, figure)
                    for other in others
                    for figure in GAP_FIGURES
                    if figure in scored[model.name][test_set].replicates  # equal pairs, so the other has it too
                ]
    return found


def notes_of(models: Sequence[FoundModel], scored: Mapping[str, Mapping[str, Scored]]) -> list[str]:
    """What a reader must know to take the figures rightly."""
    notes = []
    epochs = {model.name: model.num_epochs for model in models}
    if len(set(epochs.values())) > 1:
        shown = ", ".join(f"{name} {number}" for name, number in epochs.items())
        notes.append(f"the budgets differ: epochs over each picture as planned: {shown}")
    differing = _differing_closed_sets(models)
    if differing:
        notes.append(f"accuracy on own people is not of the same pictures: {differing}")
    for model in models:
        reasons = {name: one.no_head for name, one in scored[model.name].items() if one.no_head and name != POOLED}
        if reasons and not (model.wanted.kind == "local" and model.wanted.client not in reasons):
            grouped = {why: [name for name in reasons if reasons[name] == why] for why in reasons.values()}
            shown = "; ".join(f"at {', '.join(names)}: {why}" for why, names in grouped.items())
            notes.append(f"{model.name}: no accuracy on own people {shown}")
    return notes


def _differing_closed_sets(models: Sequence[FoundModel]) -> str:
    """The settings by which the models' closed test sets differ; empty when they are the same."""
    deciding = [field.name for field in dataclasses.fields(models[0].settings.data) if "fraction_" in field.name]
    deciding = [
        key for key in [*deciding, "max_people", "min_pictures_per_person"] if key != "max_quarantined_fraction"
    ]
    parts = []
    for key in deciding:
        values = {model.name: getattr(model.settings.data, key) for model in models}
        if len(set(values.values())) > 1:
            parts.append(f"data.{key} = " + ", ".join(f"{value} ({name})" for name, value in values.items()))
    return "; ".join(parts)
