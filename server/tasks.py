"""What each client of a round is asked to do, where what one machine does has to fit together."""

import dataclasses
from collections.abc import Mapping

from common.precision import threads_for
from common.settings import Settings
from common.wire import Task
from server.roster import Member


def tasks_for(members: Mapping[str, Member], task: Task, settings: Settings) -> dict[str, Task]:
    """The task of each member by name; clients of one machine get equal precision and divided cores.

    task: what is the same for all of them.
    """
    first_on: dict[tuple[str, str], Member] = {}
    num_on: dict[str, int] = {}
    for member in members.values():
        first_on.setdefault((member.site.machine, member.site.device), member)
        num_on[member.site.machine] = num_on.get(member.site.machine, 0) + 1
    tasks = {}
    for name, member in members.items():
        of_kind = first_on[(member.site.machine, member.site.device)].site
        tasks[name] = dataclasses.replace(
            task,
            precision=of_kind.precision,
            memory_format=of_kind.memory_format,
            compiled=of_kind.compiled,
            threads=threads_for(settings, num_on[member.site.machine], member.site.cores),
        )
    return tasks
