"""What a site lets itself be asked: the limits of its own policy file, and what stands against a run or a task.

The file is the site's (`flower-client --policy FILE`, TOML) and nothing of it ever comes from a server.  What a limit
is called, its default, its range and why it is there stand in one row each, the fields of `Policy`; what is asked is
compared with them here and nowhere else.  A refusal that leaves is `refusal_line`: fixed words and the setting's name.
"""

import dataclasses
import hashlib
import json
import tomllib
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from common import config
from common.errors import ConfigError, ReplyRefused, UserError, unknown_name
from common.models.table import BACKBONES, HEADS
from common.protocol.refusals import refusal_line
from common.settings import CODECS, PRECISIONS, PrivacySettings, Settings
from common.strategies import STRATEGIES
from common.system.files import read_text

if TYPE_CHECKING:  # the policy is shown without torch
    from common.training.gradient_shares import Share

LOSSES: Final = ("head", "triplet", "spreadout")
NORMALISATIONS: Final = ("shared", "private")
SCORES: Final = ("exact", "noisy", "none")
SCORE_BINS: Final = ("8192", "1024", "256")
MEMORY_FORMATS: Final = ("contiguous", "channels_last")
ANY: Final = "any"  # in a list: whatever there is


def limit(
    default: object,
    why: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:  # noqa: ANN401 - dataclasses.field is typed the same way
    """A limit's default, its range (low <= x <= high, x > above) or choices, and why it is there."""
    meta = {"why": why, "low": low, "high": high, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """All limits of a site.  Each is a line of its file; what a file leaves out has the default here."""

    max_lr: float = limit(1.0, "a huge step carries a picture whole through the rounding of the change", above=0.0)
    max_local_epochs: int = limit(50, "what one task may cost", low=1)
    max_head_warmup_epochs: int = limit(50, "what the first task may cost", low=0)
    max_rounds: int = limit(500, "each round is one more model that is trained and scored", low=1)
    max_image_size: int = limit(
        256, "px; the pack on disk and the cost of a task grow with its square", low=32, high=512
    )
    max_patch_fraction: float = limit(
        0.34, "of the picture's side; a ViT whose patch is the picture has a picture in one row", above=0.0, high=1.0
    )
    max_clip_norm: float = limit(
        10.0, "the gradient of a step is clipped to it: no picture moves it further", above=0.0
    )
    max_server_lr: float = limit(1.0, "of the server's step, which says how far a model may move", above=0.0)
    max_threads: int = limit(256, "CPU threads that a task may name", low=1)
    min_batch_size: int = limit(8, "a step is a mean over so many pictures", low=2)
    min_training_people: int = limit(4, "an update is made of at least so many people", low=2)
    min_training_pictures: int = limit(20, "an update is made of at least so many pictures", low=2)
    min_pairs: int = limit(20, "genuine, and impostor, pairs behind a score; of fewer only `too few` leaves", low=0)
    groups: bool = limit(
        default=True, why="whether errors by group (verification.by) leave; else nothing of groups does"
    )
    min_group_people: int = limit(
        10, "test people of a group, and of who is not in it, before anything of either leaves", low=2
    )
    max_person_pairs: int = limit(
        5_000_000, "pairs behind a score that one person is in: by so many may they move a count; 0: any number", low=0
    )
    backbones: tuple[str, ...] = limit((ANY,), "which may be trained", choices=(ANY, *BACKBONES))
    heads: tuple[str, ...] = limit((ANY,), "which may be trained", choices=(ANY, *HEADS))
    strategies: tuple[str, ...] = limit((ANY,), "which may be followed", choices=(ANY, *STRATEGIES))
    codecs: tuple[str, ...] = limit(CODECS, "of changes and models on their way", choices=CODECS)
    losses: tuple[str, ...] = limit(LOSSES, "terms that may be in the loss", choices=LOSSES)
    normalisations: tuple[str, ...] = limit(NORMALISATIONS, "of the model's layers", choices=NORMALISATIONS)
    pretrained: tuple[str, ...] = limit(
        (), 'first models that are not freshly drawn: SHA-256 of each as it is received, or "any"'
    )
    max_runs_a_day: int = limit(100, "new runs in 24 hours", low=1)
    max_tasks_a_run: int = limit(3000, "joins, rounds and evaluations, repeated ones too", low=1)
    max_extra_models: int = limit(
        3, "distinct models beyond one a round: the untrained, and two that a killed server makes anew", low=1
    )
    max_models_a_day: int = limit(1000, "distinct models that are scored in 24 hours, over all runs", low=1)
    max_data_choices_a_day: int = limit(
        20, "different [data] in 24 hours: two sets that differ by one person tell of that person", low=1
    )
    max_task_seconds: float = limit(86_400.0, "one task may take; then it is ended", above=0.0)
    max_cpu_hours_a_run: float = limit(1000.0, "CPU time that a run may take here", above=0.0)
    max_disk_gb_a_run: float = limit(20.0, "a run's private states here", above=0.0)
    keep_runs: int = limit(10, "the newest runs whose private states stay; those of older ones are deleted", low=1)
    keep_packs: int = limit(
        5, "packs that runs had made of other [data] stay, those used last; older ones are removed", low=1
    )
    max_refusals: int = limit(5, "after so many in a run it is over for this site", low=1)
    scores: str = limit("exact", "which counts leave: exact, noisy (epsilon) or none", choices=SCORES)
    epsilon: float = limit(1.0, "of the two-sided geometric noise on each count, where scores are noisy", above=0.0)
    score_bins: str = limit(
        "8192", "bins of similarity in the counts that leave; fewer are coarser", choices=SCORE_BINS
    )
    confusion: bool = limit(
        default=False, why="whether counts of who is taken for whom leave, where the run asks for pictures too"
    )
    first_model: bool = limit(
        default=True, why="whether a run's first model must be the one that its seed and settings give"
    )
    late_entry: bool = limit(
        default=True, why="whether a run may be joined that has begun, with a model that nothing vouches for"
    )
    max_move: float = limit(
        6.0, "times what own training moved a weight may a round's model move it; 0: not looked at", low=0.0
    )
    max_relative_move: float = limit(
        0.9, "of a weight's own norm may it always move; one that has nothing to do with it is at 1.4", low=0.0
    )
    max_person_share: float = limit(
        0.6, "of a unit's gradient in a round may be one person's; 1: not looked at", above=0.0, high=1.0
    )
    require_dp: bool = limit(
        default=False, why="whether a run must have differential privacy of people, whose noise is this site's own"
    )
    shared_noise: bool = limit(
        default=False, why="whether noise that other sites add, too, may be what hides this one's people"
    )
    max_epsilon: float = limit(
        10.0, "that one person may have spent, over all runs on a data set, at max_delta", above=0.0, high=1000.0
    )
    max_delta: float = limit(1e-5, "of max_epsilon, and the largest that a run may ask for", above=0.0, high=0.1)
    require_secagg: bool = limit(default=False, why="whether a run must have secure aggregation")
    pin_secagg_peers: bool = limit(
        default=False, why="whether a site whose key is not here is believed the one that comes first, by the server"
    )
    min_secagg_sites: int = limit(3, "sites that a sum is over, this one too: the others could subtract theirs", low=3)


DEFAULT: Final = Policy()
# Of a simulation, where whoever asks holds the pictures: no limit of cost, no quota, as few pictures as there are.
OWN_MACHINE: Final = dataclasses.replace(
    DEFAULT,
    max_lr=1e9,
    max_local_epochs=10**9,
    max_head_warmup_epochs=10**9,
    max_rounds=10**9,
    max_image_size=512,
    max_patch_fraction=1.0,
    max_clip_norm=1e9,
    max_server_lr=1e9,
    max_threads=10**9,
    min_batch_size=2,
    min_training_people=2,
    min_training_pictures=2,
    min_pairs=0,
    min_group_people=2,
    max_person_pairs=0,
    max_task_seconds=1e9,
    max_runs_a_day=10**9,
    max_tasks_a_run=10**9,
    max_models_a_day=10**9,
    max_person_share=1.0,
    max_data_choices_a_day=10**9,
    max_cpu_hours_a_run=1e9,
    max_disk_gb_a_run=1e9,
    keep_packs=10**9,
    max_epsilon=1e9,
    shared_noise=True,
    max_delta=0.5,
    pretrained=(ANY,),
    confusion=True,
)


class Against(NamedTuple):
    """One limit that stands against what was asked."""

    setting: str  # of the run or task, for the server
    limit: str  # a field of Policy
    asked: str  # for the site's own output only
    allowed: str


class PolicyRefusal(ReplyRefused):
    """The policy does not allow it; the words are fixed and hold no data."""

    def __init__(self, against: Against) -> None:
        super().__init__(refusal_line(against.setting, against.limit))
        self.against = against


# ---- what a run's settings ask: (setting's name, limit's name), compared as numbers

_AT_MOST: Final = (
    ("training.lr", "max_lr"),
    ("training.clip_norm", "max_clip_norm"),
    ("federation.server_lr", "max_server_lr"),
    ("training.head_warmup_epochs", "max_head_warmup_epochs"),
    ("training.threads", "max_threads"),
    ("federation.local_epochs", "max_local_epochs"),
    ("federation.rounds", "max_rounds"),
    ("data.image_size", "max_image_size"),
)
_AT_LEAST: Final = (("training.batch_size", "min_batch_size"),)
_ONE_OF: Final = (
    ("model.backbone", "backbones"),
    ("model.head", "heads"),
    ("model.normalisation", "normalisations"),
    ("federation.strategy", "strategies"),
    ("federation.upload_codec", "codecs"),
    ("federation.download_codec", "codecs"),
)


def _value(settings: Settings, name: str) -> Any:  # noqa: ANN401 - of any setting
    section, _, key = name.partition(".")
    return getattr(getattr(settings, section), key)


def against_settings(policy: Policy, settings: Settings) -> list[Against]:
    """Every limit that stands against a run of these settings, whatever the site's data are."""
    found = []
    for names, fits in ((_AT_MOST, float.__le__), (_AT_LEAST, float.__ge__)):
        for name, key in names:
            asked, allowed = _value(settings, name), getattr(policy, key)
            if not isinstance(asked, str) and not fits(float(asked), float(allowed)):
                found.append(Against(name, key, f"{asked:g}", f"{allowed:g}"))
    for name, key in _ONE_OF:
        asked, choices = _value(settings, name), getattr(policy, key)
        if asked not in choices and ANY not in choices:
            found.append(Against(name, key, asked, ", ".join(choices)))
    found += _against_steps(policy, settings) + _against_model(policy, settings) + _against_losses(policy, settings)
    if policy.require_secagg and not settings.secagg.enabled:
        found.append(Against("secagg.enabled", "require_secagg", "false", "true"))
    return found + _against_privacy(policy, settings.privacy)


def _against_steps(policy: Policy, settings: Settings) -> list[Against]:
    """A round of a few batches is an update of a few pictures."""
    steps = settings.federation.local_steps
    if isinstance(steps, str) or steps * settings.training.batch_size >= policy.min_training_pictures:
        return []
    pictures = f"{steps} batches of {settings.training.batch_size}"
    return [Against("federation.local_steps", "min_training_pictures", pictures, str(policy.min_training_pictures))]


def _against_model(policy: Policy, settings: Settings) -> list[Against]:
    model, found = settings.model, []
    fraction = model.patch_size / settings.data.image_size
    if BACKBONES[model.backbone].is_vit and fraction > policy.max_patch_fraction:
        allowed = f"{policy.max_patch_fraction:g} of data.image_size"
        found.append(Against("model.patch_size", "max_patch_fraction", str(model.patch_size), allowed))
    if model.pretrained != "none" and not policy.pretrained:
        found.append(Against("model.pretrained", "pretrained", model.pretrained, "none"))
    return found


def _against_losses(policy: Policy, settings: Settings) -> list[Against]:
    terms = [("model.head", "head", 1.0)]
    terms += [(f"training.{name}", name, _value(settings, f"training.{name}")) for name in LOSSES[1:]]
    return [
        Against(setting, "losses", name, ", ".join(policy.losses))
        for setting, name, weight in terms
        if weight > 0.0 and name not in policy.losses
    ]


def _against_privacy(policy: Policy, privacy: PrivacySettings) -> list[Against]:
    found = []
    if policy.require_dp and privacy.unit != "person":
        found.append(Against("privacy.unit", "require_dp", privacy.unit, "person"))
    if privacy.is_shared and not policy.shared_noise:
        found.append(Against("privacy.noise", "shared_noise", privacy.noise, "own"))
    if privacy.unit == "person":
        for name, key in (("epsilon", "max_epsilon"), ("delta", "max_delta")):
            asked, allowed = getattr(privacy, name), getattr(policy, key)
            if asked > allowed:
                found.append(Against(f"privacy.{name}", key, f"{asked:g}", f"{allowed:g}"))
    return found


def against_data(policy: Policy, *, num_people: int, num_pictures: int) -> list[Against]:
    """Every limit that stands against training on so many people and pictures, of a site under the run's settings."""
    found = []
    if num_people < policy.min_training_people:
        found.append(Against("data", "min_training_people", str(num_people), str(policy.min_training_people)))
    fewest = max(policy.min_training_pictures, policy.min_batch_size)
    if num_pictures < fewest:
        found.append(Against("data", "min_training_pictures", str(num_pictures), str(fewest)))
    return found


def against_scores(policy: Policy, genuine: int, impostor: int) -> list[Against]:
    """Every limit that stands against a score of so many pairs."""
    return [
        Against(f"{kind} pairs", "min_pairs", str(number), f"{policy.min_pairs} or more")
        for kind, number in (("genuine", genuine), ("impostor", impostor))
        if number < policy.min_pairs
    ]


def against_share(policy: Policy, largest: "Share | None") -> list[Against]:
    """The limit that stands against an update of which one person has so large a share of a unit's gradient."""
    if largest is None or largest.share <= (allowed := largest.allowed(policy.max_person_share)):
        return []
    seen = f"{largest.share:.2f} of the gradient of unit {largest.unit} of backbone.{largest.layer} is one person's"
    return [Against("model", "max_person_share", seen, f"{allowed:.2f}")]


class TaskWords(NamedTuple):
    """What a task says beside its settings."""

    server_round: int
    best_round: int
    splits: str
    precision: str
    memory_format: str
    threads: int


def against_task(policy: Policy, settings: Settings, kind: str, asked: TaskWords) -> list[Against]:
    """Every limit that stands against a task of a run of these settings: rounds, splits, precision, threads."""
    rounds, found = settings.federation.rounds, []
    first = 1 if kind == "train" else 0
    for name, number, low in (("round", asked.server_round, first), ("best_round", asked.best_round, 0)):
        if not low <= number <= rounds:
            found.append(Against(name, "max_rounds", str(number), f"{low} to federation.rounds, {rounds}"))
    splits = asked.splits.split()
    if len(splits) != len(set(splits)):
        found.append(Against("splits", "max_extra_models", f"{len(splits)} splits", "each once"))
    if kind == "train" and settings.federation.evaluate_only:
        found.append(Against("federation.evaluate_only", "max_rounds", "a round of training", "none: scores alone"))
    if kind == "join":
        return found
    for name, word, words in (
        ("precision", asked.precision, PRECISIONS),
        ("memory_format", asked.memory_format, MEMORY_FORMATS),
    ):
        if word not in words:
            found.append(Against(name, "max_threads", repr(word)[:40], ", ".join(words)))
    if not 1 <= asked.threads <= policy.max_threads:
        found.append(Against("threads", "max_threads", str(asked.threads), f"1 to {policy.max_threads}"))
    return found


def require_none(against: Collection[Against]) -> None:
    """Raises PolicyRefusal for the first."""
    for first in against:
        raise PolicyRefusal(first)


# ---- the file


def digest_of(policy: Policy) -> str:
    """Sixteen hexadecimal digits, equal for policies of equal limits however their files are written."""
    text = json.dumps(dataclasses.asdict(policy), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(policy: Policy) -> dict[str, Any]:
    """The limits as JSON holds them, for `from_json`."""
    return dataclasses.asdict(policy)


def from_json(values: Mapping[str, Any]) -> Policy:
    """The inverse of `to_json`."""
    limits: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
    return Policy(**limits)


def read_policy(path: Path, base: Policy = DEFAULT) -> Policy:
    """The policy of a file; what it leaves out is as in `base`.  Raises ConfigError with all that is wrong."""
    try:
        raw = tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError([f"--policy {path}: {error.strerror}."]) from None
    except ValueError as error:
        raise ConfigError([f"--policy {path} is no TOML: {error}."]) from None
    hints, fields = typing.get_type_hints(Policy), {field.name: field for field in dataclasses.fields(Policy)}
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in fields:
            problems.append(f"{path}: {unknown_name('limit', name, fields)}")
        elif problem := _problem(name, value, hints[name], fields[name].metadata):
            problems.append(f"{path}: {problem}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else float(value) if hints[name] is float else value
    policy = dataclasses.replace(base, **values)
    problems = problems or [f"{path}: {problem}" for problem in _contradictions(policy)]
    if problems:
        raise ConfigError(problems)
    return policy


_WORDS: Final[Mapping[object, str]] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple[str, ...]: "a list of texts",
}  # fmt: skip


def _problem(name: str, value: object, kind: object, meta: Mapping[str, Any]) -> str | None:
    """What is wrong with one limit, or None."""
    if not _fits(value, kind):
        return f"{name} = {json.dumps(value, default=str)} has the wrong type; write {_WORDS[kind]}."
    if isinstance(value, str | list):
        for one in [value] if isinstance(value, str) else value:
            if meta["choices"] and one not in meta["choices"]:
                return unknown_name(name, one, meta["choices"])
        return None if value or name == "pretrained" else f"{name} is empty; leave the line out, or allow something."
    return config.range_problem(name, value, meta)


def _fits(value: object, kind: object) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return isinstance(value, int | float if kind is float else typing.cast("type", kind))


def _contradictions(policy: Policy) -> list[str]:
    """Limits that are fine alone but leave nothing together."""
    if policy.min_training_pictures < policy.min_training_people:
        return [
            f"min_training_pictures = {policy.min_training_pictures} is less than min_training_people ="
            f" {policy.min_training_people}, of whom each has a picture; raise it."
        ]
    if "head" not in policy.losses:
        return ['losses has no "head", which every training has; add it.']
    refused = {name: against_settings(dataclasses.replace(policy, **_OF_NO_FILE), run) for name, run in _shipped()}
    if refused and all(refused.values()):
        name, [first, *_] = next(iter(refused.items()))
        return [
            f"the policy refuses every configuration that FaceFed has, {name} because of {first.limit} ="
            f" {first.allowed} ({first.setting} is {first.asked}); allow one of them."
        ]
    return []


# Whoever requires these knows that no configuration of ours has them.
_OF_NO_FILE: Final[Mapping[str, Any]] = {"require_dp": False, "require_secagg": False}


def _shipped() -> Iterator[tuple[str, Settings]]:
    """The configurations that come with FaceFed, by name; none where they are not installed."""
    for path in config.shipped():
        with suppress(ConfigError):  # a search is none
            yield path.stem, config.load(path)


def require_room(policy: Policy, path: Path | None, *, num_people: int, num_pictures: int) -> None:
    """Raises UserError where the site's whole data are fewer than every run must have: no run could ever be joined."""
    where = f"{path}: " if path else "the built-in policy: "
    for name, allowed, held in (
        ("min_training_people", policy.min_training_people, num_people),
        ("min_training_pictures", policy.min_training_pictures, num_pictures),
        ("min_batch_size", policy.min_batch_size, num_pictures),
    ):
        if held < allowed:
            raise UserError(
                f"{where}{name} = {allowed} is more than the {held} that this site has in all, so no run could be"
                " joined; lower it in a policy of your own (--policy FILE), or add pictures."
            )


def rows(policy: Policy) -> Iterator[tuple[str, str, str, str]]:
    """(name, value, default, why) of every limit, as text."""
    for field in dataclasses.fields(Policy):
        values = (getattr(policy, field.name), field.default)
        shown = [json.dumps(list(value) if isinstance(value, tuple) else value) for value in values]
        yield field.name, shown[0], shown[1], field.metadata["why"]
