"""What a person sees of a run: header, a line for each round, how far it is, the table at its end."""

import io
import json
import re
import time
from pathlib import Path

import pytest

from common import config
from common.metrics.names import of_split
from common.settings import Settings
from common.system import run_view
from common.system.events import EventLog, EventReader
from common.system.progress import Amount
from common.system.run_view import (
    Ending,
    Follower,
    RoundLines,
    RunView,
    begin_rows,
    compute_words,
    ending_lines,
    event_line,
    federation_ending,
    header_lines,
    model_words,
    training_words,
    warnings_of,
)

ROOT = Path(__file__).resolve().parents[2]
JOINED = {
    "kind": "joined",
    "client": "celeba",
    "people": 1200,
    "pictures": 34567,
    "device": "cpu",
    "here": ["celeba"],
    "wanted": 2,
}
ROUND = {"kind": "round", "round": 1, "rounds": 3, "clients": 2, "train_loss": 4.5678, "seconds": 10.0}
MEMBERS = {"kind": "members", "clients": 2, "rounds": 3, "compute": "cpu, bfloat16, 1 thread for each client"}
ASKED = {"kind": "asked", "round": 1, "task": "train", "clients": 2, "pictures": 4000}
WAITING = {"kind": "waiting", "here": [], "wanted": 2, "seconds": 10}
TOLD = {"kind": "progress", "client": "celeba", "work": "training", "words": "training 31 %", "pictures": 500}
EVENTS = [
    (JOINED, "joined: celeba (1,200 people, 34,567 training pictures, cpu); 1 of 2 clients are here"),
    (WAITING, "waiting for clients: nobody yet here, 2 more needed (10 s)"),
    (WAITING | {"here": ["a"]}, "waiting for clients: a here, 1 more needed (10 s)"),
    (WAITING | {"simulated": True}, "preparing: 2 of 2 clients open their pictures (10 s)"),
    ({"kind": "starting", "actors": 2}, "starting 2 processes that train for the clients"),
    ({"kind": "begun", "model": "cnn"}, "  model       cnn"),
    ({"kind": "refused", "client": "a", "round": 2, "reason": "it is late"}, "left out in round 2: a: it is late"),
    ({"kind": "refused", "client": "", "reason": "a: no pictures"}, "left out: a: no pictures"),
    ({"kind": "saving"}, "registering the model"),
    ({"kind": "resumed", "round": 3}, "going on after round 3"),
    ({"kind": "gathered", "clients": 1000, "wanted": 50}, "joined: 1,000 clients are here (50 needed)"),
    ({"kind": "warning", "line": "a word"}, "a word"),
    ({"kind": "stopped_early", "round": 3, "line": "stopped early after round 3"}, "stopped early after round 3"),
    (MEMBERS, "  device      cpu, bfloat16, 1 thread for each client"),
    (ASKED, ""),
    (
        WAITING | {"at_work": {"celeba": "packing 31 %, 40 min left"}},
        "waiting for clients: nobody yet here, 2 more needed (10 s); celeba: packing 31 %, 40 min left",
    ),
    (TOLD, ""),
    ({"kind": "answered", "answered": 1, "pictures": 10}, ""),
    ({"kind": "finished"}, ""),
    ({"kind": "failed", "line": "x", "exit_code": 1}, ""),
]
MADE_TOGETHER = {"round", "scored"}  # their line is made of several


def scored(step, split, best=0, *, is_last=True, **figures):
    named = {of_split(split, name): value for name, value in figures.items()}
    return {"kind": "scored", "round": step, "split": split, "best_round": best, "is_last": is_last, **named}


@pytest.mark.parametrize(
    ("event", "line"), EVENTS, ids=lambda value: value if isinstance(value, str) else value["kind"]
)
def test_each_event_is_a_plain_line(event, line):
    assert event_line(event) == line
    out = io.StringIO()
    with RunView(out) as view:
        view.show(event)
    assert out.getvalue() == (line + "\n" if line else "")


def test_every_kind_that_is_emitted_is_known_here():
    """A new event needs a decision whether a person reads it."""
    emitted = set()
    for package in ("common", "server", "clients", "simulation", "facefed"):
        for file in (ROOT / package).rglob("*.py"):
            emitted |= set(re.findall(r"""\.emit\(\s*"(\w+)\"""", file.read_text("utf-8")))
    assert emitted
    assert emitted <= {event["kind"] for event, _ in EVENTS} | MADE_TOGETHER


def test_a_model_that_is_scored_alone_is_no_untrained_one():
    line = RoundLines().scored(scored(0, "val", roc_auc=0.6) | {"evaluated": True})
    assert line == "the model: val AUC 0.600"


def test_a_round_is_one_line_with_its_scores_their_change_and_the_best():
    lines, out = RoundLines(), []
    out.append(lines.scored(scored(0, "val", roc_auc=0.6, eer=0.4, is_last=False)))
    out.append(lines.scored(scored(0, "test", roc_auc=0.61)))
    lines.trained(ROUND)
    out.append(lines.scored(scored(1, "val", 1, roc_auc=0.7, eer=0.3, accuracy=0.1)))  # test is not due
    lines.trained(ROUND | {"round": 2})
    out.append(lines.scored(scored(2, "public", 1, roc_auc=0.9, is_last=False)))
    out.append(lines.scored(scored(2, "val", 1, roc_auc=0.6996, is_last=False)))
    out.append(lines.scored(scored(2, "test", 1, roc_auc=0.71, eer=0.2)))
    lines.trained(ROUND | {"round": 3})
    assert [line for line in out if line] == [
        "the untrained model: val AUC 0.600, EER 0.400; test AUC 0.610",
        "round 1 of 3: 2 clients, train loss 4.568, 10.0 s; val AUC 0.700 (+0.100), EER 0.300, accuracy 0.100"
        " * best so far",
        "round 2 of 3: 2 clients, train loss 4.568, 10.0 s; public AUC 0.900; val AUC 0.700 (+0.000); test AUC 0.710",
    ]
    assert lines.left() == ["round 3 of 3: 2 clients, train loss 4.568, 10.0 s"], "nobody has scored its model"
    assert lines.left() == []
    by_median = lines.scored(scored(3, "val", 3, roc_auc=0.79, roc_auc_median=0.81))
    assert by_median.endswith("val AUC 0.790 (+0.090) * best so far by the sites' median AUC, 0.810")
    assert lines.scored(scored(2, "val", 2, roc_auc=0.8)) == "model of round 2: val AUC 0.800 (+0.010) * best so far"


class Clock:
    """Goes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_pipe_gets_a_line_each_half_minute_and_no_control_characters():
    """20 s of silence are not told of; then what those at work say is added to what was answered."""
    out, clock = io.StringIO(), Clock()
    at_work = [Amount(done=500, total=2000, seconds=20.0, run="r", server_round=1),
               Amount(done=9, total=9, seconds=1.0, run="r", server_round=7)]  # fmt: skip
    with RunView(out, at_work=lambda: at_work, clock=clock) as view:
        view.show(MEMBERS)
        view.show(ASKED)
        before = out.getvalue()
        clock.now = 20.0
        view.tick()
        assert out.getvalue() == before
        view.show({"kind": "answered", "answered": 1, "pictures": 2000})
        clock.now = 50.0
        view.tick()
        view.tick()
    assert out.getvalue() == before + "round 1/3: 2,500 of 4,000 pictures, 50 a second, 0:30 left\n"


def test_what_clients_say_themselves_is_told_in_the_same_words_and_who_is_how_far():
    out, clock = io.StringIO(), Clock()
    with RunView(out, clock=clock) as view:
        view.show(MEMBERS)
        view.show(ASKED)
        view.show(TOLD)
        view.show(TOLD | {"client": "twins", "work": "scoring", "words": "scoring 80 %", "pictures": 1600})
        clock.now = 50.0
        view.tick()
        view.show({"kind": "answered", "answered": 1, "pictures": 2000, "client": "celeba"})
        clock.now = 90.0
        view.tick()
    assert out.getvalue().splitlines()[1:] == [
        "round 1/3: 500 of 4,000 pictures, 10 a second, 5:50 left; celeba: training 31 %; twins: scoring 80 %",
        "round 1/3: 2,000 of 4,000 pictures, 22 a second, 1:30 left; twins: scoring 80 %",
    ]


def test_without_word_from_the_clients_their_answers_and_the_usual_time_are_told():
    out, clock = io.StringIO(), Clock()
    with RunView(out, clock=clock) as view:
        view.show(MEMBERS)
        view.show(ROUND)
        view.show(ASKED | {"round": 2})
        clock.now = 40.0
        view.tick()
        view.show(ASKED | {"round": 2, "task": "evaluate"})
        view.show({"kind": "answered", "answered": 1, "pictures": 0})
        clock.now = 80.0
        view.tick()
        view.show({"kind": "finished"})
        clock.now = 200.0
        view.tick()
    told = out.getvalue().splitlines()[1:]
    assert told == [
        "round 2/3: 0 of 2 clients have answered, 0:40 of about 0:10 (whole run 0:10)",
        "scoring round 2: 1 of 2 clients have answered, 0:40",
        "round 1 of 3: 2 clients, train loss 4.568, 10.0 s",
    ]


def test_a_terminal_gets_a_bar_with_pictures_rate_and_time(terminal):
    clock = Clock()
    at_work = [Amount(done=1000, total=4000, seconds=5.0, server_round=1)]
    with RunView(terminal.stream, at_work=lambda: at_work, clock=clock) as view:
        for event in (JOINED, MEMBERS, ASKED):
            view.show(event)
        clock.now = 5.0
        view.tick()
        view.show({"kind": "warning", "line": "[bold]as it is[/bold]"})
    text = terminal.text()
    assert "joined: celeba (1,200 people" in text
    assert "[bold]as it is[/bold]" in text
    assert "round 1/3 " in text
    assert "1,000 of 4,000 pictures, 200 a second, 0:15 left" in text
    assert "━" in text


def test_a_dumb_terminal_is_a_pipe(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with RunView(terminal.stream) as view:
        view.show(JOINED)
    assert terminal.text().splitlines() == [event_line(JOINED)]


def test_a_follower_shows_everything_up_to_the_end(tmp_path):
    out = io.StringIO()
    log = EventLog(tmp_path)
    with RunView(out) as view, Follower(EventReader(tmp_path), view) as follower:
        log.emit(**JOINED)
        log.emit("finished", model_sha256="ab", rounds=3)
    assert out.getvalue().startswith("joined: celeba")
    assert (follower.summary["model_sha256"], follower.summary["rounds"]) == ("ab", 3)


def test_only_this_runs_progress_is_shown(tmp_path):
    about = {"done": 1, "total": 2, "seconds": 3.0, "who": "a", "server_round": 1, "time": time.time()}
    (tmp_path / "1.json").write_text(json.dumps(about | {"run": "mine"}))
    (tmp_path / "2.json").write_text(json.dumps(about | {"run": "another"}))
    assert [amount.run for amount in run_view.amounts_of(tmp_path, "mine")()] == ["mine"]


# ---------------------------------------------------------------------------------------------------------- the header


def settings_with(**values):
    settings = Settings()
    for name, value in values.items():
        section, _, key = name.partition("__")
        settings = config.with_value(settings, section, key, value)
    return settings


def test_the_header_has_a_row_for_what_is_known(tmp_path):
    settings = settings_with(federation__rounds=3, federation__local_epochs=1, model__width=0.5)
    rows = {
        "device": compute_words("cpu", "bfloat16", 1),
        "data": "",
        **begin_rows(settings, tmp_path, look="", federated=True),
    }
    title, *lines = header_lines("run 20261128-1", rows)
    assert re.fullmatch(r"FaceFed \S+, run 20261128-1", title)
    assert lines[:3] == [
        "  device      cpu, bfloat16, 1 thread",
        "  training    fedavg, 3 rounds of 1 epoch, batches of 32, learning rate 0.05, seed 1",
        f"  run folder  {tmp_path}",
    ]
    assert model_words(settings, num_parameters=2864416, travels=2869000) == (
        "resnet18, width 0.5, 112 px: 2,864,416 parameters (2,869,000 numbers shared), and at each client its own"
        " cosface head"
    )
    assert model_words(settings, num_parameters=2864416, head=2048).endswith(
        "2,864,416 parameters, and 2,048 of its cosface head"
    )
    assert training_words(settings).startswith("3 epochs, ")


def test_a_run_with_secure_aggregation_says_what_the_server_gets(tmp_path):
    masked = config.from_mapping({"secagg": {"enabled": True}})
    assert "no site's own" in begin_rows(masked, tmp_path, look="", federated=True)["sums"]
    assert begin_rows(masked, tmp_path, look="")["sums"] == ""
    assert begin_rows(config.from_mapping({}), tmp_path, look="", federated=True)["sums"] == ""


# ------------------------------------------------------------------------------------------------------------- the end

SUMMARY = {
    "rounds": 3,
    "best_round": 2,
    "model_sha256": "ab" * 32,
    "untrained": {"roc_auc": 0.6, "eer": 0.4},
    "best": {"roc_auc": 0.95, "eer": 0.1},
    "clients": {
        "celeba": {"test_accuracy": 0.5, "test_roc_auc": 0.9, "test_eer": 0.2, "test_tar_at_far_1e-2": 0.3},
        "vggface2": {"test_roc_auc": 0.8},
    },
    "registered": ["models:/cnn_federated_fedavg/1 (best, round 2); it is the champion now"],
    "refused_replies": 1,
}


def test_the_end_is_a_table_that_begins_with_the_untrained_model():
    lines = ending_lines(federation_ending(SUMMARY), "runs/x", tracking="sqlite:////a/b.db")
    text = "\n".join(lines)
    assert (
        "test AUC on people never seen: untrained 0.600 -> federated 0.950 (EER 0.400 -> 0.100), best round 2 of 3"
        in lines
    )
    names = [line.split()[0] for line in text.partition("model ")[2].splitlines()[2:6]]
    assert names == ["untrained", "federated", "at", "at"]
    assert re.search(r"^untrained +0\.600 +0\.400 +- +-$", text, re.MULTILINE)
    assert re.search(r"^  at celeba +0\.900 +0\.200 +0\.300 +0\.500$", text, re.MULTILINE)
    assert re.search(r"^  at vggface2 +0\.800 +- +- +-$", text, re.MULTILINE)
    for line in (
        f"model SHA-256 {'ab' * 32}",
        "registered: models:/cnn_federated_fedavg/1 (best, round 2); it is the champion now",
        "replies left out: 1 (see metrics.json in the run folder)",
        "tracking: sqlite:////a/b.db",
    ):
        assert line in lines
    assert max(map(len, text.splitlines())) <= 120
    assert "warning" not in text


def test_what_is_wrong_with_a_model_is_told_at_the_end():
    ending = Ending(
        label="local",
        when="best epoch 1 of 2",
        untrained={"roc_auc": 0.783},
        trained={"roc_auc": 0.593},
        below_untrained="training ended below the untrained model (test AUC 0.783 -> 0.593)",
        few_people={"celeba": 3},
    )
    worse, few = warnings_of(ending)
    assert worse.startswith("training ended below the untrained model (test AUC 0.783 -> 0.593);\n")
    assert "it does not become champion." in worse
    assert few.startswith("fewer than 10 people are behind test figures (3 at celeba)")
    lines = ending_lines(ending, "f", tracking="off")
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {worse}", f"warning: {few}"]


def test_an_end_to_which_no_site_sent_scores_says_where_they_are_and_shows_no_table_of_dashes():
    clients: dict = {"alpha": {}, "beta": {}}
    summary = {"model_sha256": "ab", "rounds": 2, "best_round": 2, "best": {}, "untrained": {}, "clients": clients}
    text = "\n".join(ending_lines(federation_ending(summary), "f", tracking="off"))
    assert "no test figures: no scores came from the sites (alpha, beta); each site's own record has its own" in text
    assert "verification.public_dir" in text
    assert "TAR@FAR" not in text
    clients["beta"]["test_roc_auc"] = 0.7
    assert "TAR@FAR" in "\n".join(ending_lines(federation_ending(summary), "f", tracking="off"))


def test_an_end_without_scores_is_shorter():
    ending = federation_ending({"model_sha256": "ab", "rounds": 1, "best_round": 0})
    lines = ending_lines(ending, "f", tracking="off")
    assert "model SHA-256 ab" in lines
    assert not any("AUC" in line or "left out" in line for line in lines)
