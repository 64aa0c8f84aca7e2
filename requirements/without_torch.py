"""Prints a file of locked requirements without torch and what torch alone brings, which come from another index then.

python without_torch.py LOCK
"""

import re
import sys
from pathlib import Path

OF_TORCH = ("torch", "torchvision", "triton", "nvidia-", "cuda-")  # what ends in "-" begins a name


def without_torch(lock: str) -> str:
    """The other entries, each with its hashes."""
    entries = re.split(r"^(?=\S)", lock, flags=re.MULTILINE)
    return "".join(entry for entry in entries if not _is_of_torch(entry.partition("==")[0]))


def _is_of_torch(name: str) -> bool:
    return name in OF_TORCH or any(name.startswith(one) for one in OF_TORCH if one.endswith("-"))


if __name__ == "__main__":
    sys.stdout.write(without_torch(Path(sys.argv[1]).read_text(encoding="utf-8")))
