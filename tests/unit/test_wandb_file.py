"""Logs of Weights & Biases: real ones of two versions, cut off at any byte, damaged, and files that are none."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.wandb_log import BLOCK, HEAD, field, framed, varint
from common.errors import TrackingError
from simulation.admin.wandb_log import (
    CUT_SHORT,
    Damage,
    Malformed,
    Record,
    fields,
    leaves,
    read_facts,
    read_history,
    read_records,
    signed,
)
from tests.unit.wandb_logs import (
    NEW,
    OLD,
    exit_record,
    log_of,
    row_record,
    run_record,
    summary_record,
    write_log,
)

ROWS = {OLD: 170, NEW: 85}


def split(path):
    found = list(read_records(path))
    return [r for r in found if isinstance(r, Record)], [d for d in found if isinstance(d, Damage)]


@pytest.mark.parametrize("folder", [OLD, NEW])
def test_a_real_log_is_read_without_a_gap(folder):
    log = log_of(folder)
    records, damages = split(log)
    numbers = [dict(fields(record.data)).get(1, 0) for record in records]

    assert not damages
    assert records[-1].end == log.stat().st_size > BLOCK  # one record lies across two blocks
    numbered = [number for number in numbers if number]  # wandb counts its records from 1
    assert numbered == list(range(1, len(numbered) + 1))
    assert len(numbered) >= len(records) - 4  # 0.16 leaves its own head and foot without a number


@pytest.mark.parametrize("folder", [OLD, NEW])
def test_a_real_log_says_what_was_logged(folder):
    steps, log = ROWS[folder], log_of(folder)
    facts = read_facts(log)
    rows = list(read_history(log, facts.start_ms))

    assert (facts.run_id, facts.project, facts.group, facts.job_type) == (f"{log.stem[4:]}", "faces", "trial", "train")
    assert facts.notes == "First try.\nSecond line."
    assert facts.tags == ["baseline", "celeba"]
    assert facts.config == {
        "lr": 0.02, "epochs": steps, "model": {"name": "resnet18", "width": 64}, "sizes": [1, 2], "none": None,
    }  # fmt: skip
    assert (facts.exit_code, facts.summary["best_auc"], facts.summary["verdict"]) == (0, 0.95, "kept")
    assert [row.step for row in rows] == [*range(0, 2 * steps, 2), *range(2 * steps, 2 * steps + 4)]
    assert [row.values["loss"] for row in rows[:steps]] == [2.0 / (step + 1) for step in range(steps)]
    assert [dict(leaves(row.values))["val.auc"] for row in rows[:steps]] == [step / steps for step in range(steps)]
    assert all(facts.start_ms <= row.time_ms <= facts.start_ms + 60_000 for row in rows)
    assert [row.time_ms for row in rows] == sorted(row.time_ms for row in rows)


@pytest.fixture(scope="module")
def long_log():
    """Records of every length around a block's end, of which some span three blocks."""
    bodies = [bytes((n % 251,)) * (n * 37 % 3000) for n in range(80)] + [b"x" * 70_000, b"", b"y"]
    bodies = [field(90, body) for body in bodies]
    return bodies, *framed(bodies)


def test_records_of_all_lengths_come_back(tmp_path, long_log):
    bodies, content, begins = long_log
    (tmp_path / "a.wandb").write_bytes(content)

    records, damages = split(tmp_path / "a.wandb")

    assert [record.data for record in records] == bodies
    assert [record.offset for record in records] == begins
    assert not damages


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1))
def test_a_log_cut_anywhere_keeps_its_whole_records(tmp_path, long_log, cut):
    bodies, content, begins = long_log
    at = len(HEAD) + int(cut * (len(content) - len(HEAD)))
    (tmp_path / "a.wandb").write_bytes(content[:at])

    records, damages = split(tmp_path / "a.wandb")
    whole = sum(end <= at for end in [*begins[1:], len(content)])

    # Between two records there may be up to six zeros, so the next may be whole though it "begins" later.
    assert [record.data for record in records] in (bodies[:whole], bodies[: whole + 1])
    assert all(record.end <= at for record in records)
    assert all(damage.what == CUT_SHORT and damage.offset <= at for damage in damages)
    assert len(damages) <= 1
    assert (
        damages
        or at in {*begins, len(content), *(record.end for record in records), len(HEAD)}
        or at % BLOCK == 0
        or (BLOCK - at % BLOCK < 7)
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 0.9999))
def test_one_wrong_byte_costs_one_record_and_names_its_place(tmp_path, long_log, where):
    bodies, content, begins = long_log
    at = len(HEAD) + int(where * (len(content) - len(HEAD)))
    hurt = bytearray(content)
    hurt[at] ^= 0x55
    (tmp_path / "a.wandb").write_bytes(bytes(hurt))

    records, damages = split(tmp_path / "a.wandb")
    which = max(index for index, begin in enumerate(begins) if begin <= at)
    kept = [record.data for record in records]

    assert kept[:which] == bodies[:which]
    if len(kept) == len(bodies):  # it was one of the zeros between two blocks
        assert BLOCK - at % BLOCK < 7
        return
    assert begins[which] == damages[0].offset or damages[0].offset <= at
    assert bodies[which] not in kept[which : which + 1] or which == len(bodies) - 2
    # Behind a wrong length nothing is sure up to the next block; from there on every record is back.
    back = next((i for i, begin in enumerate(begins) if begin >= (at // BLOCK + 3) * BLOCK), len(bodies))
    assert kept[len(kept) - (len(bodies) - back) :] == bodies[back:]


def test_damage_within_a_small_log_loses_that_record_only(tmp_path):
    bodies = [field(90, f"record {n}") for n in range(9)]
    content, begins = framed(bodies)
    hurt = bytearray(content)
    hurt[begins[4] + 9] ^= 1
    (tmp_path / "a.wandb").write_bytes(bytes(hurt))

    records, damages = split(tmp_path / "a.wandb")

    assert [record.data for record in records] == bodies[:4] + bodies[5:]
    assert damages == [Damage(begins[4], "a record whose checksum is wrong")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"PNG no", "is no Weights & Biases log: it begins with b'PNG '"),
        (b":W&B\xe1\xbe\x07" + bytes(40), "version 7"),
        (HEAD, "has no whole record"),
        (HEAD + bytes(500), "has no whole record"),
    ],
)
def test_a_file_that_is_none_is_one_clear_line(tmp_path, content, words):
    path = tmp_path / "run-x.wandb"
    path.write_bytes(content)

    with pytest.raises(TrackingError) as caught:
        read_facts(path)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_that_is_no_message_is_damage(tmp_path):
    log = write_log(
        tmp_path, [run_record(), b"\xff" * 30, row_record(3, {"loss": 1.5}, 1_700_000_001.25), exit_record(1)]
    )

    facts = read_facts(log)

    assert [damage.what for damage in facts.damages] == ["a record that is no protobuf message (a number is too long)"]
    assert (facts.exit_code, facts.start_ms, facts.num_rows) == (1, 1_700_000_000_005, 1)
    assert facts.sound_end == facts.damages[0].offset < facts.end
    assert [row[1:] for row in read_history(log, 0)] == [(3, 1_700_000_001_250, {"loss": 1.5})]


@given(st.binary(max_size=60))
def test_any_bytes_are_fields_or_malformed(message):
    with contextlib.suppress(Malformed):
        assert all(number > 0 for number, _ in fields(message))


@given(st.integers(-(2**63), 2**63 - 1))
def test_negative_numbers_come_back(number):
    assert [signed(value) for _, value in fields(varint(8) + varint(number))] == [number]


def test_later_values_replace_and_removed_ones_are_gone(tmp_path):
    removed = field(3, field(2, field(2, "val") + field(2, "auc")))
    config = {"lr": 0.1, "model": {"width": 8, "depth": 2}, "_wandb": {}}
    nested = summary_record({("val", "auc"): 0.5, ("val", "eer"): 0.1, "text": "x"})
    update = field(5, field(1, field(2, "model") + field(2, "width") + field(16, "16")))
    log = write_log(tmp_path, [run_record(config=config), nested, removed, update])

    facts = read_facts(log)

    assert facts.config == {"lr": 0.1, "model": {"width": 16, "depth": 2}}
    assert facts.summary == {"val": {"eer": 0.1}, "text": "x"}
    assert facts.exit_code is None


def test_rows_without_step_or_time_still_have_both(tmp_path):
    log = write_log(tmp_path, [run_record(), field(2, b""), row_record(10**30, {"a": 1}, float("nan"))])

    rows = list(read_history(log, 77))

    # field 2 of the row holds 10**30 mod 2**64 as int64; the text of _step is beyond any database and not taken
    assert [row.time_ms for row in rows] == [77, 77]
    assert rows[0].step == 0
