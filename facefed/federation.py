"""A federation of data sets of this machine, as `flower-simulation` runs it."""

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from facefed.data import CACHE

CONFIG: Final = "celeba_vggface2_fedavg"  # the default of `flower-simulation`


@dataclass(frozen=True, kw_only=True)
class Federated:
    """A run that has ended well.  metrics: its metrics.json, explained in docs/METRICS.md."""

    folder: Path
    metrics: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        """What `facefed` and `load_model` take as RUN."""
        return self.folder.name


def simulate(
    clients: Mapping[str, str | Path],
    *,
    config: str = CONFIG,
    settings: Mapping[str, object] = {},
    device: str = "auto",
    cache_dir: str | Path = CACHE,
    out: TextIO | None = None,
) -> Federated:
    """Federate the clients' pictures, each client in processes of its own under Ray; returns when the run is over.

    clients: name -> folder.  A name that is no data set's has one folder a person; "north:celeba" is a client `north`
    with CelebA's layout.  config: NAME of configs/NAME.toml, or a file.  settings: laid over it, such as
    {"federation.rounds": 2, "tracking.enabled": False}.  out: is shown the run as a terminal is; None: sys.stdout.
    Raises facefed's errors, with the line that the program would end with: UserError for what was asked,
    FaceFedError for a run that failed; KeyboardInterrupt where it was stopped.
    """
    from common import config as configurations
    from common.errors import EXIT_DONE, EXIT_INTERRUPTED, FaceFedError
    from common.system.files import private_files, read_json
    from common.system.runtime import go_silent

    go_silent()
    asked, address = configurations.load_with_address(configurations.find_config(config))
    asked = configurations.with_values(asked, settings)
    if "tracking.uri" in settings:
        address = str(settings["tracking.uri"])
    from simulation.commands import federate_here

    begun: list[Path] = []
    told = io.StringIO()
    with private_files(shared=False):
        code = federate_here(
            asked,
            [_as_flag(name, folder) for name, folder in clients.items()],
            device=device,
            cache_dir=Path(cache_dir).expanduser(),
            out=sys.stdout if out is None else out,
            err=told,
            address=address,
            begun=begun.append,
        )
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != EXIT_DONE:
        raise FaceFedError(told.getvalue().strip().removeprefix("flower-simulation: "))
    [folder] = begun
    return Federated(folder=folder, metrics=read_json(folder / "metrics.json"))


def _as_flag(name: str, folder: str | Path) -> str:
    """`--client NAME=DIR` or NAME:DATASET=DIR."""
    from common.faces.datasets import DATASETS

    kind = "" if ":" in name or name in DATASETS else ":folder"
    return f"{name}{kind}={folder}"
