"""`facefed data packs list|remove`: which packs lie in a cache folder, how large they are, and which go."""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from common.faces.pack_progress import read_state
from common.faces.pack_store import MANIFEST, STATE, locked_by_nobody, origin_of
from common.faces.shards import FORMAT
from common.system.console import table

_FOLDER = re.compile(r"\.?([0-9a-f]{64})(\.[0-9a-f]{32})?(\.tmp)?")
_SHORT = 12  # characters of a key that are shown, and mostly enough to name it
_FEWEST = 4
WHOLE, UNFINISHED, EARLIER = "whole", "unfinished", "of an earlier version"


@dataclass(frozen=True, kw_only=True)
class KeptPack:
    """A pack's folder.  own_bytes: what its removal frees; shared_bytes: what other packs hold too, by links."""

    folder: Path
    key: str
    state: str  # WHOLE, UNFINISHED or EARLIER
    what: str  # data set, size and coding
    root: str
    num_pictures: int | None
    own_bytes: int
    shared_bytes: int
    changed_at: float


def kept_packs(cache_dir: Path) -> list[KeptPack]:
    """Every pack in a cache folder, whole or not, the newest first.  Raises UserError where there is no such folder."""
    if not cache_dir.is_dir():
        raise UserError(
            f"--cache-dir {cache_dir}: no such folder; packs are made by facefed data prepare and training."
        )
    found = (_kept(path) for path in cache_dir.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name))
    return sorted(found, key=lambda pack: -pack.changed_at)


def _kept(folder: Path) -> KeptPack:
    origin = origin_of(folder)
    is_unfinished = folder.name.endswith(".tmp")
    own = shared = 0
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            about = path.stat()
            own, shared = (own + about.st_size, shared) if about.st_nlink == 1 else (own, shared + about.st_size)
    what, root = "-", "-"
    if origin is not None:
        recipe = origin.recipe
        what = f"{origin.dataset}, {recipe.get('image_size')} px, {recipe.get('alignment')}, {recipe.get('coding')}"
        root = origin.root
    is_ours = origin is not None and origin.format == FORMAT
    state = UNFINISHED if is_unfinished and is_ours else WHOLE if is_ours else EARLIER
    matched = _FOLDER.fullmatch(folder.name)
    return KeptPack(
        folder=folder,
        key=matched[1] if matched else "",
        state=state,
        what=what,
        root=root,
        num_pictures=_num_pictures(folder, is_unfinished=is_unfinished),
        own_bytes=own,
        shared_bytes=shared,
        changed_at=folder.stat().st_mtime,
    )


def _num_pictures(folder: Path, *, is_unfinished: bool) -> int | None:
    if is_unfinished:
        state = read_state(folder / STATE)
        return state.done if state is not None else None
    try:
        found = json.loads((folder / MANIFEST).read_bytes())["num_pictures"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if type(found) is int else None


def size_words(num_bytes: int) -> str:
    """Such as 22.1 GB."""
    amount = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def list_packs(cache_dir: Path, out: TextIO) -> int:
    """Show them, and what could go."""
    packs = kept_packs(cache_dir)
    if not packs:
        out.write(f"{cache_dir}: no packs\n")
        return 0
    rows = [["pack", "pictures", "own size", "shared", "changed", "state", "of", "made from"]]
    for pack in packs:
        number = "-" if pack.num_pictures is None else f"{pack.num_pictures:,}"
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(pack.changed_at))
        sizes = [size_words(pack.own_bytes), size_words(pack.shared_bytes)]
        rows.append([pack.key[:_SHORT], number, *sizes, changed, pack.state, pack.what, pack.root])
    out.write(table(rows) + "\n")
    unused = [pack for pack in packs if pack.state == EARLIER]
    if unused:
        free = size_words(sum(pack.own_bytes for pack in unused))
        out.write(
            f"{len(unused)} of an earlier version are not used any more ({free}): facefed data packs remove --earlier\n"
        )
    return 0


def remove_packs(cache_dir: Path, names: Sequence[str], out: TextIO, *, earlier: bool) -> int:
    """Remove the packs whose keys begin with these names, and with `earlier` all of earlier versions.

    Raises UserError before anything is removed: for a name of no pack or of two, or a pack that is being made.
    """
    packs = kept_packs(cache_dir)
    chosen = {pack.folder: pack for name in names for pack in _named(packs, name, cache_dir)}
    if earlier:
        chosen |= {pack.folder: pack for pack in packs if pack.state == EARLIER}
    elif not names:
        raise UserError("name the packs to remove, as facefed data packs list shows them, or give --earlier.")
    with contextlib.ExitStack() as held:
        for pack in chosen.values():
            if not held.enter_context(locked_by_nobody(cache_dir, pack.key)):
                raise UserError(f"{pack.key[:_SHORT]}: is being packed by another program; stop that first.")
        for pack in chosen.values():
            (pack.folder / MANIFEST).unlink(missing_ok=True)  # from now on it is no whole pack
            shutil.rmtree(pack.folder)
            out.write(f"removed {pack.key[:_SHORT]} ({pack.what}): {size_words(pack.own_bytes)} are free again\n")
    if not chosen:
        out.write("nothing to remove\n")
    return 0


def _named(packs: Sequence[KeptPack], name: str, cache_dir: Path) -> Iterator[KeptPack]:
    found = [pack for pack in packs if len(name) >= _FEWEST and pack.key.startswith(name)]
    if not found:
        known = ", ".join(pack.key[:_SHORT] for pack in packs) or "none"
        raise UserError(
            f"{name}: no pack in {cache_dir} is called so (of its name {_FEWEST} characters at least); there: {known}."
        )
    if len({pack.key for pack in found}) > 1:
        raise UserError(f"{name}: {len(found)} packs begin so; give more of the name.")
    yield from found
