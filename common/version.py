"""Which FaceFed this is, for the tags of a run."""

import functools
import importlib.metadata
import subprocess
from pathlib import Path


def facefed_version() -> str:
    """The installed version, or "unknown" for a bundle without an installation."""
    try:
        return importlib.metadata.version("facefed")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache  # each round of a client asks
def git_commit() -> str:
    """The commit of the checkout that this file is in, or "unknown" outside one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
