"""The bench's arithmetic: turns, medians, ratios, goals, the table from the JSON, and the figures of a run's record."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import run, workload
from bench.comparison import Claim, Comparison, NotInstalled, Place, line, measure, median, shown, table, turns
from bench.our_run import figures
from bench.watch import SideFailed

ROOT = Path(__file__).parents[2]
PLACE = Place(scratch=Path("unused"), quick=False)


def claim(**other):
    return Claim(**{"what": "a round", "ours": "ours", "figure": "round_seconds", "peer": "peer"} | other)


def compared(sides, claims=(), repeats=2):
    return Comparison(name="rounds", what="W", sides=sides, claims=claims, repeats=repeats)


def test_sides_take_turns():
    order = []
    sides = {name: lambda _, name=name: order.append(name) or {"seconds": 1.0} for name in ("plain", "ours")}

    result = measure(compared(sides, repeats=3), PLACE, lambda _: None)

    assert order == ["plain", "ours"] * 3 == turns(sides, 3)
    assert {side: len(runs) for side, runs in result.runs.items()} == {"plain": 3, "ours": 3}


def test_a_quick_run_has_fewer_turns():
    sides = {"ours": lambda _: {"seconds": 1.0}}

    result = measure(compared(sides, repeats=3), Place(scratch=Path("unused"), quick=True), lambda _: None)

    assert len(result.runs["ours"]) == 1


def test_a_side_that_fails_or_is_missing_has_one_turn_and_the_others_go_on():
    asked = []

    def failing(_):
        asked.append("failing")
        raise SideFailed("exit code 1: no such option")

    def missing(_):
        asked.append("missing")
        raise NotInstalled("pip install it")

    result = measure(
        compared({"failing": failing, "missing": missing, "ours": lambda _: {"round_seconds": 2.0}},
                 [claim(peer="missing"), claim(peer="failing")]),
        PLACE, lambda _: None,
    )  # fmt: skip

    assert asked == ["failing", "missing"]
    assert len(result.runs["ours"]) == 2
    assert result.absent == {
        "failing": "failed: exit code 1: no such option",
        "missing": "not installed (pip install it)",
    }
    rows = table({"rounds": result.to_json()}).splitlines()[2:]
    assert "| 2 s | not installed (pip install it) | - |" in rows[0]
    assert "| 2 s | failed | - |" in rows[1]


def test_medians_are_of_all_rounds_of_all_runs():
    runs = [{"round_seconds": [9.0, 1.0]}, {"round_seconds": [4.0]}, {"other": 5.0}, {"round_seconds": 7.0}]

    assert median(runs, "round_seconds") == 5.5  # of 1, 4, 7, 9
    assert median(runs, "nothing") is None


@pytest.mark.parametrize(
    ("ours", "other", "reached"),
    [
        (6.0, {"goal": 0.6}, True),  # 6 / 10
        (6.1, {"goal": 0.6}, False),
        (6.0, {"goal": 5.0, "of": "ours"}, False),
        (4.9, {"goal": 5.0, "of": "ours"}, True),
        (80.0, {"goal": 8.0, "at_least": True}, True),
        (79.0, {"goal": 8.0, "at_least": True}, False),
        (6.0, {}, None),
        (6.0, {"goal": 0.6, "peer": "absent"}, None),
    ],
)
def test_goals(ours, other, reached):
    runs = {"ours": [{"round_seconds": ours}], "peer": [{"round_seconds": 10.0}]}

    assert line(claim(**other), runs).reached is reached


def test_the_table_says_both_medians_their_ratio_and_what_they_cost():
    sides = {
        "plain loop": lambda _: {"round_seconds": [10.0, 30.0, 20.0], "cpu_s": 50.0, "peak_mib": 900.0},
        "ours": lambda _: {"round_seconds": [11.0], "cpu_s": 25.0, "peak_mib": 1800.0},
    }
    result = measure(compared(sides, [claim(peer="plain loop", goal=0.6)]), PLACE, lambda _: None)

    row = table(json.loads(json.dumps({"rounds": result.to_json()}))).splitlines()[2]

    assert row == (
        "| rounds: a round against plain loop | 11 s | 20 s | 0.55 | <= 0.6 x | reached | 25 / 50 | 1,800 / 900 |"
    )


def test_numbers_have_three_digits():
    assert [shown(value) for value in (None, 0, 0.01234, 12.345, 12345.6)] == ["-", "0", "0.0123", "12.3", "12,346"]


def report(name, seconds, others=0.0):
    sides = {"ours": lambda _: {"round_seconds": seconds, "others_cores": others}}
    result = measure(compared(sides, [claim(peer="")]), PLACE, lambda _: None)
    machine = {"cpu": "a CPU", "cores": 2, "memory_gib": 8, "date": "today", "commit": "abc", "load_average": [0.5],
               "versions": {"torch": "2"}}  # fmt: skip
    return {"machine": machine, "load_average_at_end": [1.5], "comparisons": {name: result.to_json()}}


def test_tables_of_several_files_are_one_and_disturbance_is_told(tmp_path, capsys, monkeypatch):
    files = []
    reports = (report("rounds", 1.0), report("input", 2.0), report("rounds", 3.0, others=0.7))
    for number, one in enumerate(reports):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(one))
    monkeypatch.setattr(sys, "argv", ["run", "--table", *map(str, files)])

    run.main()

    printed = capsys.readouterr().out
    assert "| rounds: a round | 3 s |" in printed
    assert "| rounds: a round | 1 s |" not in printed
    assert "| input: a round | 2 s |" in printed
    assert "rounds: ours was disturbed: others kept 0.70 to 0.70 cores busy" in printed
    assert "input: ours was disturbed" not in printed


def test_every_claim_names_sides_that_there_are():
    for comparison in run.COMPARISONS.values():
        for one in comparison.claims:
            assert one.ours in comparison.sides, one
            assert not one.peer or one.peer in comparison.sides, one


def test_an_unknown_name_is_refused():
    with pytest.raises(SystemExit, match="'round' is no comparison; choose rounds, "):
        run.chosen(["round"])


def entry(step, key, value, client="", time_ms=0):
    return json.dumps({"run": client, "step": step, "key": key, "value": value, "time_ms": time_ms})


def test_a_runs_record_gives_steady_rounds_and_the_overhead_of_the_slowest_client(tmp_path):
    lines = [json.dumps({"event": "start", "time_ms": 0, "run": ""})]
    for step, ended_ms in ((1, 20_000), (2, 30_000), (3, 42_000)):
        lines += [
            entry(step, "time/round_seconds", 8.0 + step, time_ms=ended_ms),
            entry(step, "time/wait_seconds", 1.0),
        ]
        lines += [entry(step, "bytes/down", 100.0), entry(step, "bytes/up", 30.0)]
        for client, train in (("north", 6.0), ("south", 7.0)):
            lines += [
                entry(step, "time/train_seconds", train, client),
                entry(step, "time/evaluate_seconds", 1.0, client),
            ]
    (tmp_path / "spool.jsonl").write_text("\n".join(lines))

    found = figures(tmp_path)

    assert found["round_1_ended"] == 20.0
    assert found["round_seconds"] == [10.0, 11.0]
    assert found["from_told_seconds"] == 11.0
    assert found["overhead_seconds"] == [2.0, 3.0]  # beyond 7 + 1
    assert found["bytes_per_round"] == [130.0, 130.0]
    assert found["phases"]["client train_seconds"] == 6.5


@pytest.mark.parametrize("load", workload.LOADS)
def test_each_load_is_settings_that_a_program_takes_each_once(load):
    from server.cli import _settings_and_folder, parser

    given = workload.settings_arguments(load)
    names = [part.partition("=")[0] for part in given if part != "--set"]
    assert len(names) == len(set(names))
    settings, *_ = _settings_and_folder(parser().parse_args(given))
    assert (settings.model.backbone, settings.federation.local_epochs) == (
        "cnn" if load == "tiny" else "resnet18", 1
    )  # fmt: skip


def test_the_workloads_split_has_512_pictures_to_train_on_and_128_to_score():
    from common.faces.index import build_index
    from common.faces.splits import Split, assign_splits

    people = [f"n{person:06d}" for person in range(workload.NUM_PEOPLE) for _ in range(workload.PICTURES_EACH)]
    paths = [f"{person}/{number:04d}.jpg" for number, person in enumerate(people)]

    codes = assign_splits(build_index("folder", Path("unused"), paths, people), workload.settings().data)

    assert (codes == Split.TRAIN).sum() == workload.NUM_TRAINING
    assert np.isin(codes, (Split.TRAIN, Split.UNUSED), invert=True).sum() == workload.NUM_SCORED


WATCHED = """\
import subprocess, sys
burn = "import time; held = bytearray(300 << 20)\\nwhile time.process_time() < 1.5: pass"
child = subprocess.Popen([sys.executable, "-c", burn], start_new_session=True)  # a daemon of its own session
print("words before")
child.wait()
print('{"round_seconds": [1, 2]}')
"""
WATCHER = """\
import json, sys
from pathlib import Path
from bench.watch import SideFailed, run_side
print(json.dumps(run_side([sys.executable, "-c", sys.argv[1]], cwd=Path("."))))
try:
    run_side([sys.executable, "-c", "import sys; sys.exit('it broke')"], cwd=Path("."))
except SideFailed as failure:
    print(failure)
"""


def test_a_sides_whole_process_tree_is_counted():
    # in a process of its own: who watches becomes the parent of orphans, and waits for any child
    done = subprocess.run(
        [sys.executable, "-c", WATCHER, WATCHED], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )

    first, second = done.stdout.splitlines()
    found = json.loads(first)
    assert found["round_seconds"] == [1, 2]
    assert found["cpu_s"] > 0.7  # of 1.5 in the child; what falls between two looks is not seen
    assert found["peak_mib"] > 300
    assert second == "exit code 1: it broke"
