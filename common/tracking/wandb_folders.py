"""`facefed tracking import-wandb`: finds the logs below folders, imports each, and says what became of it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from common.errors import EXIT_DONE, TrackingError
from common.tracking.wandb_file import CUT_SHORT
from common.tracking.wandb_import import Imported, Importer
from common.tracking.wandb_records import RunFacts, read_facts


def import_folders(folders: Sequence[str], uri: str, experiment: str, out: TextIO, err: TextIO) -> int:
    """Import every offline run of `folders` and say so, a line each; returns the exit code.

    uri: from `resolve_uri`.  experiment: empty for each run's own wandb project.  A file that is none does not keep the
    others back.  Raises TrackingError: nothing found, MLflow does not take them, or at the end how many were refused.
    """
    logs = find_logs(Path(folder) for folder in folders)
    found, refused = dict[Path, RunFacts](), list[str]()
    for log in logs:
        try:
            found[log] = read_facts(log)
        except TrackingError as error:
            refused.append(str(error))
    if len(logs) == 1 and refused:
        raise TrackingError(refused[0])
    importer = Importer(uri, experiment)
    for log, facts in found.items():
        out.writelines(f"{line}\n" for line in _report(importer.send(log, facts)))
        out.flush()
    if refused:
        err.writelines(f"{line}\n" for line in refused)
        raise TrackingError(f"{len(refused)} of {len(logs)} files could not be read; the others are imported.")
    return EXIT_DONE


def find_logs(paths: Iterable[Path]) -> list[Path]:
    """The .wandb files that `paths` mean: such files, run folders, folders of run folders, or what holds `wandb/`.

    Raises TrackingError when one of them has none.
    """
    logs: dict[Path, None] = {}
    for path in paths:
        found = [path] if path.is_file() else _logs_below(path)
        if not found:
            what = "holds no .wandb file" if path.is_dir() else "does not exist"
            raise TrackingError(f"{path} {what}; name wandb's folder, or an offline-run-* folder in it.")
        logs.update(dict.fromkeys(log.resolve() for log in found))  # wandb/latest-run is a link to one of the others
    return list(logs)


def _logs_below(folder: Path) -> list[Path]:
    for pattern in ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return []


def _report(done: Imported) -> Iterator[str]:
    place = f"{done.name} -> experiment {done.experiment}, run {done.mlflow_run_id}"
    if done.num_points or done.num_params or done.num_files:
        yield f"{place}: {done.num_points:,} points, {done.num_params:,} params, {done.num_files:,} files"
    else:
        yield f"{place}: nothing new"
    if done.num_apart:
        yield f"  {done.num_apart:,} logged values are no metrics: no_metrics.jsonl among its artifacts has them"
    if done.not_carried:
        left = ", ".join(f"{count:,} records of {what}" for what, count in done.not_carried.items())
        yield f"  not imported: {left} (they stay in the log)"
    for damage in done.damages:
        kept = "what came before it is imported" if damage.what == CUT_SHORT else "the whole records are imported"
        yield f"  {done.log}: damaged at byte {damage.offset:,}: {damage.what}; {kept}"
