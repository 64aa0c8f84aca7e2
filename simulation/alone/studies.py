"""Studies on twins: several trainings on the same data as nested runs of one parent run.

A sweep (`simulation.alone.sweep`) looks for good values of several settings. The ablation, which stands here, says
what one setting is worth: a training for each of its values, all else equal, and their paired gaps. All variants have
the same seed, people, pictures and number of gradient steps, so what differs is the setting. The gaps come from the
same draws of families for all variants; that another seed would give other models is not in their intervals
(`common.metrics.bootstrap`).
"""

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from clients.site import SiteSettings
from common import config
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.bootstrap import paired_gap
from common.metrics.figures import AUC, KINDS
from common.metrics.names import EPOCH_SECONDS, of_model
from common.plots.comparison import ablation_dots
from common.runs import CHECKPOINTS, RunKind, all_params, recorded
from common.settings import AblationSettings, Settings
from common.system.checkpoints import read_tensors
from common.system.files import read_json, write_json
from common.system.runtime import stream_seed
from common.tracking.notes import data_note, run_note
from common.tracking.run import TrackedRun
from common.training.evaluation import embed, people_digest
from simulation.alone.baselines import check_twins, kind_of, train_and_test, write_header
from simulation.alone.trainee import Trainee, local_trainee
from simulation.alone.twin_results import NUM_REPLICATES, named_parts

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
    child.describe(
        what=run_note(kind.mode, kind.tags["model_type"], trainee.settings.data.image_size),
        data=data_note(kind.tags["dataset"], kind.tags["dataset_size"]),
    )
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


_FINISHED_FILE = "finished.json"  # RUN/VARIANT/: trained, tested and recorded

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the trainings."""

    name: str  # of the nested run and its folders: "attention-dcal"
    value: str  # of the setting, as tables and pictures show it
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class AblationSummary:
    """How an ablation ended: a row for each variant, the first one being what the others are compared with."""

    folder: Path
    over: str
    rows: Sequence[Row]


def variants_of(settings: Settings) -> list[Variant]:
    """The variants in their order; each one's settings could be given to a run of its own."""
    over = settings.ablation.over
    section, _, key = over.partition(".")
    base = dataclasses.replace(settings, ablation=AblationSettings())
    found: list[Variant] = []
    for number, text in enumerate(settings.ablation.values.split(",")):
        value = text.strip()
        changed = config.with_value(base, section, key, config.value_of(over, value))
        name = f"{key}-{re.sub(r'[^-.=A-Za-z0-9_]', '_', value)}"
        if any(name == other.name for other in found):  # two files of one name, say
            name = f"{name}-{number + 1}"
        found.append(Variant(name=name, value=value, settings=changed))
    return found


def experiment_of(settings: Settings) -> str:
    """The tracking's experiment: GLCA's own where GLCA is what is varied, else one named after the setting."""
    key = settings.ablation.over.partition(".")[2]
    return f"twin-verification-ablation-{'glca' if key in ('attention', 'glca_fraction') else key}"


def run_ablation(settings: Settings, site: SiteSettings, pack: FacePack, folder: Path, out: TextIO) -> AblationSummary:
    """Train all variants into the run's folder, or go on there, and compare them on the test people.

    Raises DataError as `run_twins` does, TrainingFailed, CheckpointError.
    """
    check_twins(site, pack)
    variants = variants_of(settings)
    first = local_trainee(variants[0].settings, site, pack)
    kind = study_kind("ablation", experiment_of(settings), first, site)
    with recorded(settings, folder, kind, command=COMMAND) as parent:
        tried = f"{settings.ablation.over} = {', '.join(variant.value for variant in variants)}; all else equal"
        write_header(first, folder, out, study=tried)
        del first  # of no use any more
        for variant in variants:
            _train(variant, site, pack, parent, out)
        embeddings = {variant.name: _test_embeddings(variant, site, pack, folder) for variant in variants}
        rows = [_figures(variant, folder) for variant in variants]
        _add_gaps(rows, list(embeddings.values()), pack, settings)
        _record(parent, settings.ablation, rows, pack, draws=settings.tracking.plots != "none")
    return AblationSummary(folder=folder, over=settings.ablation.over, rows=rows)


def _train(variant: Variant, site: SiteSettings, pack: FacePack, parent: TrackedRun, out: TextIO) -> None:
    """One variant, unless it was finished before the run was stopped."""
    finished = parent.folder / variant.name / _FINISHED_FILE
    if finished.exists():
        out.write(f"\n{variant.name}: finished before\n")
        return
    out.write(f"\n{variant.name}\n")
    trainee = local_trainee(variant.settings, site, pack)
    child = nested_run(parent, variant.name, trainee, site, {"variant": variant.value})
    train_and_test(variant.value, trainee, child, "", out, checkpoints=checkpoints_of(parent.folder, variant.name))
    child.finish("FINISHED")
    write_json(finished, {"variant": variant.value})


def _test_embeddings(variant: Variant, site: SiteSettings, pack: FacePack, folder: Path) -> NDArray[np.float32]:
    """The test people as the variant's best model embeds them; they are kept nowhere but here."""
    trainee = local_trainee(variant.settings, site, pack)
    tensors, _ = read_tensors(checkpoints_of(folder, variant.name) / "best.safetensors")
    trainee.recogniser.load_state_dict(tensors)
    indices = pack.indices(Split.TEST_PEOPLE)
    found: NDArray[np.float32] = embed(trainee.recogniser, pack, indices, trainee.compute).numpy()
    return found


def _figures(variant: Variant, folder: Path) -> Row:
    """What the variant's own metrics.json says, as one row."""
    results = read_json(folder / variant.name / "metrics.json")
    row: Row = {"variant": variant.value}
    for kind in KINDS:
        figures = results["twins"]["figures"][kind]
        for name in (AUC, "eer", "accuracy"):
            row |= named_parts(f"{kind}_{name}", figures[name])
    names = ("num_gradient_steps", "num_pictures_processed", "best_epoch", "best_val_auc")
    seconds = [epoch[EPOCH_SECONDS] for epoch in results["epochs"]]
    return row | {name: results[name] for name in names} | {"train_seconds": sum(seconds)}


def _add_gaps(
    rows: Sequence[Row], embeddings: Sequence[NDArray[np.float32]], pack: FacePack, settings: Settings
) -> None:
    """To each row but the first, how much higher its AUC is than the first one's, with intervals over families."""
    _, person, family = pack.shown_in(Split.TEST_PEOPLE)
    seed = stream_seed(settings.run.seed, "families")
    for row, own in zip(rows[1:], embeddings[1:], strict=True):
        for kind in KINDS:
            gap = paired_gap(
                [own], [embeddings[0]], person, family, kind, AUC, num_replicates=NUM_REPLICATES, seed=seed
            )
            row.update(named_parts(f"{kind}_gap", vars(gap)))


def _record(
    parent: TrackedRun, ablation: AblationSettings, rows: Sequence[Row], pack: FacePack, *, draws: bool
) -> None:
    """The comparison in the parent run; metrics.json is written last, for it says that the run is finished."""
    num_families = len(np.unique(pack.shown_in(Split.TEST_PEOPLE)[2]))
    for row in rows:
        variant = re.sub(r"[^\w .-]", "_", row["variant"])  # a value may hold what MLflow takes in no metric's name
        parent.log_metrics({of_model(variant, name): row[name] for name in row if name != "variant"}, step=0)
    parent.log_text(csv_text(rows), "ablation.csv")
    if draws:
        parent.log_figure(ablation_dots(rows, ablation.over, num_families=num_families), "plots/ablation.png")
    content = {
        "over": ablation.over,
        "compared_with": rows[0]["variant"],
        "num_test_families": num_families,
        "variants": list(rows),
        "test_pairs": {pack.dataset: people_digest(pack, "test")},
    }
    parent.log_dict(content, "metrics.json")


def ablation_lines(summary: AblationSummary) -> list[str]:
    """What an ablation shows at its end: of each variant the AUC by kind of pairs, and the gap to the first."""
    first = summary.rows[0]["variant"]
    width = max(len(row["variant"]) for row in summary.rows)
    lines = [f"\n{summary.over}, AUC on test people never seen (95 % over families), and the gap to {first}:\n"]
    for row in summary.rows:
        lines.append(f"  {row['variant']:{width}}" + "".join(f"  {kind} {_shown(row, kind)}" for kind in KINDS) + "\n")
        if "all_gap" in row:
            gaps = "".join(f"  {kind} {_shown_gap(row, kind)}" for kind in KINDS)
            lines.append(f"  {'':{width}}{gaps}\n")
    return lines


def _shown(row: Row, kind: str) -> str:
    low, high = row[f"{kind}_{AUC}_low"], row[f"{kind}_{AUC}_high"]
    return f"{row[f'{kind}_{AUC}']:6.3f} [{low:6.3f}, {high:6.3f}]"


def _shown_gap(row: Row, kind: str) -> str:
    return f"{row[f'{kind}_gap']:+6.3f} [{row[f'{kind}_gap_low']:+6.3f}, {row[f'{kind}_gap_high']:+6.3f}]"
