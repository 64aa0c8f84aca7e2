"""What is known of each round's global model, which round is the best so far, and what a checkpoint keeps of it.

All clients' sums are merged, then turned into ratios, never the other way round; but for the choice of the best round,
which takes the median over the clients: of merged pairs one client could invent more than all others have. A checkpoint
holds every figure as JSON, and the sums that the run's end still needs: those of the untrained and of the best model, a
file for each, written when they change.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import CheckpointError
from common.metrics.figures import AUC, known_scores, recorded
from common.metrics.groups import ByGroup, GroupPairs
from common.metrics.names import ROUND_SECONDS, decile, of_split, present
from common.metrics.sums import CLOSED_FIELDS, COUNTS, WHOLE_NUMBERS, EvaluationSums
from common.metrics.thresholds import thresholds_from
from common.protocol.wire import Reply
from common.system.checkpoints import read_sealed, write_sealed
from server.exchange.roster import MOST_TOLD_APART

BY_CLIENT_AUC = of_split("val", f"{AUC}_median")  # over the clients that have one; it chooses the best round
CHANGE_NORMS = ("change_norm", "change_norm_statistics")  # of a client's change: of parameters, of running statistics
STANDS_OUT = 3.0  # times the median of the others' norms; honest ones differ by less, see docs/SECURITY.md
NEWEST: Final = 5  # rounds by whose time that of the others is guessed
_ALL = ""  # the name under which the sums of all clients stand; no client has it


def round_metrics(split: str, sums: EvaluationSums) -> dict[str, float]:
    """The figures of all clients together after a round, by the tracking's names: val_roc_auc, round_test_roc_auc..."""
    scores = known_scores(sums)
    return {of_split(split, name): scores[name] for name, _ in recorded() if name in scores}


def client_metrics(split: str, sums: EvaluationSums) -> dict[str, float]:
    """One client's figures after a round, all there are: val_accuracy, val_f1, ..., round_test_tar_at_far_1e-3."""
    return {of_split(split, name): value for name, value in known_scores(sums).items()}


def final_metrics(sums: EvaluationSums) -> dict[str, float]:
    """The chosen model's figures on test: test_accuracy, test_precision, ..., test_roc_auc, test_tar_at_far_1e-3."""
    return {f"test_{name}": value for name, value in known_scores(sums).items()}


def merged_train(replies: Mapping[str, Reply]) -> dict[str, float]:
    """The clients' training sums, added."""
    total: dict[str, float] = {}
    for reply in replies.values():
        for name, value in reply.train.items():
            total[name] = total.get(name, 0.0) + value
    return total


@dataclass
class Tally:
    """One split's sums of a model as the replies come in: pooled, and by client while these are few."""

    split: str
    total: EvaluationSums | None = None  # None: nobody yet
    by_client: dict[str, EvaluationSums] = field(default_factory=dict)  # empty for more than MOST_TOLD_APART
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # client -> `client_metrics`, of all

    def aucs(self) -> list[float]:
        """Each client's AUC, of those that have genuine and impostor pairs."""
        name = of_split(self.split, AUC)
        return [own[name] for own in self.metrics.values() if name in own]

    def add(self, replies: Mapping[str, Reply]) -> None:
        """Add the sums of other clients, which are half a megabyte each."""
        for name, reply in replies.items():
            sums = reply.evaluations[self.split]
            self.total = sums if self.total is None else self.total + sums
            self.metrics[name] = client_metrics(self.split, sums)
            if len(self.metrics) <= MOST_TOLD_APART:
                self.by_client[name] = sums
            else:
                self.by_client.clear()


def quantiles(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of each figure the deciles 1, 5 and 9 over the clients that have it: {"deciles/train_loss_p50": 1.2, ...}."""
    values: dict[str, list[float]] = {}
    for own in metrics.values():
        for name, value in own.items():
            values.setdefault(name, []).append(value)
    return {
        decile(name, percent): float(np.percentile(numbers, percent))
        for name, numbers in values.items()
        for percent in (10, 50, 90)
    }


def named_norms(parameters: float, statistics: float) -> dict[str, float]:
    """The norms of a client's change by the names of its figures; nothing of statistics that are not shared."""
    return dict(zip(CHANGE_NORMS, (parameters, statistics) if statistics else (parameters,), strict=False))


def longest_first(clients: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """Of each client that has a change its norms as text, the longest first.  clients: of a `RoundRecord`."""
    found = {name: [own[norm] for norm in CHANGE_NORMS if norm in own] for name, own in clients.items()}
    order = sorted((name for name in found if found[name]), key=lambda name: found[name], reverse=True)
    return {name: [f"{norm:.4g}" for norm in found[name]] for name in order}


def standing_out(clients: Mapping[str, Mapping[str, float]]) -> str | None:
    """The client whose change was longest beside the others', if it was STANDS_OUT times their median or more.

    Of parameters or of running statistics, whichever stands out more.  clients: of a `RoundRecord`.
    """
    most, odd = STANDS_OUT, None
    for norm in CHANGE_NORMS:
        lengths = {name: own[norm] for name, own in clients.items() if norm in own}
        if len(lengths) < 2:
            continue
        name = max(lengths, key=lambda client: lengths[client])
        usual = float(np.median([length for other, length in lengths.items() if other != name]))
        ratio = lengths[name] / usual if usual > 0.0 else float("inf") if lengths[name] > 0.0 else 0.0
        if ratio >= most:
            most, odd = ratio, name
    return odd


class Progress(TypedDict):
    """What a task tells a site of the run, by the fields of `Task`."""

    scored_round: int
    val_auc: float
    seconds_left: float


def progress_of(history: "History", step: int, num_rounds: int) -> Progress:
    """How good the newest model is that was scored, and how long the rounds from `step` on may take."""
    records, name = history.rounds, of_split("val", AUC)
    scored = max((number for number, record in records.items() if name in record.metrics), default=-1)
    timed = [number for number in sorted(records) if ROUND_SECONDS in records[number].metrics][-NEWEST:]
    seconds = [records[number].metrics[ROUND_SECONDS] for number in timed]
    to_come = max(0, num_rounds - step + 1)
    return Progress(
        scored_round=scored,
        val_auc=records[scored].metrics[name] if scored >= 0 else -1.0,
        seconds_left=to_come * sum(seconds) / len(seconds) if seconds else -1.0,
    )


@dataclass
class RoundRecord:
    """Round `step`: the figures of its training and of the model after it (round 0: the initial model)."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    totals: dict[str, EvaluationSums] = field(default_factory=dict)  # split -> all clients' sum
    sums: dict[str, dict[str, EvaluationSums]] = field(default_factory=dict)  # split -> client -> sums, of few clients
    groups: dict[str, GroupPairs] = field(default_factory=dict)  # of test people, of all clients, where asked for
    scored: set[str] = field(default_factory=set)  # splits; of a run that goes on, most of their sums are not here


@dataclass
class History:
    """All rounds, and the choice among them: by the median of the clients' validation AUC, never by test."""

    rounds: dict[int, RoundRecord] = field(default_factory=dict)
    best_round: int = 0
    best_val_auc: float = float("-inf")  # pooled, of the best round

    def at(self, step: int) -> RoundRecord:
        """The record of a round, made when it is first asked for."""
        return self.rounds.setdefault(step, RoundRecord(step))

    def score(self, step: int, tally: Tally) -> dict[str, float]:
        """Keep the sums of the model of round `step`; returns its metrics (val_roc_auc, ...), pooled but for one.

        An equal median of the clients' validation AUC leaves the earlier round the best; where no client's leaves, the
        last round is it. Round 0 is never the best: it is untrained. The best round's model may be scored again, by
        more clients; then that score is its own.
        """
        if tally.total is None:
            return {}
        record, split = self.at(step), tally.split
        record.sums[split], record.totals[split] = tally.by_client, tally.total
        record.scored.add(split)
        metrics = round_metrics(split, tally.total)
        aucs = tally.aucs()
        if split == "val" and aucs:
            metrics[BY_CLIENT_AUC] = float(np.median(aucs))
        chosen = metrics.get(BY_CLIENT_AUC, 0.0)
        if split == "val" and not tally.metrics:  # with secure aggregation nobody's own is known
            chosen = metrics.get(of_split("val", AUC), 0.0)
        better = chosen > self._best_by_client()
        if BY_CLIENT_AUC not in metrics and self._is_unscored(self.best_round):
            better = step > self.best_round
        record.metrics |= metrics
        if split == "val" and step > 0 and (better or step == self.best_round):
            self.best_round, self.best_val_auc = step, known_scores(tally.total).get(AUC, 0.0)
        return metrics

    def _is_unscored(self, step: int) -> bool:
        """Whether no client's validation AUC is known of that round's model: there is nothing to choose by."""
        return BY_CLIENT_AUC not in self.at(step).metrics and of_split("val", AUC) not in self.at(step).metrics

    def _best_by_client(self) -> float:
        """What chose the best round."""
        if self.best_round == 0:
            return float("-inf")
        metrics = self.at(self.best_round).metrics
        return metrics.get(
            BY_CLIENT_AUC, metrics.get(of_split("val", AUC), 0.0)
        )  # of a run begun before there were medians

    def median_of_clients(self, step: int, name: str) -> float | None:
        """The median of a figure of that round's model over the clients that have it; one client does not move it far.

        None: nobody has it.
        """
        values = [own[name] for own in self.at(step).clients.values() if name in own]
        return float(np.median(values)) if values else None

    def forget_after(self, step: int) -> None:
        """Drop what is known of later rounds, none of which is the best: they are repeated."""
        for later in [number for number in self.rounds if number > step]:
            del self.rounds[later]

    def validations_since_best(self) -> int:
        """How many models after the best one were scored on validation and were no better."""
        return sum("val" in record.scored for step, record in self.rounds.items() if step > self.best_round)

    def tested(self, step: int) -> bool:
        """Whether the model of that round was scored on the test split."""
        return "test" in self.at(step).scored

    def pooled_test(self, step: int) -> EvaluationSums:
        """The test sums of that round's model over all clients."""
        return self.at(step).totals["test"]

    def validation_pairs(self, step: int) -> list[NDArray[np.int64]]:
        """The pairs [2, NUM_BINS] of that round's model on validation people: of each client, or of many all together.

        Empty where they are not known, as of most rounds before a run was gone on with.
        """
        record = self.at(step)
        if record.sums.get("val"):
            return [sums.pairs for sums in record.sums["val"].values()]
        return [record.totals["val"].pairs] if "val" in record.totals else []

    def tested_sums(self, step: int) -> dict[str, EvaluationSums]:
        """The test sums of that round's model by client, or of many all together; empty where they are not known."""
        record = self.at(step)
        return record.sums.get("test") or ({"all": record.totals["test"]} if "test" in record.totals else {})

    def by_group(self, step: int, model: str, least_people: int) -> ByGroup | None:
        """The errors of that round's model by group at the threshold of its validation people; None: nobody asked."""
        groups, validation = self.at(step).groups, self.validation_pairs(step)
        if not groups:
            return None
        is_known = bool(validation) and bool(np.sum(np.stack(validation), axis=0).any(axis=1).all())
        threshold = thresholds_from(validation).usual if is_known else None
        return ByGroup.at(model, threshold, [groups], least_people)

    def rows(self) -> list[dict[str, float]]:
        """One flat row for each round in order, with its "step"."""
        return [{"step": float(step), **self.rounds[step].metrics} for step in sorted(self.rounds)]

    def client_rows(self) -> dict[str, list[dict[str, float]]]:
        """For each client, one row for each round in which it has a figure."""
        names = sorted({name for record in self.rounds.values() for name in record.clients})
        return {
            name: [
                {"step": float(step), **self.rounds[step].clients[name]}
                for step in sorted(self.rounds)
                if name in self.rounds[step].clients
            ]
            for name in names
        }


def history_to_json(history: History) -> dict[str, Any]:
    """Everything but the sums."""
    return {
        "best_round": history.best_round,
        "best_val_auc": history.best_val_auc if history.best_round else None,
        "rounds": history.rows(),
        "scored": {str(step): sorted(record.scored) for step, record in sorted(history.rounds.items())},
        "clients": {str(step): record.clients for step, record in sorted(history.rounds.items()) if record.clients},
    }


def history_from_json(values: Mapping[str, Any]) -> History:
    """The inverse of `history_to_json`.  Raises CheckpointError."""
    try:
        history = History(best_round=int(values["best_round"]))
        if history.best_round:
            history.best_val_auc = float(values["best_val_auc"])
        for row in values["rounds"]:
            step = int(row["step"])
            metrics = present({name: float(value) for name, value in row.items() if name != "step"})
            history.rounds[step] = RoundRecord(
                step=step,
                metrics=metrics,
                clients={
                    client: present({name: float(value) for name, value in own.items()}, of_client_row=True)
                    for client, own in values["clients"].get(str(step), {}).items()
                },
                scored=set(values["scored"].get(str(step), [])),
            )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the checkpoint's state.json is not one of ours ({error!r}).") from None
    return history


def scores_path(folder: Path, step: int) -> Path:
    """The file of the sums of the model of that round."""
    return folder / f"scores-{step:06d}.safetensors"


def write_scores(path: Path, record: RoundRecord) -> None:
    """Write a model's sums: of all clients, and of each while they are kept."""
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, str] = {}
    for split, total in record.totals.items():
        for client, sums in {_ALL: total, **record.sums.get(split, {})}.items():
            name = f"{split}/{client}"
            notes[name] = " ".join(repr(value) for value in sums.numbers().values())
            # Copies: of one client, its sums are also all sums.
            tensors |= {f"{name}/{part}": torch.tensor(counts) for part, counts in sums.arrays().items()}
    write_sealed(path, tensors, notes)


def read_scores(path: Path, record: RoundRecord) -> None:
    """Put a file's sums into the record.  Raises CheckpointError."""
    tensors, notes = read_sealed(path)
    try:
        for name, text in notes.items():
            split, _, client = name.partition("/")
            numbers = dict(zip(CLOSED_FIELDS, map(float, text.split()), strict=True))
            sums = EvaluationSums.from_parts(
                {key: int(value) if key in WHOLE_NUMBERS else value for key, value in numbers.items()},
                {part: tensors[f"{name}/{part}"].numpy() for part in COUNTS if f"{name}/{part}" in tensors},
            )
            if client == _ALL:
                record.totals[split] = sums
            else:
                record.sums.setdefault(split, {})[client] = sums
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a file of ours ({error!r}).") from None
