"""The weights that a run begins with, from wherever `model.pretrained` names them: made a file of the run's own.

    models:/NAME/VERSION, models:/NAME@ALIAS, an MLflow run's id, a FaceFed run's folder or id (its best model)
        -> RUN/pretrained.safetensors, which `model.pretrained` names from then on

So every process that builds the first model finds it in one place, and a run that goes on needs neither the registry
nor the other run.  Registered tensors are read by `common.tracking.registry`: nothing that a registry holds is run.
Who has the first model (the server, or training without one) reads them; clients get it from the server.
"""

import dataclasses
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common import config
from common.errors import CheckpointError, ConfigError, TrackingError
from common.runs import CHECKPOINTS, CONFIG_FILE, WEIGHTS_FILE, new_run_folder, write_config_file
from common.settings import Settings
from common.system.events import RUN_FILE
from common.system.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

_OWN: Final = ("none", "imagenet")
_FILES: Final = ".safetensors"
_REGISTERED: Final = "models:/"
_MLFLOW_RUN: Final = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Given:
    """Tensors by the backbone's names, "backbone.linear.weight", and where they are from."""

    tensors: "dict[str, Tensor]"
    source: str


def begin_run(settings: Settings, address: str) -> tuple[Settings, Path]:
    """Make the folder of a new run that trains, and in it the weights that it begins with.

    address: of the tracking, with its password.  Returns the settings, in which `model.pretrained` is then a file, and
    the folder.  Nothing is made where the weights cannot be had or do not fit the model.
    Raises ConfigError, CheckpointError, TrackingError, UserError.
    """
    given = _find(settings, address)
    with tempfile.TemporaryDirectory() as aside:
        trial = Path(aside) / WEIGHTS_FILE
        _check(_taking(settings, given, trial), {str(trial): settings.model.pretrained} if given else {})
        folder = new_run_folder(settings, address)
        if given:
            settings = _taking(settings, given, folder / WEIGHTS_FILE)
            write_config_file(folder, settings, address)
    return settings, folder


def check_weights(settings: Settings) -> None:
    """That the weights of a run that goes on can be had and fit.  Raises ConfigError, CheckpointError."""
    _check(settings, {})


def _taking(settings: Settings, given: Given | None, path: Path) -> Settings:
    """The settings, with the given tensors in the file that they name."""
    if given is None:
        return settings
    from common.system.checkpoints import write_tensors

    write_tensors(path, given.tensors, {"from": given.source})
    return config.with_value(settings, "model", "pretrained", str(path))


def _check(settings: Settings, shown: dict[str, str]) -> None:
    """Build what begins with the weights.  shown: what an error calls a file."""
    if settings.model.pretrained == "none":
        return
    from common.models.recogniser import build_recogniser

    try:
        build_recogniser(
            settings.model, num_people=2, image_size=settings.data.image_size, backbone_seed=0, head_seed=0
        )
    except CheckpointError as error:
        text = str(error)
        for path, name in shown.items():
            text = text.replace(path, f"model.pretrained = {name}")
        raise CheckpointError(text) from None


def _find(settings: Settings, address: str) -> Given | None:
    """The tensors that `model.pretrained` means; None where it is no reference to another run's."""
    wanted = settings.model.pretrained
    if wanted in _OWN or wanted.endswith(_FILES):
        return None
    places = (Path(wanted).expanduser(), Path(settings.run.out).expanduser() / wanted)
    folder = next((place for place in places if (place / RUN_FILE).is_file()), None)
    if wanted.startswith(_REGISTERED):
        return _registered(wanted, settings, address)
    if folder is not None:
        return _of_run(folder.resolve(), wanted)
    if _MLFLOW_RUN.fullmatch(wanted):
        return _registered(wanted, settings, address)
    raise ConfigError(
        [
            f"model.pretrained = {wanted!r} is no run in {settings.run.out} and no folder of one; write none, imagenet,"
            " FILE.safetensors, models:/NAME@champion, a run's folder or its id."
        ]
    )


def _registered(wanted: str, settings: Settings, address: str) -> Given:
    from common.tracking.registry import load_state, read_registered, version_of_run

    address = (address or settings.tracking.uri) if settings.tracking.enabled else ""
    try:
        found = read_registered(address, wanted if wanted.startswith(_REGISTERED) else version_of_run(address, wanted))
        return Given(tensors=load_state(found), source=found.uri)
    except TrackingError as error:
        raise TrackingError(f"model.pretrained = {error}") from None


def _of_run(folder: Path, wanted: str) -> Given:
    about, what = read_json(folder / RUN_FILE), f"model.pretrained = {wanted}"
    if not (folder / "metrics.json").is_file():
        raise CheckpointError(f"{what}: that run has not finished; let it end, resume it, or name a file of its.")
    metrics, settings = read_json(folder / "metrics.json"), config.load_of_run(folder / CONFIG_FILE)[0]
    if about.get("mode") == "federated":
        return Given(tensors=_of_federation(folder, metrics, settings, what), source=folder.name)
    checkpoints = folder / CHECKPOINTS
    if isinstance(trial := metrics.get("sweep"), dict):
        checkpoints /= f"trial-{int(trial['best_trial']):03d}"
    path = checkpoints / f"best{_FILES}"
    if not path.is_file():
        raise CheckpointError(f"{what}: that run is {about.get('mode')} and has no one best model; name a file of its.")
    from common.system.checkpoints import read_tensors

    tensors = {name: tensor for name, tensor in read_tensors(path)[0].items() if name.startswith("backbone.")}
    return Given(tensors=tensors, source=folder.name)


def _of_federation(folder: Path, metrics: dict[str, Any], settings: Settings, what: str) -> "dict[str, Tensor]":
    """The best round's shared tensors, whose digest is examined."""
    if settings.model.normalisation == "private":
        raise CheckpointError(
            f"{what}: that run has private normalisation, so there is no single model; name one with shared."
        )
    from common.models.recogniser import build_recogniser, shared_names
    from common.protocol.parameters import buffer_sha256, manifest_of, views
    from common.system.checkpoints import read_flat

    model = dataclasses.replace(settings.model, pretrained="none")
    whole = build_recogniser(model, num_people=2, image_size=settings.data.image_size, backbone_seed=0, head_seed=0)
    state = whole.state_dict()
    manifest = manifest_of({name: state[name] for name in shared_names(whole, settings.model.normalisation)})
    path = folder / CHECKPOINTS / f"round-{int(metrics['best_round']):06d}{_FILES}"
    buffer, notes = read_flat(path, [(entry.name, entry.shape) for entry in manifest.entries])
    if notes.get("sha256") != buffer_sha256(buffer):
        raise CheckpointError(f"{what}: {path} is damaged: its numbers are not those that were written.")
    return views(buffer, manifest)
