"""`flower-server`: a SuperLink of our own, one run submitted to it, watched until it ends, and everything ended."""

import http.client
import json
import logging
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import config
from common.checkpoints import read_json
from common.errors import EXIT_FAILED, EXIT_INTERRUPTED, FaceFedError, InterruptedRun
from common.events import OUTCOME_FILE, STOP_FILE
from common.processes import child_environment, require_free_port, start, stop
from common.settings import Settings
from common.tracking.settings import without_secrets
from common.version import facefed_version, git_commit
from server.bundle import write_bundle
from server.runs import write_config_file

log = logging.getLogger("facefed.server")

CONNECTION = "facefed"
HEALTHY_WITHIN_S = 60.0
SUBMIT_WITHIN_S = 60.0
LOOK_EVERY_S = 0.2
ASK_STATUS_EVERY_S = 15.0
STOP_WITHIN_S = 20.0


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the SuperLink listens and keeps its state."""

    host: str
    port: int
    database: Path | None


class Launch:
    """One run on a SuperLink of its own."""

    def __init__(self, settings: Settings, options: ServerOptions, run_folder: Path) -> None:
        """run_folder: where logs, the bundle and Flower's own files of this run are kept."""
        self._settings, self._options, self._folder = settings, options, run_folder
        self._stop = threading.Event()
        self._environment = child_environment(run_folder / "flwr")

    def request_stop(self) -> None:
        """Ask the run to end; safe in a signal handler."""
        self._stop.set()

    def run(self) -> dict[str, Any]:
        """Start, submit, watch, end; returns the outcome {"exit_code", "line"}.  Raises FaceFedError."""
        require_free_port(self._options.host, self._options.port, "--address")
        log_path = self._folder / "logs" / "superlink.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as output:
            superlink = start(self._superlink_command(), environment=self._environment, output=output)
            try:
                self._wait_until(lambda: self._is_healthy(superlink), HEALTHY_WITHIN_S, "the SuperLink did not start")
                return self._watch(superlink, self._submit())
            except InterruptedRun as error:
                return {"exit_code": EXIT_INTERRUPTED, "line": str(error)}
            finally:
                stop(superlink)

    def _superlink_command(self) -> list[str]:
        options = self._options
        command = ["flower-superlink", "--insecure", "--host", options.host, "--port", str(options.port)]
        command.append("--disable-runtime-dependency-installation")  # it would ask a package index
        return [*command, "--database", str(options.database)] if options.database else command

    def _local_host(self) -> str:
        return "127.0.0.1" if self._options.host == "0.0.0.0" else self._options.host  # noqa: S104

    def _is_healthy(self, superlink: subprocess.Popen[bytes]) -> bool:
        if superlink.poll() is not None:
            raise FaceFedError(f"the SuperLink ended at once (see {self._folder}/logs/superlink.log).")
        connection = http.client.HTTPConnection(self._local_host(), self._options.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()

    def _wait_until(self, look: Callable[[], bool], within_s: float, failure: str) -> None:
        deadline = time.monotonic() + within_s
        while not look():
            if self._stop.wait(LOOK_EVERY_S):
                raise InterruptedRun("stopped by the user")
            if time.monotonic() > deadline:
                raise FaceFedError(f"{failure} within {within_s:g} s (see {self._folder}/logs).")

    def _submit(self) -> int:
        """Submit the bundle; returns Flower's run id."""
        home = self._folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        address = f"{self._local_host()}:{self._options.port}"
        (home / "config.toml").write_text(
            f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n', encoding="utf-8"
        )
        run_config = {
            "settings": config.to_json(without_secrets(self._settings)),
            "run-folder": str(self._folder),
            "git-commit": git_commit(),
        }
        config_file = self._folder / "flwr" / "run-config.toml"
        config_file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in run_config.items()), encoding="utf-8")
        write_config_file(self._folder, self._settings)
        bundle = write_bundle(self._folder / "flwr" / "facefed", facefed_version())
        answer = self._flwr("run", str(bundle), CONNECTION, "--run-config", str(config_file), "--format", "json")
        if not answer.get("success"):
            raise FaceFedError(f"Flower refused the run: {answer.get('error-message', answer)}")
        return int(answer["run-id"])

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        try:
            done = subprocess.run(
                ["flwr", *arguments],
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=SUBMIT_WITHIN_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FaceFedError(f"flwr {arguments[0]} did not end within {SUBMIT_WITHIN_S:g} s.") from None
        try:
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            raise FaceFedError(f"flwr {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-400:]}") from None
        return answer

    def _watch(self, superlink: subprocess.Popen[bytes], flower_run: int) -> dict[str, Any]:
        """Wait for the outcome file; Flower's own status tells of a ServerApp that died without writing one."""
        outcome = self._folder / OUTCOME_FILE
        ask_at = time.monotonic() + ASK_STATUS_EVERY_S
        give_up_at = float("inf")
        while not outcome.exists():
            if self._stop.wait(LOOK_EVERY_S) and give_up_at == float("inf"):
                (self._folder / STOP_FILE).touch()
                give_up_at = time.monotonic() + STOP_WITHIN_S
            if self._stop.is_set():
                time.sleep(LOOK_EVERY_S)
            if time.monotonic() > give_up_at:
                return {"exit_code": EXIT_INTERRUPTED, "line": "stopped by the user"}
            if superlink.poll() is not None:
                return {
                    "exit_code": EXIT_FAILED,
                    "line": f"the SuperLink died (see {self._folder}/logs/superlink.log).",
                }
            if time.monotonic() > ask_at:
                ask_at = time.monotonic() + ASK_STATUS_EVERY_S
                status = self._status(flower_run)
                if status.startswith("finished") and not outcome.exists():
                    line = f"the ServerApp ended as {status!r} without a word (see {self._folder}/logs/superlink.log)."
                    return {"exit_code": EXIT_FAILED, "line": line}
        return read_json(outcome)

    def _status(self, flower_run: int) -> str:
        try:
            runs = self._flwr("ls", CONNECTION, "--run-id", str(flower_run), "--format", "json").get("runs", [])
        except FaceFedError as error:
            log.warning("the run's status is unknown: %s", error)
            return "unknown"
        return str(runs[0]["status"]) if runs else "unknown"
