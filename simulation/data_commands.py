"""`facefed data synth|prepare|audit`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from common.config import Settings
from common.console import PackProgress
from common.faces.audit import audit, audit_overlap
from common.faces.synthetic import SynthSettings, write_dataset
from common.runtime import num_cores
from simulation.sites import ClientOption, pack_at_the_door, site_of


def synth(layout: str, folder: Path, *, people: int | None, pictures: int | None, seed: int, out: TextIO) -> int:
    """Write a synthetic data set in an official layout."""
    chosen = {"num_people": people, "pictures_per_person": pictures}
    settings = SynthSettings(layout=layout, seed=seed, **{k: v for k, v in chosen.items() if v is not None})
    progress = PackProgress(f"drawing {layout}", out)
    try:
        write_dataset(settings, folder, num_processes=num_cores(), progress=progress)
    finally:
        progress.close()
    out.write(
        f"{folder}: {settings.num_people} people, {settings.pictures_per_person} pictures each, {layout} layout\n"
    )
    return 0


def prepare(settings: Settings, options: Sequence[ClientOption], *, device: str, cache_dir: Path, out: TextIO) -> int:
    """Align and pack data sets, so that training starts at once."""
    for option in options:
        site = site_of(option, device=device, cache_dir=cache_dir, state_dir=cache_dir)
        pack = pack_at_the_door(site, settings, out)
        out.write(f"{option.name}: packed as {pack.key[:16]} in {cache_dir}\n")
    return 0


def audit_data(settings: Settings, options: Sequence[ClientOption], *, shape: str, out: TextIO) -> int:
    """Report what is in each data set, and what two data sets share."""
    reports = {option.name: audit(option.dataset, option.data_dir, settings.data) for option in options}
    overlaps = audit_overlap(list(reports.values())) if len(reports) > 1 else None
    if shape == "json":
        content = {name: json.loads(report.to_json()) for name, report in reports.items()}
        if overlaps is not None:
            content["overlap"] = json.loads(overlaps.to_json())
        out.write(json.dumps(content, indent=2) + "\n")
        return 0
    out.writelines(f"== {name}\n" + "\n".join(report.lines()) + "\n" for name, report in reports.items())
    if overlaps is not None:
        out.write("== shared between data sets\n" + "\n".join(overlaps.lines()) + "\n")
    return 0
