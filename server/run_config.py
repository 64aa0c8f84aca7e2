"""What `flwr run --run-config` may say: a configuration, any setting by its dotted name, and four words of its own.

Flower takes no key that the project file does not declare, so `[tool.flwr.app.config]` there has all of `declared`; a
setting that nobody gives stands there as "", which is no value of any setting.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common import config
from common.errors import ConfigError, UserError, unknown_name
from common.redact import shown_uri
from common.settings import RunSettings, Settings
from common.system.runtime import tracking_uri_of_environment

RunConfig = Mapping[str, bool | int | float | str]

DEFAULT_CONFIG: Final = "celeba_vggface2_fedavg"
OWN: Final[RunConfig] = {"config": DEFAULT_CONFIG, "clients": "", "resume": "", "any-flower": False}
NOT_GIVEN: Final = ""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run's configuration comes to."""

    settings: Settings
    address: str  # of the tracking, with the password that may be in it
    clients: tuple[str, ...]  # of Flower's simulation, as NAME=DIR; none in a deployment
    resumed: Path | None  # the folder of the run that goes on


def declared() -> dict[str, bool | int | float | str]:
    """Every key that a run's configuration may have, and what the project file has for it."""
    settings = config.to_mapping(Settings())
    return {**OWN, **{f"{section}.{key}": NOT_GIVEN for section, table in settings.items() for key in table}}


def read_run_config(given: RunConfig) -> Asked:
    """Settings and more from a run's configuration, as Flower hands it to the ServerApp.

    Raises ConfigError with all wrong settings at once; UserError.
    """
    known = declared()
    for key in given:
        if key not in known:
            raise UserError(unknown_name("--run-config: the key", key, known))
    overrides = {key: value for key, value in given.items() if key not in OWN and value != NOT_GIVEN}
    uri = str(overrides.get("tracking.uri", ""))
    if shown_uri(uri) != uri:
        raise UserError(
            "--run-config: tracking.uri has a password, and Flower hands the run's configuration to every node; write"
            ' it into a TOML file on the server and give config="/path/of/it.toml".'
        )
    texts = {key: str(given.get(key, value)) for key, value in OWN.items()}
    clients = tuple(text.strip() for text in texts["clients"].split(",") if text.strip())
    if texts["resume"]:
        return _resumed(texts["resume"], clients, overrides)
    settings, address = _load(texts["config"], overrides)
    if clients:
        settings = config.with_value(settings, "federation", "min_clients", len(clients))
    return Asked(settings=settings, address=address, clients=clients, resumed=None)


def _load(name: str, given: RunConfig) -> tuple[Settings, str]:
    path = config.find_config(DEFAULT_CONFIG if name in ("", "default") else name, "--run-config config =")
    overrides: dict[tuple[str, str], object] = {}
    if tracking_uri_of_environment():
        overrides[("tracking", "uri")] = tracking_uri_of_environment()
    for dotted, value in given.items():
        section, _, key = dotted.partition(".")
        overrides[(section, key)] = value
    try:
        return config.load_with_address(path, overrides)
    except ConfigError as error:
        raise ConfigError([_blamed(problem, f"{path}: ", given) for problem in error.problems]) from None


def _blamed(problem: str, source: str, given: RunConfig) -> str:
    """A problem of a setting that was given is none of the file's."""
    bare = problem.removeprefix(source)
    return f"--run-config: {bare}" if bare.split(" ", 1)[0] in given else problem


def _resumed(run: str, clients: tuple[str, ...], given: RunConfig) -> Asked:
    from common.runs import unfinished_federation

    others = [*(["clients"] if clients else []), *(key for key in given if key != "run.out")]
    if others:
        raise UserError(
            f"--run-config: resume goes on with the run's own settings and sites; leave {', '.join(others)} out."
        )
    out = str(given.get("run.out", RunSettings().out))
    folder, settings, address = unfinished_federation(run, out, None)
    return Asked(settings=settings, address=address, clients=(), resumed=folder)
