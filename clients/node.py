"""Which site a stock SuperNode is, and which client a node of Flower's own simulation: by its configuration alone.

    flower-supernode --node-config 'dataset="celeba" data-dir="/data/celeba"'      a site: flower-client's flags
    flwr run . local --run-config 'clients="celeba=/data/celeba,north:folder=/n"'  a simulation: who asks holds all

A site's settings never come from a run: what `clients` says counts in Flower's simulation only, whose nodes are
processes of whoever started it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from clients.own_machine import parse_clients, site_of
from clients.policy import DEFAULT, read_policy, require_room
from clients.site import OF_SITE, SiteSettings
from common.errors import UserError, unknown_name
from common.faces.datasets import DATASETS
from common.names import CLIENT_NAME, NAME_RULE
from common.secagg.keys import load_identity
from common.system.runtime import num_cores, require_one_version, require_tested_flower, resolve_devices

NodeConfig = Mapping[str, bool | int | float | str]

NODE_KEYS: Final[Mapping[str, type]] = {
    "dataset": str,
    "data-dir": str,
    "name": str,
    "device": str,
    "state-dir": str,
    "cache-dir": str,
    "policy": str,
    "tracking-uri": str,
    "keys": str,
    "site-seed": int,
    "any-flower": bool,
}
PARTITION, NUM_PARTITIONS = "partition-id", "num-partitions"  # Flower's own
_OF_FLOWER: Final = (PARTITION, NUM_PARTITIONS)
_WORDS: Final = {str: 'a text in quotes, such as "celeba"', int: "a whole number", bool: "true or false"}
_EXAMPLE: Final = '--node-config \'dataset="celeba" data-dir="/data/celeba"\''


class NodeRefused(UserError):
    """A node that is no site as it stands; the line holds nothing of this machine, so that the server may read it."""


def check_keys(config: NodeConfig) -> None:
    """Raises NodeRefused for a key that is unknown, of another type, or not there."""
    for key, value in config.items():
        if key in _OF_FLOWER:
            continue
        if key not in NODE_KEYS:
            raise NodeRefused(unknown_name("--node-config: the key", key, NODE_KEYS))
        if type(value) is not NODE_KEYS[key]:
            raise NodeRefused(f"--node-config: {key} must be {_WORDS[NODE_KEYS[key]]}.")
    missing = [key for key in ("dataset", "data-dir") if not config.get(key)]
    if missing:
        raise NodeRefused(
            f"this node is no site of FaceFed: its configuration has no {' and no '.join(missing)}; start its SuperNode"
            f" with {_EXAMPLE}."
        )


def site_of_node(config: NodeConfig) -> SiteSettings:
    """The site that a SuperNode's `--node-config` describes, as flower-client's flags of the same names do.

    Raises UserError; NodeRefused where the server may read the line.
    """
    check_keys(config)
    accept = bool(config.get("any-flower", False))
    require_tested_flower(any_flower=accept, flag="--node-config any-flower=true")
    require_one_version("this node")
    text = {key: str(config.get(key, "")) for key in NODE_KEYS}
    keys, name = _keys(text["keys"], text["name"])
    dataset, name = text["dataset"], name or text["dataset"]
    if dataset not in DATASETS:
        raise NodeRefused(unknown_name("--node-config: the dataset", dataset, DATASETS))
    if not CLIENT_NAME.fullmatch(name):
        raise NodeRefused(f"--node-config: name must be {NAME_RULE}.")
    policy = read_policy(Path(text["policy"]).expanduser()) if text["policy"] else DEFAULT
    seed = config.get("site-seed", OF_SITE)
    return SiteSettings(
        name=name,
        dataset=dataset,
        data_dir=Path(text["data-dir"]).expanduser().resolve(),
        device=",".join(resolve_devices(text["device"] or "auto")),
        state_dir=Path(text["state-dir"] or f".facefed/clients/{name}").expanduser().resolve(),
        cache_dir=Path(text["cache-dir"] or ".facefed/packs").expanduser().resolve(),
        pack_workers=num_cores(),
        tracking_uri=_tracking_uri(text["tracking-uri"]),
        policy=policy,
        seed=seed if isinstance(seed, int) else OF_SITE,
        keys=keys,
    )


def _keys(text: str, name: str) -> tuple[Path | None, str]:
    """The folder of `facefed certs` with this site's key, for secure aggregation, and the site's name, which it says.

    Raises UserError; NodeRefused where `name` is another.
    """
    if not text:
        return None, name
    folder = Path(text).expanduser().resolve()
    owner = load_identity(folder).name
    if name and owner != name:
        raise NodeRefused(
            f"--node-config: keys holds the key of {owner!r} and name is {name!r}; a site has its key's name, so leave"
            " name out or give the folder of its own key."
        )
    return folder, owner


def _tracking_uri(text: str) -> str:
    from common.tracking.address import resolve_uri

    return resolve_uri(text, Path.cwd()) if text else ""


def check_room(site: SiteSettings, policy_file: str) -> None:
    """Raises UserError where the site's data are fewer than its own policy wants of every run, or are none."""
    from common.faces.index import read_index

    index = read_index(site.dataset, site.data_dir)
    path = Path(policy_file) if policy_file else None
    require_room(site.policy, path, num_people=len(index.people), num_pictures=len(index.paths))


def site_of_partition(config: NodeConfig, clients: str, *, out: str) -> SiteSettings:
    """The client of a partition of Flower's simulation: `clients` in order of their names, as NAME=DIR,NAME=DIR.

    out: the run's `run.out`, below which a simulation's clients keep what is theirs.  Raises NodeRefused.
    """
    number, num_partitions = int(config.get(PARTITION, 0)), int(config.get(NUM_PARTITIONS, 0))
    if not clients.strip():
        raise NodeRefused(f"partition {number} has no client: give --run-config 'clients=\"celeba=/data/celeba\"'.")
    try:
        options = parse_clients([text.strip() for text in clients.split(",") if text.strip()], "clients")
    except UserError as error:  # whoever asks wrote it, and holds this machine
        raise NodeRefused(str(error)) from None
    names = ", ".join(option.name for option in options)
    if num_partitions and num_partitions < len(options):
        raise NodeRefused(
            f"the simulation has {num_partitions} SuperNodes and clients names {len(options)} ({names}); give"
            f" --federation-config num-supernodes={len(options)}."
        )
    if number >= len(options):
        raise NodeRefused(
            f"partition {number} has no client: clients names {len(options)} ({names}); give --federation-config"
            f" num-supernodes={len(options)}, or name more."
        )
    option = options[number]
    if not option.data_dir.is_absolute():
        where = f"clients {option.name}={option.data_dir}"
        raise NodeRefused(f"{where}: write an absolute path; Flower's nodes work elsewhere.")
    return site_of(
        option, device="auto", cache_dir=Path(".facefed/packs"), state_dir=Path(out).expanduser() / "clients"
    )
