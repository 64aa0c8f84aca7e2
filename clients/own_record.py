"""What a site keeps of a run for itself: its own model, its test figures and pictures, a tracking of its own."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from clients.egress import LEDGER
from clients.site import SiteSettings
from common.errors import CheckpointError, FaceFedError
from common.faces.pack import FacePack
from common.metrics.figures import AUC, CLOSED, PAIRS, figures_of, known_scores, scores, train_metrics
from common.metrics.names import BYTES_DOWN, BYTES_UP, of_split, seconds_of
from common.metrics.sums import open_set_only
from common.models.recogniser import Recogniser
from common.private_figures import HARDEST, hardest, own_threshold, private_pictures
from common.protocol.wire import Reply, Task, counts_nbytes
from common.settings import Settings, TrackingSettings
from common.system.checkpoints import write_tensors
from common.system.events import SHOWN
from common.system.files import Line, read_json, read_lines
from common.system.live import clock_text
from common.system.runtime import facefed_version, git_commit, resolve_devices
from common.tracking.hardware import gpu_type, sample_hardware
from common.tracking.notes import NOTE_TAG, data_note, experiment_note, run_note
from common.tracking.run import SavesFigure, TrackedRun, finishing, open_run
from common.training.evaluation import evaluate
from common.training.loop import Compute

LONGEST_LEFT_S: Final = 366 * 86_400.0  # of a run; more is no guess
_MODE: Final = "federated_client"
RESULTS_FILE, UNTRAINED_FILE = "metrics.json", "untrained.json"  # in the site's folder of a run

log = logging.getLogger("facefed.client")


def own_folder(site: SiteSettings, run_id: str) -> Path:
    """Where the site keeps what it draws and measures of a run; nothing of it is sent to the server."""
    return site.state_dir / "runs" / run_id


def export_own_model(site: SiteSettings, task: Task, settings: Settings, recogniser: Recogniser) -> None:
    """With private normalisation there is no single global model: each site keeps its own, whole, backbone."""
    if settings.model.normalisation == "private":
        backbone = {k: v for k, v in recogniser.state_dict().items() if k.startswith("backbone.")}
        notes = {"round": str(task.server_round), "backbone": settings.model.backbone}
        write_tensors(site.state_dir / "export" / f"{task.run_id}.safetensors", backbone, notes)


@contextlib.contextmanager
def keep_round(
    site: SiteSettings, task: Task, settings: Settings, *, num_pictures: int, bytes_down: int
) -> Iterator[Callable[[Reply], None]]:
    """Record a round's training in this site's own folder, and meanwhile how busy its machine is.

    bytes_down: of the model that came.  Yields what is called with the round's reply.  A failure costs a
    warning, never the round.
    """
    device = ",".join(resolve_devices(site.device))
    with contextlib.ExitStack() as at_end:
        tracked = None
        try:
            tracked = _open(site, task, settings, num_pictures, device, delivers=False)
            at_end.callback(tracked.pause)
            sample_hardware(tracked, settings.tracking)
        except (FaceFedError, OSError) as error:
            log.warning("this client's own figures of round %d are not kept: %s", task.server_round, error)

        def keep(reply: Reply) -> None:
            if tracked:
                up = 0 if reply.change is None else reply.change.nbytes
                sizes = {BYTES_DOWN: float(bytes_down), BYTES_UP: float(up + counts_nbytes(reply))}
                told = known_progress(task, settings.federation.rounds)
                left = {seconds_of("left"): told["left"]} if "left" in told else {}
                tracked.log_metrics(train_metrics(reply.train) | sizes | left, step=reply.server_round)
                if AUC in told:
                    tracked.log_metrics({f"global/{of_split('val', AUC)}": told[AUC]}, step=task.scored_round)
                if reply.server_round == 1 and "test" in reply.evaluations:  # of the model before any training
                    tracked.log_dict(known_scores(reply.evaluations["test"]), UNTRAINED_FILE)

        yield keep


def keep_own_record(
    site: SiteSettings, task: Task, settings: Settings, recogniser: Recogniser, pack: FacePack, compute: Compute
) -> None:
    """Measure the best global model on this site's own test data, and draw it, for its own folder and tracking.

    Where the site has an MLflow of its own, all that the rounds left in the folder is sent there now.
    A failure costs a warning, never the run.
    """
    draws = settings.tracking.plots != "none"
    if not draws and not site.tracking_uri:
        return
    try:
        tracked = _open(site, task, settings, len(pack), compute.devices, delivers=bool(site.tracking_uri))
        with finishing(tracked):
            sums = evaluate(recogniser, pack, "test", compute)
            if settings.federation.evaluate_only:  # nobody has trained the head, so only people never seen are scored
                sums = open_set_only(sums)
            found = known_scores(sums) if settings.federation.evaluate_only else scores(sums)
            tracked.log_metrics({f"test_{name}": value for name, value in found.items()}, step=task.server_round)
            tracked.log_dict({"round": task.server_round, "test": found}, RESULTS_FILE)
            pictures: Mapping[str, SavesFigure] = {}
            if draws:
                pictures = private_pictures(recogniser, pack, compute, client=site.name, seed=settings.run.seed)
                _keep_hardest(tracked, recogniser, pack, compute, client=site.name)
            if settings.federation.evaluate_only:
                pictures = {name: figure for name, figure in pictures.items() if not name.startswith("confusion")}
            for name, figure in pictures.items():
                tracked.log_figure(figure, f"plots/{name}")
    except Exception as error:  # drawing fails in many ways, and the reply is worth more than the site's own pictures
        unforeseen = not isinstance(error, FaceFedError | OSError)
        why = repr(error) if unforeseen else str(error)
        log.warning("this client's own pictures of run %s are not complete: %s", task.run_id, why, exc_info=unforeseen)


def _keep_hardest(
    tracked: TrackedRun, recogniser: Recogniser, pack: FacePack, compute: Compute, *, client: str
) -> None:
    """Draw faces into the site's own folder; not even its own tracking gets them, which may be another machine."""
    threshold = own_threshold(recogniser, pack, compute)
    figure = hardest(recogniser, pack, compute, client=client, threshold=threshold)
    if figure is not None:
        tracked.keep_figure(figure, HARDEST)


def tell_round(site: SiteSettings, task: Task, settings: Settings, reply: Reply) -> None:
    """Say to the site's own user what a round of training came to: here, over all sites, and what leaves now."""
    before = sum(
        line.record.get("num_bytes", 0)
        for line in _lines_of(site.state_dir / LEDGER / f"{task.run_id}.jsonl")
        if line.record is not None and line.record.get("kind") == "sent"
    )
    log.info("%s%s: %s", SHOWN, site.name, round_words(task, settings.federation.rounds, reply, before))


def _lines_of(path: Path) -> Iterator[Line]:
    return read_lines(path) if path.exists() else iter(())


def round_words(task: Task, num_rounds: int, reply: Reply, sent_before: int) -> str:
    """What `tell_round` says.  sent_before: bytes that left in this run so far.

    The server's numbers are shown only where they are such: an AUC, a round of the run, a time.
    """
    train, parts = reply.train, [f"round {task.server_round} of {num_rounds} is done here"]
    if "seconds" in train:
        parts[0] += f" in {train['seconds']:.1f} s"
    if "loss_sum" in train and train.get("num_pictures"):
        parts.append(f"train loss {train['loss_sum'] / train['num_pictures']:.3f}")
    if told := known_progress(task, num_rounds):
        parts += (
            [f"the model of round {task.scored_round} over all sites: val AUC {told[AUC]:.3f}"] if AUC in told else []
        )
    leaving = counts_nbytes(reply) + (reply.change.nbytes if reply.change is not None else 0)
    parts.append(f"{leaving / 1e6:.1f} MB go out ({(sent_before + leaving) / 1e6:.1f} MB in this run)")
    if "left" in told:
        parts.append(f"about {clock_text(told['left'])} left")
    return "; ".join(parts)


def known_progress(task: Task, num_rounds: int) -> dict[str, float]:
    """What the server told of the run, as far as these are numbers that can be: AUC, and "left" in seconds."""
    found = {}
    # As it came: nobody has looked at their types.
    auc, left, scored = (getattr(task, name) for name in ("val_auc", "seconds_left", "scored_round"))
    if isinstance(auc, float) and 0.0 <= auc <= 1.0 and isinstance(scored, int) and 0 <= scored <= num_rounds:
        found[AUC] = auc
    if isinstance(left, float) and 0.0 <= left <= LONGEST_LEFT_S:
        found["left"] = left
    return found


def tell_end(site: SiteSettings, task: Task) -> None:
    """Say to the site's own user what the run came to here, and where it lies; the server never sees it."""
    folder = own_folder(site, task.run_id)
    found, untrained = _figures(folder / RESULTS_FILE).get("test", {}), _figures(folder / UNTRAINED_FILE)
    if found:
        log.info("%s%s: %s", SHOWN, site.name, end_words(found, untrained, task.server_round))
    if untrained.get(AUC, 0.0) > found.get(AUC, 1.0):
        line = "the model is worse on this site's own test people than the untrained one"
        log.warning("%s%s: warning: %s", SHOWN, site.name, line)
    if (folder / "plots").is_dir():
        log.info("%s%s: pictures and figures of this run: %s", SHOWN, site.name, folder)
    ledger = site.state_dir / LEDGER / f"{task.run_id}.jsonl"
    how = f"facefed egress report --state-dir {site.state_dir}"
    log.info("%s%s: what left this site: %s (%s shows it)", SHOWN, site.name, ledger, how)


def end_words(found: Mapping[str, float], untrained: Mapping[str, float], server_round: int) -> str:
    """The best model's figures on the site's own test data, beside those of the untrained one."""
    names = {row.name: row.told for row in figures_of(CLOSED, PAIRS) if row.told}
    told = []
    for name, label in names.items():
        if name in found:
            before = f" (untrained {untrained[name]:.3f})" if name in untrained else ""
            told.append(f"{label} {found[name]:.3f}{before}")
    which = f"the best model, of round {server_round}," if server_round else "the model"  # that was only scored
    return f"{which} on this site's own test pictures: {', '.join(told)}"


def _figures(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def _open(
    site: SiteSettings, task: Task, settings: Settings, num_pictures: int, device: str, *, delivers: bool
) -> TrackedRun:
    data = data_note(site.dataset, num_pictures)
    return open_run(
        TrackingSettings(enabled=delivers, tensorboard="none"),
        uri=site.tracking_uri,
        folder=own_folder(site, task.run_id),
        experiment=f"{settings.tracking.experiment_prefix}_client_{site.name}",
        run_name=f"{site.name}_{task.run_id}",
        tags={
            "mode": _MODE,
            "model_type": settings.model.backbone,
            "dataset": site.dataset,
            "dataset_size": str(num_pictures),
            "device": device,
            "gpu_type": gpu_type(device),
            "facefed_version": facefed_version(),
            "git_commit": git_commit(),
            "run_folder": task.run_id,
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": "flower-client",
            NOTE_TAG: " ".join([run_note(_MODE, settings.model.backbone, settings.data.image_size), data]),
        },
        about=experiment_note(_MODE),
        params={"client": site.name, "model": settings.model.backbone, "method": settings.federation.strategy},
    )
