"""Makes the federation's certificates once, and lays into each service's own volume what belongs there.

python make_certs.py FOLDER [SERVER_NAME ...]

    FOLDER/authority   everything, with ca.key; no other service has this volume
    FOLDER/server      ca.crt, server.crt, server.key and the keys that are accepted
    FOLDER/SITE        that site's ca.crt, client.key, name and peers, for each folder beside those two

It may run again at each start: what is there stays, but a server certificate that runs out soon is made anew.
"""

import datetime as dt
import shutil
import sys
from pathlib import Path

from common.system.certs import CA, CLIENTS, SERVER, SERVER_KEY, read_certificate
from common.system.files import replacing
from simulation.admin.certs import make_folder, renew_server

AUTHORITY, OF_SERVER = "authority", "server"
NAMES = ("proxy", "superlink")  # under which sites reach the front door, and the front door the SuperLink
RENEW_DAYS = 60


def main(folder: Path, names: list[str]) -> None:
    """Make or renew, and hand out."""
    kept = folder / AUTHORITY / "federation"
    sites = sorted(path.name for path in folder.iterdir() if path.name not in (AUTHORITY, OF_SERVER))
    if not kept.exists():
        make_folder(kept, [*NAMES, *names], sites)
    left = read_certificate(kept / SERVER).not_valid_after_utc - dt.datetime.now(dt.UTC)
    if left < dt.timedelta(days=RENEW_DAYS):
        renew_server(kept, ())
    for name in (CA, SERVER, SERVER_KEY):
        _replace(kept / name, folder / OF_SERVER / name)
    _replace_all(kept / CLIENTS, folder / OF_SERVER / CLIENTS)
    for site in sites:
        _replace_all(kept / site, folder / site)
    sys.stdout.write(f"certificates for {', '.join(NAMES)} and the sites {', '.join(sites)} are in their volumes\n")


def _replace_all(source: Path, target: Path) -> None:
    """The target's files are the source's afterwards; a key that was revoked goes."""
    target.mkdir(mode=0o700, exist_ok=True)
    for path in target.iterdir():
        if not (source / path.name).exists():
            path.unlink()
    for path in source.iterdir():
        (_replace_all if path.is_dir() else _replace)(path, target / path.name)


def _replace(source: Path, target: Path) -> None:
    """Whole or not at all, and never more readable than the source."""
    with replacing(target) as aside:
        aside.touch(mode=0o600)
        shutil.copyfile(source, aside)
        shutil.copymode(source, aside)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
