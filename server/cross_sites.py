"""Several models beside each other, each scored by every site: `flower-server --evaluate A --evaluate B`.

With each site's own model among them, as its people handed it over, this is the cross-site table: how well a model that
one site trained alone knows the people of another.  Each model is a run of its own (federation.evaluate_only); the
table is made of what those runs left, and nothing more of a site is in it than in them.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.metrics.figures import AUC
from common.system.files import read_json, write_bytes

ALL_SITES: Final = "all sites"  # the figures of the merged sums
FILES: Final = ("cross_sites.json", "cross_sites.csv")
MISSING: Final = "-"
EER: Final = "eer"


@dataclass(frozen=True)
class Row:
    """A model, and by site (and ALL_SITES) its figures on the site's test people: AUC in [0, 1], EER in [0, 1]."""

    model: str
    run_id: str
    sha256: str
    auc: Mapping[str, float]
    eer: Mapping[str, float]


def row_of(model: str, run_folder: Path) -> Row:
    """What a run that scored a model left.  model: as it was asked for.

    Raises CheckpointError where its metrics cannot be read.
    """
    summary: dict[str, Any] = read_json(run_folder / "metrics.json")
    named = {name: {key.removeprefix("test_"): value for key, value in figures.items()}
             for name, figures in summary["clients"].items()} | {ALL_SITES: summary["best"]}  # fmt: skip
    auc, eer = ({name: float(of[figure]) for name, of in named.items() if figure in of} for figure in (AUC, EER))
    return Row(model, run_folder.name, summary["model_sha256"], auc, eer)


def sites_of(rows: Sequence[Row]) -> list[str]:
    """The columns: each site that scored one model at least, by name, and all of them together."""
    return [*sorted({site for row in rows for site in row.auc} - {ALL_SITES}), ALL_SITES]


def lines(rows: Sequence[Row], num_models: int) -> list[str]:
    """The table for a terminal: models down, sites across, AUC (EER).  num_models: that were to be scored."""
    sites = sites_of(rows)
    cells = [["model", *sites]]
    for row in rows:
        found = (f"{row.auc[site]:.3f} ({row.eer[site]:.3f})" if site in row.auc else MISSING for site in sites)
        cells.append([row.model, *found])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    table = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    num_missing = sum(site not in row.auc for row in rows for site in sites)
    notes = []
    if len(rows) < num_models:
        notes.append(f"{len(rows)} of {num_models} models were scored")
    if num_missing:
        notes.append(f"{num_missing} scores are missing: that site did not answer, or has too few pairs")
    return ["each model at each site, test AUC (EER), people never seen:", *(f"  {line}" for line in [*table, *notes])]


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The table as JSON and as CSV, a line for each model and site, into the folder."""
    told = [
        {"model": row.model, "run": row.run_id, "model_sha256": row.sha256, "site": site, AUC: row.auc.get(site),
         EER: row.eer.get(site)}
        for row in rows for site in sites_of(rows)
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(told[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(told)
    paths = [folder / name for name in FILES]
    for path, content in zip(paths, (json.dumps(told, indent=1) + "\n", text.getvalue()), strict=True):
        write_bytes(path, content.encode())
    return paths
