"""A comparison as text for the terminal, as CSV and as JSON."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.console import table
from common.metrics.twin_report import ACCURACY as OF_PAIRS
from common.metrics.twins import KINDS
from simulation.compare import AUC, Comparison
from simulation.kinds import figure_name, kind_of
from simulation.scoring import ACCURACY, CLOSED_FIGURES, NUM_REPLICATES, OPEN_FIGURES, TEN_FOLD, Estimate
from simulation.tested import POOLED, TestSet

COLUMNS: Mapping[str, str] = {
    AUC: "AUC",
    "eer": "EER",
    "tar_at_far_1e-2": "TAR@FAR 1e-2",
    "tar_at_far_1e-3": "TAR@FAR 1e-3",
    TEN_FOLD: "ten-fold",
    ACCURACY: "own people",
}
KIND_COLUMNS: Mapping[str, str] = {
    AUC: "AUC [95 %]",
    "eer": "EER",
    "tar_at_far_1e-1": "TAR@FAR 1e-1",
    "tar_at_far_1e-2": "1e-2",
    "tar_at_far_1e-3": "1e-3",
    OF_PAIRS: "accuracy",
}
INTERVALS: Mapping[str, str] = {TEN_FOLD: "1.96 standard errors over folds", ACCURACY: "Wilson, over pictures"}
_CSV_HEAD = (
    "row", "model", "minus", "trained_on", "run", "tested_at", "figure", "value", "low_95", "high_95", "interval",
    "num_people", "num_pictures", "num_genuine_pairs", "num_impostor_pairs",
)  # fmt: skip


def number(value: float, *, sign: str = "") -> str:
    """Three decimals, or a dash for what is not there.  sign: "+" shows that of positive numbers too."""
    return "-" if math.isnan(value) else f"{value:{sign}.3f}"


def bounds(estimate: Estimate, *, sign: str = "") -> str:
    """The interval, "[0.871, 0.902]"; empty where there is none."""
    if math.isnan(estimate.low):
        return ""
    return f"[{number(estimate.low, sign=sign)}, {number(estimate.high, sign=sign)}]"


def bootstrap(test_set: TestSet) -> str:
    """How the intervals of open-set figures were made."""
    return f"bootstrap over {test_set.drawn_over}, {NUM_REPLICATES:,} replicates"


def behind(test_set: TestSet) -> str:
    """How many people and pairs a test set has."""
    return (
        f"{test_set.num_people:,} people never seen, {test_set.num_pictures:,} pictures,"
        f" {test_set.num_genuine:,} genuine and {test_set.num_impostor:,} impostor pairs"
    )


def behind_kinds(test_set: TestSet) -> str:
    """How many pairs of twins and of strangers it has."""
    shown = "; ".join(
        f"{kind}: {genuine:,} genuine and {impostor:,} impostor pairs"
        for kind, (genuine, impostor) in ((kind, test_set.pairs_of(kind)) for kind in KINDS if kind != "all")
    )
    return f"{test_set.num_families:,} families; {shown}"


def has_kinds(comparison: Comparison, test_set: str) -> bool:
    """Whether the figures of twins and of strangers are there."""
    return any(scored[test_set].kinds is not None for scored in comparison.scored.values())


def kinds_table(comparison: Comparison, test_set: str) -> list[list[str]]:
    """A row for each model and kind of pairs on one test set, the first row being the heads."""
    rows = [["model", "pairs", *KIND_COLUMNS.values()]]
    for model in comparison.models:
        figures = comparison.scored[model.name][test_set].figures
        for kind in KINDS:
            named = [figure_name(kind, name) for name in KIND_COLUMNS]
            auc, *others = [figures.get(name, Estimate(value=math.nan)) for name in named]
            shown = [number(one.value) for one in others]
            rows.append([model.name, kind, f"{number(auc.value)} {bounds(auc)}".strip(), *shown])
    return rows


def figures_table(comparison: Comparison, test_set: str) -> list[list[str]]:
    """One row for each model on one test set, the first row being the heads."""
    rows = [["model", "AUC [95 %]", *(head for name, head in COLUMNS.items() if name != AUC)]]
    for model in comparison.models:
        figures = comparison.scored[model.name][test_set].figures
        shown = [number(figures[name].value) if name in figures else "-" for name in COLUMNS if name != AUC]
        rows.append([model.name, f"{number(figures[AUC].value)} {bounds(figures[AUC])}".strip(), *shown])
    return rows


def gaps_table(comparison: Comparison) -> list[list[str]]:
    """The gaps in AUC, the first row being the heads."""
    rows = [["gap", "tested at", "AUC", "95 %", "excludes zero"]]
    for gap in comparison.gaps:
        kind = kind_of(gap.figure)
        if gap.figure == figure_name(kind, AUC):
            says = "yes" if gap.excludes_zero else "no"
            name = f"{gap.minuend} minus {gap.subtrahend}"
            where = gap.test_set if kind == "all" else f"{gap.test_set}: {kind} only"
            rows.append([name, where, number(gap.gap.value, sign="+"), bounds(gap.gap, sign="+"), says])
    return rows


def transfer_table(comparison: Comparison) -> list[list[str]]:
    """The AUC of each model (row) at each client's test people (column), the first row being the heads."""
    places = list(comparison.test_sets)
    rows = [["model \\ tested at", *places]]
    for model in comparison.models:
        scored = comparison.scored[model.name]
        rows.append([model.name, *(number(scored[place].figures[AUC].value) for place in places)])
    return rows


def terminal_lines(comparison: Comparison) -> list[str]:
    """All that the terminal shows, but for where the files are."""
    lines = ["", f"{comparison.main}: {behind(comparison.test_sets[comparison.main])}", ""]
    lines += [table(figures_table(comparison, comparison.main)), ""]
    drawn = bootstrap(comparison.test_sets[comparison.main])
    lines.append(f"AUC: {drawn}. own people: accuracy on new pictures of people trained on.")
    for name, test in comparison.test_sets.items():
        if has_kinds(comparison, name):
            lines += ["", f"{name}: {behind_kinds(test)}", "", table(kinds_table(comparison, name))]
            lines += ["accuracy: mean of genuine pairs accepted and impostor pairs rejected, at validation's threshold"]
    gaps = gaps_table(comparison)
    if len(gaps) > 1:
        lines += ["", "what federation changes (+: the federated model is better)", table(gaps)]
    if len(comparison.test_sets) > 1:
        lines += ["", "AUC by where a model was trained and tested", table(transfer_table(comparison)), ""]
        lines += [f"{name}: {behind(test)}" for name, test in comparison.test_sets.items() if name != POOLED]
    return [*lines, *(["", *(f"note: {note}" for note in comparison.notes)] if comparison.notes else [])]


def interval_method(figure: str, test_set: TestSet) -> str:
    """How a figure's interval was made; empty for those without one."""
    return INTERVALS.get(figure, bootstrap(test_set) if figure in OPEN_FIGURES else "")


def csv_text(comparison: Comparison) -> str:
    """One line for each figure of each model on each test set, then one for each gap."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_HEAD)
    for model in comparison.models:
        for place, scored in comparison.scored[model.name].items():
            for name in (*OPEN_FIGURES, *CLOSED_FIGURES):
                if name in scored.figures:
                    test = comparison.test_sets[place]
                    counts = _counts(test, name) if name in OPEN_FIGURES else ["", scored.num_closed, "", ""]
                    about = ["figure", model.name, "", "+".join(model.clients), model.source, place, name]
                    writer.writerow([*about, *_cells(scored.figures[name]), interval_method(name, test), *counts])
    for gap in comparison.gaps:
        about = ["gap", gap.minuend, gap.subtrahend, "", "", gap.test_set, gap.figure]
        test = comparison.test_sets[gap.test_set]
        writer.writerow([*about, *_cells(gap.gap), bootstrap(test), *_counts(test, gap.figure)])
    return text.getvalue()


def _cells(estimate: Estimate) -> Sequence[object]:
    values = (estimate.value, estimate.low, estimate.high)
    return ["" if math.isnan(value) else f"{value:.6f}" for value in values]


def _counts(test: TestSet, figure: str) -> Sequence[object]:
    return [test.num_people, test.num_pictures, *test.pairs_of(kind_of(figure))]


def json_content(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as plain data; what has no interval has none here either."""
    return {
        "mode": comparison.mode,
        "backbone": comparison.backbone,
        "bootstrap": {
            "replicates": NUM_REPLICATES,
            "seed": comparison.seed,
            "over": comparison.test_sets[comparison.main].drawn_over,
        },
        "test_sets": {
            name: {
                "num_people": test.num_people,
                "num_pictures": test.num_pictures,
                "num_genuine_pairs": test.num_genuine,
                "num_impostor_pairs": test.num_impostor,
                **(_families(test) if test.num_families else {}),
                "digest": test.digest,
            }
            for name, test in comparison.test_sets.items()
        },
        "models": {
            model.name: {
                "run": model.source,
                "trained_on": list(model.clients),
                "step": model.step,
                "epochs": model.num_epochs,
                "seed": model.settings.run.seed,
                "tested_at": {
                    place: {name: _plain(estimate) for name, estimate in scored.figures.items()}
                    for place, scored in comparison.scored[model.name].items()
                },
            }
            for model in comparison.models
        },
        "gaps": [
            {
                "model": gap.minuend,
                "minus": gap.subtrahend,
                "tested_at": gap.test_set,
                "figure": gap.figure,
                **_plain(gap.gap),
                "excludes_zero": gap.excludes_zero,
            }
            for gap in comparison.gaps
        ],
        "notes": list(comparison.notes),
    }


def _families(test: TestSet) -> dict[str, Any]:
    counts = {kind: test.pairs_of(kind) for kind in KINDS if kind != "all"}
    pairs = {
        kind: {"num_genuine_pairs": genuine, "num_impostor_pairs": impostor}
        for kind, (genuine, impostor) in counts.items()
    }
    return {"num_families": test.num_families, **pairs}


def _plain(estimate: Estimate) -> dict[str, float]:
    values = {"value": estimate.value, "low_95": estimate.low, "high_95": estimate.high}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def metrics(comparison: Comparison) -> dict[str, float]:
    """By the names that the tracking shows: fedavg_test_roc_auc, fedavg_celeba_test_eer, fedavg_minus_..."""
    named: dict[str, float] = {}
    for model in comparison.models:
        for place, scored in comparison.scored[model.name].items():
            start = model.name if place == comparison.main else f"{model.name}_{place}"
            for name, estimate in scored.figures.items():
                named[f"{start}_test_{name}"] = estimate.value
            for name in (figure_name(kind, AUC) for kind in KINDS):
                if name in scored.figures:
                    named[f"{start}_test_{name}_low"] = scored.figures[name].low
                    named[f"{start}_test_{name}_high"] = scored.figures[name].high
    for gap in comparison.gaps:
        if gap.test_set == comparison.main and gap.figure == figure_name(kind_of(gap.figure), AUC):
            named[f"{gap.minuend}_minus_{gap.subtrahend}_test_{gap.figure}"] = gap.gap.value
    return named
