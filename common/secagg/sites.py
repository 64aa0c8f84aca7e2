"""How many sites a masked sum may be over, said before anything of a run is begun; and how many must stay."""

import math

from common.errors import UserError
from common.secagg.keys import FEWEST_MEMBERS, MOST_MEMBERS


def require_sites(num_sites: int) -> None:
    """Raises UserError where a run of so many sites cannot have secure aggregation."""
    if not FEWEST_MEMBERS <= num_sites <= MOST_MEMBERS:
        why = "each of two could take itself from the sum" if num_sites < FEWEST_MEMBERS else "each pair shares a mask"
        raise UserError(
            f"secagg.enabled = true with federation.min_clients = {num_sites}: secure aggregation is for"
            f" {FEWEST_MEMBERS} to {MOST_MEMBERS} sites, as {why}; have others take part (--min-clients), or leave"
            " --secagg out."
        )


def threshold_of(fraction: float, num_members: int) -> int:
    """How many of so many must stay: `secagg.threshold` of them, rounded up, and FEWEST_MEMBERS at least."""
    return max(FEWEST_MEMBERS, math.ceil(fraction * num_members))
