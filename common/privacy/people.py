"""Whether so few people, or clients, can be protected as a run wants, and what a person is told of the guarantee."""

from common.settings import PrivacySettings


def num_groups_of(num_people: int, group_people: int) -> int:
    """How many groups so many people make; at least one."""
    return max(1, num_people // group_people)


def problem_of(privacy: PrivacySettings, num_units: int) -> str:
    """What stands against it, in one sentence; "" where nothing does.

    num_units: people to train on, at a site; with privacy.unit = "site" clients.
    """
    units = {"person": "people", "site": "clients"}.get(privacy.unit, "")
    if units and privacy.delta * num_units >= 1.0:
        return (
            f"privacy.delta = {privacy.delta:g} would allow one of {num_units} {units} to be given away whole; it must"
            f" be below {1.0 / num_units:.2g}."
        )
    if privacy.unit == "person" and num_units < privacy.group_people:
        return (
            f"privacy.group_people = {privacy.group_people} is more than the {num_units} people to train on; lower it."
        )
    return ""


def words_of(privacy: PrivacySettings) -> str:
    """The guarantee in a line for whoever watches a run; "" without one."""
    if not privacy.is_on:
        return ""
    whose = {"person": "one person at a site, whose own noise it is", "site": "one client, by the server's noise"}
    what = whose[privacy.unit]
    if privacy.is_shared:
        what = f"one person in the sum, by all sites' noise while at most {privacy.colluding_sites} of them tell theirs"
    return f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}, of {what}; no scores leave the sites"
