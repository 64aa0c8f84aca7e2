"""What a comparison comes to, in sentences that open its page: what federation changed, or that it cannot be told.

A difference is called one only where its interval leaves zero out; a figure of few people is said to be one.
"""

from collections.abc import Sequence
from typing import Final

from common.metrics.bootstrap import Estimate
from common.metrics.figures import AUC, FEW_PEOPLE
from simulation.compare.comparison import Comparison
from simulation.compare.model_lookup import UNTRAINED, FoundModel
from simulation.compare.scoring import POOLED, Gap

_MOST_CLIENTS: Final = 4  # with a sentence each


def verdict(comparison: Comparison) -> list[str]:
    """A few sentences of plain text, the answer first."""
    federated = [model for model in comparison.models if model.wanted.mode == "federated"]
    said = [_of_model(comparison, model) for model in federated] or [_best_of(comparison)]
    said += [sentence for sentence in (_not_above_untrained(comparison), _few_people(comparison)) if sentence]
    return said


def _of_model(comparison: Comparison, model: FoundModel) -> str:
    place = comparison.main
    auc = comparison.scored[model.name][place].figures[AUC]
    where = "all clients together" if place == POOLED else place
    gaps = _gaps(comparison, model, place)
    compared = "; ".join(_against(comparison, gap) for gap in gaps)
    text = f"Federated ({model.shown}), on {where}: AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]"
    text += f", {compared}." if compared else "."
    return " ".join([text, *_at_clients(comparison, model)])


def _gaps(comparison: Comparison, model: FoundModel, place: str) -> list[Gap]:
    return [gap for gap in comparison.gaps if (gap.minuend, gap.test_set, gap.figure) == (model.name, place, AUC)]


def _against(comparison: Comparison, gap: Gap) -> str:
    """How far the first model is above or below the other, or that there is no clear difference."""
    other = _in_words(comparison, gap.subtrahend)
    one = gap.gap
    if not gap.excludes_zero:
        return f"no clear difference from {other} ({one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}])"
    if one.value < 0.0:
        one = Estimate(value=-one.value, low=-one.high, high=-one.low)
        return f"{_plain(one)} below {other}"
    return f"{_plain(one)} above {other}"


def _plain(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _in_words(comparison: Comparison, name: str) -> str:
    model = next(model for model in comparison.models if model.name == name)
    kind = model.wanted.kind
    if kind == "local":
        return f"local training ({model.wanted.client})"
    return {"centralized": "centralised training", UNTRAINED: "the untrained model"}.get(kind, model.shown)


def _at_clients(comparison: Comparison, model: FoundModel) -> list[str]:
    """Against what each client reaches alone: a sentence each, or of many how often which is so."""
    if comparison.main != POOLED:
        return []
    own = {
        place: gap
        for place in comparison.test_sets
        for gap in _gaps(comparison, model, place)
        if place != POOLED and gap.subtrahend == f"local-{place}"
    }
    if len(own) > _MOST_CLIENTS:
        above = sum(gap.excludes_zero and gap.gap.value > 0.0 for gap in own.values())
        below = sum(gap.excludes_zero and gap.gap.value < 0.0 for gap in own.values())
        return [
            f"Of {len(own)} clients it is clearly above their own local training at {above}, clearly below at {below};"
            f" at {len(own) - above - below} no difference is clear."
        ]
    return [f"At {place}: {_against(comparison, gap)}." for place, gap in own.items()]


def _best_of(comparison: Comparison) -> str:
    aucs = {model.shown: comparison.scored[model.name][comparison.main].figures[AUC] for model in comparison.models}
    best = max(aucs, key=lambda name: aucs[name].value)
    return f"No federated model is compared. The highest AUC is {_plain(aucs[best])}, of {best}."


def _not_above_untrained(comparison: Comparison) -> str:
    first = comparison.models[0]
    if first.wanted.kind != UNTRAINED:
        return ""
    figures = {model.shown: comparison.scored[model.name][comparison.main].figures[AUC] for model in comparison.models}
    start = figures.pop(first.shown)
    worse = [name for name, auc in figures.items() if auc.value <= start.value]
    if not worse:
        return ""
    verb = "is" if len(worse) == 1 else "are"
    return f"Warning: {_listed(worse)} {verb} not above the untrained model, whose AUC is {start.value:.3f}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _few_people(comparison: Comparison) -> str:
    few = {name: test.num_people for name, test in comparison.test_sets.items() if test.num_people < FEW_PEOPLE}
    if not few:
        return ""
    shown = ", ".join(f"{name} {number}" for name, number in few.items())
    return f"Warning: fewer than {FEW_PEOPLE} test people ({shown}) are too few to trust a figure or its interval."
