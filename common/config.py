"""Run settings: a TOML file and flags -> frozen typed objects -> JSON on the wire -> back, losslessly.

Every default and every allowed range stands here and nowhere else. All problems of a file are reported together.
"""

import dataclasses
import json
import math
import re
import tomllib
import typing
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError, unknown_name

STRATEGIES = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi")
VITS = ("vit_tiny", "vit_small", "vit_base")
BACKBONES = ("resnet18", "resnet50", "mobilenet_v2", "cnn", *VITS)
ATTENTIONS = ("sa", "glca", "pwca", "dcal")
INFERENCES = ("sa", "glca", "both")
HEADS = ("softmax", "cosface", "arcface")
ALIGNMENTS = ("landmarks", "box", "resize")
# A client's name is shown on terminals and becomes part of folders, tags and metrics.
CLIENT_NAME = re.compile(r"\w[\w .-]{0,63}")
LOG_LEVELS = ("debug", "info", "warning", "error")
# What a study may vary: the trainings of a study share their data, people and machine.
STUDIED_SECTIONS = ("augmentation", "model", "training", "twins")
# What would give the variants of an ablation different budgets, or no training of their own.
NOT_ABLATED = ("training.epochs", "training.batch_size", "training.patience", "training.device")


def setting(
    default: object,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    word: str = "",
) -> Any:  # noqa: ANN401 - dataclasses.field is typed the same way
    """A settings field: its default, its range (low <= x <= high, x > above), its choices, or a word for 'decide'."""
    return dataclasses.field(
        default=default, metadata={"low": low, "high": high, "above": above, "choices": choices, "word": word}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """[run]: where the run lives and what makes it repeatable."""

    seed: int = setting(1, low=0)
    out: str = setting("runs")
    log_level: str = setting("info", choices=LOG_LEVELS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """[data]: which pictures are used, how they are aligned, how they are split."""

    image_size: int = setting(112, low=32, high=512)  # px, width and height
    alignment: str = setting("landmarks", choices=ALIGNMENTS)
    box_margin: float = setting(0.0, low=0.0, high=1.0)  # fraction of the box's longer side added around it
    min_pictures_per_person: int = setting(2, low=1)
    max_people: int | str = setting("all", low=2, word="all")  # the first so many by hash
    max_quarantined_fraction: float = setting(0.05, low=0.0, high=1.0)
    fraction_val_pictures: float = setting(0.1, above=0.0, high=0.5)  # of each training person's pictures
    fraction_test_pictures: float = setting(0.1, above=0.0, high=0.5)
    fraction_val_people: float = setting(0.12, above=0.0, high=0.5)  # where no official split names them
    fraction_test_people: float = setting(0.2, above=0.0, high=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """[augmentation]: random changes of training pictures, on the training device."""

    flip: float = setting(0.5, low=0.0, high=1.0)  # probability
    crop: float = setting(0.1, low=0.0, high=0.5)  # largest shift and zoom, as a fraction of the side
    rotation_rad: float = setting(0.0, low=0.0, high=0.8)  # largest turn
    colour: float = setting(0.2, low=0.0, high=1.0)  # largest relative change of brightness, contrast, saturation
    erase: float = setting(0.0, low=0.0, high=1.0)  # probability of blanking one random rectangle


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """[model]: backbone (picture -> embedding) and head (embedding -> logits)."""

    backbone: str = setting("resnet18", choices=BACKBONES)
    width: float = setting(1.0, low=0.125, high=2.0)  # fraction of the channels of every layer
    embedding_size: int = setting(512, low=8, high=4096)
    head: str = setting("cosface", choices=HEADS)
    head_scale: float = setting(30.0, above=0.0)
    head_margin: float = setting(0.35, low=0.0, high=1.5)  # cosface: cosine; arcface: radians; softmax: none
    dropout: float = setting(0.0, low=0.0, high=0.9)  # before the embedding
    pretrained: str = setting("none")  # none | imagenet | a .safetensors file
    normalisation: str = setting("shared", choices=("shared", "private"))
    patch_size: int = setting(16, low=2, high=64)  # px, of a ViT
    depth: int = setting(12, low=1, high=64)  # blocks of a ViT
    attention: str = setting("sa", choices=ATTENTIONS)  # a ViT's branches in training; dcal: all three
    glca_fraction: float = setting(0.1, above=0.0, high=1.0)  # R: the patches that GLCA asks with
    inference: str = setting("sa", choices=INFERENCES)  # which branch of a ViT embeds; both: the sum of the two


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """[training]: the optimiser and its schedule, which runs over the whole federation."""

    optimiser: str = setting("sgd", choices=("sgd", "adamw"))
    lr: float = setting(0.05, above=0.0)
    momentum: float = setting(0.9, low=0.0, high=0.999)  # sgd only
    weight_decay: float = setting(5e-4, low=0.0)
    batch_size: int = setting(32, low=2)
    epochs: int | str = setting("auto", low=1, word="auto")  # local training; auto: rounds x local_epochs
    warmup_fraction: float = setting(0.1, low=0.0, high=0.9)  # of all steps
    label_smoothing: float = setting(0.0, low=0.0, high=0.9)
    clip_norm: float = setting(5.0, above=0.0)  # of the whole gradient
    patience: int | str = setting("off", low=1, word="off")  # validations without a better AUC before training stops
    head_warmup_epochs: int = setting(0, low=0)  # a new head alone, before the backbone moves
    spreadout: float = setting(0.0, low=0.0)  # weight of the regulariser that keeps identity vectors apart
    spreadout_margin: float = setting(0.7, above=0.0, high=2.0)  # distance of unit identity vectors that is enough
    triplet: float = setting(0.0, low=0.0)  # weight of the batch-hard triplet loss
    triplet_margin: float = setting(0.3, above=0.0, high=2.0)  # distance of unit embeddings
    device: str = setting("auto", choices=("auto", "cpu", "cuda", "mps"))  # local training; sites choose their own
    precision: str = setting("auto", choices=("auto", "float32", "bfloat16"))
    memory_format: str = setting("auto", choices=("auto", "contiguous", "channels_last"))
    threads: int | str = setting("auto", low=1, word="auto")  # CPU threads of each client


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwinSettings:
    """[twins]: which pairs of pictures training batches are made of; the three numbers count relative to their sum."""

    genuine: float = setting(0.5, above=0.0, high=1.0)  # of one person
    stranger: float = setting(0.25, low=0.0, high=1.0)  # of two families
    twin: float = setting(0.25, low=0.0, high=1.0)  # of two siblings
    hard_negatives: bool = setting(default=True)  # genuine pairs of two siblings in one batch
    partner: str = setting("random", choices=("random", "twin"))  # PWCA's other picture; twin where the batch has one


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """[ablation]: `facefed train twins` trains one variant for each value of one setting, all else equal."""

    over: str = setting("none")  # a setting's name, such as model.attention; none: no ablation
    values: str = setting("none")  # separated by commas; the others are compared with the first


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """[federation]: the rounds and how their replies become one model."""

    strategy: str = setting("fedavg", choices=STRATEGIES)
    rounds: int = setting(10, low=1)
    local_epochs: int = setting(2, low=1)
    proximal_mu: float = setting(0.01, low=0.0)  # fedprox only
    server_lr: float | str = setting("auto", above=0.0, word="auto")  # of the server's step; auto: the strategy's own
    server_momentum: float = setting(0.9, low=0.0, high=0.999)  # fedavgm; fedadam and fedyogi: beta 1
    server_beta2: float = setting(0.99, low=0.0, high=0.9999)  # fedadam, fedyogi
    server_adaptivity: float = setting(1e-3, low=1e-9)  # fedadam, fedyogi: tau, added to the root of the moment
    min_clients: int = setting(2, low=1)
    join_timeout_s: float = setting(300.0, above=0.0)
    round_timeout_s: float = setting(3600.0, above=0.0)
    test_every_rounds: int = setting(1, low=1)  # how often the test curve gets a point; never used for a choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerificationSettings:
    """[verification]: a public set of pairs (LFW's layout) on which the server scores the global model."""

    public_dir: str = setting("none")  # a folder with one folder a person; none: no such set
    public_pairs: str = setting("pairs.txt")  # the list of pairs, in public_dir or by its own path
    public_crop: float = setting(1.0, low=0.1, high=1.0)  # the central part of each picture that is used


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """[tracking]: MLflow, and TensorBoard beside it. The local record in the run's folder is always written."""

    enabled: bool = setting(default=True)
    uri: str = setting("sqlite:///mlflow.db")
    experiment_prefix: str = setting("facial_recognition")
    plots: str = setting("all", choices=("all", "final", "none"))
    tensorboard: str = setting("logs/tensorboard")  # a folder with one folder a run; none: no TensorBoard
    system_metrics_s: float | str = setting(10.0, above=0.0, word="off")  # between samples of the machine's use


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All run settings. They belong to the server; site settings never stand here."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    twins: TwinSettings = TwinSettings()
    ablation: AblationSettings = AblationSettings()
    federation: FederationSettings = FederationSettings()
    verification: VerificationSettings = VerificationSettings()
    tracking: TrackingSettings = TrackingSettings()

    @property
    def total_epochs(self) -> int:
        """How often each picture is processed in the whole federation, and in local training by default."""
        return self.federation.rounds * self.federation.local_epochs

    @property
    def local_training_epochs(self) -> int:
        """Epochs of `facefed train local`: training.epochs, or the federation's total."""
        epochs = self.training.epochs
        return epochs if isinstance(epochs, int) else self.total_epochs


def _section_types() -> dict[str, type]:
    hints = typing.get_type_hints(Settings)
    return {f.name: hints[f.name] for f in dataclasses.fields(Settings)}


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


def _fits_type(value: object, kind: object, word: str) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int)
    if kind is float:
        return isinstance(value, int | float)
    if kind is str:
        return isinstance(value, str)
    return isinstance(value, int) or value == word or (kind == float | str and isinstance(value, float))


def _wanted(kind: object, word: str) -> str:
    names: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(kind, f'a {"number" if kind == float | str else "whole number"} or "{word}"')


def _problem(name: str, value: object, kind: object, meta: Mapping[str, Any]) -> str | None:
    """What is wrong with one value, or None."""
    if not _fits_type(value, kind, meta["word"]):
        return f"{name} = {_shown(value)} has the wrong type; write {_wanted(kind, meta['word'])}."
    if isinstance(value, str):
        if meta["choices"] and value not in meta["choices"]:
            return unknown_name(name, value, meta["choices"])
        if not value.strip():
            return f"{name} is empty; write a value or leave the line out."
        # Neither TOML nor a file's name can hold them.
        odd = any(unicodedata.category(character) in ("Cc", "Cs") for character in value)
        return f"{name} = {json.dumps(value)} holds a character that cannot be written; leave it out." if odd else None
    try:
        number = float(typing.cast("float", value))
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    low, high, above = meta["low"], meta["high"], meta["above"]
    if not math.isfinite(number):
        return f"{name} = {value} is not finite; write an ordinary number."
    if above is not None and number <= above:
        return f"{name} = {value} must be greater than {above:g}."
    if low is not None and number < low:
        return f"{name} = {value} must be at least {low:g}."
    if high is not None and number > high:
        return f"{name} = {value} must be at most {high:g}."
    return None


def _read_section(section: str, kind: type, raw: object, problems: list[str]) -> Any:  # noqa: ANN401
    if not isinstance(raw, Mapping):
        problems.append(f"{section} = {_shown(raw)} must be a table: write [{section}] and its settings below it.")
        return kind()
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{section}.{key}"
        if key not in fields:
            problems.append(unknown_name("setting", name, [f"{section}.{known}" for known in fields]))
            continue
        problem = _problem(name, value, hints[key], fields[key].metadata)
        if problem:
            problems.append(problem)
        else:
            is_number = hints[key] is float or (hints[key] == float | str and not isinstance(value, str))
            values[key] = float(value) if is_number else value
    return kind(**values)


def _conflicts(settings: Settings) -> list[str]:
    """Settings that are fine alone but not together."""
    if settings.model.pretrained == "imagenet" and settings.model.width != 1.0:
        return [f'model.width = {settings.model.width} has no ImageNet weights; use 1.0 or model.pretrained = "none".']
    if settings.model.normalisation == "private" and settings.model.pretrained != "none":
        return [
            'model.normalisation = "private" keeps the pretrained normalisation layers from the clients; use "shared"'
            ' with model.pretrained, or model.pretrained = "none".'
        ]
    return _attention_conflicts(settings.model) + _patch_conflicts(settings)


def _attention_conflicts(model: ModelSettings) -> list[str]:
    """What branches a backbone can have, and which of them can embed."""
    problems = []
    if model.attention != "sa" and model.backbone not in VITS:
        problems.append(
            f'model.attention = "{model.attention}" needs a ViT, and model.backbone = "{model.backbone}" is none; use'
            f' "sa", or one of {", ".join(VITS)}.'
        )
    if model.inference != "sa" and model.attention not in ("glca", "dcal"):
        problems.append(
            f'model.inference = "{model.inference}" needs a GLCA branch, and model.attention = "{model.attention}" has'
            ' none; use "glca" or "dcal", or model.inference = "sa".'
        )
    return problems


def _patch_conflicts(settings: Settings) -> list[str]:
    """A ViT cuts the picture into whole patches; given weights are made for theirs."""
    model, size, patch = settings.model, settings.data.image_size, settings.model.patch_size
    problems = []
    if model.backbone in VITS and size % patch:
        nearest = max(patch, patch * round(size / patch))
        problems.append(
            f"data.image_size = {size} is not divisible by model.patch_size = {patch}; use {nearest} px, or another"
            " patch size."
        )
    if model.backbone == "vit_base" and model.pretrained == "imagenet" and (patch, model.depth) != (16, 12):
        problems.append(
            f"model.patch_size = {patch} and model.depth = {model.depth}: vit_base's ImageNet weights are for 16 and"
            ' 12; use those, or model.pretrained = "none".'
        )
    return problems


def _ablation_problems(settings: Settings) -> list[str]:
    """An unknown setting, values that do not fit it, or that do not go together with the other settings."""
    over, texts = settings.ablation.over, [text.strip() for text in settings.ablation.values.split(",")]
    if over == "none":
        return []
    problem = setting_problem("ablation.over", over, without=NOT_ABLATED)
    if problem:
        return [problem]
    if settings.training.patience != "off":
        return ['training.patience stops variants after different numbers of steps; use "off" in an ablation.']
    values = [value_of(over, text) for text in texts]
    if len(values) < 2 or any(value in values[:place] for place, value in enumerate(values)):
        return [f'ablation.values = "{settings.ablation.values}" must be two or more different values of {over}.']
    section, _, key = over.partition(".")
    own, problems = _conflicts(settings), []
    for value in values:
        raw = to_mapping(settings) | {"ablation": {}}
        raw[section] = raw[section] | {key: value}
        try:
            from_mapping(raw, source="ablation.values")
        except ConfigError as error:
            problems += [line for line in error.problems if line.removeprefix("ablation.values: ") not in own]
    return list(dict.fromkeys(problems))


def _unknown_section(name: str, sections: Mapping[str, type]) -> str:
    if name == "sweep":
        return "[sweep] describes a search over settings; give the file to facefed train twins --sweep."
    return unknown_name("section", name, sections)


def from_mapping(raw: Mapping[str, object], source: str = "settings") -> Settings:
    """Typed settings from nested plain values; missing ones take their defaults.

    Raises ConfigError with every problem found, each prefixed by `source`.
    """
    sections = _section_types()
    problems = [_unknown_section(name, sections) for name in raw if name not in sections]
    values = {name: _read_section(name, kind, raw.get(name, {}), problems) for name, kind in sections.items()}
    settings = Settings(**values)
    problems += _conflicts(settings) + _ablation_problems(settings)
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    return settings


def find_config(name: str, flag: str = "--config") -> Path:
    """The TOML file meant by `--config`: a path, or NAME for configs/NAME.toml (here, then beside the program).

    flag: what named it, for the error.
    Raises ConfigError naming the configurations that exist.
    """
    given = Path(name).expanduser()
    if given.suffix and not (given.name == name and given.suffix.lstrip(".").isdigit()):  # "mu0.01" is a NAME
        candidates = [given, *([] if given.is_absolute() else [Path(__file__).parent.parent / given])]
    else:
        candidates = [folder / "configs" / f"{name}.toml" for folder in (Path.cwd(), Path(__file__).parent.parent)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.toml"))
    raise ConfigError([f"{flag} {name}: no such file ({candidates[0]}); the configurations here: {', '.join(known)}."])


def load(path: Path | None, overrides: Mapping[tuple[str, str], object] | None = None) -> Settings:
    """Settings from a TOML file (None: all defaults) with flags laid over it.

    overrides: (section, key) -> value.  Raises ConfigError with all problems at once.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
        except ValueError as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
            raise ConfigError([f"{path}: not valid TOML: {error}"]) from None
    for (section, key), value in (overrides or {}).items():
        table = raw.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
    return from_mapping(raw, source=str(path) if path else "settings")


def to_mapping(settings: Settings) -> dict[str, dict[str, Any]]:
    """Nested plain values of every setting: {section: {key: value}}."""
    return dataclasses.asdict(settings)


def to_json(settings: Settings) -> str:
    """The settings as one line of JSON, as they travel in Flower's run config and in each message."""
    return json.dumps(to_mapping(settings), sort_keys=True)


def from_json(text: str) -> Settings:
    """Settings from the JSON of `to_json`, equal to what went in.  Raises ConfigError."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ConfigError([f"settings: not valid JSON: {error}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError(["settings: the JSON text must hold an object"])
    return from_mapping(raw)


def to_toml(settings: Settings) -> str:
    """The resolved settings as a TOML file that `load` reads back."""
    lines = []
    for section, values in to_mapping(settings).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def with_value(settings: Settings, section: str, key: str, value: object) -> Settings:
    """A copy of the settings with one value changed and checked."""
    raw = to_mapping(settings)
    raw[section][key] = value
    return from_mapping(raw)


def takes_number(section: str, key: str) -> bool:
    """Whether a setting whose default is a text (such as "auto") may also be a number."""
    kind = _section_types().get(section)
    return kind is not None and typing.get_type_hints(kind).get(key) in (int | str, float | str)


def value_of(name: str, text: str) -> object:
    """The text as the type of the setting "section.key"; one that does not fit is left for `from_mapping` to refuse."""
    section, _, key = name.partition(".")
    default = to_mapping(Settings()).get(section, {}).get(key)
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    kinds: tuple[type, ...] = (float,) if isinstance(default, float) else (int,)
    if isinstance(default, str):
        if not takes_number(section, key):
            return text
        kinds = (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def setting_problem(what: str, name: str, *, without: Iterable[str] = ()) -> str | None:
    """Why the setting "section.key" cannot be varied in a study, or None.

    what: where the name stands, to open the line.  without: names that cannot be varied either.
    """
    section, _, key = name.partition(".")
    if section not in STUDIED_SECTIONS or not key:
        return f"{what} = {_shown(name)}: a study varies settings of {', '.join(STUDIED_SECTIONS)}; write SECTION.KEY."
    known = [f"{section}.{field.name}" for field in dataclasses.fields(_section_types()[section])]
    if name in known and name in without:
        return f"{what} = {_shown(name)} changes what all trainings of a study must share; choose another setting."
    return (
        None
        if name in known
        else unknown_name(what, name, [known_one for known_one in known if known_one not in without])
    )


def value_problem(name: str, value: object) -> str | None:
    """What is wrong with a value of the known setting "section.key", or None."""
    section, _, key = name.partition(".")
    kind = _section_types()[section]
    field = next(field for field in dataclasses.fields(kind) if field.name == key)
    return _problem(name, value, typing.get_type_hints(kind)[key], field.metadata)


def takes_fractions(name: str) -> bool:
    """Whether the known setting "section.key" may be any number, not only a whole one."""
    section, _, key = name.partition(".")
    return typing.get_type_hints(_section_types()[section])[key] in (float, float | str)
