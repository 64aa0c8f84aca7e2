"""Prints what pyproject.toml says FaceFed needs, a line each, so that it can be installed before our code is there.

python dependencies.py PYPROJECT [EXTRA ...]
"""

import sys
import tomllib
from pathlib import Path


def needed(pyproject: Path, extras: list[str]) -> list[str]:
    """The requirements of the project and of its named extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    sys.stdout.write("\n".join(needed(Path(sys.argv[1]), sys.argv[2:])) + "\n")
