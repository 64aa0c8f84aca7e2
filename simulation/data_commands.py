"""`facefed data synth|prepare|audit`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from common.console import PackProgress
from common.errors import UserError, escaped
from common.faces.audit import audit, audit_overlap
from common.faces.datasets import OF_FAMILIES
from common.faces.synthetic import SynthSettings, write_dataset
from common.runtime import num_cores
from common.settings import Settings
from simulation.sites import ClientOption, pack_at_the_door, site_of


def synth(
    layout: str,
    folder: Path,
    *,
    people: int | None,
    families: int | None,
    closeness: float | None,
    pictures: int | None,
    seed: int,
    out: TextIO,
) -> int:
    """Write a synthetic data set in an official layout.  Raises UserError for an option of another layout."""
    given = {"--people": people, "--families": families, "--closeness": closeness}
    of_twins = layout in OF_FAMILIES
    wrong = ("--people",) if of_twins else ("--families", "--closeness")
    for flag in wrong:
        if given[flag] is not None:
            pairs = "give --families N, for twins come in pairs"
            other = pairs if of_twins else f"it is for --layout {', '.join(OF_FAMILIES)}"
            raise UserError(f"{flag} {given[flag]:g} does not go with --layout {layout}; {other}.")
    if families is not None:
        people = 2 * families
    settings = SynthSettings(layout=layout, seed=seed)
    if people is not None:
        settings = dataclasses.replace(settings, num_people=people)
    if pictures is not None:
        settings = dataclasses.replace(settings, pictures_per_person=pictures)
    if closeness is not None:
        settings = dataclasses.replace(settings, closeness=closeness)
    progress = PackProgress(f"drawing {layout}", out)
    try:
        write_dataset(settings, folder, num_processes=num_cores(), progress=progress)
    finally:
        progress.close()
    held = f"{settings.num_people} people"
    if of_twins:
        held += f" ({settings.num_people // 2} pairs of twins, closeness {settings.closeness:g})"
    out.write(f"{folder}: {held}, {settings.pictures_per_person} pictures each, {layout} layout\n")
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
    lines = [line for name, report in reports.items() for line in (f"== {name}", *report.lines())]
    if overlaps is not None:
        lines += ["== shared between data sets", *overlaps.lines()]
    out.writelines(f"{escaped(line)}\n" for line in lines)  # files may have names that no terminal can show
    return 0
