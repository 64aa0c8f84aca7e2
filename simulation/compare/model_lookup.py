"""Which trained models a comparison is about, and where they are: in run folders, else in MLflow's registry.

--compare local,fedavg -> Wanted -> FoundModel (its run's settings, best step and files), or a line with the command
that trains what is missing
"""

import logging
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from common import config
from common.errors import CheckpointError, UserError, unknown_name
from common.faces.datasets import OF_FAMILIES
from common.metrics.names import BYTES_DOWN, BYTES_UP, EPOCH_SECONDS, ROUND_SECONDS, present
from common.models.table import ATTENTIONS, BACKBONES
from common.plots.style import LOCAL, SHOWN_METHODS
from common.runs import CONFIG_FILE
from common.settings import Settings
from common.strategies import STRATEGIES
from common.system.events import RUN_FILE
from common.system.files import read_json
from common.tracking.registry import Registered, find_registered, read_registered
from simulation.sites import USUAL_CLIENTS

FEDERATED: Final = (*STRATEGIES, "fedbn")
TWINS: Final = "twins"  # one holder's, trained on batches of twins
KINDS: Final = ("local", "centralized", TWINS, *FEDERATED)
UNTRAINED: Final = "untrained"  # the first row of every comparison: what they all began as
FEDBN: Final = "fedbn"  # private normalisation, whatever the strategy (arXiv:2102.07623)
DEFAULT_KINDS: Final = ("local", "centralized", "fedavg", "fedprox")
_REGISTRY: Final = "models:/"

_log = logging.getLogger("facefed.evaluate")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A model by what it is: how it was trained, and by whom when it was trained alone."""

    kind: str
    client: str = ""  # local models only

    @property
    def name(self) -> str:
        """The name everywhere: "fedavg", "centralized", "local-celeba"."""
        return f"{self.kind}-{self.client}" if self.client else self.kind

    @property
    def mode(self) -> str:
        """The run's mode: local, centralized, twins or federated."""
        return "federated" if self.kind in FEDERATED else self.kind


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What training took, as its run recorded it; NaN where nobody wrote it down."""

    seconds: float = math.nan  # of all rounds or epochs, on the machine that trained, with scoring
    bytes_up: float = math.nan  # of all clients, to the server
    bytes_down: float = math.nan
    num_pictures: float = math.nan  # processed; a picture counts once an epoch


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A trained model: whose settings, which step, which files."""

    wanted: Wanted
    source: str  # the run's id, or models:/NAME/VERSION
    settings: Settings
    clients: tuple[str, ...]  # it was trained on, sorted; () where nobody wrote it down
    step: int  # the best epoch or round, by validation
    test_pairs: Mapping[str, str] = field(default_factory=dict)  # client -> digest, as the run recorded it
    folder: Path | None = None
    registered: Registered | None = None
    cost: Cost = Cost()  # frozen

    @property
    def shown(self) -> str:
        """The name in words, for pages and pictures: "fedavg", "centralised", "local celeba"."""
        client = self.wanted.client
        return f"{LOCAL}{client}" if client else SHOWN_METHODS.get(self.wanted.kind, self.wanted.kind)

    @property
    def name(self) -> str:
        """The name everywhere: "fedavg", "centralized", "local-celeba"."""
        return self.wanted.name

    @property
    def checkpoint(self) -> Path:
        """The file of the best model's tensors; of a run folder only."""
        if self.folder is None:
            raise ValueError(f"{self.source} has no run folder")
        name = f"round-{self.step:06d}" if self.wanted.mode == "federated" else "best"
        return self.folder / "checkpoints" / f"{name}.safetensors"

    @property
    def num_epochs(self) -> int | str:
        """How often each picture was processed, as planned; or in how many steps, where rounds are counted in those."""
        settings = self.settings
        if self.wanted.kind == UNTRAINED:
            return 0
        return settings.planned if self.wanted.mode == "federated" else settings.local_training_epochs


@dataclass(frozen=True, kw_only=True)
class Search:
    """Where to look and for what."""

    settings: Settings  # of the command: the backbone, --out, the tracking address
    clients: tuple[str, ...]  # whose test people the models meet
    told: Mapping[str, str] = field(default_factory=dict)  # client -> its --client for `facefed train`; else its name
    command_options: str = ""  # what `facefed train` needs besides, such as --config
    address: str = field(default="", repr=False)  # of the tracking, with its password; "": the settings' own is whole

    @property
    def registry(self) -> str:
        """The address whose registry is asked; "" where tracking is off."""
        return _registry_of(self.settings, self.address)


def wanted_models(compare: str, clients: Sequence[str], runs: Mapping[str, str]) -> list[Wanted]:
    """The models that `--compare` and `--run` name, each once; "local" is one for each client.

    Raises UserError for a kind that is not known, or for none.
    """
    wanted: list[Wanted] = []
    for kind in (part.strip() for part in compare.split(",")):
        if kind not in KINDS:
            raise UserError(unknown_name("--compare", kind, KINDS))
        wanted += [Wanted(kind=kind, client=name) for name in clients] if kind == "local" else [Wanted(kind=kind)]
    wanted += [_wanted_by_name(name) for name in runs]
    return list(dict.fromkeys(wanted))


def explicit_runs(texts: Iterable[str], clients: Sequence[str]) -> dict[str, str]:
    """`--run KIND=RUN` by model name; "local" stands for local-NAME where one client is meant.  Raises UserError."""
    runs: dict[str, str] = {}
    for text in texts:
        kind, equals, run = text.partition("=")
        if not (equals and kind and run):
            raise UserError(f"--run {text}: write KIND=RUN, for example fedavg=RUN or local-celeba=RUN.")
        if kind == "local":
            if len(clients) != 1:
                raise UserError(f"--run {text}: whose? Write local-NAME=RUN, for example local-{clients[0]}=RUN.")
            kind = f"local-{clients[0]}"
        if kind in runs:
            raise UserError(f"--run {text}: {kind} has a run already ({runs[kind]}); give one.")
        runs[_wanted_by_name(kind).name] = run
    return runs


def _wanted_by_name(name: str) -> Wanted:
    kind, _, client = name.partition("-")
    if kind == "local" and client:
        return Wanted(kind=kind, client=client)
    if name in KINDS and name != "local":
        return Wanted(kind=name)
    raise UserError(unknown_name("--run: the kind", name, ("local-NAME", *KINDS[1:])))


def find_models(search: Search, wanted: Sequence[Wanted], runs: Mapping[str, str]) -> list[FoundModel]:
    """Every wanted model: the run named for it, else the newest finished one that fits, else a registered one.

    runs: model name -> RUN.  Raises UserError that names all missing ones with the commands that make them, or a model
    that is not comparable; CheckpointError for a damaged run.
    """
    found, missing = [], []
    for want in wanted:
        model = _explicit(search, want, runs[want.name]) if want.name in runs else _newest(search, want)
        if model is None:
            missing.append(want)
        else:
            found.append(model)
    if missing:
        raise UserError(_missing_line(search, wanted, missing, found))
    _check_alike(search, found)
    return found


def _registry_of(settings: Settings, address: str) -> str:
    return (address or settings.tracking.uri) if settings.tracking.enabled else ""


def find_model(settings: Settings, run: str, flag: str, address: str = "") -> FoundModel:
    """The model that RUN or models:/NAME/VERSION or models:/NAME@ALIAS names, however it was trained.

    settings: of the command: --out, the tracking.  flag: what the user wrote, for the line of an error.
    address: of the tracking, with its password; "": the settings' own is whole.
    Raises UserError, CheckpointError, TrackingError.
    """
    if run.startswith(_REGISTRY):
        return _from_registry(Wanted(kind="registered"), read_registered(_registry_of(settings, address), run))
    folder = _run_folder(settings, run, flag)
    if not (folder / "config.toml").is_file():
        raise UserError(f"{flag}: that run trained no model (it has no config.toml); name one of training.")
    return _finished(_wanted_of(_about(folder)), folder, flag)


def _about(folder: Path) -> dict[str, Any]:
    """A run's run.json.  Raises CheckpointError."""
    about = read_json(folder / RUN_FILE)
    clients = about.get("clients", [])
    if not (isinstance(clients, list) and all(isinstance(name, str) for name in clients)):
        raise CheckpointError(f"{folder / RUN_FILE}: its clients are no list of names; it is not a file of ours.")
    return about


def _wanted_of(about: Mapping[str, Any]) -> Wanted:
    """What a run's run.json says that its model is."""
    mode, clients = str(about.get("mode", "")), list(about.get("clients", []))
    if mode == "federated":
        return Wanted(kind=FEDBN if about.get("normalisation") == "private" else str(about.get("strategy")))
    return Wanted(kind=mode, client=str(clients[0]) if mode == "local" and clients else "")


def _explicit(search: Search, want: Wanted, run: str) -> FoundModel:
    if run.startswith(_REGISTRY):
        registered = read_registered(search.registry, run)
        return _from_registry(want, registered)
    flag = f"--run {want.name}={run}"
    folder = _run_folder(search.settings, run, flag)
    about = _about(folder)
    if not _is_kind(want, about):
        seen = f"{about.get('mode')} {about.get('strategy') or ''} {about.get('clients')}".replace("  ", " ")
        raise UserError(f"{flag}: that run is {seen}, not {want.name}; name a run of that kind.")
    return _finished(want, folder, flag)


def _run_folder(settings: Settings, run: str, flag: str) -> Path:
    """The folder of a run by its id or its path.  Raises UserError."""
    out = Path(settings.run.out).expanduser()
    for folder in (out / run, Path(run).expanduser()):
        if folder.is_dir():
            break
    else:
        raise UserError(
            f"{flag}: there is no such run in {out}, nor a folder of that name; name one, or models:/NAME@champion."
        )
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"{flag}: {folder} has no run.json, so it is no run of ours; name a run folder.")
    return folder.resolve()


def _finished(want: Wanted, folder: Path, flag: str) -> FoundModel:
    model = _from_folder(want, folder)
    if model is None:
        raise UserError(f"{flag}: the run has not finished (no metrics.json); let it end, or resume it.")
    return model


def _newest(search: Search, want: Wanted) -> FoundModel | None:
    """The newest finished run that fits, or the registered model; None when there is neither."""
    model = _newest_folder(search, want)
    if model is not None or not search.registry or want.kind == FEDBN:  # each of its clients has a backbone of its own
        return model
    registered = find_registered(search.registry, registered_name(want, search.settings.model.backbone))
    return None if registered is None else _from_registry(want, registered)


def _newest_folder(search: Search, want: Wanted) -> FoundModel | None:
    """The newest finished run that fits.  Raises CheckpointError or ConfigError."""
    out = Path(search.settings.run.out).expanduser()
    folders = sorted(out.iterdir(), key=lambda path: path.name, reverse=True) if out.is_dir() else []
    for folder in folders:
        if not (folder / RUN_FILE).is_file():
            continue
        try:
            about = _about(folder)
        except CheckpointError as error:
            _log.warning("left aside: %s", error)
            continue
        if _is_kind(want, about) and _fits(search, want, about):
            model = _from_folder(want, folder.resolve())
            if model is not None:
                return model
    return None


def registered_name(want: Wanted, backbone: str) -> str:
    """The name under which such a model is registered."""
    if want.kind == "local":
        return f"{want.client}_{backbone}_local"
    return f"{backbone}_federated_{want.kind}" if want.mode == "federated" else f"{backbone}_{want.kind}"


def _is_kind(want: Wanted, about: Mapping[str, Any]) -> bool:
    if about.get("mode") != want.mode:
        return False
    if want.kind == "local":
        return list(about.get("clients", [])) == [want.client]
    if want.mode != "federated":
        return True
    private = about.get("normalisation") == "private"
    return private if want.kind == FEDBN else not private and about.get("strategy") == want.kind


def _fits(search: Search, want: Wanted, about: Mapping[str, Any]) -> bool:
    """Whether a run of the kind is of the wanted backbone, and of the holders that are compared."""
    if about.get("backbone") != search.settings.model.backbone:
        return False
    clients = set(about.get("clients", []))
    if want.kind == TWINS:  # of one of the holders
        return clients <= set(search.clients)
    return want.kind == "local" or set(search.clients) <= clients


def _from_folder(want: Wanted, folder: Path) -> FoundModel | None:
    """The model of a run folder; None when the run has not finished.  Raises CheckpointError or ConfigError."""
    if not (folder / "metrics.json").is_file():
        return None
    metrics = read_json(folder / "metrics.json")
    about = _about(folder)
    if not isinstance(metrics.get("test_pairs", {}), dict):
        raise CheckpointError(f"{folder / 'metrics.json'}: its test_pairs are no table; it is not a file of ours.")
    return FoundModel(
        wanted=want,
        source=folder.name,
        settings=config.load_of_run(folder / "config.toml")[0],
        clients=tuple(about.get("clients", ())),
        step=_best_step(want, metrics, str(folder / "metrics.json")),
        test_pairs=dict(metrics.get("test_pairs", {})),
        folder=folder,
        cost=_cost(metrics),
    )


def _cost(metrics: Mapping[str, Any]) -> Cost:
    """metrics: of metrics.json; one round or epoch without a number leaves the sum unknown."""
    rows = metrics.get("rounds_table") or metrics.get("epochs") or []
    rows = [present(row) for row in rows if isinstance(row, dict) and row.get("step")] if isinstance(rows, list) else []

    def total(*names: str) -> float:
        values = [next((row[name] for name in names if name in row), math.nan) for row in rows]
        return float(sum(values)) if values and all(isinstance(value, int | float) for value in values) else math.nan

    pictures = metrics.get("num_pictures_processed")
    return Cost(
        seconds=total(ROUND_SECONDS, EPOCH_SECONDS),
        bytes_up=total(BYTES_UP),
        bytes_down=total(BYTES_DOWN),
        num_pictures=float(pictures) if isinstance(pictures, int | float) else math.nan,
    )


def untrained(models: Sequence[FoundModel]) -> FoundModel:
    """What the models were before training: that of the first federated one, else of the first.

    With `model.pretrained` it has the given weights.
    """
    first = next((model for model in models if model.wanted.mode == "federated"), models[0])
    given = first.settings.model.pretrained
    start = "random weights" if given == "none" else f"{given} weights"
    return FoundModel(
        wanted=Wanted(kind=UNTRAINED),
        source=f"{start}, seed {first.settings.run.seed}",
        settings=first.settings,
        clients=(),
        step=0,
    )


def _from_registry(want: Wanted, registered: Registered) -> FoundModel:
    return FoundModel(
        wanted=want,
        source=registered.uri,
        settings=config.from_mapping(config.without_gone(registered.settings), f"{registered.uri}: config.toml"),
        clients=(),
        step=registered.step,
        test_pairs=dict(registered.metrics.get("test_pairs", {})),
        registered=registered,
    )


def _best_step(want: Wanted, metrics: Mapping[str, Any], where: str) -> int:
    name = "best_round" if want.mode == "federated" else "best_epoch"
    step = metrics.get(name)
    if not isinstance(step, int):
        raise CheckpointError(f"{where}: {name} is {step!r}, not a number; the file is damaged or of another version.")
    return step


def _missing_line(
    search: Search, wanted: Sequence[Wanted], missing: Sequence[Wanted], found: Sequence[FoundModel]
) -> str:
    """What is missing, the commands that make it, alike to what is there, and what can be compared without it."""
    backbone, out = search.settings.model.backbone, search.settings.run.out
    where = f"{out} and the registry" if search.registry else out
    pattern = _pattern(search, found)
    commands = "; ".join(f"{want.name}: `{_command(search, want, pattern)}`" for want in missing)
    line = f"no trained {backbone} model in {where} of {', '.join(w.name for w in missing)}. Train {commands}."
    whole = dict.fromkeys(want.kind for want in wanted if want.kind not in {other.kind for other in missing})
    if sum(model.wanted.kind in whole for model in found) > 1:
        line += f" Or compare what is there: --compare {','.join(whole)}."
    return line


def _pattern(search: Search, found: Sequence[FoundModel]) -> FoundModel | None:
    """The run that the missing models should be like: of those found one of several holders, else any such run."""
    here = [model for model in found if model.folder is not None]
    several = [model for model in here if model.wanted.kind in ("centralized", *FEDERATED)]
    kinds = [Wanted(kind=kind) for kind in (*FEDERATED, "centralized")]
    for want in () if several else kinds:
        model = _newest_folder(search, want)
        several += [] if model is None else [model]
    newest = sorted(several or here, key=lambda model: model.source)
    return newest[-1] if newest else None


def _command(search: Search, want: Wanted, pattern: FoundModel | None) -> str:
    """The command that makes such a model."""
    parts = [f"facefed train {want.mode}"]
    parts += [f"--client {search.told.get(name, name)}" for name in _clients_of(search, want, pattern)]
    if want.kind == FEDBN:
        parts.append("--set model.normalisation=private")
    elif want.mode == "federated":
        parts.append(f"--method {want.kind}")
    if "--config " in search.command_options or pattern is None:
        parts.append(f"--model {search.settings.model.backbone}")
    else:
        parts.append(f"--config {shlex.quote(str(_as_told(search, pattern)))}")
    return " ".join([*parts, search.command_options]).strip()


def _clients_of(search: Search, want: Wanted, pattern: FoundModel | None) -> Sequence[str]:
    """Whose pictures such a model learns from: of one that several hold, not only those that are compared on."""
    if want.kind == "local":
        return (want.client,)
    if want.kind == TWINS:
        return search.clients if len(search.clients) == 1 else OF_FAMILIES
    if pattern is not None and len(pattern.clients) > 1:
        return pattern.clients
    if len(search.clients) > 1:
        return search.clients
    others = [name for name in USUAL_CLIENTS if name not in search.clients]
    return (*search.clients, *(others if set(search.clients) <= set(USUAL_CLIENTS) else ["OTHER=DIR"]))


def _as_told(search: Search, model: FoundModel) -> Path:
    """The settings of a run, by the short path where it is in --out."""
    out, folder = Path(search.settings.run.out), model.folder or Path()
    short = out / folder.name
    return (short if short.expanduser().resolve() == folder else folder) / CONFIG_FILE


def _check_alike(search: Search, found: Sequence[FoundModel]) -> None:
    """Raise UserError when the models are not of one architecture: then the training is not all that differs."""
    first = found[0]
    for model in found:
        backbone = search.settings.model.backbone
        if model.settings.model.backbone != backbone:
            raise UserError(_unlike(model, "model.backbone", model.settings.model.backbone, "--model", backbone))
        wanted, seen = _architecture(first.settings), _architecture(model.settings)
        for name in seen:
            if seen[name] != wanted.get(name):
                other = f"{first.name} ({first.source})"
                raise UserError(_unlike(model, name, seen[name], other, wanted.get(name)))


def _architecture(settings: Settings) -> dict[str, object]:
    """What decides the network beside the backbone's name.

    A ViT has a position embedding for each patch, so its pictures' size is part of it; and its branches are.
    """
    model = settings.model
    found: dict[str, object] = {"model.width": model.width, "model.embedding_size": model.embedding_size}
    if BACKBONES[model.backbone].is_vit:
        names = ("patch_size", "depth", "attention", "inference")
        found |= {f"model.{name}": getattr(model, name) for name in names}
        found["data.image_size"] = settings.data.image_size
        if "glca" in ATTENTIONS[model.attention]:
            found["model.glca_fraction"] = model.glca_fraction
    return found


def _unlike(model: FoundModel, name: str, seen: object, other: str, wanted: object) -> str:
    return (
        f"{model.name} ({model.source}) has {name} = {seen}, {other} has {wanted}; compare models of one"
        f" architecture: name another run with --run {model.name}=RUN."
    )
