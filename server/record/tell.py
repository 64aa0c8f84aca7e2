"""The record of a federation as it happens: events for whoever watches, metrics and pictures for the tracking."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from common.metrics.design import PAIRS_PER_CPU_S, auc_half_width
from common.metrics.figures import (
    AUC,
    FEW_PEOPLE,
    known_scores,
    known_threshold,
    own_seconds,
    people_behind,
    train_metrics,
)
from common.metrics.intervals import FROM_SUMS, intervals_from_sums
from common.metrics.names import BYTES_DOWN, BYTES_UP, ROUND_SECONDS, WORK_SECONDS, of_client, of_split, seconds_of
from common.metrics.sums import EvaluationSums
from common.plots import curves
from common.plots.comparison import client_comparison
from common.plots.people import confusion
from common.protocol.beats import Beat
from common.protocol.codec import is_lossy
from common.protocol.refusals import refused_setting
from common.protocol.wire import Reply, Site, Task
from common.results import draw_scores, margin_words, worse_than_untrained
from common.runs import federated_kind, write_run_file
from common.settings import Settings
from common.system.events import EventLog
from common.system.group_table import GROUPS_FILE, group_content, group_metrics
from common.system.run_view import compute_words
from common.tracking.hardware import gpu_type
from common.tracking.notes import chosen_note, data_note, run_note
from common.tracking.run import SavesFigure, TrackedRun
from common.training.autotune import threads_for
from server.exchange.clock import TimeBudget
from server.exchange.roster import MOST_TOLD_APART, Member
from server.record.history import History, Tally, final_metrics, merged_train, quantiles


def _data_tags(sites: Sequence[Site], *, are_here: bool) -> dict[str, str]:
    """are_here: they compute on this machine, whose GPU is known; a site tells its kind of device only."""
    datasets = [site.dataset for site in sites]
    return {
        "dataset": "+".join(datasets if len(sites) <= MOST_TOLD_APART else sorted(set(datasets))),
        "dataset_size": str(sum(site.num_pictures for site in sites)),
        "device": "+".join(sorted({site.device for site in sites})),
        "gpu_type": "+".join(sorted({_gpu_type(site, is_here=are_here) for site in sites})),
    }


def _gpu_type(site: Site, *, is_here: bool) -> str:
    return "unknown" if site.device == "cuda" and not is_here else gpu_type(site.device)


TELL_ANSWERS = 50  # times a round at most
LONGEST_TAG = 1000  # characters: two reasons, each of which may be cut and end in the hash of the whole
DRAWING_FRACTION = 0.05  # of the run's time, for curves that are drawn anew while it runs


class Record:
    """One call for each thing that happens; hides which run, event, picture and file each of them is told by.

    So whoever federates knows no tracking, and few clients or many make no difference to it.
    """

    def __init__(
        self, tracked: TrackedRun, events: EventLog, settings: Settings, *, clients_are_here: bool = False
    ) -> None:
        """tracked: the run, begun.  events: where whoever watches reads.

        clients_are_here: they are processes of this machine for sure; what they tell of theirs is keyed by each site.
        """
        self._clients_are_here = clients_are_here
        self._tracked, self._events, self._settings = tracked, events, settings
        self._children: dict[str, TrackedRun] = {}
        self._sites: dict[str, Site] = {}
        self._num_pictures = self._num_steps = self._num_warmup_pictures = 0.0
        self._refusals: dict[int, dict[str, str]] = {}
        self._num_refused = 0
        self._by_policy: dict[str, Counter[str]] = {}  # client -> setting that its own policy refused -> how often
        self._refused_so_far: dict[int, int] = {}  # by round, where some were and it is not told yet
        self._are_many = False  # more clients than are told apart
        self._budget = TimeBudget(DRAWING_FRACTION)
        self._limited: dict[str, str] = {}  # client -> what it says and what it counts for
        self._asked: dict[str, int] = {}  # client -> pictures that it trains on, of those whose answers are awaited
        self._answered = self._told_answered = self._answered_pictures = 0
        self._heard: dict[str, tuple[str, int]] = {}  # client -> at what it is, and at how much of it in percent
        self._went_back: list[str] = []  # for each time that a round's model was of no use, what was done
        self._restored = History()  # of a run that goes on

    def counts(self) -> dict[str, float]:
        """What was counted so far, for the checkpoint."""
        return {
            "num_pictures": self._num_pictures,
            "num_steps": self._num_steps,
            "num_warmup_pictures": self._num_warmup_pictures,
            "num_refused": float(self._num_refused),
        }

    def go_on(self, history: History, counts: Mapping[str, float]) -> None:
        """Continue where a checkpoint stands.  All that was saved is told again; the run skips what it was told."""
        self._count_on_from(counts)
        self._num_refused = int(counts["num_refused"])
        self._restored = history
        for step, record in sorted(history.rounds.items()):
            self._tracked.log_metrics(record.metrics, step=step)

    def _count_on_from(self, counts: Mapping[str, float]) -> None:
        self._num_pictures, self._num_steps = counts["num_pictures"], counts["num_steps"]
        self._num_warmup_pictures = counts["num_warmup_pictures"]

    def members(self, members: Mapping[str, Member]) -> None:
        """Begin a nested run for each client that is new, while they are few; of many, say once that there are none."""
        new = [name for name in members if name not in (self._sites if self._are_many else self._children)]
        if not new:
            return
        self._sites = {name: member.site for name, member in members.items()}
        sites = list(self._sites.values())
        tags = _data_tags(sites, are_here=self._clients_are_here)
        self._tracked.set_tags(tags)
        self._tracked.describe(data=data_note(tags["dataset"], tags["dataset_size"], len(sites)))
        self._events.emit(
            "members",
            clients=len(members),
            rounds=self._settings.federation.rounds,
            compute=self._compute_words(sites) if not self._children else "",
        )
        write_run_file(self._tracked.folder, self._settings, federated_kind(self._settings), list(self._sites))
        if len(members) <= MOST_TOLD_APART:
            for name in new:
                self._begin_child(name, members[name].site)
                self._tell_pairs(name, members[name].site)
        elif not self._are_many:
            self._are_many = True
            line = (
                f"{len(members)} clients are more than {MOST_TOLD_APART}: the record has pooled figures and quantiles"
                " over the clients, and no run and curves for each of them"
            )
            self._events.emit("warning", line=line)

    def _compute_words(self, sites: Sequence[Site]) -> str:
        """How the clients compute, each way once; those of one machine and device do it as the first of them."""
        on_machine = Counter(site.machine for site in sites)
        precision: dict[tuple[str, str], str] = {}
        ways = []
        for site in sites:
            usual = precision.setdefault((site.machine, site.device), site.precision)
            threads = threads_for(self._settings, on_machine[site.machine], site.cores)
            ways.append(compute_words(site.device, usual, threads))
        counted = Counter(ways)
        if len(counted) == 1:
            return f"{ways[0]} for each client"
        return "; ".join(f"{way} for {number} client{'s' * (number != 1)}" for way, number in counted.items())

    def _begin_child(self, name: str, site: Site) -> None:
        counted = {
            "num_people": site.num_people,
            "num_pictures": site.num_pictures,
            "num_training_people": site.num_training_people,
            "num_training_pictures": site.num_training_pictures,
        }
        # The digest covers every picture of the set.
        self._tracked.log_dataset(name=name, digest=site.val_people, context="training", profile=counted)
        num_there = sum(other.machine == site.machine for other in self._sites.values())
        child = self._tracked.child(
            name, {"mode": "federated_client"} | _data_tags([site], are_here=self._clients_are_here)
        )
        backbone, size = self._settings.model.backbone, self._settings.data.image_size
        child.describe(
            what=run_note("federated_client", backbone, size), data=data_note(site.dataset, site.num_pictures)
        )
        child.log_params(
            {
                "client": name,
                "dataset": site.dataset,
                "num_training_people": site.num_training_people,
                "num_training_pictures": site.num_training_pictures,
                "num_pictures": site.num_pictures,
                "num_quarantined": site.num_quarantined,
                "precision": site.precision,
                "memory_format": site.memory_format,
                "compiled": site.compiled,
                "threads": threads_for(self._settings, num_there, site.cores),
            }
        )
        self._children[name] = child
        for step, record in sorted(self._restored.rounds.items()):
            child.log_metrics(record.clients.get(name, {}), step=step)

    def _log_of_clients(self, metrics: Mapping[str, Mapping[str, float]], step: int) -> None:
        """Each client's figures in its own run; of many clients, quantiles in the run of all."""
        if self._are_many:
            self._tracked.log_metrics(quantiles(metrics), step=step)
            return
        for name, own in metrics.items():
            if own:
                self._children[name].log_metrics(own, step=step)

    def refused(self, server_round: int, client: str, reason: str) -> None:
        """A client's reply was left out: named and counted; what its own policy does not allow, apart."""
        refusals = self._refusals.setdefault(server_round, {})
        # The last round's model is also evaluated, so a client can be left out twice under one number.
        earlier = refusals.get(client, "")
        if reason not in earlier:
            refusals[client] = f"{earlier}; {reason}" if earlier else reason
        if setting := refused_setting(reason):
            self._by_policy.setdefault(client, Counter())[setting] += 1
        else:
            self._num_refused += 1
        self._refused_so_far[server_round] = self._num_refused
        self._tracked.set_tags({f"refused.round_{server_round}.{client}": refusals[client][:LONGEST_TAG]})
        self._events.emit("refused", client=client, round=server_round, reason=reason)

    def _tell_refused(self, before: float) -> None:
        """The count of each round before that one, once: a round that is tried again, or scored, may add to its own."""
        for step in [step for step in self._refused_so_far if step < before]:
            self._tracked.log_metrics({"refused_replies": float(self._refused_so_far.pop(step))}, step=step)

    def saturated(self, server_round: int, number: int) -> None:
        """Elements of changes were beyond what secure aggregation carries, and were cut to it."""
        lossy = is_lossy(self._settings.federation.upload_codec)
        rest = "what is left of it goes with the next round's" if lossy else "lower training.lr if it happens again"
        line = (
            f"round {server_round}: {number:,} elements of the clients' changes were too large for secure aggregation"
            f" and were cut to its range; {rest}"
        )
        self._events.emit("warning", line=line)

    def limited(self, client: str, line: str) -> None:
        """A client counts for less than it says: told once, of the first clients."""
        if client in self._limited or len(self._limited) >= MOST_TOLD_APART:
            return
        self._limited[client] = line
        self._tracked.set_tags({f"limited.{client}": line[:400]})
        self._events.emit("warning", line=line)

    def went_back(self, step: int, line: str, counts: Mapping[str, float]) -> None:
        """The model of round `step` was of no use, and the run is where the round before had left it.

        What was refused since stays counted.
        """
        self._count_on_from(counts)
        self._went_back.append(line)
        self._tracked.set_tags({f"went_back.{len(self._went_back)}": f"round {step}: {line}"[:400]})
        self._events.emit("warning", line=line)

    def repeated(self, line: str) -> None:
        """A round is tried again."""
        self._events.emit("warning", line=f"{line} The round is tried again.")

    def reasons(self, server_round: int) -> Mapping[str, str]:
        """Why replies of that round were left out, by client."""
        return self._refusals.get(server_round, {})

    @property
    def num_refused(self) -> int:
        """How many replies were left out in the whole run."""
        return self._num_refused

    def asked(self, tasks: Mapping[str, Task], members: Mapping[str, Member]) -> None:
        """Tasks were sent, all of one kind and round: from now on it is told how many have answered."""
        if not tasks:
            return
        first, pictures = next(iter(tasks.values())), self._settings.round_pictures
        self._asked = {name: pictures(members[name].site.num_training_pictures) for name in tasks}
        self._answered = self._told_answered = 0
        names = [] if self._are_many else sorted(tasks)
        pictures_of_all = sum(self._asked.values())
        self._events.emit(
            "asked",
            round=first.server_round,
            task=first.kind,
            clients=len(tasks),
            pictures=pictures_of_all,
            names=names,
        )

    def answered(self, client: str) -> None:
        """A client's reply was taken, or given up; told at most TELL_ANSWERS times a round."""
        total, self._answered = len(self._asked), self._answered + 1
        self._answered_pictures = (self._answered_pictures if self._answered > 1 else 0) + self._asked.get(client, 0)
        self._heard.pop(client, None)
        if self._answered < total and self._answered - self._told_answered < total / TELL_ANSWERS:
            return
        self._told_answered = self._answered
        self._events.emit("answered", answered=self._answered, pictures=self._answered_pictures, client=client)

    def heard(self, client: str, beat: Beat) -> None:
        """A client said how far it is; told where that is news."""
        if self._are_many or self._heard.get(client) == (beat.work, beat.percent):
            return
        self._heard[client] = beat.work, beat.percent
        pictures = self._asked.get(client, 0) * max(beat.percent, 0) // 100
        self._events.emit("progress", client=client, work=beat.work, words=beat.words(), pictures=pictures)

    def scored(self, history: History, step: int, tallies: Sequence[Tally]) -> None:
        """The model of round `step` was scored, on one split or several: keep, log, tell."""
        for number, tally in enumerate(tallies, start=1):
            self._scored(history, step, tally, is_last=number == len(tallies))

    def _scored(self, history: History, step: int, tally: Tally, *, is_last: bool) -> None:
        metrics = history.score(step, tally)
        metrics |= self._drawn(tally.split, metrics)
        history.at(step).metrics |= metrics
        if metrics:
            self._tracked.log_metrics(metrics, step=step)
        for name, own in tally.metrics.items():
            history.at(step).clients.setdefault(name, {}).update(own)
        self._log_of_clients(tally.metrics, step)
        name = of_split("val", AUC)
        own = {} if self._are_many else {site: one[name] for site, one in tally.metrics.items() if name in one}
        self._events.emit(
            "scored",
            round=step,
            split=tally.split,
            best_round=history.best_round,
            is_last=is_last,
            sites=own,
            **({"evaluated": True} if self._settings.federation.evaluate_only else {}),
            **metrics,
        )

    def _drawn(self, split: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """How far off the pooled AUC may be because pairs were drawn; nothing where all were scored."""
        most, auc = self._settings.verification.max_pairs, metrics.get(of_split(split, AUC))
        was_drawn = any(site.num_scored_pairs < site.num_pairs for site in self._sites.values())
        if isinstance(most, str) or auc is None or not was_drawn:
            return {}
        return {of_split(split, f"{AUC}_half_width"): auc_half_width(auc, most)}

    def _tell_pairs(self, name: str, site: Site) -> None:
        """Say once at the start which part of a client's pairs a round scores, and what it may cost."""
        most = self._settings.verification.max_pairs
        if isinstance(most, str) or site.num_scored_pairs >= site.num_pairs:
            return
        line = (
            f"{name} scores {site.num_scored_pairs:.2g} of {site.num_pairs:.2g} pairs of unseen people in each round"
            f" (verification.max_pairs = {most:.2g} for validation and for test), about"
            f" {site.num_scored_pairs / PAIRS_PER_CPU_S:.0f} CPU-seconds; an AUC of 0.9 is within"
            f" {auc_half_width(0.9, most):.4f} of that of all pairs (95 %)"
        )
        self._events.emit("warning", line=line)

    def public_scored(self, history: History, step: int, metrics: Mapping[str, float]) -> None:
        """The model of round `step` was scored on the public pairs: keep, log, tell."""
        history.at(step).metrics |= metrics
        self._tracked.log_metrics(dict(metrics), step=step)
        self._events.emit("scored", round=step, split="public", best_round=history.best_round, **metrics)

    def trained(
        self,
        history: History,
        server_round: int,
        replies: Mapping[str, Reply],
        *,
        sizes: Mapping[str, float],
        clients: Mapping[str, Mapping[str, float]],
        content: Mapping[str, float] | None = None,
    ) -> None:
        """A round is whole: its training figures and bytes.

        content: sums of all clients that no reply has, with secure aggregation.
        sizes: bytes of all.  clients: of each client of `replies` its own bytes down and up, the norms of its
        change, and answer_seconds from the sending of its task until its reply was taken.
        """
        self._tell_refused(before=server_round)
        merged = merged_train(replies) | dict(content or {})
        self._num_pictures += merged["num_pictures"]
        self._num_steps += merged["num_steps"]
        self._num_warmup_pictures += merged["num_warmup_pictures"]
        train = train_metrics(merged)
        record = history.at(server_round)
        record.metrics |= {name: train[name] for name in ("train_loss", "train_accuracy") if name in train}
        record.metrics |= sizes
        record.metrics["round_clients"] = float(len(replies))
        record.metrics[WORK_SECONDS] = sum(merged[f"{part}seconds"] for part in ("evaluate_", "warmup_", ""))
        self._tracked.log_metrics(record.metrics, step=server_round)
        told: dict[str, dict[str, float]] = {}
        for name, reply in replies.items():
            own = told[name] = train_metrics(reply.train) | dict(clients[name])
            own[seconds_of("wait")] = max(0.0, own.pop("answer_seconds") - own_seconds(reply.train))
            record.clients.setdefault(name, {}).update(own)
        self._log_of_clients(told, server_round)
        if self._settings.tracking.plots == "all" and self._budget.affords():
            with self._budget:
                self._draw_curves(history)

    def timed(self, history: History, server_round: int, seconds: Mapping[str, float]) -> None:
        """Where the seconds of a round that was `trained` went, its record among them: keep, log, tell."""
        metrics = history.at(server_round).metrics
        metrics |= seconds
        self._tracked.log_metrics(seconds, step=server_round)
        self._events.emit(
            "round",
            round=server_round,
            rounds=self._settings.federation.rounds,
            clients=int(metrics["round_clients"]),
            seconds=seconds[ROUND_SECONDS],
            train_loss=metrics.get("train_loss"),  # stays at the clients where they have differential privacy
            **{way: metrics[way] for way in (BYTES_DOWN, BYTES_UP) if way in metrics},
        )

    def stopped_early(self, last_round: int, history: History) -> None:
        """No further round: validation has not become better for long enough."""
        self._tracked.set_tags({"stopped_early": f"after round {last_round}"})
        line = (
            f"stopped early after round {last_round} of {self._settings.federation.rounds}:"
            f" {history.validations_since_best()} validations without a better AUC than round {history.best_round}'s"
        )
        self._events.emit("stopped_early", round=last_round, line=line)

    def out_of_privacy(self, last_round: int) -> None:
        """No further round: the privacy of those who would have to answer is spent."""
        self._tracked.set_tags({"stopped_early": f"after round {last_round}"})
        line = (
            f"stopped after round {last_round} of {self._settings.federation.rounds}: privacy.epsilon is spent (a round"
            " that is repeated with other noise is paid for twice), or a site's own highest is"
        )
        self._events.emit("stopped_early", round=last_round, line=line)

    def finished(self, history: History, last_round: int, sha256: str) -> dict[str, Any]:
        """The last pictures and the summary, which is also RUN/metrics.json."""
        self._tell_refused(before=math.inf)
        best = history.best_round
        if self._settings.tracking.plots != "none":
            self._draw_curves(history)
            self._draw_verification(history)
            self._draw_clients(history, best)
        validation = history.at(best).totals.get("val")
        threshold = None if validation is None else known_threshold(validation.pairs)
        summary: dict[str, Any] = {
            "rounds": last_round,
            "stopped_early": last_round < self._settings.federation.rounds,
            "best_round": best,
            "model_sha256": sha256,
            "refused_replies": self.num_refused,
            "refusals": self._refusals,
            "policy_refusals": self._by_policy,
            "limited": self._limited,
            "went_back": self._went_back,
            "untrained": self._test_scores(history, 0),
            "best": self._test_scores(history, best),
            "below_untrained": self._below_untrained(history, best),
            "few_people": self._few_people(history.at(best).sums.get("test", {})),
            "last": self._test_scores(history, last_round),
            "best_val_auc": history.best_val_auc,
            "threshold": threshold,
            "test_roc_auc_median": history.median_of_clients(best, of_split("test", AUC)),
            "num_pictures_processed": self._num_pictures,
            "num_gradient_steps": self._num_steps,
            "num_warmup_pictures": self._num_warmup_pictures,
            "test_pairs": {name: site.test_pairs for name, site in self._sites.items()},
            "clients": {name: final_metrics(sums) for name, sums in history.at(best).sums.get("test", {}).items()},
            "clients_quantiles": quantiles(history.at(best).clients) if self._are_many else {},
            "rounds_table": history.rows(),
        }
        final = {f"test_{name}": value for name, value in summary["best"].items()}
        final |= self._by_group(history, best, summary)
        for name, scores in summary["clients"].items():
            final |= {of_client(name, key): value for key, value in scores.items()}
            if name in self._children:  # of many clients nobody has a run of its own
                self._children[name].log_metrics(scores, step=best)
        final |= {"best_round": float(best), f"best_val_{AUC}": history.best_val_auc}
        if summary["test_roc_auc_median"] is not None:
            final["test_roc_auc_median"] = summary["test_roc_auc_median"]
        if threshold is not None:
            final["test_threshold"] = threshold
        budget = ("num_pictures_processed", "num_gradient_steps", "num_warmup_pictures")
        final |= {name: summary[name] for name in budget}
        self._tracked.log_metrics(final, step=best)
        self._tracked.set_tags({"best_round": str(best), "model_sha256": sha256})
        if summary["below_untrained"]:
            self._tracked.set_tags({"below_untrained": summary["below_untrained"]})
        self._tracked.describe(result=chosen_note("round", best, last_round, history.best_val_auc))
        self._tracked.log_dict(summary, "metrics.json")
        return summary

    def evaluated(self, history: History, sha256: str) -> dict[str, Any]:
        """The pictures and the summary of a run that scored a model and trained nothing, also RUN/metrics.json."""
        self._tell_refused(before=math.inf)
        totals, tested = history.at(0).totals, history.at(0).sums.get("test", {})
        validation = totals.get("val")
        threshold = None if validation is None else known_threshold(validation.pairs)
        if self._settings.tracking.plots != "none":
            draw_scores(
                self._tracked,
                {"evaluated": totals["test"].pairs} if AUC in self._test_scores(history, 0) else {},
                "evaluated",
                None if validation is None else validation.pairs,
            )
            self._draw_clients(history, 0)
        summary: dict[str, Any] = {
            "evaluated": self._settings.model.pretrained,
            "rounds": 0,
            "model_sha256": sha256,
            "refused_replies": self.num_refused,
            "refusals": self._refusals,
            "policy_refusals": self._by_policy,
            "limited": self._limited,
            "best": self._test_scores(history, 0),
            "validation": {} if validation is None else known_scores(validation),
            "threshold": threshold,
            "few_people": self._few_people(tested),
            "test_pairs": {name: site.test_pairs for name, site in self._sites.items()},
            "clients": {name: final_metrics(sums) for name, sums in tested.items()},
            "clients_quantiles": quantiles(history.at(0).clients) if self._are_many else {},
        }
        final = {f"test_{name}": value for name, value in summary["best"].items()}
        final |= self._by_group(history, 0, summary)
        final |= {} if threshold is None else {"test_threshold": threshold}
        for name, scores in summary["clients"].items():
            final |= {of_client(name, key): value for key, value in scores.items()}
            self._children[name].log_metrics(scores, step=0)
        self._tracked.log_metrics(final, step=0)
        self._tracked.set_tags({"model_sha256": sha256})
        self._tracked.log_dict(summary, "metrics.json")
        return summary

    def without_groups(self, reason: str) -> None:
        """There are no errors by group: too few sites answered."""
        self._events.emit("warning", line=f"no errors by group: {reason}")

    def _by_group(self, history: History, step: int, summary: dict[str, Any]) -> dict[str, float]:
        """Put the model's errors by group into the summary and groups.json; returns them as metrics."""
        least = self._settings.verification.group_people
        found = history.by_group(step, "federated", least)
        if found is None:
            return {}
        summary["groups"] = group_content([found], least)
        self._tracked.log_dict(summary["groups"], GROUPS_FILE)
        return group_metrics(found)

    def _below_untrained(self, history: History, best: int) -> str:
        untrained, trained = (
            {
                "validation": history.at(step).metrics.get(of_split("val", AUC)),
                "test": self._test_scores(history, step).get(AUC),
            }
            for step in (0, best)
        )
        return worse_than_untrained(untrained, trained)

    def _few_people(self, tested: Mapping[str, EvaluationSums]) -> dict[str, int]:
        """Of each client whose test figures stand on fewer than FEW_PEOPLE people, how many these are.

        A site does not say how many it tests on, but how many it does not train on: where these are many, a small
        number of pairs is a choice among them.
        """
        found = {}
        for name, sums in tested.items():
            number, site = people_behind(sums.pairs), self._sites[name]
            if 0 < number < FEW_PEOPLE and site.num_people - site.num_training_people < 4 * FEW_PEOPLE:
                found[name] = number
        return found

    def _test_scores(self, history: History, step: int) -> dict[str, float]:
        if not history.tested(step):
            return {}
        return known_scores(history.pooled_test(step))

    def _draw_curves(self, history: History) -> None:
        self._tracked.log_figure(
            curves.convergence(history.rows(), margin=margin_words(self._settings)), "plots/convergence.png"
        )
        if not self._are_many:
            self._tracked.log_figure(curves.client_curves(history.client_rows()), "plots/clients.png")

    def _draw_verification(self, history: History) -> None:
        strategy = self._settings.federation.strategy
        steps = (("untrained", 0), (strategy, history.best_round))
        scored = {label: step for label, step in steps if AUC in self._test_scores(history, step)}
        pairs = {label: history.pooled_test(step).pairs for label, step in scored.items()}
        validation = history.at(history.best_round).totals.get("val")
        draw_scores(self._tracked, pairs, strategy, None if validation is None else validation.pairs)

    def _draw_clients(self, history: History, best: int) -> None:
        """Each client's figures side by side, and its confusion matrix, from the counts it sent."""
        tested = history.at(best).sums.get("test", {})
        if tested:
            scores, of_all = intervals_from_sums(tested)
            figure = client_comparison(scores, pooled=of_all, about=FROM_SUMS)
            self._tracked.log_figure(figure, "plots/client_comparison.png")
        elif self._are_many and history.tested(best):
            self._tracked.log_figure(self._many_clients(history, best), "plots/client_comparison.png")
        for name, sums in tested.items():
            if sums.confusion is not None and sums.closed.num_examples > 0:
                num_people = max(self._sites[name].num_training_people, len(sums.confusion))
                figure = confusion(sums.confusion, num_people=num_people, title=f"Confusion at {name}")
                self._children[name].log_figure(figure, "plots/confusion.png")

    def _many_clients(self, history: History, best: int) -> SavesFigure:
        """The same of so many clients that only their figures are kept, and not the sums that give intervals."""
        nothing = math.nan
        of_all = {name: (value, nothing, nothing) for name, value in self._test_scores(history, best).items()}
        scores = {
            client: {
                name: (own[of_split("test", name)], nothing, nothing)
                for name in of_all
                if of_split("test", name) in own
            }
            for client, own in history.at(best).clients.items()
        }
        about = f"no intervals: of more than {MOST_TOLD_APART} clients the sums that they come from are not kept"
        return client_comparison(scores, pooled=of_all, about=about)
