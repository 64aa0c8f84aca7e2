"""Run settings: a TOML file and flags -> frozen typed objects -> JSON on the wire -> back, losslessly.

The settings themselves stand in common.settings. All problems of a file are reported together.
"""

import dataclasses
import json
import math
import tomllib
import typing
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError, UserError, unknown_name
from common.metrics.group_names import attributes_of
from common.models.table import ATTENTIONS, BACKBONES, HEADS, VITS
from common.settings import FederationSettings, ModelSettings, Settings
from common.strategies import STRATEGIES
from common.system.files import read_text

# Settings that name a row of a table, which says what they may be.
TABLES: Mapping[str, Collection[str]] = {
    "federation.strategy": STRATEGIES,
    "model.backbone": BACKBONES,
    "model.attention": ATTENTIONS,
    "model.head": HEADS,
}
# What a study may vary: the trainings of a study share their data, people and machine.
STUDIED_SECTIONS = ("augmentation", "model", "training", "twins")
# What would give the variants of an ablation different budgets, or no training of their own.
NOT_ABLATED = ("training.epochs", "training.batch_size", "training.patience", "training.device")

# Settings that went (docs/adr/0021-settings-that-went.md), and the value that now always holds.
GONE: Mapping[str, object] = {
    "augmentation.erase": 0.0,
    "training.triplet_margin": 0.3,
    "twins.hard_negatives": True,
}


ROUND_LENGTHS = ("local_epochs", "local_steps")  # of [federation]: one of them


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


def range_problem(name: str, value: object, meta: Mapping[str, Any]) -> str | None:
    """What is wrong with a number beside its range, or None.  meta: with low, high and above, each a number or None."""
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


def _problem(name: str, value: object, kind: object, meta: Mapping[str, Any]) -> str | None:
    """What is wrong with one value, or None."""
    if not _fits_type(value, kind, meta["word"]):
        return f"{name} = {_shown(value)} has the wrong type; write {_wanted(kind, meta['word'])}."
    if isinstance(value, str):
        choices = meta["choices"] or TABLES.get(name, ())
        if choices and value not in choices:
            return unknown_name(name, value, choices)
        if not value.strip():
            return f"{name} is empty; write a value or leave the line out."
        # Neither TOML nor a file's name can hold them.
        odd = any(unicodedata.category(character) in ("Cc", "Cs") for character in value)
        return f"{name} = {json.dumps(value)} holds a character that cannot be written; leave it out." if odd else None
    return range_problem(name, value, meta)


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
    given = [key for key in ROUND_LENGTHS if isinstance(getattr(settings.federation, key), int)]
    if len(given) != 1:
        both = " and ".join(f"federation.{key} = {getattr(settings.federation, key)}" for key in ROUND_LENGTHS)
        return [f'{both}: a round is counted in one of them; set the other to "off".']
    if settings.model.pretrained == "imagenet" and settings.model.width != 1.0:
        return [f'model.width = {settings.model.width} has no ImageNet weights; use 1.0 or model.pretrained = "none".']
    if settings.model.pretrained == "imagenet" and settings.model.norm == "group":
        return ['model.norm = "group" has no ImageNet weights; use "batch", or model.pretrained = "none".']
    if settings.model.normalisation == "private" and settings.training.trainable == "norm":
        return [
            'training.trainable = "norm" would train nothing that is shared with model.normalisation = "private"; use'
            ' "shared", or another part.'
        ]
    if settings.federation.evaluate_only and settings.privacy.is_on:
        return [
            f'federation.evaluate_only gets nothing with privacy.unit = "{settings.privacy.unit}": no score leaves a'
            ' site then; use "off", and each site\'s policy decides.'
        ]
    if settings.federation.evaluate_only and settings.model.normalisation == "private":
        return ['federation.evaluate_only scores one whole model; use model.normalisation = "shared".']
    if settings.model.normalisation == "private" and settings.model.pretrained != "none":
        return [
            'model.normalisation = "private" keeps the pretrained normalisation layers from the clients; use "shared"'
            ' with model.pretrained, or model.pretrained = "none".'
        ]
    problems = _group_conflicts(settings) + _attention_conflicts(settings.model) + _patch_conflicts(settings)
    return problems + _privacy_conflicts(settings) + _secagg_conflicts(settings)


def _group_conflicts(settings: Settings) -> list[str]:
    """Errors by group are scores, and of few people."""
    try:
        asked = attributes_of(settings.verification.by)
    except UserError as error:
        return [str(error)]
    if asked and settings.privacy.is_on:
        return [
            f'verification.by = "{settings.verification.by}": with privacy.unit = "{settings.privacy.unit}" no site\'s'
            ' scores leave, so there are none by group; use "none".'
        ]
    return []


def _secagg_conflicts(settings: Settings) -> list[str]:
    """What needs single replies, which nobody sees."""
    federation, on = settings.federation, "secagg.enabled = true"
    if not settings.secagg.enabled:
        return []
    problems = []
    if STRATEGIES[federation.strategy].rule is not None:
        means = ", ".join(row.name for row in STRATEGIES.values() if row.rule is None)
        problems.append(
            f'federation.strategy = "{federation.strategy}" looks at single changes; with {on} use one of {means}.'
        )
    if federation.norm_factor != "off":
        problems.append(f'federation.norm_factor compares single changes; with {on} use "off".')
    if federation.upload_codec == "float16":
        problems.append(
            f'federation.upload_codec = "float16": masked words are whole numbers; with {on} use "int8", which takes as'
            ' many bytes, or "float32".'
        )
    if federation.clients_per_round != "all":
        problems.append(
            f"federation.clients_per_round = {federation.clients_per_round}: sums over other sites each round can be"
            f' subtracted from each other; with {on} use "all".'
        )
    if settings.privacy.unit == "site":
        problems.append(f'privacy.unit = "site" has the server clip single changes; with {on} use "person" or "off".')
    return problems


def _privacy_conflicts(settings: Settings) -> list[str]:
    """What would leave a site, or reach the model, outside of the guarantee."""
    privacy, federation = settings.privacy, settings.federation
    if not privacy.is_on:
        return []
    problems = []
    on = f'privacy.unit = "{privacy.unit}"'
    if settings.model.normalisation == "private":
        problems.append(f'model.normalisation = "private" keeps layers that everybody trained; with {on} use "shared".')
    if has_statistics(settings.model) and settings.model.pretrained == "none":
        problems.append(
            f"{on}: batch statistics would leave as they are, so they stay as they are received, and a model that is"
            f' freshly drawn has none; take model.norm = "group", a ViT ({", ".join(VITS)}), or weights to begin with'
            " (model.pretrained)."
        )
    if settings.training.patience != "off":
        problems.append(f'training.patience counts scores, and with {on} no site\'s scores leave; use "off".')
    if privacy.noise == "shared":
        problems += _shared_noise_conflicts(settings)
    if privacy.unit == "site":
        problems += _site_privacy_conflicts(federation)
    return problems


def _shared_noise_conflicts(settings: Settings) -> list[str]:
    """What noise that the sites draw together needs: a sum that nobody sees a summand of, over enough of them."""
    from common.privacy.shared_noise import fewest_noises
    from common.secagg.sites import threshold_of

    privacy, secagg, on = settings.privacy, settings.secagg, 'privacy.noise = "shared"'
    if privacy.unit != "person":
        return [f'{on} is for privacy.unit = "person"; with "{privacy.unit}" the server adds the noise, so use "own".']
    if not secagg.enabled:
        return [f'{on} hides a person in the sum only; with secagg.enabled = false use "own".']
    if settings.federation.upload_codec != "float32":
        return [
            f'federation.upload_codec = "{settings.federation.upload_codec}": {on} has words of 32 bits in steps of its'
            ' own; use "float32".'
        ]
    members = settings.federation.min_clients
    threshold = threshold_of(secagg.threshold, members)
    sure = fewest_noises(members, num_keys=members, threshold=threshold, colluding=privacy.colluding_sites)
    if sure < 2:
        return [
            f"{on} with federation.min_clients = {members} and privacy.colluding_sites = {privacy.colluding_sites}: of"
            f' {max(0, sure)} sites alone the noise is sure to be unknown; have more sites, or use "own".'
        ]
    return []


def _site_privacy_conflicts(federation: FederationSettings) -> list[str]:
    """What the server may not do with changes before it has added them up and made the sum noisy."""
    on = 'privacy.unit = "site"'
    if STRATEGIES[federation.strategy].rule is not None:
        means = ", ".join(row.name for row in STRATEGIES.values() if row.rule is None)
        return [f'federation.strategy = "{federation.strategy}" looks at single changes; with {on} use one of {means}.']
    if federation.norm_factor != "off":
        return [f'federation.norm_factor leaves changes out because of others; with {on} use "off".']
    if federation.clients_per_round == "all":
        return [f"{on} divides by a number that is fixed, whoever answers; set federation.clients_per_round."]
    return []


def has_statistics(model: ModelSettings) -> bool:
    """Whether the backbone's layers normalise with running statistics of batches."""
    return model.norm == "batch" and not BACKBONES[model.backbone].is_vit


def _attention_conflicts(model: ModelSettings) -> list[str]:
    """What branches a backbone can have, and which of them can embed."""
    problems = []
    if model.attention != "sa" and not BACKBONES[model.backbone].is_vit:
        problems.append(
            f'model.attention = "{model.attention}" needs a ViT, and model.backbone = "{model.backbone}" is none; use'
            f' "sa", or one of {", ".join(VITS)}.'
        )
    if model.inference != "sa" and "glca" not in ATTENTIONS[model.attention]:
        problems.append(
            f'model.inference = "{model.inference}" needs a GLCA branch, and model.attention = "{model.attention}" has'
            ' none; use "glca" or "dcal", or model.inference = "sa".'
        )
    return problems


def _patch_conflicts(settings: Settings) -> list[str]:
    """A ViT cuts the picture into whole patches; given weights are made for theirs."""
    model, size, patch = settings.model, settings.data.image_size, settings.model.patch_size
    row, problems = BACKBONES[model.backbone], []
    if row.is_vit and size % patch:
        nearest = max(patch, patch * round(size / patch))
        problems.append(
            f"data.image_size = {size} is not divisible by model.patch_size = {patch}; use {nearest} px, or another"
            " patch size."
        )
    if model.pretrained == "imagenet" and row.imagenet_blocks not in (None, (patch, model.depth)):
        problems.append(
            f"model.patch_size = {patch} and model.depth = {model.depth}: {row.name}'s ImageNet weights are for"
            f' {" and ".join(map(str, row.imagenet_blocks or ()))}; use those, or model.pretrained = "none".'
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
    own = _conflicts(settings)
    of_values = [line for value in values for line in _changed(settings, {over: value})[1] if line not in own]
    return [f"ablation.values: {line}" for line in dict.fromkeys(of_values)]


def _changed(settings: Settings, values: Mapping[str, object]) -> tuple[Settings, list[str]]:
    """The settings with values changed, by "section.key", and what is wrong with these, alone and beside the others."""
    problems = [problem for name, value in values.items() if (problem := value_problem(name, value))]
    given = [key for key in ROUND_LENGTHS if isinstance(values.get(f"federation.{key}"), int)]
    if len(given) == 1:  # the other one is off then
        values = {f"federation.{key}": "off" for key in ROUND_LENGTHS if key not in given} | dict(values)
    for name, value in () if problems else values.items():
        section, _, key = name.partition(".")
        number = float(value) if isinstance(value, int) and takes_fractions(name) else value
        table = dataclasses.replace(getattr(settings, section), **{key: number})
        settings = dataclasses.replace(settings, **{section: table})
    return settings, problems or _conflicts(settings)


def _unknown_section(name: str, sections: Mapping[str, type]) -> str:
    if name == "sweep":
        return "[sweep] describes a search over settings; give the file to facefed train twins --sweep."
    return unknown_name("section", name, sections)


def from_mapping(raw: Mapping[str, object], source: str = "settings") -> Settings:
    """Typed settings from nested plain values; missing ones take their defaults.

    Raises ConfigError with every problem found, each prefixed by `source`.
    """
    sections = _section_types()
    raw = _one_round_length(raw)
    problems = [_unknown_section(name, sections) for name in raw if name not in sections]
    values = {name: _read_section(name, kind, raw.get(name, {}), problems) for name, kind in sections.items()}
    settings = Settings(**values)
    problems += _conflicts(settings) + _ablation_problems(settings)
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    return settings


def _one_round_length(raw: Mapping[str, object]) -> Mapping[str, object]:
    """Where only the steps of a round are given, its epochs are off, whatever their default."""
    table = raw.get("federation")
    steps = table.get("local_steps") if isinstance(table, Mapping) else None
    if isinstance(table, Mapping) and isinstance(steps, int) and steps > 0 and "local_epochs" not in table:
        return {**raw, "federation": {**table, "local_epochs": "off"}}
    return raw


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
    known = [path.stem for path in shipped()]
    raise ConfigError([f"{flag} {name}: no such file ({candidates[0]}); the configurations here: {', '.join(known)}."])


def shipped() -> list[Path]:
    """What comes with FaceFed in configs/, in order of names: configurations, and what `--sweep` takes."""
    return sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def load(path: Path | None) -> Settings:
    """Settings from a TOML file (None: all defaults).  Raises ConfigError with all problems at once."""
    return load_with_address(path)[0]


def load_with_address(
    path: Path | None, overrides: Mapping[tuple[str, str], object] | None = None
) -> tuple[Settings, str]:
    """Settings from a TOML file with flags laid over it, and the tracking address with the password that may be in it.

    overrides: (section, key) -> value.  Raises ConfigError with all problems at once.
    """
    raw = _read_toml(path) if path else {}
    model = raw.get("model")
    asked = (overrides or {}).get(("model", "backbone"))
    if isinstance(model, dict) and asked not in (None, model.get("backbone", ModelSettings().backbone)):
        model.pop("width", None)  # it is of the file's backbone; another one is built as wide as it is
    for (section, key), value in (overrides or {}).items():
        table = raw.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
    settings = from_mapping(raw, source=str(path) if path else "settings")
    return settings, raw.get("tracking", {}).get("uri", settings.tracking.uri)


def load_of_run(path: Path) -> tuple[Settings, str]:
    """The same from the configuration that a run wrote down, perhaps before some settings went."""
    raw = _read_toml(path)
    settings = from_mapping(without_gone(raw), source=str(path))
    return settings, raw.get("tracking", {}).get("uri", settings.tracking.uri)


def without_gone(raw: Mapping[str, object]) -> dict[str, object]:
    """A run's configuration without the settings that went and stood at what now always holds; else it is refused."""
    return {
        section: {key: value for key, value in table.items() if GONE.get(f"{section}.{key}") != value}
        if isinstance(table, Mapping)
        else table
        for section, table in raw.items()
    }


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (ValueError, RecursionError) as error:  # also no UTF-8, numbers of thousands of digits, deep nesting
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None


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
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"settings: not valid JSON: {error}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError(["settings: the JSON text must hold an object"])
    return from_mapping(raw)


def to_toml(settings: Settings, address: str = "") -> str:
    """The resolved settings as a TOML file that `load` reads back.

    address: of the tracking, to be written in place of the settings', which has no password.
    """
    lines, sections = [], to_mapping(settings)
    if address:
        sections["tracking"]["uri"] = address
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def with_values(settings: Settings, values: Mapping[str, object], source: str = "settings") -> Settings:
    """A copy of the settings with values changed, by "section.key".

    They alone are checked, and whether they go with the others.  Raises ConfigError, each line prefixed by `source`.
    """
    changed, problems = _changed(settings, values)
    problems = problems or _ablation_problems(changed)
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    return changed


def with_value(settings: Settings, section: str, key: str, value: object) -> Settings:
    """The same with one value."""
    return with_values(settings, {f"{section}.{key}": value})


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
