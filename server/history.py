"""What is known of each round's global model, and which round is the best so far."""

from dataclasses import dataclass, field

from common.evaluation import EvaluationSums
from server.scores import Tally, open_scores, round_metrics


@dataclass
class RoundRecord:
    """Round `step`: the figures of its training and of the model after it (round 0: the initial model)."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    totals: dict[str, EvaluationSums] = field(default_factory=dict)  # split -> all clients' sum
    sums: dict[str, dict[str, EvaluationSums]] = field(default_factory=dict)  # split -> client -> sums, of few clients
    scored: set[str] = field(default_factory=set)  # splits; of a run that goes on, most of their sums are not here


@dataclass
class History:
    """All rounds, and the choice among them: by pooled validation AUC, never by test."""

    rounds: dict[int, RoundRecord] = field(default_factory=dict)
    best_round: int = 0
    best_val_auc: float = float("-inf")

    def at(self, step: int) -> RoundRecord:
        """The record of a round, made when it is first asked for."""
        return self.rounds.setdefault(step, RoundRecord(step))

    def score(self, step: int, tally: Tally) -> dict[str, float]:
        """Keep the sums of the model of round `step`; returns its pooled metrics (round_val_auc, ...).

        An equal validation AUC leaves the earlier round the best. Round 0 is never the best: it is untrained. The best
        round's model may be scored again, by more clients; then that score is its own.
        """
        if tally.total is None:
            return {}
        record, split = self.at(step), tally.split
        record.sums[split], record.totals[split] = tally.by_client, tally.total
        record.scored.add(split)
        metrics = round_metrics(split, tally.total)
        record.metrics |= metrics
        val_auc = open_scores(tally.total).get("roc_auc", 0.0)
        if split == "val" and step > 0 and (val_auc > self.best_val_auc or step == self.best_round):
            self.best_round, self.best_val_auc = step, val_auc
        return metrics

    def validations_since_best(self) -> int:
        """How many models after the best one were scored on validation and were no better."""
        return sum("val" in record.scored for step, record in self.rounds.items() if step > self.best_round)

    def tested(self, step: int) -> bool:
        """Whether the model of that round was scored on the test split."""
        return "test" in self.at(step).scored

    def pooled_test(self, step: int) -> EvaluationSums:
        """The test sums of that round's model over all clients."""
        return self.at(step).totals["test"]

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
