"""Writes run.txt and develop.txt beside this file: each pinned package with the hash of every file that may be it.

python requirements/lock.py      (`make lock`)

run.txt is what FaceFed needs and PostgreSQL's driver, which the image has; develop.txt is what all extras add to that.
constraints.txt says which versions, the index what their hashes are: read the difference before you commit it.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PYTHONS: Final = ("3.11", "3.12", "3.13")  # of [project] requires-python
FILES: Final = {"run.txt": ("--extra", "postgresql"), "develop.txt": ("--all-extras",)}
HEAD: Final = (
    "# Made by `make lock` from pyproject.toml and constraints.txt; `make setup` installs it with --require-hashes.\n"
)

Entries = dict[str, str]  # name -> its line, and one for each hash


def resolved(extras: Iterable[str], python: str) -> Entries:
    """What a Python on Linux installs for them.  Raises CalledProcessError; uv says why."""
    uv = Path(sys.executable).with_name("uv")  # Flower brings it
    command = [
        *(uv, "pip", "compile", "pyproject.toml", *extras, "--constraints", "constraints.txt", "--generate-hashes"),
        *("--python-version", python, "--python-platform", "linux", "--no-header", "--no-annotate", "--quiet"),
        *("--no-emit-index-url", "--no-emit-find-links"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
    entries = re.split(r"^(?=\S)", done.stdout, flags=re.MULTILINE)
    return {entry.partition("==")[0]: entry for entry in entries if entry}


def locked(extras: Iterable[str]) -> Entries:
    """The same for every Python.  Exits where they need different packages: then a lock for each is due."""
    first, *others = (resolved(extras, python) for python in PYTHONS)
    if any(other != first for other in others):
        sys.exit(f"requirements/lock.py: Python {' and '.join(PYTHONS)} need different packages; lock each apart.")
    return first


def main() -> None:
    """Write both files; what the first has is not in the second."""
    known: Entries = {}
    for name, extras in FILES.items():
        entries = locked(extras)
        text = "".join(entries[package] for package in sorted(entries.keys() - known.keys()))
        (ROOT / "requirements" / name).write_text(HEAD + text, encoding="utf-8")
        known |= entries


if __name__ == "__main__":
    main()
