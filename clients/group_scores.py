"""Which counts of pairs within groups of people leave this site: of groups with enough people, once a run, or none.

What its people are (`verification.by`) stays here: only histograms of their pairs and three counts of each group leave,
and those of both of an attribute's groups or of neither.
"""

import logging

import numpy as np
from numpy.typing import NDArray

from clients.policy import Policy
from clients.run_state import ClientState, telling_of
from clients.scores import merged_bins
from common.errors import DataError, ReplyRefused, UserError, one_line
from common.faces.attributes import people_of_groups
from common.faces.splits import Split
from common.metrics.design import pair_design
from common.metrics.group_names import attributes_of, group_names
from common.metrics.groups import NOBODY, GroupPairs, pairs_of_groups, with_enough
from common.metrics.pairs import designed_histogram, pair_histogram
from common.protocol.wire import Task
from common.system.events import SHOWN
from common.system.progress import SCORING
from common.system.runtime import stream_seed
from common.training.evaluation import embed, people_digest
from common.training.loop import Compute

log = logging.getLogger("facefed.client")


def groups_leaving(state: ClientState, task: Task, compute: Compute) -> NDArray[np.int64]:
    """A row for each group of the run, [G, GROUP_ROW] int64: zeros of those of which nothing leaves.

    Raises ReplyRefused where the run's settings ask for no groups.
    """
    attributes = attributes_of(state.settings.verification.by)
    if not attributes:
        raise ReplyRefused("errors by group are asked for, and the run's settings say nothing of groups.")
    least = max(state.settings.verification.group_people, state.site.policy.min_group_people)
    why = _why_none(state.site.policy)
    found: dict[str, GroupPairs] = {}
    if not why:
        try:
            found = _counted(state, task, compute, attributes)
        except (UserError, DataError) as error:  # a folder that says nothing of its people takes part all the same
            why = one_line(str(error))
    leaves = with_enough(found, attributes, least, state.site.policy.min_pairs) if found else {}
    small = [group for group, pairs in leaves.items() if not pairs.num_sites]
    told = why or (f"fewer than {least} people, or too few pairs: {', '.join(small)}" if small else "")
    if state.site.share is None:
        gone = ", ".join(group for group in leaves if group not in small) or "nothing"
        log.info("%s%s: errors by group: %s leaves%s", SHOWN, state.site.name, gone, f" ({told})" if told else "")
    bins = int(state.site.policy.score_bins)
    rows = [leaves.get(group, NOBODY) for group in group_names(attributes)]
    return np.stack([_coarser(pairs, bins).row for pairs in rows])


def _why_none(policy: Policy) -> str:
    if not policy.groups:
        return "the site's policy: groups = false"
    return "" if policy.scores == "exact" else f'the site\'s policy: scores = "{policy.scores}"'


def _counted(state: ClientState, task: Task, compute: Compute, attributes: tuple[str, ...]) -> dict[str, GroupPairs]:
    """The pairs within each group of the test people, as many as the run and the site's policy score of a split."""
    site, pack = state.site, state.pack
    people = people_of_groups(site.dataset, site.data_dir, attributes, site.name)
    indices, person, _ = pack.shown_in(Split.TEST_PEOPLE)
    number = {identifier: row for row, identifier in enumerate(pack.people)}
    members = {group: [number[one] for one in named if one in number] for group, named in people.items()}
    with telling_of(state, task, SCORING, len(indices)) as tick:
        embeddings = embed(state.recogniser, pack, indices, compute, tick).numpy()
    most, of_person = state.settings.verification.max_pairs, site.policy.max_person_pairs
    seed = stream_seed("pairs", people_digest(pack, "test"))

    def histogram(of_group: NDArray[np.float32], shown: NDArray[np.int64]) -> NDArray[np.int64]:
        design = pair_design(shown, most=most, seed=seed, most_of_person=of_person)
        return pair_histogram(of_group, shown) if design is None else designed_histogram(of_group, shown, design)

    return pairs_of_groups(embeddings, person, members, histogram)


def _coarser(pairs: GroupPairs, num_bins: int) -> GroupPairs:
    return GroupPairs(
        histogram=merged_bins(pairs.histogram, num_bins),
        num_people=pairs.num_people,
        num_people_pairs=pairs.num_people_pairs,
        num_sites=pairs.num_sites,
    )
