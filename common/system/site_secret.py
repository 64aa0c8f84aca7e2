"""The secret of a site, and digests keyed with it: equal for equal things over rounds and runs, and a riddle to others.

It lies beside the packs, so that all programs of a site have the same one.  Whoever knows no secret cannot try names or
machines out against a digest, however few there are.
"""

import hashlib
import hmac
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from common.errors import CheckpointError
from common.system.files import write_new

FILE: Final = "site-secret"
NUM_BYTES: Final = 32
LOOKS, BETWEEN_LOOKS_S = 20, 0.05


def site_secret(folder: Path) -> bytes:
    """The secret that lies in the folder, 0600; who asks first makes it.  Raises CheckpointError where it is cut."""
    path = folder / FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another program of the site was first
            write_new(path, secrets.token_bytes(NUM_BYTES))
    for _ in range(LOOKS):  # who was first may be writing
        content = path.read_bytes()
        if len(content) >= NUM_BYTES:
            break
        time.sleep(BETWEEN_LOOKS_S)
    if len(content) < NUM_BYTES:
        raise CheckpointError(f"{path} has {len(content)} bytes, not {NUM_BYTES}; delete it, and another is made.")
    return content


def keyed_digest(secret: bytes, what: str, value: str, *, digits: int) -> str:
    """So many hexadecimal digits of HMAC-SHA-256 of the value.  what: keeps digests of different things apart."""
    return hmac.new(secret, f"{what}\n{value}".encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:digits]


def keyed_seed(secret: bytes, what: str, value: str) -> int:
    """A seed of 128 bits that nobody without the secret knows, and that is the same for the same things."""
    return int(keyed_digest(secret, what, value, digits=32), 16)
