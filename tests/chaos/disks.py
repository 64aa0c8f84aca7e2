"""A small disk of its own for one folder, which can be filled and emptied again."""

import os
import subprocess
from pathlib import Path
from typing import Self

SIZE = "200m"  # a run needs 50 MB to begin; a small one writes less than 20
PIECE = bytes(1 << 20)


class SmallDisk:
    """A tmpfs on a folder, while the block lasts.  Raises OSError where this process may not mount."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(self.folder)], capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"no small disk can be mounted ({done.stderr.strip()})")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def fill(self) -> None:
        """Leave not a byte of room."""
        with self._filler.open("ab", buffering=0) as file:
            try:
                while file.write(PIECE) == len(PIECE):
                    pass
                os.fsync(file.fileno())
            except OSError:
                pass

    def empty(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)
