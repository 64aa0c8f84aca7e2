"""How far a packing is: rate, time left, and the file that others read."""

from pathlib import Path

import pytest

from common.faces.pack_progress import PackingClock, PackingState, StateFile, read_state


def test_a_pack_that_goes_on_has_the_rate_of_what_it_does_now() -> None:
    """It begins at 500 of 1,000 and does 10 a second: 400 are left after 10 s, so 40 s."""
    times = iter([0.0, 0.0, 5.0, 10.0])
    clock = PackingClock(lambda: next(times))
    clock(500, 1000)
    clock(550, 1000)
    state = clock(600, 1000)
    assert state == PackingState(done=600, total=1000, per_second=10.0, moved_at=10.0)
    assert state.left_s == 40.0
    assert state.words() == "packing 60 %, 10 pictures a second, 40 s left"


def test_what_does_not_move_says_when_it_last_did() -> None:
    times = iter([0.0, 1.0, 2.0, 100.0])
    clock = PackingClock(lambda: next(times))
    clock(10, 100)
    clock(20, 100)
    assert clock(20, 100).moved_at == 2.0


@pytest.mark.parametrize(("left", "words"), [(89, "89 s left"), (2400, "40 min left"), (9000, "2.5 h left")])
def test_time_left_in_words(left: int, words: str) -> None:
    state = PackingState(done=0, total=left, per_second=1.0, moved_at=0.0)
    assert state.words().endswith(words)
    assert PackingState(done=0, total=0, per_second=0.0, moved_at=0.0).words() == "packing: counting the pictures"


def test_the_file_holds_the_last_state_and_goes_with_the_packing(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    file = StateFile(tmp_path / "state.json", then=lambda *call: seen.append(call))
    assert read_state(tmp_path / "state.json") is None
    file(1, 3)
    file(2, 3)  # within the second: told on, not written
    found = read_state(tmp_path / "state.json")
    assert found is not None
    assert (found.done, found.total) == (1, 3)
    file(3, 3)
    found = read_state(tmp_path / "state.json")
    assert found is not None
    assert found.done == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]
    file.close()
    assert read_state(tmp_path / "state.json") is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"done": 1}', b'{"done": "x", "total": 1, "per_second": 1, "moved_at": 1}']
)
def test_a_file_that_says_nothing_is_no_state(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)
    assert read_state(tmp_path / "state.json") is None
