"""How many sites a masked sum may be over, said before anything of a run is begun."""

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
