"""What a site is shown of a run: what the history comes to, the line after a round, and lies that are left out."""

import json
import math

import pytest
from tiny_federation import MANIFEST, reply_to, settings_with, site_settings, task_for

from clients import own_record
from clients.own_record import keep_round, known_progress, round_words, tell_round
from common.metrics.figures import AUC
from common.metrics.names import ROUND_SECONDS
from common.protocol import wire
from common.system.events import SHOWN
from server.record.history import NEWEST, History, progress_of
from server.rounds import Federation

SETTINGS = settings_with(federation__rounds=10)


def asked(**values):
    return task_for(MANIFEST, SETTINGS, server_round=3, splits="", **values)


def test_the_newest_score_and_the_newest_rounds_seconds_are_what_a_site_is_told():
    history = History()
    assert progress_of(history, 1, 10) == {"scored_round": -1, "val_auc": -1.0, "seconds_left": -1.0}
    for number in range(8):
        history.at(number).metrics |= {"val_roc_auc": 0.5 + number / 100, ROUND_SECONDS: float(number)}
    del history.at(7).metrics["val_roc_auc"]
    mean = sum(range(8 - NEWEST, 8)) / NEWEST
    assert progress_of(history, 8, 10) == {"scored_round": 6, "val_auc": 0.56, "seconds_left": 3 * mean}
    assert progress_of(history, 11, 10)["seconds_left"] == 0.0
    assert set(history.rounds) == set(range(8))  # looking made no round


def test_every_task_of_a_round_brings_it(monkeypatch):
    given = {"scored_round": 2, "val_auc": 0.75, "seconds_left": 90.0}
    monkeypatch.setattr("server.rounds.progress_of", lambda *_: given)
    made = []
    monkeypatch.setattr("server.rounds._tasks_for", lambda _members, task, _settings: made.append(task) or {})
    federation = Federation.__new__(Federation)
    federation.settings, federation.run_id, federation.manifest, federation.history = SETTINGS, "r", MANIFEST, History()
    federation._tasks("train", 3, {}, "val")
    assert {name: getattr(made[0], name) for name in given} == given


def test_the_line_after_a_round_has_all_that_a_site_wants_to_know():
    reply = reply_to(asked())
    leaving = wire.counts_nbytes(reply) + reply.change.nbytes
    words = round_words(asked(scored_round=2, val_auc=0.7012, seconds_left=754.0), 10, reply, 5_000_000 - leaving)
    assert words == (
        "round 3 of 10 is done here in 1.0 s; train loss 1.000; the model of round 2 over all sites: val AUC 0.701;"
        f" {leaving / 1e6:.1f} MB go out (5.0 MB in this run); about 12:34 left"
    )
    assert round_words(asked(), 10, reply, 0) == (
        f"round 3 of 10 is done here in 1.0 s; train loss 1.000; {leaving / 1e6:.1f} MB go out"
        f" ({leaving / 1e6:.1f} MB in this run)"
    )


@pytest.mark.parametrize("auc", [math.nan, math.inf, -0.1, 1.01, "0.7", True, None])
@pytest.mark.parametrize("left", [math.nan, -5.0, 1e12, "soon\x1b[2J"])
def test_what_a_server_says_is_shown_only_where_it_can_be(auc, left):
    assert known_progress(asked(scored_round=2, val_auc=auc, seconds_left=left), 10) == {}


@pytest.mark.parametrize("scored", [-1, 11, "2"])
def test_a_score_of_no_round_is_none(scored):
    assert known_progress(asked(scored_round=scored, val_auc=0.7), 10) == {}


def test_what_left_before_is_counted_from_the_ledger(tmp_path, caplog):
    site = site_settings("alpha", tmp_path)
    ledger = site.state_dir / "egress" / "run-1.jsonl"
    ledger.parent.mkdir(parents=True)
    lines = [{"kind": "sent", "num_bytes": 7_000_000}, {"kind": "received", "num_bytes": 7_000_000}]
    ledger.write_text("\n".join(map(json.dumps, [*lines, {"kind": "sent", "num_bytes": 2_000_000}])) + "\n{cut")
    with caplog.at_level("INFO"):
        tell_round(site, asked(), SETTINGS, reply_to(asked()))
    assert "(9.0 MB in this run)" in caplog.text or "(9.1 MB in this run)" in caplog.text
    assert caplog.records[0].args[0] == SHOWN


def test_the_sites_own_record_has_the_models_score_at_the_round_that_made_it(tmp_path, monkeypatch):
    logged = []

    class Tracked:
        def pause(self):
            """Nothing."""

        def log_metrics(self, metrics, step):
            logged.append((step, metrics))

    monkeypatch.setattr(own_record, "_open", lambda *_, **__: Tracked())
    monkeypatch.setattr(own_record, "sample_hardware", lambda *_: None)
    task = asked(scored_round=2, val_auc=0.75, seconds_left=90.0)
    with keep_round(site_settings("alpha", tmp_path), task, SETTINGS, num_pictures=9, bytes_down=7) as keep:
        keep(reply_to(task))
    assert (2, {f"global/val_{AUC}": 0.75}) in logged
    (own,) = [metrics for step, metrics in logged if step == 3]
    assert own["time/left_seconds"] == 90.0
    assert "bytes/up" in own
