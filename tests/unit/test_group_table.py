"""Errors by group as they are shown: on the terminal, in a card, in a record."""

import json

from common.metrics.groups import ByGroup, GroupErrors
from common.metrics.thresholds import Threshold
from common.system.group_table import group_content, group_lines, group_metrics, group_section
from common.system.run_view import federation_ending

AT = Threshold(
    far=1e-3, threshold=0.5, measured_far=1e-3, far_low=0.0, far_high=0.01, measured_tar=0.9, tar_low=0.8, tar_high=1.0
)


def errors(group, fmr, fnmr):
    return GroupErrors(
        group=group, num_people=12, num_sites=2, num_genuine_pairs=40, num_impostor_pairs=400,
        fmr=fmr, fmr_low=0.0, fmr_high=0.5, fnmr=fnmr, fnmr_low=0.0, fnmr_high=0.5,
    )  # fmt: skip


FOUND = ByGroup(
    model="federated",
    threshold=AT,
    errors=(errors("Male", 0.01, 0.2), errors("not Male", 0.04, 0.0)),
    too_small={"Young": 3},
)


def test_the_card_has_what_the_terminal_has():
    lines, section = group_lines([FOUND], 10), group_section(FOUND, 10)
    for text in ("\n".join(lines), section):
        assert "0.0400 (0.0000 to 0.5000)" in text
        assert "worst to best: FMR 4.0, FNMR not finite (the best has none)" in text
        assert "left out, fewer than 10 people: Young 3" in text
    assert "| not Male | 12 |" in section
    assert "cosine 0.5000" in section


def test_a_ratio_to_none_is_null_and_no_metric():
    content = json.loads(json.dumps(group_content([FOUND], 10), allow_nan=False))
    assert content["models"][0]["worst_to_best"] == {"fmr": 4.0, "fnmr": None}
    metrics = group_metrics(FOUND)
    assert metrics["groups/fmr_worst_to_best"] == 4.0
    assert "groups/fnmr_worst_to_best" not in metrics
    assert metrics["groups/not Male/fmr"] == 0.04


def test_a_federations_end_shows_them():
    summary = {
        "model_sha256": "ab", "groups": group_content([FOUND], 10), "best_round": 1, "rounds": 1, "untrained": {},
        "best": {}, "clients": {}, "registered": [], "refused_replies": 0,
    }  # fmt: skip
    shown = "\n".join(federation_ending(summary).notes)
    assert "federated by group, at its threshold (cosine 0.5000, FAR 0.001 on validation people)" in shown


def test_without_a_threshold_that_is_said():
    none = ByGroup(model="m", threshold=None, errors=(), too_small={})
    assert group_section(none, 10) == "Too few validation pairs for a threshold."
