"""The comparison of models as plain values: who is tested on whom, the gaps that answer the user's question, notes.

Each client's test people are the same for every model.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from common.errors import DataError, UserError
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.bootstrap import EXACT_PAIRS
from common.metrics.design import PAIRS_PER_CPU_S
from common.metrics.figures import AUC, gap_figures
from common.metrics.pairs import pair_counts
from common.settings import DataSettings
from common.system.site_secret import keyed_digest
from common.training.evaluation import TEST_PAIRS, people_digest
from simulation.compare.model_lookup import TWINS, UNTRAINED, FoundModel
from simulation.compare.scoring import POOLED, Gap, Scored, gap

# What may differ: the same people are shown, only cut out in another way.
_HARMLESS = ("image_size", "alignment", "box_margin", "max_quarantined_fraction")

DRAWN_PER_CPU_S: Final = 3e7  # pairs, by another look for 1,000 replicates; measured: 10 to 50 million
Packs = Mapping[DataSettings, Mapping[str, FacePack]]


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """What stands behind the figures: one client's test people, or all clients'."""

    name: str  # a client's, or POOLED
    num_people: int
    num_pictures: int
    num_genuine: int
    num_impostor: int
    num_families: int = 0  # of clients that know of families
    num_twin_genuine: int = 0  # of people with a sibling among them
    num_twin_impostor: int = 0  # of two siblings
    digest: str = ""

    def pairs_of(self, kind: str) -> tuple[int, int]:
        """(genuine, impostor) pairs of one of `figures.KINDS`."""
        if kind == "twins":
            return self.num_twin_genuine, self.num_twin_impostor
        return self.num_genuine, self.num_impostor - (self.num_twin_impostor if kind == "strangers" else 0)

    @property
    def num_pairs(self) -> int:
        """All pairs, each once."""
        return self.num_genuine + self.num_impostor

    @property
    def is_linear(self) -> bool:
        """Whether a client's replicates are made of each person's sums; of all clients together each is as its own."""
        return bool(self.digest) and self.num_pairs > EXACT_PAIRS and not self.num_families

    @property
    def drawn_over(self) -> str:
        """What its bootstrap draws."""
        return "families" if self.num_families else "people"

    def __add__(self, other: "TestSet") -> "TestSet":
        return TestSet(
            name=POOLED,
            num_people=self.num_people + other.num_people,
            num_pictures=self.num_pictures + other.num_pictures,
            num_genuine=self.num_genuine + other.num_genuine,
            num_impostor=self.num_impostor + other.num_impostor,
            num_families=self.num_families + other.num_families,
            num_twin_genuine=self.num_twin_genuine + other.num_twin_genuine,
            num_twin_impostor=self.num_twin_impostor + other.num_twin_impostor,
        )


def check_same_pairs(
    models: Sequence[FoundModel], packs: Packs, clients: Sequence[str], secret: bytes | None = None
) -> None:
    """Raise UserError unless all models are tested, and were after training, on the same pairs of each client.

    secret: of the site, with which a federation's digests of its people are keyed; None: there is none here.
    """
    first = models[0]
    for client in clients:
        wanted = people_digest(packs[first.settings.data][client], "test")
        for model in models:
            if people_digest(packs[model.settings.data][client], "test") != wanted:
                raise UserError(_different_pairs(first, model, client))
            # All are scored anew, on all pairs; a run's own score may be of a design.
            now = people_digest(packs[model.settings.data][client], "test", model.settings.verification.max_pairs)
            recorded = model.test_pairs.get(client) or now
            keyed = keyed_digest(secret, TEST_PAIRS, now, digits=16) if secret else now
            if recorded not in (now, keyed):
                raise UserError(
                    f"{model.name} ({model.source}) was tested on other pairs of {client} than there are now"
                    f" (digest {recorded}, now {now}): the data set has changed since; give that run's data set with"
                    f" --data-dir {client}=DIR (of a federation with the site's own --cache-dir, where the secret of"
                    f" its digests is), or train {model.name} again."
                )


def _different_pairs(one: FoundModel, other: FoundModel, client: str) -> str:
    ours, theirs = dataclasses.asdict(one.settings.data), dataclasses.asdict(other.settings.data)
    settings = [
        f"data.{key} = {ours[key]} and {theirs[key]}"
        for key in ours
        if ours[key] != theirs[key] and key not in _HARMLESS
    ]
    # Otherwise other pictures were quarantined, which depends on how they are cut out.
    seen = "; ".join(settings) or "other pictures were left out"
    return (
        f"{one.name} ({one.source}) and {other.name} ({other.source}) are tested on different pairs of {client}:"
        f" {seen}; train one again with the other's setting, or name another run with --run {other.name}=RUN."
    )


def describe(name: str, pack: FacePack) -> TestSet:
    """A client's test people.  Raises DataError when there are fewer than two, or no genuine pair."""
    _, person, family = pack.shown_in(Split.TEST_PEOPLE)
    counted = pair_counts(person, family)
    num_genuine, num_impostor = counted["all"]
    num_twin_genuine, num_twin_impostor = counted["twins"]
    test_set = TestSet(
        name=name,
        num_people=len(np.unique(person)),
        num_pictures=len(person),
        num_genuine=num_genuine,
        num_impostor=num_impostor,
        num_families=0 if pack.family is None else len(np.unique(family)),
        num_twin_genuine=num_twin_genuine,
        num_twin_impostor=num_twin_impostor,
        digest=people_digest(pack, "test"),
    )
    if test_set.num_people < 2 or num_genuine == 0:
        raise DataError(
            f"{name}: the test set has {test_set.num_people} people and {num_genuine} genuine pairs, so nothing can be"
            " compared; give at least two people, one of them with two pictures."
        )
    return test_set


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
    """Each federated model minus the centralised one, that of twins, the best local one and the untrained one.

    On each test set.  On a client's own the local model is that client's; on the pooled one it is the local model with
    the highest test AUC, a choice made on the test set and in favour of training alone.
    """
    locals_ = [model for model in models if model.wanted.kind == "local"]
    found = []
    for test_set in test_sets:
        others = [model.name for model in models if model.wanted.kind in ("centralized", TWINS)]
        own = [model.name for model in locals_ if model.wanted.client == test_set]
        best = max(locals_, key=lambda model: scored[model.name][test_set].figures[AUC].value, default=None)
        others += own or ([best.name] if best is not None else [])
        others += [model.name for model in models if model.wanted.kind == UNTRAINED]
        for model in models:
            if model.wanted.mode == "federated":
                found += [
                    gap(scored, model.name, other, test_set, figure)
                    for other in others
                    for figure in gap_figures()
                    if figure in scored[model.name][test_set].replicates  # equal pairs, so the other has it too
                ]
    return found


def cpu_seconds_of(test_sets: Iterable[TestSet]) -> float:
    """About what one model's pairs and their intervals cost on one core; embeddings are not in it."""
    return sum(
        2 * test.num_pairs / PAIRS_PER_CPU_S
        if test.is_linear
        else test.num_pairs / PAIRS_PER_CPU_S + test.num_pairs / DRAWN_PER_CPU_S
        for test in test_sets
    )


def notes_of_size(test_sets: Mapping[str, TestSet]) -> list[str]:
    """How the intervals of very large test sets are made."""
    return [
        f"{name} has {test.num_pairs:,} pairs, all of them scored; its intervals are made of each person's sums, which"
        " leaves out one part in as many as there are people"
        for name, test in test_sets.items()
        if test.is_linear
    ]


def notes_of(models: Sequence[FoundModel], scored: Mapping[str, Mapping[str, Scored]]) -> list[str]:
    """What a reader must know to take the figures rightly."""
    notes = []
    trained = [model for model in models if model.wanted.kind != UNTRAINED]
    epochs = {model.shown: model.num_epochs for model in trained}
    if len(set(epochs.values())) > 1:
        shown = ", ".join(f"{name} {number}" for name, number in epochs.items())
        notes.append(f"the budgets differ: epochs over each picture as planned: {shown}")
    differing = _differing_closed_sets(models)
    if differing:
        notes.append(f"accuracy on own people is not of the same pictures: {differing}")
    for model in trained:
        reasons = {name: one.no_head for name, one in scored[model.name].items() if one.no_head and name != POOLED}
        if reasons and not (model.wanted.kind == "local" and model.wanted.client not in reasons):
            grouped = {why: [name for name in reasons if reasons[name] == why] for why in reasons.values()}
            shown = "; ".join(f"at {', '.join(names)}: {why}" for why, names in grouped.items())
            notes.append(f"{model.shown}: no accuracy on own people {shown}")
    return notes


def _differing_closed_sets(models: Sequence[FoundModel]) -> str:
    """The settings by which the models' closed test sets differ; empty when they are the same."""
    deciding = [field.name for field in dataclasses.fields(models[0].settings.data) if "fraction_" in field.name]
    deciding = [
        key for key in [*deciding, "max_people", "min_pictures_per_person"] if key != "max_quarantined_fraction"
    ]
    parts = []
    for key in deciding:
        values = {model.shown: getattr(model.settings.data, key) for model in models}
        if len(set(values.values())) > 1:
            parts.append(f"data.{key} = " + ", ".join(f"{value} ({name})" for name, value in values.items()))
    return "; ".join(parts)
