"""What README and the pages of docs/ tell a reader to type."""

import re

from tests.conftest import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The command lines of the code blocks that name no language; variables set before a program are left out."""
    lines = [line for language, block in FENCE.findall(text) if not language for line in block.splitlines()]
    return [re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in lines if line.strip()]


def page(name: str) -> str:
    """The text of README, or of a page of docs/."""
    return (ROOT / ("README.md" if name == "README" else f"docs/{name}.md")).read_text(encoding="utf-8")


def commands_of(name: str, start: str) -> list[str]:
    """A page's command lines that begin so.  Fails when there is none."""
    found = [line for line in commands(page(name)) if line.startswith(start)]
    assert found, f"{name} has no {start}"
    return found
