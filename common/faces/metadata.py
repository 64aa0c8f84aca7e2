"""Reading the text files of official layouts: whole files at a time, a fault reported with file and line number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

CHUNK_LINES = 100_000  # numbers are parsed so many lines at a time: memory stays bounded on VGGFace2's 3.1 M lines


@dataclass(frozen=True, kw_only=True)
class Table:
    """How the numbers of one file stand: how many in a line, what separates them, what a line should hold."""

    columns: int
    separator: str | None  # None: any white space
    wanted: str


def require_folder(folder: Path, what: str) -> None:
    """Raise DataError unless `folder` is a folder; `what` says what it is for."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {what}.")


def malformed(file: Path, number: int, line: str, wanted: str) -> DataError:
    """The error for one bad line.  number: counted from 1."""
    shown = line if len(line) <= 80 else line[:77] + "..."
    return DataError(f"{file}, line {number}: {shown!r} is malformed; expected {wanted}.")


def read_lines(file: Path) -> list[str]:
    """All lines without their ends (LF or CRLF) and without trailing empty lines.  Raises DataError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); fetch the official file again.") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from None
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_pairs(file: Path, wanted: str) -> tuple[list[str], list[str]]:
    """The two columns of a file whose lines are `name value`, split at white space.

    wanted: what a line should hold, for the message.  Raises DataError naming the first bad line.
    """
    lines = read_lines(file)
    rows = [line.split() for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise malformed(file, number, lines[number - 1], wanted)
    return [row[0] for row in rows], [row[1] for row in rows]


def check_paths(file: Path, paths: Sequence[str], first_line: int = 1) -> None:
    """Raise DataError for a path that is absolute or leaves the folder; line numbers start at `first_line`."""
    for number, path in enumerate(paths, start=first_line):
        if (".." in path or "\\" in path or path[:1] == "/" or "\0" in path) and _leaves(path):
            raise DataError(f"{file}, line {number}: picture {path!r} leaves the data folder; paths must be relative.")


def _leaves(path: str) -> bool:
    return path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/")


def parse_numbers(file: Path, rows: Sequence[str], table: Table, first_line: int) -> NDArray[np.float32]:
    """Numbers of many lines at once.  rows: [M] texts of `table.columns` numbers each.  Returns float32 [M, columns].

    first_line: the line number of rows[0].  Raises DataError naming the first line that holds anything else.
    """
    blocks = [np.zeros((0, table.columns), dtype=np.float32)]
    for start in range(0, len(rows), CHUNK_LINES):
        block = rows[start : start + CHUNK_LINES]
        numbers = _parse_block(block, table)
        if numbers is None:
            bad = next((i for i, row in enumerate(block) if _parse_block([row], table) is None), 0)
            raise malformed(file, first_line + start + bad, block[bad], table.wanted)
        blocks.append(numbers)
    return np.concatenate(blocks)


def _parse_block(block: Sequence[str], table: Table) -> NDArray[np.float32] | None:
    """The numbers, or None when any line is not exactly `table.columns` finite numbers."""
    if not all(row.strip() for row in block):  # loadtxt passes over empty lines
        return None
    try:
        numbers = np.loadtxt(block, dtype=np.float32, delimiter=table.separator, comments=None, ndmin=2)
    except ValueError:
        return None
    return numbers if numbers.shape == (len(block), table.columns) and np.isfinite(numbers).all() else None


def align_rows(wanted: Sequence[str], names: Sequence[str], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of `values` [M, ...] (one for each of `names`) in the order of `wanted` [N]; NaN where there is none."""
    if len(wanted) == len(names) and all(a == b for a, b in zip(wanted, names, strict=True)):
        return values
    where = {name: i for i, name in enumerate(names)}
    rows = np.fromiter((where.get(name, -1) for name in wanted), dtype=np.int64, count=len(wanted))
    found = np.full((len(wanted), *values.shape[1:]), np.nan, dtype=np.float32)
    found[rows >= 0] = values[rows[rows >= 0]]
    return found
