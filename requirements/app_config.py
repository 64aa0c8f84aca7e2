"""Writes `[tool.flwr.app.config]` of pyproject.toml anew, as server/run_config.py declares it: after a new setting.

python requirements/app_config.py        (make app-config)
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from server.run_config import declared  # noqa: E402 - found there

BEGIN, END = "[tool.flwr.app.config]\n", "\n[tool.ruff]\n"


def table() -> str:
    """The section as TOML, one table for each section of the settings."""
    lines, section = [BEGIN], ""
    for name, value in declared().items():
        own, _, key = name.rpartition(".")
        if own != section:
            lines.append(f"\n[tool.flwr.app.config.{own}]\n")
            section = own
        lines.append(f"{key} = {json.dumps(value)}\n")
    return "".join(lines)


def main() -> None:
    """Replace it in the file."""
    path = ROOT / "pyproject.toml"
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{path}: there is no {BEGIN.strip()} before {END.strip()}")
    path.write_text(before + table() + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
