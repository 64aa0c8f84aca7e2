"""What `flower-simulation` and `facefed train` do between their flags and the work."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from clients.own_machine import ClientOption, parse_clients, site_of
from clients.policy import OWN_MACHINE
from clients.site import SiteSettings
from common import config
from common.errors import CheckpointError, UserError, escaped
from common.faces.datasets import OF_FAMILIES
from common.faces.pack import FacePack
from common.faces.partition import part_of, partition
from common.faces.splits import Split
from common.privacy.people import problem_of
from common.runs import CHECKPOINTS, CONFIG_FILE, STATE_FILE, unfinished_run
from common.secagg.sites import require_sites
from common.settings import Settings
from common.system.events import OUTCOME_FILE, RUN_FILE, EventReader
from common.system.files import read_json
from common.system.progress import FOLDER as PROGRESS
from common.system.run_view import (
    Ending,
    Follower,
    RunView,
    amounts_of,
    begin_rows,
    ending_lines,
    federation_ending,
    header_lines,
)
from common.system.runtime import resolve_devices
from common.tracking.address import with_absolute_tracking
from common.tracking.page import tracking_line, where_to_look
from common.weights import begin_run, check_weights
from server.public_set import open_public_set, with_absolute_public_set
from simulation.alone.baselines import BaselineSummary, run_centralized, run_local, run_twins
from simulation.alone.studies import MODES
from simulation.alone.sweep_plan import SweepPlan, plan_of_run
from simulation.alone.twin_results import twin_lines
from simulation.engine.virtual import IDENTITY, VirtualSites, divide, parse_partition
from simulation.sites import USUAL_CLIENTS, data_options, names_client, pack_at_the_door, parse_policies

_GOES_ON = {"twins": MODES}  # command -> the modes of the runs that it resumes, where they are not its own name


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the clients are simulated."""

    num_virtual: int | None = None  # --clients: the data sets are divided among so many; None: one client each
    partition: str = IDENTITY
    ray_address: str = ""  # HOST:PORT of a running cluster; empty: a Ray of our own
    policies: Sequence[str] = ()  # --policy NAME=FILE
    num_actors: int | None = None  # processes that work for the clients; None: as many as cores


def federate_here(
    settings: Settings,
    clients: Sequence[str],
    *,
    device: str,
    cache_dir: Path,
    out: TextIO,
    err: TextIO,
    engine: Engine = Engine(),
    address: str = "",
    begun: Callable[[Path], object] = str,
) -> int:
    """`flower-simulation`: check and pack every client's data, then federate them under Ray.

    address: of the tracking, with its password; "": the settings' own is whole.  begun: is told the run's folder.
    """
    _check_engine(engine, out)
    options = parse_clients(clients)
    settings, address = with_absolute_tracking(settings, address or settings.tracking.uri, Path.cwd())
    settings = with_absolute_public_set(settings, Path.cwd())
    open_public_set(settings)  # what it refuses is told before a run is begun
    state = Path(settings.run.out).expanduser() / "clients"
    held = _held_sites(options, engine, device=device, cache_dir=cache_dir, state_dir=state)
    packs = {site.name: pack_at_the_door(site, settings, out) for site in held}
    sites = _virtual_sites(settings, held, packs, engine, out) if engine.num_virtual else held
    _require_private(settings, len(sites), {} if engine.num_virtual else packs, engine)
    packs_held = {name: (pack.num_classes, len(pack.indices(Split.TRAIN))) for name, pack in packs.items()}
    del packs
    settings = config.with_value(settings, "federation", "min_clients", len(sites))
    if settings.secagg.enabled:
        require_sites(len(sites))
        out.write("secure aggregation: one program has all clients' keys here, so it is shown and hides nothing\n")
    settings, run_folder = begin_run(settings, address)
    begun(run_folder)
    from simulation.engine.run import simulate

    rows = {
        "data": _data_words(held, packs_held),
        **begin_rows(settings, run_folder, look=where_to_look(settings), federated=True),
    }
    out.writelines(f"{line}\n" for line in header_lines(f"run {run_folder.name}", rows))
    out.flush()
    at_work = amounts_of(run_folder / PROGRESS, run_folder.name)
    with RunView(out, at_work=at_work) as view, Follower(EventReader(run_folder), view) as follower:
        exit_code = simulate(settings, sites, run_folder, ray_address=engine.ray_address, num_actors=engine.num_actors)
    if exit_code == 0:
        lines = ending_lines(
            federation_ending(follower.summary), run_folder, tracking=tracking_line(settings, run_folder)
        )
        out.write("\n".join(lines) + "\n")
    else:
        err.write(f"flower-simulation: {_failure(run_folder)} {_what_is_kept(run_folder)}\n")
    return exit_code


def _held_sites(
    options: Sequence[ClientOption], engine: Engine, *, device: str, cache_dir: Path, state_dir: Path
) -> list[SiteSettings]:
    """Those of --client, with the policies of --policy."""
    policies = parse_policies(engine.policies, [option.name for option in options])
    return [
        site_of(
            option,
            device=device,
            cache_dir=cache_dir,
            state_dir=state_dir,
            policy=policies.get(option.name, OWN_MACHINE),
        )
        for option in options
    ]


def _data_words(held: Sequence[SiteSettings], packs: Mapping[str, tuple[int, int]]) -> str:
    """packs: of each data set the people and the pictures to train on."""
    told = (f"{site.name} {packs[site.name][0]:,} people, {packs[site.name][1]:,} pictures" for site in held)
    return f"to train on: {'; '.join(told)}"


def _check_engine(engine: Engine, out: TextIO) -> None:
    """Raises UserError: also for a cluster that does not answer, before anything is packed.

    out: is told first of all what a cluster without a token means.
    """
    parse_partition(engine.partition)
    if engine.partition != IDENTITY and not engine.num_virtual:
        raise UserError(f"--partition {engine.partition}: give --clients N too, among whom the pictures are divided.")
    for flag, number in (("--clients", engine.num_virtual), ("--actors", engine.num_actors)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number}: give a whole number, 1 or more.")
    if engine.ray_address and engine.num_actors:
        raise UserError("--actors: a cluster's nodes say how many actors there are; leave out --ray-address or this.")
    if engine.ray_address:
        from simulation.engine.cluster import check_address

        if warning := check_address(engine.ray_address):
            out.write(f"{warning}\n")
            out.flush()


def _virtual_sites(
    settings: Settings, held: Sequence[SiteSettings], packs: Mapping[str, FacePack], engine: Engine, out: TextIO
) -> VirtualSites:
    """Who the virtual clients are; says in a line for each data set how many, and how few people they have at least."""
    alpha = parse_partition(engine.partition)
    numbers = divide(packs, engine.num_virtual or 0, alpha)
    sites = VirtualSites(held, numbers, alpha=alpha, seed=settings.run.seed)
    for name, number in numbers.items():
        parts = [part_of(packs[name], rows) for rows in partition(packs[name], number, alpha=alpha, seed=sites.seed)]
        people, pictures = zip(*((part.num_classes, len(part.indices(Split.TRAIN))) for part in parts), strict=True)
        open_sets = sum(len(part.indices(Split.TEST_PEOPLE)) > 0 for part in parts)
        out.write(
            f"{name}: {number:,} virtual clients with {min(people):,} to {max(people):,} people and {min(pictures):,}"
            f" to {max(pictures):,} pictures to train on; {open_sets:,} of them test on unseen people\n"
        )
    out.flush()
    return sites


def _failure(run_folder: Path) -> str:
    try:
        return f"{escaped(str(read_json(run_folder / OUTCOME_FILE)['line'])).removesuffix('.')}."
    except CheckpointError:
        return f"the run ended without a word; see {run_folder}."


def _what_is_kept(run_folder: Path) -> str:
    """A simulation that has ended before its end cannot go on: its clients' own state is not saved with the rounds."""
    again = "a simulation cannot be resumed, and the same command begins a new run."
    try:
        state = read_json(run_folder / CHECKPOINTS / STATE_FILE)
    except CheckpointError:
        return f"No round had ended: {again}"
    return f"Kept in {run_folder}: the model of round {state.get('round')} and the record up to it; {again}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the command line says beside the settings."""

    clients: Sequence[str]  # --client
    data_dirs: Sequence[str]  # --data-dir
    device: str
    cache_dir: Path
    address: str = field(default="", repr=False)  # of the tracking, with its password; "": the settings' own is whole


@dataclass(frozen=True, kw_only=True)
class _Resumed:
    """A run that is to go on."""

    folder: Path
    settings: Settings
    clients: Sequence[str]
    data: Mapping[str, str]  # client -> key of the pack it was trained on


def several_options(machine: Machine) -> list[ClientOption]:
    """The clients that are meant where several may be: those named, or celeba and vggface2.  Raises UserError."""
    named = machine.clients or sorted(text.partition("=")[0] for text in machine.data_dirs if names_client(text, ()))
    return data_options(named or USUAL_CLIENTS, machine.data_dirs)


def _run_to_resume(run: str, out: str, mode: str) -> _Resumed:
    """The unfinished run that `--resume` means, by its id or its folder.  Raises UserError."""
    folder, about = unfinished_run(run, out, command=mode, modes=_GOES_ON.get(mode, (mode,)))
    try:
        clients, data = list(about["clients"]), dict(about["data"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{folder / RUN_FILE} is not a file of ours.") from None
    settings, _ = config.load_of_run(folder / CONFIG_FILE)
    return _Resumed(folder=folder, settings=settings, clients=clients, data=data)


def _door(
    options: Sequence[ClientOption], settings: Settings, machine: Machine, out: TextIO
) -> tuple[dict[str, SiteSettings], dict[str, FacePack]]:
    """Check and pack every client's data."""
    device = settings.training.device if machine.device == "auto" else machine.device
    state = Path(settings.run.out).expanduser() / "clients"
    devices = resolve_devices(device)
    sites = {}
    for option in options:
        site = site_of(option, device=devices[0], cache_dir=machine.cache_dir, state_dir=state)
        sites[option.name] = dataclasses.replace(site, device=",".join(devices))
    return sites, {name: pack_at_the_door(site, settings, out) for name, site in sites.items()}


def _require_private(settings: Settings, num_clients: int, packs: Mapping[str, FacePack], engine: Engine) -> None:
    """Raises UserError where so few cannot be protected.  packs: of whole sites; virtual clients say it themselves."""
    privacy = settings.privacy
    if privacy.unit == "person" and engine.num_virtual and engine.partition != IDENTITY:
        raise UserError(
            f'--partition {engine.partition} divides one person\'s pictures among clients, and privacy.unit = "person"'
            f" protects a person at one; use --partition {IDENTITY}."
        )
    held = {name: pack.num_classes for name, pack in packs.items()} if privacy.unit == "person" else {"": num_clients}
    for name, number in held.items():
        if problem := problem_of(privacy, number):
            raise UserError(f"{name}: {problem}" if name else problem)


def _check_same_data(resumed: _Resumed, packs: Mapping[str, FacePack]) -> None:
    changed = sorted(name for name, pack in packs.items() if resumed.data.get(name) != pack.key)
    if changed or set(packs) != set(resumed.data):
        raise UserError(
            f"--resume {resumed.folder.name}: the data of {', '.join(changed) or 'the clients'} are not those that the"
            f" run began with ({', '.join(sorted(resumed.data))}); give the same --data-dir, or start a new run."
        )


def _show(summary: BaselineSummary, label: str, settings: Settings, out: TextIO) -> int:
    ending = Ending(
        label=label,
        when=f"best epoch {summary.best_epoch} of {summary.epochs}",
        untrained=summary.untrained,
        trained=summary.test,
        clients=summary.clients,
        below_untrained=summary.below_untrained,
        few_people=summary.few_people,
        registered=summary.registered,
    )
    out.write("\n".join(ending_lines(ending, summary.folder, tracking=tracking_line(settings, summary.folder))) + "\n")
    return 0


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A run that can begin, or go on."""

    settings: Settings
    sites: Mapping[str, SiteSettings]
    packs: Mapping[str, FacePack]
    folder: Path

    @property
    def alone(self) -> tuple[SiteSettings, FacePack]:
        """The one holder's site and pictures."""
        [site], [pack] = self.sites.values(), self.packs.values()
        return site, pack


def _settled(mode: str, settings: Settings, machine: Machine, resume: str, out: TextIO) -> _Job:
    """Settings, checked data and the run's folder: a new one's, or those of the run that goes on."""
    resumed = _run_to_resume(resume, settings.run.out, mode) if resume else None
    if resumed and not machine.clients:
        machine = dataclasses.replace(machine, clients=resumed.clients)
    options = _options(mode, machine)
    address = machine.address or settings.tracking.uri
    if resumed:
        settings = resumed.settings
    else:
        settings, address = with_absolute_tracking(settings, address, Path.cwd())
    sites, packs = _door(options, settings, machine, out)
    if resumed:
        _check_same_data(resumed, packs)
    if resumed:
        check_weights(settings)
        folder = resumed.folder
    else:
        settings, folder = begin_run(settings, address)
    return _Job(settings=settings, sites=sites, packs=packs, folder=folder)


def _options(mode: str, machine: Machine) -> list[ClientOption]:
    """Whose data a mode trains on.  Raises UserError."""
    if mode == "centralized":
        return several_options(machine)
    named = machine.clients or (OF_FAMILIES if mode == "twins" else [])
    options = data_options(named, machine.data_dirs)
    if len(options) != 1:
        raise UserError(f"train {mode} trains one holder, {len(options)} were named; give one --client NAME.")
    return options


def train_local(settings: Settings, machine: Machine, resume: str, out: TextIO) -> int:
    """`facefed train local`: one holder alone.  resume: a run's id or folder, or ""."""
    job = _settled("local", settings, machine, resume, out)
    return _show(run_local(job.settings, *job.alone, job.folder, out), "local", job.settings, out)


def train_twins(
    settings: Settings, machine: Machine, resume: str, out: TextIO, *, plan: SweepPlan | None = None
) -> int:
    """`facefed train twins`: verification of identical twins, an ablation, or with a plan a search over settings.

    resume: a run's id or folder, or ""; what kind of run it is, its folder says.
    """
    job = _settled("twins", settings, machine, resume, out)
    settings, folder, (site, pack) = job.settings, job.folder, job.alone
    if resume:
        plan = plan_of_run(folder, plan)
    if plan or settings.ablation.over != "none":
        if plan:
            from simulation.alone.sweep import run_sweep, sweep_lines  # Optuna only where it is needed

            out.writelines(sweep_lines(run_sweep(settings, plan, site, pack, folder, out)))
        else:
            from simulation.alone.studies import ablation_lines, run_ablation

            out.writelines(ablation_lines(run_ablation(settings, site, pack, folder, out)))
        out.write(f"run folder: {folder}\ntracking: {tracking_line(settings, folder)}\n")
        return 0
    summary = run_twins(settings, site, pack, folder, out)
    out.writelines(twin_lines(summary.twins))
    return _show(summary, "trained", settings, out)


def train_centralized(settings: Settings, machine: Machine, resume: str, out: TextIO) -> int:
    """`facefed train centralized`: all holders' pictures in one place.  resume: a run's id or folder, or ""."""
    job = _settled("centralized", settings, machine, resume, out)
    return _show(run_centralized(job.settings, job.sites, job.packs, job.folder, out), "centralised", job.settings, out)


def train_federated(settings: Settings, machine: Machine, out: TextIO, err: TextIO) -> int:
    """`facefed train federated`: the Ray simulation, as `flower-simulation` runs it."""
    clients = [f"{option.name}:{option.dataset}={option.data_dir}" for option in several_options(machine)]
    return federate_here(
        settings,
        clients,
        device=machine.device,
        cache_dir=machine.cache_dir,
        out=out,
        err=err,
        address=machine.address,
    )
