"""`facefed evaluate` between its flags and the work: find, check, score, show, record."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from clients.own_machine import ClientOption, site_of
from common.errors import CheckpointError, ConfigError, UserError, escaped
from common.faces.pack import FacePack
from common.metrics.bootstrap import Estimate
from common.metrics.figures import AUC, KINDS, figure_name, roc_curve, row_of
from common.metrics.groups import ByGroup
from common.plots import comparison as comparison_plots
from common.plots import verification
from common.runs import RunKind, new_run_folder, recorded
from common.settings import DataSettings, RunSettings, Settings
from common.system.group_table import GROUPS_FILE, group_content, group_lines
from common.system.runtime import facefed_version, num_cores, resolve_device
from common.system.site_secret import site_secret
from common.tracking.address import with_absolute_tracking
from common.tracking.page import tracking_line
from common.tracking.run import TrackedRun
from common.training.autotune import threads_for
from common.training.loop import Compute
from simulation.compare.comparison import (
    Comparison,
    check_same_pairs,
    cpu_seconds_of,
    describe,
    gaps_of,
    notes_of,
    notes_of_size,
    with_pooled,
)
from simulation.compare.groups import errors_by_group, read_groups
from simulation.compare.model_lookup import (
    UNTRAINED,
    FoundModel,
    Search,
    explicit_runs,
    find_models,
    untrained,
    wanted_models,
)
from simulation.compare.report import csv_text, has_kinds, json_content, metrics, page, terminal_lines
from simulation.compare.scoring import Scored, score
from simulation.sites import USUAL_CLIENTS, data_options, pack_at_the_door, usual_folder

_SPAN = row_of(AUC).span
TOLD_FROM = 10**8  # pairs: what a model costs is told before it is scored
_KIND = {"all": "all pairs", "twins": "pairs of twins", "strangers": "pairs of strangers"}  # for the plots


@dataclass(frozen=True, kw_only=True)
class Request:
    """The flags of `facefed evaluate` that are no run settings."""

    mode: str  # single | all
    compare: str
    runs: Sequence[str]  # KIND=RUN
    clients: Sequence[str]
    data_dirs: Sequence[str]
    device: str
    cache_dir: Path
    by: Sequence[str] = ()  # attributes of people
    config_name: str = ""  # as given, for the commands that are told
    address: str = field(default="", repr=False)  # of the tracking, with its password; "": the settings' own is whole


def evaluate_models(settings: Settings, request: Request, out: TextIO) -> int:
    """`facefed evaluate`: nothing is written before every model was found, checked and scored."""
    started = time.perf_counter()
    options = _options(request)
    groups = read_groups(options, request.by) if request.by else {}
    names = tuple(option.name for option in options)
    settings, address = with_absolute_tracking(settings, request.address or settings.tracking.uri, Path.cwd())
    runs = explicit_runs(request.runs, names)
    search = Search(
        settings=settings,
        clients=names,
        told={option.name: _client_told(option) for option in options},
        command_options=_command_options(settings, request),
        address=address,
    )
    models = find_models(search, wanted_models(request.compare, names, runs), runs)
    models = [untrained(models), *models]
    packs = _packs(models, options, settings, request, out)
    check_same_pairs(models, packs, names, site_secret(request.cache_dir))
    compared = _compare(models, packs, names, settings=settings, request=request, out=out)
    out.write("\n".join(terminal_lines(compared)) + "\n")
    by_group = _by_group(compared.models, packs, groups, settings, request) if groups else []
    least = settings.verification.group_people
    out.writelines(f"{escaped(line)}\n" for line in group_lines(by_group, least))
    beside = {GROUPS_FILE: group_content(by_group, least)} if by_group else {}
    folder = _record(compared, settings, resolve_device(_device(settings, request)), address, beside)
    out.write(f"\nreport: {folder / 'report.html'} (comparison.csv, comparison.json and plots/ beside it)\n")
    out.write(f"tracking: {tracking_line(settings, folder)}\n{time.perf_counter() - started:.0f} s\n")
    return 0


def _options(request: Request) -> list[ClientOption]:
    """The clients that are meant, in order of their names.  Raises UserError."""
    clients = request.clients
    if request.mode == "single":
        named = clients or [text for text in request.data_dirs if "=" in text]
        if len(named) != 1:
            raise UserError(f"--mode single compares on one client, {len(named)} were named; give one --client NAME.")
    elif not (clients or request.data_dirs):
        clients = USUAL_CLIENTS
    return data_options(clients, request.data_dirs)


def _command_options(settings: Settings, request: Request) -> str:
    """What a training command needs besides its kind, its clients and the backbone, to be like this command."""
    parts = [f"--config {shlex.quote(request.config_name)}"] if request.config_name else []
    parts += [f"--out {shlex.quote(settings.run.out)}"] if settings.run.out != RunSettings().out else []
    return " ".join(parts)


def _client_told(option: ClientOption) -> str:
    """The `--client` of a training command that means the same pictures."""
    label = option.name if option.dataset == option.name else f"{option.name}:{option.dataset}"
    return label if option.data_dir == usual_folder(option.name) else shlex.quote(f"{label}={option.data_dir}")


def _device(settings: Settings, request: Request) -> str:
    return settings.training.device if request.device == "auto" else request.device


def _packs(
    models: Sequence[FoundModel], options: Sequence[ClientOption], settings: Settings, request: Request, out: TextIO
) -> dict[DataSettings, dict[str, FacePack]]:
    """Each client's pictures as each model's own data settings cut them out, packed once for equal settings."""
    state = Path(settings.run.out).expanduser() / "clients"
    device = _device(settings, request)
    packs: dict[DataSettings, dict[str, FacePack]] = {}
    for model in models:
        if model.settings.data not in packs:
            packs[model.settings.data] = {
                option.name: pack_at_the_door(
                    site_of(option, device=device, cache_dir=request.cache_dir, state_dir=state), model.settings, out
                )
                for option in options
            }
    return packs


def _compute(settings: Settings, device: str) -> Compute:
    """The same for all models, whatever each was trained with: float32 unless the settings name another precision."""
    training = settings.training
    return Compute(
        device=device,
        precision="float32" if training.precision == "auto" else training.precision,
        memory_format="channels_last" if training.memory_format == "auto" else training.memory_format,
        threads=threads_for(settings, 1, num_cores()),
    )


def _compare(
    models: Sequence[FoundModel],
    packs: Mapping[DataSettings, Mapping[str, FacePack]],
    clients: Sequence[str],
    *,
    settings: Settings,
    request: Request,
    out: TextIO,
) -> Comparison:
    compute, seed = _compute(settings, resolve_device(_device(settings, request))), settings.run.seed
    test_sets = with_pooled({name: describe(name, packs[models[0].settings.data][name]) for name in clients})
    scored, without = {}, []
    num_pairs = sum(test.num_pairs for test in test_sets.values() if test.digest)
    if num_pairs > TOLD_FROM:
        seconds = cpu_seconds_of(test for test in test_sets.values() if test.digest)
        out.write(f"{num_pairs:,} pairs a model: about {seconds:,.0f} CPU-seconds of one core, less on a GPU\n")
    for model in models:
        out.write(escaped(f"scoring {model.name}: {model.source}") + "\n")
        out.flush()
        try:
            by_place = score(model, packs[model.settings.data], clients, compute, seed)
        except (ConfigError, CheckpointError) as error:
            if model.wanted.kind != UNTRAINED:
                raise
            without.append(f"there is no row of the untrained model: {error}")  # the weights it was given are gone
            continue
        scored[model.name] = {place: by_place[place] for place in test_sets}
    models = [model for model in models if model.name in scored]
    return Comparison(
        mode=request.mode,
        backbone=settings.model.backbone,
        seed=seed,
        models=models,
        test_sets=test_sets,
        scored=scored,
        gaps=gaps_of(models, list(test_sets), scored),
        notes=[*without, *notes_of_size(test_sets), *notes_of(models, scored)],
    )


def _by_group(
    models: Sequence[FoundModel],
    packs: Mapping[DataSettings, Mapping[str, FacePack]],
    groups: Mapping[str, Mapping[str, Sequence[str]]],
    settings: Settings,
    request: Request,
) -> list[ByGroup]:
    """The errors of each model but the untrained, by group."""
    compute, least = _compute(settings, resolve_device(_device(settings, request))), settings.verification.group_people
    trained = [model for model in models if model.wanted.kind != UNTRAINED]
    return [errors_by_group(model, packs[model.settings.data], groups, compute, least) for model in trained]


def _record(
    compared: Comparison, settings: Settings, device: str, address: str, beside: Mapping[str, dict[str, Any]]
) -> Path:
    """Write RUN with tables, pictures and the page, and tell the tracking; returns the folder.

    beside: name -> content of further files.
    """
    folder = new_run_folder(settings)
    clients = [name for name, test in compared.test_sets.items() if test.digest]
    kind = RunKind(
        mode="evaluation",
        trains=False,
        experiment="evaluation",
        program="facefed evaluate",
        label=f"{compared.mode}_{compared.backbone}",
        clients=clients,
        tags={
            "dataset": "+".join(clients),
            "dataset_size": str(compared.test_sets[compared.main].num_pictures),
            "device": device,
        },
        params={
            "client": "+".join(clients),
            "model": compared.backbone,
            "mode": compared.mode,
            "seed": compared.seed,
            **{f"{model.name}_run": model.source for model in compared.models},
        },
    )
    with recorded(settings, folder, kind, address=address) as tracked:
        for name, content in beside.items():
            tracked.log_dict(content, name)
        _write(compared, settings, tracked)
    return folder


def _write(compared: Comparison, settings: Settings, tracked: TrackedRun) -> None:
    tracked.log_metrics(metrics(compared), step=0)
    tracked.log_text(csv_text(compared), "comparison.csv")
    tracked.log_dict(json_content(compared), "comparison.json")
    pictures = {} if settings.tracking.plots == "none" else _draw(compared, tracked)
    where = " and ".join(name for name, test in compared.test_sets.items() if test.digest)
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, run {tracked.folder.name}, FaceFed {facefed_version()}"
    title = f"{compared.backbone}: local, centralised and federated models on {where}"
    tracked.log_text(page(compared, title=title, made=made, pictures=pictures), "report.html")


def _draw(compared: Comparison, tracked: TrackedRun) -> dict[str, bytes]:
    """Draw and keep the plots; returns what each shows with its PNG."""
    label = {model.name: model.shown for model in compared.models}
    main = {label[model.name]: compared.scored[model.name][compared.main] for model in compared.models}
    curves = {name: (*roc_curve(one.sums.pairs), one.figures[AUC].value) for name, one in main.items()}
    everywhere = {
        label[name]: {p: s.figures[AUC] for p, s in places.items()} for name, places in compared.scored.items()
    }
    figures = {
        "auc.png": ("AUC with 95 % intervals", comparison_plots.method_bars(_dots(everywhere), "ROC AUC", span=_SPAN)),
        "roc.png": ("ROC curves", verification.roc(curves, intervals=_ends(main, AUC))),
        "det.png": ("DET curves", verification.det(curves, intervals=_ends(main, "eer"))),
    }
    if len(compared.test_sets) > 1:
        places = list(compared.test_sets)
        values = np.array([[compared.scored[name][p].figures[AUC].value for p in places] for name in label])
        transfer = comparison_plots.transfer_matrix(values, list(label.values()), places, span=_SPAN)
        figures["transfer.png"] = ("Trained at one place, tested at another", transfer)
    drawn = {text: tracked.log_figure(figure, f"plots/{name}").read_bytes() for name, (text, figure) in figures.items()}
    return drawn | (_draw_kinds(main, tracked) if has_kinds(compared, compared.main) else {})


def _draw_kinds(main: Mapping[str, Scored], tracked: TrackedRun) -> dict[str, bytes]:
    """The kinds of pairs beside each other, and the models' ROC curves on twins alone.  main: label -> scored."""
    of_twins = figure_name("twins", AUC)
    curves = {
        name: (*roc_curve(one.sums.of_kind("twins")), one.figures[of_twins].value)
        for name, one in main.items()
        if one.sums.has_kinds
    }
    kinds = {name: {_KIND[kind]: one.figures[figure_name(kind, AUC)] for kind in KINDS} for name, one in main.items()}
    title = "Verification of twins never seen in training: two siblings as impostors"
    dots = comparison_plots.method_bars(_dots(kinds), "ROC AUC", span=_SPAN)
    roc = verification.roc(curves, intervals=_ends(main, of_twins), title=title)
    return {
        "AUC by kind of pairs": tracked.log_figure(dots, "plots/auc_kinds.png").read_bytes(),
        "ROC curves, twins only": tracked.log_figure(roc, "plots/roc_twins.png").read_bytes(),
    }


def _ends(main: Mapping[str, Scored], figure: str) -> dict[str, tuple[float, float]]:
    """Label -> the interval of a figure."""
    return {name: (one.figures[figure].low, one.figures[figure].high) for name, one in main.items()}


def _dots(estimates: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Label -> place or kind of pairs -> (value, low, high)."""
    return {name: {place: (e.value, e.low, e.high) for place, e in own.items()} for name, own in estimates.items()}
