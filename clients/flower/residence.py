"""The trainer as its flower-client sees it: started, met in a folder of the user's own, started again, ended."""

import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

from clients.flower.handover import KEY, SITE
from clients.flower.trainer import LEFT_ALONE, site_to_json
from clients.site import SiteSettings
from common.processes import child_environment, start, stop, write_new

LOG_KEPT_BYTES = 10_000_000
END_GRACE_S = 2.0  # it holds nothing that a later one would miss

log = logging.getLogger("facefed.client")


def follow(process: subprocess.Popen[bytes], path: Path, notice: Callable[[str], object]) -> threading.Thread:
    """Keep a program's output in a file that does not grow for ever, and show each line to `notice`, from a thread."""
    reader = threading.Thread(target=_read, args=(process.stdout, path, notice), daemon=True)
    reader.start()
    return reader


def _read(output: IO[bytes], path: Path, notice: Callable[[str], object]) -> None:
    if path.exists() and path.stat().st_size > LOG_KEPT_BYTES:
        path.replace(path.with_suffix(".log.1"))
    with path.open("ab") as kept, output:
        for raw in output:
            kept.write(raw)
            kept.flush()
            notice(raw.decode(errors="replace"))


class Trainer:
    """One trainer process after the other, while the block lasts."""

    def __init__(self, site: SiteSettings, notice: Callable[[str], object]) -> None:
        """notice: gets each line that the trainer says."""
        self._site, self._notice = site, notice

    def __enter__(self) -> Self:
        """Make the folder and start the first."""
        # Not in the state folder: the path of a socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="facefed-"))  # 0700
        try:
            write_new(self.folder / KEY, secrets.token_bytes(32))
            write_new(self.folder / SITE, site_to_json(self._site).encode())
            self._start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        stop(self._process, END_GRACE_S)
        self._reader.join(timeout=5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self._process = start(
            [sys.executable, "-P", "-m", "clients.flower.trainer", str(self.folder), str(os.getpid())],
            environment=child_environment(self._site.state_dir / "flwr"),
            output=subprocess.PIPE,
        )
        self._reader = follow(self._process, self._site.state_dir / "trainer.log", self._notice)

    def keep_alive(self) -> None:
        """Start another where the last one has ended."""
        code = self._process.poll()
        if code is None:
            return
        if code != LEFT_ALONE:
            log.warning("the trainer ended (exit code %d, see %s); another is started", code, self._site.state_dir)
        self._start()
