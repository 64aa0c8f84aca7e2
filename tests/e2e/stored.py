"""Everything that an MLflow with a sqlite database has stored, as bytes that can be searched."""

import io
import sqlite3
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def stored(database: Path, artifacts: Path) -> dict[str, bytes]:
    """Place -> content: each text of the database, each file, what is packed in it, and the files' names."""
    return {**dict(_cells(database)), **dict(_files(artifacts))}


def holding(needles: Iterable[str | bytes], haystack: dict[str, bytes]) -> list[tuple[str | bytes, str]]:
    """(needle, place) wherever one is found; texts in any case."""
    wanted = [(needle, needle.lower().encode() if isinstance(needle, str) else needle) for needle in needles]
    return [
        (needle, place)
        for place, content in haystack.items()
        for needle, sought in wanted
        if sought in (content.lower() if isinstance(needle, str) else content)
    ]


def _cells(database: Path) -> Iterator[tuple[str, bytes]]:
    with sqlite3.connect(database) as connection:
        tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        for table in tables:
            rows = connection.execute(f'select * from "{table}"')  # noqa: S608 - a name of the database itself
            names = [column[0] for column in rows.description]
            for number, row in enumerate(rows):
                for name, value in zip(names, row, strict=True):
                    if isinstance(value, str | bytes):
                        content = value.encode() if isinstance(value, str) else value
                        yield f"{table}[{number}].{name}", content
    connection.close()


def _files(artifacts: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(path for path in artifacts.rglob("*") if path.is_file()):
        place = path.relative_to(artifacts).as_posix()
        yield f"name of {place}", place.encode()
        yield from _unpacked(place, path.read_bytes())


def _unpacked(place: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    yield place, content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            for name in packed.namelist():
                yield f"name of {place}!{name}", name.encode()
                yield f"{place}!{name}", packed.read(name)
