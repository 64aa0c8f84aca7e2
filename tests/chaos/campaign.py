"""Runs of a federation with faults: one run, its report, and the table over many."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.chaos.checks import Undisturbed, Verdict, judge
from tests.chaos.deployment import CLIENTS, Deployment
from tests.chaos.fault_points import Watch
from tests.chaos.faults import Bringer, NothingThere, wait_until_over
from tests.chaos.plan import LOSING_KINDS, Fault
from tests.e2e.programs import Programs

DONE_WITHIN_S = 900.0
SYNC_WITHIN_S = 300.0

CONFIG = """\
[run]
seed = {seed}

[data]
image_size = 32

[model]
backbone = "cnn"
width = 0.25
embedding_size = 32

[training]
precision = "float32"
memory_format = "contiguous"
batch_size = 8
threads = 1
momentum = 0.9

[federation]
rounds = {rounds}
local_epochs = 1
min_clients = 2
strategy = "{strategy}"
join_timeout_s = 240.0
round_timeout_s = 30.0

[tracking]
plots = "final"
tensorboard = "none"
"""
STRATEGIES = ("fedavg", "fedadam")  # without and with moments in the checkpoint


class Ground:
    """What all runs of a campaign have in common: faces, configurations, undisturbed models, MLflow's tables."""

    def __init__(self, folder: Path, *, rounds: int, faces: Path | None = None) -> None:
        """folder: may be there already; what is in it is used again.  faces: with data/NAME of each client, if any."""
        self.folder, self.rounds = folder, rounds
        self.faces = faces or folder / "faces"
        folder.mkdir(parents=True, exist_ok=True)
        self._programs = Programs(folder)
        for layout in CLIENTS:
            out = self.faces / "data" / layout
            if not out.is_dir():
                self._run("facefed", "data", "synth", "--layout", layout, "--people", 12, "--pictures", 8, "--out", out)
        self.migrated = folder / "migrated.db"
        if not self.migrated.exists():
            tables = "import sys, mlflow; mlflow.MlflowClient(tracking_uri=sys.argv[1]).search_experiments()"
            subprocess.run([sys.executable, "-c", tables, f"sqlite:///{self.migrated}"], check=True, cwd=folder)

    def _run(self, *command: object) -> str:
        ended = self._programs.run(*command)
        assert ended.code == 0, ended
        return ended.out

    def config(self, run: int) -> Path:
        """The configuration of the run with that number."""
        path = self.folder / f"run-{run}.toml"
        strategy = STRATEGIES[run % len(STRATEGIES)]
        path.write_text(CONFIG.format(seed=run % 2, rounds=self.rounds, strategy=strategy), encoding="utf-8")
        return path

    def undisturbed(self, run: int) -> Undisturbed:
        """What a simulation makes of the same configuration."""
        config = self.config(run)
        kept = self.folder / f"undisturbed-{run % 2}-{STRATEGIES[run % len(STRATEGIES)]}-{self.rounds}"
        if not kept.exists():
            clients = [word for name in CLIENTS for word in ("--client", f"{name}={self.faces / 'data' / name}")]
            out = self.folder / f"simulated-{kept.name}"
            self._run(
                "flower-simulation", "--config", config, *clients, "--cache-dir", self.faces / "packs", "--no-mlflow",
                "--out", out, "--actors", 1, "--set", "tracking.plots=none",
            )  # fmt: skip
            [summary] = out.glob("*/metrics.json")
            shutil.copyfile(summary, kept)
        summary = json.loads(kept.read_text())
        return Undisturbed(sha256=summary["model_sha256"], best_val_auc=summary["best_val_auc"])


def play(ground: Ground, number: int, faults: Sequence[Fault], *, disks: bool) -> tuple[Verdict, list[dict]]:
    """One run with its faults; returns how it ended and a row for each fault.

    Its folder goes when all was well, and stays for whoever looks for the reason otherwise.
    """
    undisturbed = ground.undisturbed(number)
    folder = ground.folder / f"run-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    rows: list[dict] = []
    verdict = Verdict()
    with Deployment(folder, ground.faces, ground.config(number), ground.migrated, disks=disks) as deployment:
        try:
            _bring_all(deployment, faults, ground.rounds, rows)
            _finish(deployment)
            differs = any(row["came"] and row["kind"] in LOSING_KINDS for row in rows)
            verdict = judge(
                deployment.run, deployment.mlflow, rounds=ground.rounds, undisturbed=undisturbed, may_differ=differs
            )
        except (AssertionError, OSError) as error:
            verdict.wrong.append(repr(error)[:400])
        verdict.demand(not deployment.seen.orphans, f"orphans: {deployment.seen.orphans}")
        if verdict.wrong and deployment.run:
            shutil.copytree(deployment.run, folder / "kept", dirs_exist_ok=True)
        ends = {"server_exits": deployment.seen.server_exits, "client_exits": deployment.seen.client_exits}
    for row in rows:
        row |= {"run_ok": not verdict.wrong, "ok": not verdict.wrong and row["came"]}
    if rows:
        rows[-1] |= {"verdict": dataclasses.asdict(verdict), **ends}
    if not verdict.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return verdict, rows


def _bring_all(deployment: Deployment, faults: Sequence[Fault], rounds: int, rows: list[dict]) -> None:
    watch = Watch(deployment)
    for fault in faults:
        row = {**dataclasses.asdict(fault), "came": False}
        rows.append(row)
        bringer = Bringer(deployment, fault)
        if not watch.wait_for(fault, rounds, DONE_WITHIN_S):
            continue
        exits = len(deployment.seen.server_exits)
        where = watch.where()
        began = time.monotonic()
        try:
            bringer.bring()
        except NothingThere:
            continue
        row |= {"came": True, "client": bringer.client if fault.kind.endswith("state") else "", **where}
        row["detail"] = bringer.detail
        wait_until_over(deployment, watch)
        row["recovered_s"] = round(time.monotonic() - began, 1)
        row["resumes"] = len(deployment.seen.server_exits) - exits


def _finish(deployment: Deployment) -> None:
    """Wait for the end; stop everything; send what MLflow has not got yet."""
    deadline = time.monotonic() + DONE_WITHIN_S
    while deployment.tend() != 0:
        assert time.monotonic() < deadline, f"the run is not over within {DONE_WITHIN_S:g} s"
        time.sleep(0.2)
    deployment.stop()
    with suppress(RuntimeError):
        deployment.mlflow.wait()
    deployment.sync()


def table(rows: Sequence[dict]) -> str:
    """Kinds by phases: how many faults came, and of them how many ended as they must."""
    came = [row for row in rows if row["came"]]
    lines = [f"{'kind':24} {'faults':>6} {'ended well':>10} {'median recovery':>16}  phases"]
    for kind in sorted({row["kind"] for row in came}):
        own = [row for row in came if row["kind"] == kind]
        times = sorted(row.get("recovered_s", float("nan")) for row in own)
        phases = ", ".join(f"{row['phase']}" for row in own)
        lines.append(
            f"{kind:24} {len(own):6} {sum(row['ok'] for row in own):10} {times[len(times) // 2]:14.1f} s  {phases}"
        )
    phases = sorted({row["phase"] for row in came})
    lines.append("")
    for phase in phases:
        own = [row for row in came if row["phase"] == phase]
        lines.append(f"{phase:24} {len(own):6} {sum(row['ok'] for row in own):10}")
    lines.append(f"{'all':24} {len(came):6} {sum(row['ok'] for row in came):10}")
    return "\n".join(lines)


def line_of(row: dict) -> str:
    """A fault in a line."""
    told = f"{row['kind']} in {row['phase']} of round {row['server_round']} or later"
    if not row["came"]:
        return f"{told}: did not come"
    where = f"{row.get('ms_later')} ms after {row.get('last_event')} {row.get('last_event_round')}"
    back = f"on again after {row.get('recovered_s')} s, {row.get('resumes')} resumes"
    return f"{told} ({where}): {row.get('detail') or row.get('client') or 'done'}; {back}"


def append(report: Path, rows: Sequence[dict]) -> None:
    """Add the rows to a report."""
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(report: Path) -> list[dict]:
    """The rows of a report."""
    return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()] if report.exists() else []
