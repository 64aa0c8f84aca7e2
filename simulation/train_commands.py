"""What `facefed train` does between its flags and the work."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clients.site import SiteSettings
from common import config
from common.console import tracking_line
from common.errors import CheckpointError, UserError
from common.faces.pack import FacePack
from common.settings import Settings
from common.tracking.settings import with_absolute_uri
from server.run_folder import new_run_folder
from server.runs import RUN_FILE
from server.unfinished import unfinished_run
from simulation.baselines import BaselineSummary, run_centralized, run_local, run_twins
from simulation.commands import check_pretrained, federate_here
from simulation.sites import USUAL_CLIENTS, ClientOption, data_options, pack_at_the_door, site_of
from simulation.studies import MODES
from simulation.sweep_plan import SweepPlan, plan_of_run
from simulation.twin_results import twin_lines


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the command line says of this machine."""

    clients: Sequence[str]  # --client
    data_dirs: Sequence[str]  # --data-dir
    device: str
    cache_dir: Path


_GOES_ON = {"twins": MODES}  # command -> the modes of the runs that it resumes, where they are not its own name


@dataclass(frozen=True, kw_only=True)
class _Resumed:
    """A run that is to go on."""

    folder: Path
    settings: Settings
    clients: Sequence[str]
    data: Mapping[str, str]  # client -> key of the pack it was trained on


def several_options(machine: Machine) -> list[ClientOption]:
    """The clients that are meant where several may be: those named, or celeba and vggface2.  Raises UserError."""
    named = machine.clients or sorted(text.partition("=")[0] for text in machine.data_dirs if "=" in text)
    return data_options(named or USUAL_CLIENTS, machine.data_dirs)


def _run_to_resume(run: str, out: str, mode: str) -> _Resumed:
    """The unfinished run that `--resume` means, by its id or its folder.  Raises UserError."""
    folder, about = unfinished_run(run, out, command=mode, modes=_GOES_ON.get(mode, (mode,)))
    try:
        clients, data = list(about["clients"]), dict(about["data"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{folder / RUN_FILE} is not a file of ours.") from None
    return _Resumed(folder=folder, settings=config.load(folder / "config.toml"), clients=clients, data=data)


def _door(
    options: Sequence[ClientOption], settings: Settings, machine: Machine, out: TextIO
) -> tuple[dict[str, SiteSettings], dict[str, FacePack]]:
    """Check and pack every client's data."""
    device = settings.training.device if machine.device == "auto" else machine.device
    state = Path(settings.run.out).expanduser() / "clients"
    sites = {
        option.name: site_of(option, device=device, cache_dir=machine.cache_dir, state_dir=state) for option in options
    }
    return sites, {name: pack_at_the_door(site, settings, out) for name, site in sites.items()}


def _check_same_data(resumed: _Resumed, packs: Mapping[str, FacePack]) -> None:
    changed = sorted(name for name, pack in packs.items() if resumed.data.get(name) != pack.key)
    if changed or set(packs) != set(resumed.data):
        raise UserError(
            f"--resume {resumed.folder.name}: the data of {', '.join(changed) or 'the clients'} are not those that the"
            f" run began with ({', '.join(sorted(resumed.data))}); give the same --data-dir, or start a new run."
        )


def _show(summary: BaselineSummary, label: str, settings: Settings, out: TextIO) -> int:
    out.write(
        f"\ntest AUC on people never seen: untrained {summary.untrained_auc:.3f} -> {label} {summary.test_auc:.3f}\n"
    )
    out.write(f"best epoch {summary.best_epoch} of {summary.epochs}\n")
    out.writelines(f"registered: {name}\n" for name in summary.registered)
    out.write(f"run folder: {summary.folder}\ntracking: {tracking_line(settings)}\n")
    return 0


def _settled(
    mode: str, settings: Settings, machine: Machine, resume: str, out: TextIO
) -> tuple[Settings, dict[str, SiteSettings], dict[str, FacePack], Path]:
    """Settings, checked data and the run's folder: a new one's, or those of the run that goes on."""
    resumed = _run_to_resume(resume, settings.run.out, mode) if resume else None
    if resumed and not machine.clients:
        machine = dataclasses.replace(machine, clients=resumed.clients)
    options = _options(mode, machine)
    settings = resumed.settings if resumed else with_absolute_uri(settings, Path.cwd())
    sites, packs = _door(options, settings, machine, out)
    if resumed:
        _check_same_data(resumed, packs)
    check_pretrained(settings)
    return settings, sites, packs, resumed.folder if resumed else new_run_folder(settings)


def _options(mode: str, machine: Machine) -> list[ClientOption]:
    """Whose data a mode trains on.  Raises UserError."""
    if mode == "centralized":
        return several_options(machine)
    named = machine.clients or (["twins"] if mode == "twins" else [])
    options = data_options(named, machine.data_dirs)
    if len(options) != 1:
        raise UserError(f"train {mode} trains one holder, {len(options)} were named; give one --client NAME.")
    return options


def train_local(settings: Settings, machine: Machine, resume: str, out: TextIO) -> int:
    """`facefed train local`: one holder alone.  resume: a run's id or folder, or ""."""
    settings, sites, packs, folder = _settled("local", settings, machine, resume, out)
    [site], [pack] = sites.values(), packs.values()
    return _show(run_local(settings, site, pack, folder, out), "local", settings, out)


def train_twins(
    settings: Settings, machine: Machine, resume: str, out: TextIO, *, plan: SweepPlan | None = None
) -> int:
    """`facefed train twins`: verification of identical twins, an ablation, or with a plan a search over settings.

    resume: a run's id or folder, or ""; what kind of run it is, its folder says.
    """
    settings, sites, packs, folder = _settled("twins", settings, machine, resume, out)
    if resume:
        plan = plan_of_run(folder, plan)
    [site], [pack] = sites.values(), packs.values()
    if plan or settings.ablation.over != "none":
        if plan:
            from simulation.sweep import run_sweep  # Optuna only where it is needed
            from simulation.sweep_results import sweep_lines

            out.writelines(sweep_lines(run_sweep(settings, plan, site, pack, folder, out)))
        else:
            from simulation.ablation import ablation_lines, run_ablation

            out.writelines(ablation_lines(run_ablation(settings, site, pack, folder, out)))
        out.write(f"run folder: {folder}\ntracking: {tracking_line(settings)}\n")
        return 0
    summary = run_twins(settings, site, pack, folder, out)
    out.writelines(twin_lines(summary.twins))
    return _show(summary, "trained", settings, out)


def train_centralized(settings: Settings, machine: Machine, resume: str, out: TextIO) -> int:
    """`facefed train centralized`: all holders' pictures in one place.  resume: a run's id or folder, or ""."""
    settings, sites, packs, folder = _settled("centralized", settings, machine, resume, out)
    return _show(run_centralized(settings, sites, packs, folder, out), "centralised", settings, out)


def train_federated(settings: Settings, machine: Machine, out: TextIO, err: TextIO) -> int:
    """`facefed train federated`: the Ray simulation, as `flower-simulation` runs it."""
    clients = [f"{option.name}:{option.dataset}={option.data_dir}" for option in several_options(machine)]
    return federate_here(settings, clients, device=machine.device, cache_dir=machine.cache_dir, out=out, err=err)
