"""Files on disk: replaced in one step, locked, private, sealed, written and read as lines of JSON; none can run code.

Apart from `common/system/checkpoints.py`, so that programs without a model do not import torch for them.
"""

import codecs
import errno
import fcntl
import hashlib
import io
import json
import os
import shlex
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.errors import CheckpointError, UserError

SEAL = "seal"  # the entry of a file that has the digest of everything else in it
_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # EACCES: in the words of a server of files (SMB)
_LOOK_AGAIN_S = 0.1
_LOCKED_FOR_S = 10.0  # a line is written in milliseconds
_BLOCK_BYTES = 65_536


# -- replaced in one step ----------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Where to write the new content of a file, which takes its place when the block ends well, and vanishes else.

    Readers see the old or the new content, never a part of it.  synced: it survives a power cut from then on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)  # of a process that was killed, readable by whoever could read that
    try:
        yield aside
        if synced:
            bring_to_disk(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    if synced:
        bring_to_disk(path.parent)  # without it a power cut may take the rename back


def bring_to_disk(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, survives a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_bytes(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace a file in one step.  mode: of the file, less what the user's umask takes."""
    write_parts(path, (content,), mode)


def write_parts(path: Path, parts: Iterable[bytes | memoryview], mode: int = 0o666) -> None:
    """`write_bytes` of a content that comes in parts."""
    with replacing(path) as aside, os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        for part in parts:
            file.write(part)


def write_new(path: Path, content: bytes, mode: int = 0o600) -> Path:
    """Write a file that must not be there yet; it never was readable by more people than `mode` says."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    return path


def read_text(path: Path) -> str:
    """A text that somebody wrote: UTF-8, with or without a byte order mark, or UTF-16 with one (Windows' editors).

    Raises OSError, and UnicodeDecodeError (a ValueError).
    """
    content = path.read_bytes()
    return content.decode(_coding(content)).replace("\r\n", "\n").replace("\r", "\n")


def text_decoder(first: bytes) -> io.IncrementalNewlineDecoder:
    """What decodes such a text block by block, with LF for every end of a line.  first: how the text begins."""
    return io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(_coding(first))(), translate=True)


def _coding(content: bytes) -> str:
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.  Raises CheckpointError when it is missing, cut short or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it is cut short or damaged.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; it is not a file of ours.")
    return value


# -- whose they are ----------------------------------------------------------------------------------------------------

_OTHERS = 0o077  # the permissions of a file's group and of all others


@contextmanager
def private_files(*, shared: bool = False) -> Iterator[None]:
    """What this process and its children make while the block lasts is this account's alone: 0600, in folders of 0700.

    shared: as the account's own umask has it.
    """
    usual = os.umask(_OTHERS)
    if shared:
        os.umask(usual)
    try:
        yield
    finally:
        os.umask(usual)


def open_to_others(paths: Iterable[Path]) -> str:
    """The line to show where other accounts can read or write one of these, made earlier; "" where they cannot."""
    found = {path: mode for path in dict.fromkeys(paths) if (mode := _mode_for_others(path))}
    if not found:
        return ""
    shown = ", ".join(f"{path} (mode {mode:04o})" for path, mode in found.items())
    words = "read and change" if any(mode & 0o022 for mode in found.values()) else "read"
    names = shlex.join(str(path) for path in found)
    return (
        f"other accounts can {words} {shown}; close that: chmod -R go= {names} (or give --shared-files, if it is meant)"
    )


def _mode_for_others(path: Path) -> int:
    """A file's or folder's mode, or 0 where it is not there or others have no way to it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        group, everybody = mode & 0o070, mode & 0o007
        for above in path.resolve().parents:
            ways = above.stat().st_mode
            group = group if ways & 0o011 else 0
            everybody = everybody if ways & 0o001 else 0
    except OSError:
        return 0
    return mode if group or everybody else 0


# -- short enough for a socket -----------------------------------------------------------------------------------------


SOCKET_PATH_BYTES = 103  # of a socket's path on macOS (sockaddr_un); Linux takes four more
_RANDOM_BYTES = 8  # that `mkdtemp` adds to a name


def short_private_folder(prefix: str, inside: str) -> Path:
    """A new folder of this user alone (0700), in which a socket's path fits; whoever asked for it removes it.

    inside: the longest path below it that a socket gets.  TMPDIR is left where it is too long, as a batch system's may
    be: XDG_RUNTIME_DIR and /tmp are tried next.  Raises UserError.
    """
    usual = tempfile.gettempdir()
    longest = SOCKET_PATH_BYTES - len(os.fsencode(f"/{prefix}/{inside}")) - _RANDOM_BYTES
    for place in dict.fromkeys((usual, os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp")):  # noqa: S108
        if place and len(os.fsencode(place)) <= longest:
            with suppress(OSError):
                return Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    raise UserError(
        f"TMPDIR {usual} has {len(os.fsencode(usual))} characters, and the path of a socket leaves {longest}; nothing"
        " can be made in /tmp either. Set TMPDIR to a shorter folder."
    )


# -- sealed ------------------------------------------------------------------------------------------------------------


def seal_of(value: object, parts: Iterable[bytes | memoryview] = ()) -> str:
    """SHA-256 over a value as JSON and the bytes behind it."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def require_seal(path: Path, seal: object, value: object, parts: Iterable[bytes | memoryview] = ()) -> None:
    """Raise CheckpointError where that seal of a file is not `seal_of` what else is in it: a single bit has changed.

    seal: None for a file that was written before there were seals, which is taken as it is.
    """
    if seal is not None and seal != seal_of(value, parts):
        raise CheckpointError(f"{path} is damaged: its content is not what was written.")


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` with a seal, which `read_sealed_json` examines."""
    write_json(path, {**value, SEAL: seal_of(value)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """`read_json` of a file of `write_sealed_json`.  Raises CheckpointError also when it is not what was written."""
    value = read_json(path)
    require_seal(path, value.pop(SEAL, None), value)
    return value


# -- locked ------------------------------------------------------------------------------------------------------------


class InUse(Exception):
    """Another process has the lock."""


def lock(file: IO[Any], within_s: float = 0.0) -> OSError | None:
    """Lock an open file until it is closed or this process dies.  Raises InUse when another has it for `within_s`.

    Returns None, or why the file system has no locks (ENOLCK, ENOSYS, EOPNOTSUPP, ...): nobody is kept out then, and
    the caller goes on and says so.  To refuse would forbid work on such a file system altogether, and what two would do
    there at once is bounded: files are replaced whole, and lines are written whole.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                return error
            if time.monotonic() >= deadline:
                raise InUse from None
            time.sleep(_LOOK_AGAIN_S)
        else:
            return None


# -- lines of JSON -----------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of a file: what it says, or why it says nothing."""

    begin: int  # its first byte in the file
    end: int  # the byte behind it
    record: dict[str, Any] | None
    damage: str  # why there is no record; empty for an empty line too
    text: bytes  # as it stands in the file, without the line break
    is_whole: bool  # the last one may be cut, or is being written


def append_line(path: Path, record: Mapping[str, Any], *, synced: bool) -> None:
    """Add one line to a file, which is made where it is missing; a line that was cut before is left behind, ended.

    synced: be on the disk before this returns.  Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _add_line(file, record, synced=synced)


def append_after(path: Path, make: Callable[[bytes], Mapping[str, Any]], *, synced: bool) -> None:
    """`append_line` of what `make` says of the line before, none but this process adding one meanwhile.

    make: gets the last line's bytes without the line break, also those of one that was cut; none in a new file.
    Raises OSError, also where another process keeps the file for long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            lock(file, _LOCKED_FOR_S)
        except InUse:
            raise OSError(errno.EWOULDBLOCK, f"{path} is in use by another process") from None
        _add_line(file, make(_last_line(file)), synced=synced)


def _add_line(file: IO[bytes], record: Mapping[str, Any], *, synced: bool) -> None:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 1, 0))
    is_cut = file.read(1) not in (b"", b"\n")
    file.write((b"\n" if is_cut else b"") + json.dumps(record).encode() + b"\n")
    file.flush()
    if synced:
        os.fsync(file.fileno())
    if synced and end == 0:
        bring_to_disk(Path(file.name).parent)  # without it a power cut may take the new file's name


def _last_line(file: IO[bytes]) -> bytes:
    """The last line that is not empty, without its line break."""
    begin = end = file.seek(0, os.SEEK_END)
    tail = b""
    while begin > 0 and b"\n" not in tail.rstrip(b"\n"):
        begin = max(0, begin - _BLOCK_BYTES)
        file.seek(begin)
        tail = file.read(end - begin)
    return tail.rstrip(b"\n").rpartition(b"\n")[2]


def read_lines(path: Path, begin: int = 0) -> Iterator[Line]:
    """The lines of a file from byte `begin` on, those that are damaged or empty among them.  Raises OSError."""
    with path.open("rb") as file:
        file.seek(begin)
        for text in file:
            is_whole = text.endswith(b"\n")
            record, damage = _record_of(text, is_whole=is_whole) if text.strip() else (None, "")
            yield Line(begin, begin + len(text), record, damage, text.rstrip(b"\n"), is_whole)
            begin += len(text)


def _record_of(text: bytes, *, is_whole: bool) -> tuple[dict[str, Any] | None, str]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None, "is no JSON" if is_whole else "is cut: whoever wrote it was stopped"
    return (record, "") if isinstance(record, dict) else (None, "is no record")
