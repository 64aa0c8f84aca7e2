"""What studies on twins share: several trainings on the same data as nested runs of one parent run.

An ablation (`simulation.ablation`) trains one variant for each value of a setting; a sweep (`simulation.sweep`) looks
for good values of several.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from clients.site import SiteSettings
from common import config
from common.runs import CHECKPOINTS, RunKind, all_params
from common.tracking.run import TrackedRun
from simulation.baselines import kind_of
from simulation.trainee import Trainee

MODES = ("twins", "ablation", "sweep")  # what `facefed train twins` makes
COMMAND = "facefed train twins"


def study_kind(mode: str, experiment: str, trainee: Trainee, site: SiteSettings) -> RunKind:
    """The kind of the parent run.  mode: "ablation" or "sweep".  trainee: any of the study's."""
    kind = kind_of("twins", trainee, {site.name: site})
    backbone = trainee.settings.model.backbone
    return dataclasses.replace(
        kind,
        mode=mode,
        experiment=experiment,
        label=f"{mode}_{backbone}",
        tags={**kind.tags, "model_type": backbone},
    )


def nested_run(
    parent: TrackedRun, name: str, trainee: Trainee, site: SiteSettings, tags: Mapping[str, str]
) -> TrackedRun:
    """The nested run of one training, with its own tags, all its parameters and its configuration.

    What it keeps lies in folders of its name: RUN/NAME/config.toml, RUN/plots/NAME/.
    """
    kind = kind_of("twins", trainee, {site.name: site})
    child = parent.child(name, {**kind.tags, **tags})
    child.log_params(all_params(trainee.settings, kind))
    child.log_text(config.to_toml(trainee.settings), "config.toml")
    return child


def checkpoints_of(folder: Path, name: str) -> Path:
    """Where a nested run's checkpoints lie in the study's folder."""
    return folder / CHECKPOINTS / name


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """A table; its columns are those of all rows in order of their first appearance, what a row lacks is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
