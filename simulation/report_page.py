"""A comparison as one page of HTML that needs nothing else: no script, no file, no address beside it."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from common.metrics.twins import KINDS
from simulation.compare import Comparison
from simulation.kinds import figure_name
from simulation.report import (
    COLUMNS,
    KIND_COLUMNS,
    behind,
    behind_kinds,
    bootstrap,
    bounds,
    gaps_table,
    has_kinds,
    interval_method,
    number,
    transfer_table,
)
from simulation.scoring import Estimate
from simulation.tested import POOLED

# Nothing may be loaded, whatever ends up in the text.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding-bottom: .4rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top;
  white-space: nowrap; }
thead th { border-bottom: 2px solid #888; }
small { color: #555; display: block; font-size: .78rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
"""
_WORDS: Mapping[str, str] = {
    "AUC": "probability that a pair of pictures of one person scores above a pair of two people; 0.5 is guessing.",
    "EER": "equal error rate: the part of impostor pairs accepted where it equals that of genuine pairs rejected.",
    "TAR@FAR 1e-2, 1e-3": "the part of genuine pairs accepted when at most 1 % or 0.1 % of impostor pairs are.",
    "ten-fold": "part of balanced pairs judged rightly, each tenth by the threshold that is best on the other nine.",
    "own people": "accuracy among one client's own people, on pictures that were not trained on.",
    "pooled": "the clients' pairs judged together by one threshold; there are no pairs across clients.",
    "excludes zero": "the 95 % interval of the gap lies on one side of zero; both models are drawn on the same people.",
}
_KIND_WORDS: Mapping[str, str] = {
    "twins": "genuine pairs of people with a sibling, impostor pairs of two siblings.",
    "strangers": "all genuine pairs, impostor pairs of two families.",
    "accuracy": "mean of the parts of genuine pairs accepted and of impostor pairs rejected, by one threshold for all"
    " kinds: the best one for all pairs of the validation people.",
}


def page(comparison: Comparison, *, title: str, made: str, pictures: Mapping[str, bytes]) -> str:
    """The whole page.

    title, made: plain text; made says when and by which run.  pictures: what each shows -> PNG.
    """
    words = {**_WORDS, **(_KIND_WORDS if has_kinds(comparison, comparison.main) else {})}
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(made)}</p>",
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


def _table(rows: Sequence[Sequence[str]], caption: str) -> str:
    """rows: cells that are HTML already, the first row being the heads.  caption: plain text."""
    head, *body = rows
    lines = ["<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr>"]
    below = [
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in body
    ]
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead>{"".join(lines)}</thead>'
        f"<tbody>{''.join(below)}</tbody></table></div>"
    )


def _escaped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[escape(cell) for cell in row] for row in rows]


def _figures(comparison: Comparison, test_set: str) -> str:
    test = comparison.test_sets[test_set]
    heads = [f"{escape(head)}<small>{escape(interval_method(name, test))}</small>" for name, head in COLUMNS.items()]
    rows = [["model", *heads]]
    for model in comparison.models:
        figures = comparison.scored[model.name][test_set].figures
        rows.append([escape(model.name), *_cells(figures, COLUMNS)])
    title = "All clients together" if test_set == POOLED else f"Tested at {test_set}"
    return f"<h2>{escape(title)}</h2>" + _table(rows, behind(test)) + _kinds(comparison, test_set)


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
    rows = [["model", "pairs", *(escape(head.removesuffix(" [95 %]")) for head in KIND_COLUMNS.values())]]
    for model in comparison.models:
        figures = comparison.scored[model.name][test_set].figures
        for kind in KINDS:
            names = [figure_name(kind, name) for name in KIND_COLUMNS]
            rows.append([escape(model.name), kind, *_cells(figures, names)])
    caption = f"{behind_kinds(test)}. Intervals of 95 %: {bootstrap(test)}."
    return "<h2>Twins and strangers</h2>" + _table(rows, caption)


def _gaps(comparison: Comparison) -> str:
    rows = gaps_table(comparison)
    if len(rows) == 1:
        return ""
    caption = "Differences in AUC, +: the federated model is better; "
    caption += f"{bootstrap(comparison.test_sets[comparison.main])}, the same draws for both models."
    text = (
        "<p>Minus a local model: what federation bought. Minus the centralised model: what it cost that no picture left"
        " its holder. On all clients together the local model is the one with the highest test AUC, which favours"
        " training alone.</p>"
    )
    return "<h2>What federation changes</h2>" + text + _table(_escaped(rows), caption)


def _transfer(comparison: Comparison) -> str:
    if len(comparison.test_sets) == 1:
        return ""
    caption = "AUC of a model (row) on the test people of a client (column)."
    return "<h2>Trained at one place, tested at another</h2>" + _table(_escaped(transfer_table(comparison)), caption)


def _notes(comparison: Comparison) -> str:
    if not comparison.notes:
        return ""
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in comparison.notes) + "</ul>"


def _picture(text: str, content: bytes) -> str:
    data = base64.b64encode(content).decode("ascii")
    return f'<h2>{escape(text)}</h2><img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _models(comparison: Comparison) -> str:
    rows = [["model", "run", "trained on", "best epoch or round", "epochs over each picture", "seed", "picture"]]
    rows += [
        [
            model.name,
            model.source,
            ", ".join(model.clients) or "not recorded",
            str(model.step),
            str(model.num_epochs),
            str(model.settings.run.seed),
            f"{model.settings.data.image_size} px, {model.settings.data.alignment}",
        ]
        for model in comparison.models
    ]
    caption = f"All are {comparison.backbone}; the best epoch or round was chosen on validation people."
    return "<h2>Models</h2>" + _table(_escaped(rows), caption)
