"""A comparison as text for the terminal, as CSV, as JSON, and as one page of HTML.

The page needs nothing else: no script, no file, no address beside it.
"""

import base64
import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from common.metrics.bootstrap import Estimate
from common.metrics.figures import AUC, CLOSED, JUDGED, KINDS, PAIRS, compared, figure_name, figures_of, kind_of
from common.metrics.names import of_client, of_model
from common.system.console import table
from simulation.compare.comparison import Comparison, TestSet
from simulation.compare.model_lookup import UNTRAINED, Cost
from simulation.compare.scoring import NUM_REPLICATES, POOLED
from simulation.compare.verdict import verdict

_CSV_HEAD = (
    "row", "model", "minus", "trained_on", "run", "tested_at", "figure", "value", "low_95", "high_95", "interval",
    "num_people", "num_pictures", "num_genuine_pairs", "num_impostor_pairs",
)  # fmt: skip
# Nothing may be loaded, whatever ends up in the text.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
h1, h2, p, li, dt, dd, td, th, caption { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding-bottom: .4rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
td span, tbody th { white-space: nowrap; }
td.text span, tbody th { white-space: normal; }
small { color: #555; display: block; font-size: .78rem; }
.below { color: #555; font-size: .85rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid #0072b2; padding-left: .8rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
/* On a phone each row is a card: a cell a line, with its head before it. */
@media (max-width: 56rem) {
  table, caption, tbody, tr, tbody th { display: block; }
  thead { display: none; }
  tbody th { font-weight: 600; padding-top: .8rem; border-bottom: 1px solid #888; }
  td { display: flex; justify-content: space-between; padding-right: 0; }
  td::before { content: attr(data-head); color: #555; margin-right: 1rem; }
  td span { text-align: right; }
}
@media (max-width: 46rem) { .picture { overflow-x: auto; } .picture img { max-width: none; width: 46rem; } }
"""
_COST_HEADS = ("time", "sent")
_MOST_COLUMNS = 8  # of test sets in the table of who is tested where
_WORDS: Mapping[str, str] = {
    "untrained": "the model that training began with: what does not beat it has learned nothing that helps here.",
    "pooled": "the clients' pairs judged together by one threshold; there are no pairs across clients.",
    "excludes zero": "the 95 % interval of the gap lies on one side of zero; both models are drawn on the same people.",
}
_KIND_WORDS: Mapping[str, str] = {
    "twins": "genuine pairs of people with a sibling, impostor pairs of two siblings.",
    "strangers": "all genuine pairs, impostor pairs of two families.",
}


def _columns() -> dict[str, str]:
    """Figure -> the head of its column in the table of models."""
    return {name: row.head for name, row in compared().items() if row.head and name == row.name}


def _kind_columns() -> dict[str, str]:
    """Figure of a kind of pairs -> the head of its column."""
    return {row.name: row.kind_head for row in figures_of(PAIRS, JUDGED) if row.kind_head}


def _with_interval(heads: Mapping[str, str]) -> list[str]:
    """The heads of a table of text, whose column of the AUC shows its interval."""
    return [f"{head} [95 %]" if name == AUC else head for name, head in heads.items()]


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
    return any(scored[test_set].sums.has_kinds for scored in comparison.scored.values())


def kinds_table(comparison: Comparison, test_set: str) -> list[list[str]]:
    """A row for each model and kind of pairs on one test set, the first row being the heads."""
    rows = [["model", "pairs", *_with_interval(_kind_columns())]]
    for model in comparison.models:
        figures = comparison.scored[model.name][test_set].figures
        for kind in KINDS:
            named = [figure_name(kind, name) for name in _kind_columns()]
            auc, *others = [figures.get(name, Estimate(value=math.nan)) for name in named]
            shown = [number(one.value) for one in others]
            rows.append([model.name, kind, f"{number(auc.value)} {bounds(auc)}".strip(), *shown])
    return rows


def figures_table(comparison: Comparison, test_set: str) -> list[list[str]]:
    """One row for each model on one test set, the first row being the heads."""
    columns = _columns()
    rows = [["model", *_with_interval(columns)]]
    for model in comparison.models:
        figures = comparison.scored[model.name][test_set].figures
        shown = [number(figures[name].value) if name in figures else "-" for name in columns if name != AUC]
        rows.append([model.name, f"{number(figures[AUC].value)} {bounds(figures[AUC])}".strip(), *shown])
    return rows


def gaps_table(comparison: Comparison, *, in_words: bool = False) -> list[list[str]]:
    """The gaps in AUC, the first row being the heads.  in_words: with the models' names as pages have them."""
    names = {model.name: model.shown if in_words else model.name for model in comparison.models}
    rows = [["gap", "tested at", "AUC", "95 %", "excludes zero"]]
    for gap in comparison.gaps:
        kind = kind_of(gap.figure)
        if gap.figure == figure_name(kind, AUC):
            says = "yes" if gap.excludes_zero else "no"
            name = f"{names[gap.minuend]} minus {names[gap.subtrahend]}"
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
    row = compared()[figure]
    return bootstrap(test_set) if row.of in (PAIRS, JUDGED) else row.ends_method


def csv_text(comparison: Comparison) -> str:
    """One line for each figure of each model on each test set, for what it cost, then one for each gap."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_HEAD)
    for model in comparison.models:
        for place, scored in comparison.scored[model.name].items():
            for name, row in compared().items():
                if name in scored.figures:
                    test = comparison.test_sets[place]
                    counts = _counts(test, name) if row.of != CLOSED else ["", scored.num_closed, "", ""]
                    about = ["figure", model.name, "", "+".join(model.clients), model.source, place, name]
                    writer.writerow([*about, *_numbers(scored.figures[name]), interval_method(name, test), *counts])
    for model in comparison.models:
        for name, value in _known(model.cost).items():
            about = ["cost", model.name, "", "+".join(model.clients), model.source, "", name]
            writer.writerow([*about, f"{value:.6f}", *[""] * (len(_CSV_HEAD) - len(about) - 1)])
    for gap in comparison.gaps:
        about = ["gap", gap.minuend, gap.subtrahend, "", "", gap.test_set, gap.figure]
        test = comparison.test_sets[gap.test_set]
        writer.writerow([*about, *_numbers(gap.gap), bootstrap(test), *_counts(test, gap.figure)])
    return text.getvalue()


def _numbers(estimate: Estimate) -> Sequence[object]:
    values = (estimate.value, estimate.low, estimate.high)
    return ["" if math.isnan(value) else f"{value:.6f}" for value in values]


def _known(cost: Cost) -> dict[str, float]:
    """What was recorded of it."""
    return {name: value for name, value in dataclasses.asdict(cost).items() if not math.isnan(value)}


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
                "cost": {
                    name: value for name, value in dataclasses.asdict(model.cost).items() if not math.isnan(value)
                },
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
    """By the names that the tracking shows: fedavg/test_roc_auc, fedavg/client/celeba/test_eer, fedavg_minus_.../..."""
    named: dict[str, float] = {}
    for model in comparison.models:
        for place, scored in comparison.scored[model.name].items():
            where = partial(_metric, comparison, model.name, place)
            for name, estimate in scored.figures.items():
                named[where(f"test_{name}")] = estimate.value
            for name in (figure_name(kind, AUC) for kind in KINDS):
                if name in scored.figures:
                    named[where(f"test_{name}_low")] = scored.figures[name].low
                    named[where(f"test_{name}_high")] = scored.figures[name].high
    for gap in comparison.gaps:
        if gap.test_set == comparison.main and gap.figure == figure_name(kind_of(gap.figure), AUC):
            named[of_model(f"{gap.minuend}_minus_{gap.subtrahend}", f"test_{gap.figure}")] = gap.gap.value
    return named


def _metric(comparison: Comparison, model: str, place: str, name: str) -> str:
    return of_model(model, name if place == comparison.main else of_client(place, name))


def page(comparison: Comparison, *, title: str, made: str, pictures: Mapping[str, bytes]) -> str:
    """The whole page.

    title, made: plain text; made says when and by which run.  pictures: what each shows -> PNG.
    """
    words = {word: text for row in compared().values() if row.of != JUDGED for word, text in row.words.items()} | dict(
        _WORDS
    )
    if has_kinds(comparison, comparison.main):
        words |= _KIND_WORDS
        words |= {word: text for row in figures_of(JUDGED) for word, text in row.words.items()}
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(made)}</p>",
        *(f'<p class="verdict">{escape(sentence)}</p>' for sentence in verdict(comparison)),
        _figures(comparison, comparison.main),
        _gaps(comparison),
        _transfer(comparison),
        *(_figures(comparison, name) for name in comparison.test_sets if name not in (comparison.main, POOLED)),
        _notes(comparison),
        *(_picture(text, content) for text, content in pictures.items()),
        _models(comparison),
        "<h2>Words</h2><dl>"
        + "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in words.items())
        + "</dl>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _table(rows: Sequence[Sequence[str]], caption: str, *, kind: str = "") -> str:
    """rows: cells that are HTML already, the first row being the heads, plain text.  caption: likewise.

    kind: "text" for cells whose words may stand on several lines.
    """
    head, *body = rows
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    opening = f'<td class="{kind}"' if kind else "<td"
    below = [
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(
            f'{opening} data-head="{escape(name)}"><span>{cell}</span></td>'
            for name, cell in zip(head[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in body
    ]
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(below)}</tbody></table></div>"
    )


def _escaped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[escape(cell) for cell in row] for row in rows]


def _figures(comparison: Comparison, test_set: str) -> str:
    test = comparison.test_sets[test_set]
    columns, is_main = _columns(), test_set == comparison.main
    rows = [["model", *columns.values(), *(_COST_HEADS if is_main else ())]]
    for model in comparison.models:
        figures = comparison.scored[model.name][test_set].figures
        cost = _cost_cells(model.cost) if is_main else []
        rows.append([escape(model.shown), *_cells(figures, columns), *cost])
    title = "All clients together" if test_set == POOLED else f"Tested at {test_set}"
    below = _below(columns, test) if is_main else ""
    return f"<h2>{escape(title)}</h2>" + _table(rows, behind(test)) + below + _kinds(comparison, test_set)


def _below(columns: Mapping[str, str], test: TestSet) -> str:
    """How the intervals of the columns were made, each way once, and what the costs are."""
    methods: dict[str, list[str]] = {}
    for name, head in columns.items():
        methods.setdefault(interval_method(name, test), []).append(head)
    ways = "; ".join(f"{', '.join(heads)}: {how}" for how, heads in methods.items() if how)
    text = (
        f"Brackets: 95 % intervals ({ways}). Time: of all rounds or epochs with scoring, on the machine that trained."
        " Sent: bytes of all clients to the server and back; without a federation none are sent, but then all pictures"
        " lie with one holder or came to one place."
    )
    return f'<p class="below">{escape(text)}</p>'


def _cost_cells(cost: Cost) -> list[str]:
    sent = cost.bytes_up + cost.bytes_down
    return [_duration(cost.seconds), "-" if math.isnan(sent) else f"{sent / 1e6:,.1f} MB"]


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _cells(figures: Mapping[str, Estimate], names: Iterable[str]) -> list[str]:
    return [
        f"{number(figures[name].value)}<small>{bounds(figures[name])}</small>" if name in figures else "-"
        for name in names
    ]


def _kinds(comparison: Comparison, test_set: str) -> str:
    """The figures of twins and of strangers apart, where there are any."""
    if not has_kinds(comparison, test_set):
        return ""
    test = comparison.test_sets[test_set]
    rows = [["model", "pairs", *_kind_columns().values()]]
    for model in comparison.models:
        figures = comparison.scored[model.name][test_set].figures
        for kind in KINDS:
            names = [figure_name(kind, name) for name in _kind_columns()]
            rows.append([escape(model.shown), kind, *_cells(figures, names)])
    caption = f"{behind_kinds(test)}. Intervals of 95 %: {bootstrap(test)}."
    return "<h2>Twins and strangers</h2>" + _table(rows, caption)


def _gaps(comparison: Comparison) -> str:
    rows = gaps_table(comparison, in_words=True)
    if len(rows) == 1:
        return ""
    caption = "Differences in AUC, +: the federated model is better; "
    caption += f"{bootstrap(comparison.test_sets[comparison.main])}, the same draws for both models."
    text = (
        "<p>Minus a local model: what federation bought. Minus the centralised model: what it cost that no picture left"
        " its holder. Minus the untrained model: what training did at all. On all clients together the local model is"
        " the one with the highest test AUC, which favours training alone.</p>"
    )
    return "<h2>What federation changes</h2>" + text + _table(_escaped(rows), caption)


def _transfer(comparison: Comparison) -> str:
    if len(comparison.test_sets) == 1:
        return ""
    caption = "AUC of a model (row) on the test people of a client (column)."
    rows = transfer_table(comparison)
    for row, model in zip(rows[1:], comparison.models, strict=True):
        row[0] = model.shown
    if len(comparison.test_sets) > _MOST_COLUMNS:  # a row for each client then
        rows = [list(row) for row in zip(*rows, strict=True)]
        rows[0][0], caption = "tested at", "AUC of a model (column) on the test people of a client (row)."
    return "<h2>Trained at one place, tested at another</h2>" + _table(_escaped(rows), caption)


def _notes(comparison: Comparison) -> str:
    if not comparison.notes:
        return ""
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in comparison.notes) + "</ul>"


def _picture(text: str, content: bytes) -> str:
    data = base64.b64encode(content).decode("ascii")
    image = f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'
    return f'<h2>{escape(text)}</h2><div class="picture">{image}</div>'


def _models(comparison: Comparison) -> str:
    rows = [["model", "run", "trained on", "best epoch or round", "epochs over each picture", "seed", "picture"]]
    rows += [
        [
            model.shown,
            model.source,
            "nobody" if model.wanted.kind == UNTRAINED else ", ".join(model.clients) or "not recorded",
            str(model.step),
            str(model.num_epochs),
            str(model.settings.run.seed),
            f"{model.settings.data.image_size} px, {model.settings.data.alignment}",
        ]
        for model in comparison.models
    ]
    caption = f"All are {comparison.backbone}; the best epoch or round was chosen on validation people."
    return "<h2>Models</h2>" + _table(_escaped(rows), caption, kind="text")
