"""What `facefed privacy audit` found of a model: beside the run, beside its registered versions, and in their cards.

Audits of several sites, or of one site again, add up in one file, MEMBERSHIP, as long as they are of the same step.
"""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from common.errors import TrackingError
from common.metrics.membership import Membership
from common.redact import shown_uri
from common.system.files import write_json
from common.tracking.card import with_membership
from common.tracking.delivery import quieten
from common.tracking.registry import MODEL_CARD, PREFIX, Registered, client_of, file_of_model, read_registered
from common.tracking.sender import short_reason
from common.tracking.spool import SENT_NAME, load_sent

MEMBERSHIP: Final = "membership.json"
Audited = Mapping[str, Mapping[str, Membership]]  # site -> what the attacker has -> what they reached

_log = logging.getLogger("facefed.tracking")


def keep_in_run(folder: Path, step: int, audited: Audited) -> Path:
    """Add to RUN/membership.json what sites found of the model of a step; returns the file.  Raises OSError."""
    path = folder / MEMBERSHIP
    before = _earlier(path.read_text(encoding="utf-8", errors="replace") if path.exists() else None, step, str(path))
    write_json(path, _content({**before, **audited}, step))
    return path


def keep_in_cards(address: str, uris: Sequence[str], audited: Audited) -> list[str]:
    """Make the cards of registered versions anew with what sites found; returns the versions where that was done.

    address: of the tracking, resolved.  uris: models:/NAME/VERSION.  A registry that takes nothing costs a warning.
    """
    done = []
    for uri in uris:
        try:
            _make_anew(read_registered(address, uri), audited)
        except Exception as error:  # MLflow raises what its database or network library raises
            _log.warning("Tracking: the card of %s stays as it is (%s).", uri, short_reason(error))
        else:
            done.append(uri)
    return done


def registered_of_run(address: str, folder: Path, step: int) -> list[str]:
    """models:/NAME/VERSION of the models that a run registered of a step; none where nobody knows of the run there.

    address: of the tracking, resolved.  folder: the run's.
    """
    run_id = load_sent(folder, shown_uri(address)).run_ids.get("") if (folder / SENT_NAME).is_file() else None
    if run_id is None:
        return []
    try:
        found = client_of(address).search_model_versions(f"run_id = '{run_id}'")
    except Exception as error:
        _log.warning("Tracking: %s cannot be asked for models (%s).", shown_uri(address), short_reason(error))
        return []
    return sorted(f"{PREFIX}{one.name}/{one.version}" for one in found if one.tags.get("step") == str(step))


def _make_anew(registered: Registered, audited: Audited) -> None:
    """Add to a version's MEMBERSHIP, and write its card, and its description, with all of it.  Raises anything."""
    before = _earlier(file_of_model(registered, MEMBERSHIP), registered.step, f"{registered.uri}: {MEMBERSHIP}")
    every = {**before, **audited}
    name, _, number = registered.uri.removeprefix(PREFIX).rpartition("/")
    quieten()
    client = client_of(registered.address)
    version = client.get_model_version(name, number)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / MEMBERSHIP, _content(every, registered.step))
        card = file_of_model(registered, MODEL_CARD)
        if card is not None:
            (Path(folder) / MODEL_CARD).write_text(with_membership(card, every), encoding="utf-8")
        logged = str(version.source or "")  # models:/ID of the logged model, as `delivery` registers it
        if not logged.startswith(PREFIX):
            raise TrackingError(f"{registered.uri} is of {logged or 'no source'}, which takes no files")
        client.log_model_artifacts(logged.removeprefix(PREFIX), folder)
    client.update_model_version(name, number, description=with_membership(version.description or "", every))


def _content(audited: Audited, step: int) -> dict[str, Any]:
    sites = {
        site: [{"attacker": attacker, **found.to_json()} for attacker, found in models.items()]
        for site, models in audited.items()
    }
    return {"step": step, "sites": sites}


def _earlier(text: str | None, step: int, where: str) -> Audited:
    """What a file says of the model of this step: nothing where there is none, or it is of another step or damaged."""
    try:
        content: dict[str, Any] = {"step": None} if text is None else json.loads(text)
        if content["step"] != step:
            return {}
        return {
            str(site): {str(row["attacker"]): Membership.from_json(row) for row in rows}
            for site, rows in content["sites"].items()
            if rows
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        _log.warning("%s is damaged (%s); it is written anew, with this audit alone.", where, short_reason(error))
        return {}
