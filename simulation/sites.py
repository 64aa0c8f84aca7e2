"""`--client NAME=DIR` and `--data-dir` -> site settings whose data were checked and packed at the door.

And `facefed data synth|align|prepare|audit`, which make, pack and examine such data.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from clients.own_machine import ClientOption, parse_clients, site_of
from clients.policy import Policy, read_policy
from clients.site import SiteSettings
from common.errors import UserError, escaped, unknown_name
from common.faces.datasets import DEFAULT_CLIENTS, OF_FAMILIES
from common.faces.pack import FacePack, open_pack
from common.names import CLIENT_NAME
from common.settings import Settings
from common.system.console import PackProgress, counts
from common.system.runtime import num_cores
from simulation.data.aligning import AlignSettings, align_photos, summary_lines
from simulation.data.audit import AuditReport, audit, audit_overlap
from simulation.data.synthetic import SynthSettings, write_dataset

# Where several may be meant and none is named; twins are trained for by themselves.
USUAL_CLIENTS = tuple(name for name in DEFAULT_CLIENTS if name not in OF_FAMILIES)


def parse_policies(texts: Sequence[str], names: Sequence[str]) -> dict[str, Policy]:
    """All `--policy NAME=FILE`, by client.  names: of the clients.  Raises UserError."""
    policies: dict[str, Policy] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not (equals and name and file):
            raise UserError(f"--policy {text}: write NAME=FILE, for example celeba=site.toml.")
        if name not in names:
            raise UserError(unknown_name(f"--policy {text}: the client", name, names))
        if name in policies:
            raise UserError(f"--policy {text}: {name} has a policy already; give it one.")
        policies[name] = read_policy(Path(file).expanduser())
    return policies


def pack_at_the_door(site: SiteSettings, settings: Settings, out: TextIO, *, verify: bool = False) -> FacePack:
    """Check and pack a site's pictures before anything starts, and say in one line what it holds."""
    progress = PackProgress(f"packing {site.name}", out, goes_on=True)
    try:
        pack = open_pack(
            site.dataset,
            site.data_dir,
            settings.data,
            site.cache_dir,
            workers=site.pack_workers,
            progress=progress,
            verify=verify,
        )
    finally:
        progress.close()
    held = counts({"people": len(set(pack.person.tolist())), "pictures": len(pack.person)})
    out.write(f"{site.name}: {held} ({pack.num_classes:,} people to train on), {site.device}\n")
    if pack.quarantined:
        out.write(f"{site.name}: {len(pack.quarantined):,} pictures left out; facefed data audit lists them\n")
    out.writelines(f"{site.name}: {escaped(line)}\n" for line in pack.account.lines())
    out.flush()
    return pack


def usual_folder(name: str) -> Path:
    """Where a client's pictures are when nobody says."""
    return Path("data") / name


def names_client(text: str, clients: Sequence[str]) -> bool:
    """Whether a `--data-dir` is NAME=DIR, and no plain DIR with a "=" in its own name.  clients: those of --client."""
    name, equals, _ = text.partition("=")
    if not (equals and CLIENT_NAME.fullmatch(name)):
        return False
    known = {client.partition("=")[0].partition(":")[0] for client in clients}
    return name in known or not Path(text).expanduser().is_dir()


def data_options(clients: Sequence[str], data_dirs: Sequence[str]) -> list[ClientOption]:
    """`--client NAME` with `--data-dir`: NAME=DIR for several, a plain DIR for one, else data/NAME.

    A `--client NAME=DIR` carries its folder itself.  Raises UserError, also for a client with two folders.
    """
    named = dict(text.split("=", 1) for text in data_dirs if names_client(text, clients))
    plain = [text for text in data_dirs if not names_client(text, clients)]
    names = list(clients) or sorted(named)
    if len(plain) > 1 or (plain and len(names) != 1):
        raise UserError(f"--data-dir {plain[0]}: with {len(names)} clients write --data-dir NAME=DIR for each.")
    texts = []
    for text in names:
        name = text.partition("=")[0].partition(":")[0]
        if "=" in text and (plain or name in named):
            raise UserError(f"--client {text} names its folder already; leave --data-dir out.")
        folder = plain[0] if plain else named.pop(name, str(usual_folder(name)))
        texts.append(text if "=" in text else f"{text}={folder}")
    unknown = sorted(named)
    if unknown:
        raise UserError(f"--data-dir {unknown[0]}=...: there is no --client {unknown[0]}.")
    return parse_clients(texts)


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


def align(photos: Path, folder: Path, settings: AlignSettings, *, num_jobs: int | None, out: TextIO) -> int:
    """Align photographs into a folder.  num_jobs: processes; None: one for a core.  Raises UserError."""
    progress = PackProgress(f"aligning {photos}", out, goes_on=True)
    workers = num_cores() if num_jobs is None else num_jobs
    try:
        summary = align_photos(photos, folder, settings, workers=workers, progress=progress)
    finally:
        progress.close()
    out.writelines(f"{escaped(line)}\n" for line in summary_lines(folder, summary, settings))
    return 0


def prepare(
    settings: Settings, options: Sequence[ClientOption], *, device: str, cache_dir: Path, out: TextIO, verify: bool
) -> int:
    """Align and pack data sets, so that training starts at once.  verify: packs that are there are read whole."""
    for option in options:
        site = site_of(option, device=device, cache_dir=cache_dir, state_dir=cache_dir)
        pack = pack_at_the_door(site, settings, out, verify=verify)
        out.write(f"{option.name}: packed as {pack.key[:16]} in {cache_dir}\n")
    return 0


def _audited(option: ClientOption, settings: Settings, err: TextIO) -> AuditReport:
    progress = PackProgress(f"reading {option.name}", err)
    try:
        return audit(option.dataset, option.data_dir, settings.data, workers=num_cores(), progress=progress)
    finally:
        progress.close()


def audit_data(settings: Settings, options: Sequence[ClientOption], *, shape: str, out: TextIO, err: TextIO) -> int:
    """Report what is in each data set, and what two data sets share; how far it is, is shown on `err`."""
    reports = {option.name: _audited(option, settings, err) for option in options}
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
