"""What a person sees of a run that trains, the same from every program.

Its header, a line for each round or epoch, how far the present one is; at its end the table, what is to be warned of,
and where to look.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TextIO

from common.metrics.figures import AUC, CLOSED, FEW_PEOPLE, FOLDS, PAIRS, figures_of
from common.metrics.names import of_split
from common.privacy.people import words_of
from common.settings import Settings
from common.system.console import table
from common.system.events import EventReader
from common.system.live import Live, clock_text
from common.system.progress import EVERY_S, TRAINING, Amount, added, read_amounts
from common.system.runtime import facefed_version

LONGEST_LABEL: Final = 11  # of the header's rows
NEWEST_ROUNDS: Final = 3  # whose mean time says how long the rest takes


# -- the header --------------------------------------------------------------------------------------------------------


def header_lines(about: str, rows: Mapping[str, str]) -> list[str]:
    """The first lines: version and what this is, then a row for each thing that is known; empty ones are left out.

    about: "run 20261128-101500-1a2b3c".
    """
    return [f"FaceFed {facefed_version()}, {about}", *(header_row(label, text) for label, text in rows.items() if text)]


def header_row(label: str, text: str) -> str:
    """One row of the header: also for what becomes known later."""
    return f"  {label:<{LONGEST_LABEL}} {text}"


def model_words(settings: Settings, *, num_parameters: int, head: int = 0, travels: int = 0) -> str:
    """resnet18, width 0.5, 64 px: 2,834,112 parameters, and 20,480 of its cosface head.

    num_parameters: of the backbone.  head: of the head; 0: each client has its own.  travels: the numbers that a round
    sends to each client and back, statistics of normalisation among them; 0: nothing travels.
    """
    model = settings.model
    width = "" if model.width == 1.0 else f", width {model.width:g}"
    branches = "" if model.attention == "sa" else f", {model.attention}"
    weights = "" if model.pretrained == "none" else f", weights from {model.pretrained}"
    shared = f" ({travels:,} numbers shared)" if travels else ""
    own = f"{head:,} of its {model.head} head" if head else f"at each client its own {model.head} head"
    return (
        f"{model.backbone}{branches}{width}{weights}, {settings.data.image_size} px: {num_parameters:,}"
        f" parameters{shared}, and {own}"
    )


def compute_words(device: str, precision: str, threads: int) -> str:
    """cpu, bfloat16, 2 threads."""
    return f"{device}, {precision}, {threads} thread{'s' * (threads != 1)}"


def training_words(settings: Settings, *, federated: bool = False) -> str:
    """The strategy and the schedule."""
    training, federation = settings.training, settings.federation
    about = f"batches of {training.batch_size}, learning rate {training.lr:g}, seed {settings.run.seed}"
    if not federated:
        epochs = settings.local_training_epochs
        return f"{epochs} epoch{'s' * (epochs != 1)}, {about}"
    if federation.evaluate_only:
        return "nothing: everybody scores the model"
    unit, number = "epoch", federation.local_epochs
    if not isinstance(number, int):
        unit, number = "step", federation.local_steps
    return f"{federation.strategy}, {federation.rounds} rounds of {number} {unit}{'s' * (number != 1)}, {about}"


SECURE_SUMS: Final = "secure aggregation: the server gets the sum over the sites, and no site's own"


def begin_rows(settings: Settings, folder: Path, *, look: str, federated: bool = False) -> dict[str, str]:
    """The header's rows that every run has.  look: how its tracking is looked at."""
    return {
        "training": training_words(settings, federated=federated),
        "privacy": words_of(settings.privacy) if federated else "",
        "sums": SECURE_SUMS if federated and settings.secagg.enabled else "",
        "run folder": str(folder),
        "look at it": look,
    }


# -- a line for each round or epoch ------------------------------------------------------------------------------------


def scores_text(split: str, metrics: Mapping[str, float], *, before: float | None = None) -> str:
    """The figures of one split by the table: val AUC 0.702 (+0.013), EER 0.351, accuracy 0.105.

    metrics: by their names in the table.  before: the AUC that the change is from.
    """
    names = {row.name: row.told for row in figures_of(CLOSED, PAIRS, FOLDS) if row.told}
    parts = []
    for key, label in names.items():
        if key in metrics:
            change = f" ({round(metrics[key] - before, 3) + 0.0:+.3f})" if key == AUC and before is not None else ""
            parts.append(f"{label} {metrics[key]:.3f}{change}")
    return f"{split} " + ", ".join(parts) if parts else ""


BEST_MARK: Final = " * best so far"


def best_mark(validation: Mapping[str, float]) -> str:
    """The mark of the best round; it names the median of the sites' AUC, which chose it, where another AUC is shown."""
    median = validation.get(f"{AUC}_median")
    if median is None or round(median, 3) == round(validation.get(AUC, median), 3):
        return BEST_MARK
    return f"{BEST_MARK} by the sites' median AUC, {median:.3f}"


@dataclass
class RoundLines:
    """Makes one line of a round from what is told of it at several times: its training, then its model's scores."""

    _trained: dict[int, str] = field(default_factory=dict)  # round -> how its line begins
    _scores: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)  # round -> split -> its figures
    _former_auc: float | None = None  # of the round before

    def trained(self, event: Mapping[str, Any]) -> None:
        """A round is whole; its line comes with its scores."""
        loss = event.get("train_loss")  # stays at the clients where the run has differential privacy
        told = "" if loss is None else f" train loss {loss:.3f},"
        self._trained[event["round"]] = (
            f"round {event['round']} of {event['rounds']}: {event['clients']} clients,{told} {event['seconds']:.1f} s"
        )

    def scored(self, event: Mapping[str, Any]) -> str:
        """The line, where this was the last of the model's scores; else empty."""
        step, split = event["round"], event["split"]
        opening = of_split(split, "")
        figures = {key.removeprefix(opening): value for key, value in event.items() if key.startswith(opening)}
        self._scores.setdefault(step, {})[split] = figures
        if not event.get("is_last", False):
            return ""
        found, auc = self._scores.pop(step), None
        mark = best_mark(found.get("val", {})) if step > 0 and step == event.get("best_round") else ""
        texts = []
        for split, figures in found.items():
            before = self._former_auc if split == "val" else None
            shown = figures if split != "test" else {key: figures[key] for key in (AUC,) if key in figures}
            texts.append(scores_text(split, shown, before=before))
            auc = figures.get(AUC) if split == "val" else auc
        scores = "; ".join(text for text in texts if text)
        self._former_auc = auc if auc is not None else self._former_auc
        first = "the model" if event.get("evaluated") else "the untrained model"  # a run that only scores trains none
        again = first if step == 0 else f"model of round {step}"
        begun = self._trained.pop(step, "")
        if not scores:
            return begun
        return f"{begun}; {scores}{mark}" if begun else f"{again}: {scores}{mark}"

    def left(self) -> list[str]:
        """The lines of rounds whose model nobody has scored, when the run ends."""
        lines = [self._trained[step] for step in sorted(self._trained)]
        self._trained.clear()
        return lines


def event_line(event: Mapping[str, Any]) -> str:
    """One event of a run as a plain line; empty for what a person need not read, or reads in the line of a round."""
    kind = event["kind"]
    if kind == "starting":
        processes = f"{event['actors']} process{'es' * (event['actors'] != 1)}"
        return f"starting {processes} that train for the clients"
    if kind == "begun":
        return header_row("model", event["model"])
    if kind == "members":
        return header_row("device", event["compute"]) if event.get("compute") else ""
    if kind in ("joined", "gathered", "waiting"):
        return _gathering_line(event)
    if kind == "refused":
        where = f" in round {event['round']}" if "round" in event else ""
        who = f"{event['client']}: " if event["client"] else ""
        return f"left out{where}: {who}{event['reason']}"
    if kind == "resumed":
        return f"going on after round {event['round']}"
    if kind == "saving":
        return "registering the model"
    return str(event.get("line", "")) if kind in ("warning", "stopped_early") else ""


def _gathering_line(event: Mapping[str, Any]) -> str:
    """Who is here, and who is not yet."""
    wanted = event["wanted"]
    if event["kind"] == "gathered":
        return f"joined: {event['clients']:,} clients are here ({wanted:,} needed)"
    num_here = len(event["here"])
    if event["kind"] == "joined":
        held = f"{event['people']:,} people, {event['pictures']:,} training pictures, {event['device']}"
        of_wanted = f" of {wanted}" if num_here <= wanted else ""  # more may come than are needed
        return f"joined: {event['client']} ({held}); {num_here}{of_wanted} clients are here"
    missing = wanted - num_here
    if event.get("simulated"):  # nobody can come who is not there
        return f"preparing: {missing} of {wanted} clients open their pictures ({event['seconds']} s)"
    here = ", ".join(event["here"]) or "nobody yet"
    at_work = "".join(f"; {name}: {words}" for name, words in event.get("at_work", {}).items())
    return f"waiting for clients: {here} here, {missing} more needed ({event['seconds']} s){at_work}"


@dataclass
class _Round:
    """The round, or the evaluation, that is under way."""

    number: int
    kind: str  # "train" | "evaluate"
    clients: int
    pictures: int  # that its clients train on, each as often as there are epochs
    began: float
    answered: int = 0
    done: int = 0  # pictures of those who have answered
    told: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # client -> what it said last of how far it is

    @property
    def words(self) -> str:
        """How far those are who said so: "; celeba: training 31 %, 5 min left"."""
        return "".join(f"; {name}: {one['words']}" for name, one in sorted(self.told.items()))


class RunView:
    """Shows a run's events, and between them how far the round is."""

    def __init__(
        self,
        stream: TextIO,
        *,
        at_work: Callable[[], Iterable[Amount]] = list,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """stream: usually sys.stdout.  at_work: how far those are who train now, where this machine knows it."""
        self._live, self._clock, self._at_work = Live(stream, clock=clock), clock, at_work
        self._lines = RoundLines()
        self._rounds = 0
        self._round: _Round | None = None
        self._seconds: list[float] = []  # of the newest rounds

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for line in self._lines.left():
            self._live.say(line)
        self._live.__exit__(*error)

    def say(self, line: str) -> None:
        """A line that stays."""
        self._live.say(line)

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        kind = event["kind"]
        line = event_line(event)
        if kind == "members":
            self._rounds = event["rounds"]
        elif kind == "asked":
            self._round = _Round(event["round"], event["task"], event["clients"], event["pictures"], self._clock())
        elif kind == "answered" and self._round is not None:
            self._round.answered, self._round.done = event["answered"], event["pictures"]
            self._round.told.pop(event.get("client", ""), None)
            if self._round.answered >= self._round.clients:
                self._round = None
                self._live.rest()
        elif kind == "progress" and self._round is not None:
            self._round.told[event["client"]] = event
        elif kind == "round":
            self._lines.trained(event)
            self._seconds = [*self._seconds, event["seconds"]][-NEWEST_ROUNDS:]
        elif kind == "scored":
            line = self._lines.scored(event)
        elif kind in ("finished", "failed", "saving"):
            self._round = None
            self._live.rest()
        if line:
            self._live.say(line)

    def tick(self) -> None:
        """Move what moves."""
        now = self._round
        if now is None:
            return
        seconds = self._clock() - now.began
        if now.kind != "train":
            more = f"{now.answered} of {now.clients} clients have answered"
            words = f"{more}, {clock_text(seconds)}{now.words}"
            self._live.tell(f"scoring round {now.number}", now.answered, now.clients, words)
            return
        label = f"round {now.number}/{self._rounds}" if self._rounds else f"round {now.number}"
        working = [one for one in self._at_work() if one.server_round == now.number and one.work == TRAINING]
        done = now.done + sum(one["pictures"] for one in now.told.values() if one["work"] == TRAINING)
        if working or done:
            whole = added(working, done=done, total=now.pictures, seconds=seconds)
            self._live.move(label, whole, self._rest_of_run(now, whole.seconds_left) + now.words)
            return
        words = f"{now.answered} of {now.clients} clients have answered, {clock_text(seconds)}"
        if self._seconds:
            usual = sum(self._seconds) / len(self._seconds)
            words += f" of about {clock_text(usual)}" + self._rest_of_run(now, max(0.0, usual - seconds))
        self._live.tell(label, now.answered, now.clients, words + now.words)

    def _rest_of_run(self, now: _Round, left: float | None) -> str:
        to_come = self._rounds - now.number
        if left is None or not self._seconds or to_come < 1:
            return ""
        return f" (whole run {clock_text(left + to_come * sum(self._seconds) / len(self._seconds))})"


class Follower:
    """Shows the events of a run's folder from a thread, until it is closed."""

    def __init__(self, reader: EventReader, view: RunView) -> None:
        """reader: of the run's folder.  view: entered by the caller."""
        self._reader, self._view = reader, view
        self._closing = threading.Event()
        self.summary: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _follow(self) -> None:
        ticked = time.monotonic()
        while not self._closing.wait(0.2):
            self._look()
            if time.monotonic() - ticked >= EVERY_S:
                ticked = time.monotonic()
                self._view.tick()
        self._look()

    def _look(self) -> None:
        for event in self._reader.new_events():
            if event["kind"] == "finished":
                self.summary = event
            self._view.show(event)


def amounts_of(folder: Path, run_id: str) -> Callable[[], list[Amount]]:
    """How far the processes are that tell into a folder, for that run."""
    return lambda: [amount for amount in read_amounts(folder) if amount.run == run_id]


# -- the end -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What a run has come to."""

    label: str  # of the model: "federated", "local", "centralised"
    when: str  # "best round 3 of 10"
    untrained: Mapping[str, float]  # test figures
    trained: Mapping[str, float]  # of the best model, over all clients
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # of each, where there are several
    below_untrained: str = ""
    few_people: Mapping[str, int] = field(default_factory=dict)
    registered: Sequence[str] = ()
    notes: Sequence[str] = ()  # further lines


_COLUMNS: Final = {"test AUC": AUC, "EER": "eer", "TAR@FAR 1e-2": "tar_at_far_1e-2", "accuracy": "accuracy"}

_WHERE_SCORES_ARE: Final = (
    "each site's own record has its own,\n"
    "  and verification.public_dir has the server score the model on pictures that are public"
)


def ending_lines(ending: Ending, folder: Path | str, *, tracking: str) -> list[str]:
    """The table with the untrained model as its first row, what is to be warned of, and where to look.

    tracking: where the run was tracked, and how to look at it.
    """
    lines = [""]
    if AUC in ending.untrained and AUC in ending.trained:
        before, after = ending.untrained, ending.trained
        eer = f" (EER {before['eer']:.3f} -> {after['eer']:.3f})" if "eer" in before and "eer" in after else ""
        lines.append(
            f"test AUC on people never seen: untrained {before[AUC]:.3f} -> {ending.label} {after[AUC]:.3f}{eer},"
            f" {ending.when}"
        )
    if _has_figures(ending):
        lines += ["", _table(ending)]
    elif ending.clients:  # of a federation in which no scores leave
        lines.append(
            f"no test figures: no scores came from the sites ({', '.join(ending.clients)}); {_WHERE_SCORES_ARE}"
        )
    else:
        lines.append(ending.when)
    lines += [f"warning: {line}" for line in warnings_of(ending)]
    lines += ["", *ending.notes]
    lines += [f"registered: {name}" for name in ending.registered]
    lines.append(f"run folder: {folder} (config.toml, metrics.json, plots/, checkpoints/)")
    lines.append(f"tracking: {tracking}")
    return lines


def _has_figures(ending: Ending) -> bool:
    columns = set(_COLUMNS.values())
    return any(columns & set(figures) for figures in (ending.untrained, ending.trained, *ending.clients.values()))


def _table(ending: Ending) -> str:
    rows = [["model", *_COLUMNS], ["untrained", *_cells(ending.untrained)], [ending.label, *_cells(ending.trained)]]
    rows = [row for row in rows if ending.untrained or row[0] != "untrained"]
    if len(ending.clients) > 1:
        rows += [[f"  at {name}", *_cells(figures)] for name, figures in ending.clients.items()]
    return table(rows)


def _cells(figures: Mapping[str, float]) -> list[str]:
    return [f"{figures[name]:.3f}" if name in figures else "-" for name in _COLUMNS.values()]


def warnings_of(ending: Ending) -> list[str]:
    """What is to be known of the figures before anybody uses the model."""
    lines = []
    if ending.below_untrained:
        lines.append(
            f"{ending.below_untrained};\n  it does not become champion. More rounds or epochs, a lower learning rate or"
            " more people may help."
        )
    if ending.few_people:
        counted = ", ".join(f"{number} at {name}" for name, number in ending.few_people.items())
        lines.append(
            f"fewer than {FEW_PEOPLE} people are behind test figures ({counted});\n"
            "  other people would give quite other figures."
        )
    return lines


def federation_ending(summary: Mapping[str, Any]) -> Ending:
    """A federation's end, from its summary, which is the event "finished"."""
    notes = [f"model SHA-256 {summary['model_sha256']}"]
    if groups := summary.get("groups"):
        from common.metrics.groups import ByGroup
        from common.system.group_table import group_lines

        notes += group_lines([ByGroup.from_json(one) for one in groups["models"]], groups["least_people"])
    is_trained = not summary.get("evaluated")
    if summary.get("stopped_early"):
        notes.insert(0, f"stopped early after round {summary['rounds']} (training.patience)")
    if summary.get("refused_replies"):
        notes.append(f"replies left out: {summary['refused_replies']} (see metrics.json in the run folder)")
    clients = {
        name: {key.removeprefix("test_"): value for key, value in figures.items()}
        for name, figures in summary.get("clients", {}).items()
    }
    return Ending(
        label="federated" if is_trained else "all sites",
        when=f"best round {summary['best_round']} of {summary['rounds']}" if is_trained else "nothing was trained",
        untrained=summary.get("untrained", {}),
        trained=summary.get("best", {}),
        clients=clients,
        below_untrained=summary.get("below_untrained", ""),
        few_people=summary.get("few_people", {}),
        registered=summary.get("registered", []),
        notes=notes,
    )
