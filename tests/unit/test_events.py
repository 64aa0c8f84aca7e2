"""Events pass from the ServerApp to whoever watches, line by line, while both run."""

import json
import subprocess
import sys
import threading
from pathlib import Path

from common.system.events import EVENTS_FILE, EventLog, EventReader

ROOT = Path(__file__).resolve().parents[2]


def test_each_look_brings_what_is_new(tmp_path):
    reader, log = EventReader(tmp_path / "run"), EventLog(tmp_path / "run")
    assert list(reader.new_events()) == []
    log.emit("joined", client="ü", people=3)
    log.emit("round", round=1, loss=float("nan"))
    first, second = reader.new_events()
    assert (first["kind"], first["client"], first["people"]) == ("joined", "ü", 3)
    assert second["time"] >= first["time"]
    assert second["loss"] != second["loss"]
    assert list(reader.new_events()) == []
    log.emit("finished")
    assert [event["kind"] for event in reader.new_events()] == ["finished"]


def test_a_reader_may_be_there_before_the_folder(tmp_path):
    reader = EventReader(tmp_path / "later")
    assert list(reader.new_events()) == []
    EventLog(tmp_path / "later").emit("a")
    assert len(list(reader.new_events())) == 1


def test_a_line_still_being_written_is_left_for_the_next_look(tmp_path):
    reader = EventReader(tmp_path)
    path = tmp_path / EVENTS_FILE
    whole = json.dumps({"kind": "a"}) + "\n"
    path.write_text(whole + whole[:5])
    assert len(list(reader.new_events())) == 1
    assert list(reader.new_events()) == []
    with path.open("a") as file:
        file.write(whole[5:])
    assert list(reader.new_events()) == [{"kind": "a"}]


def test_a_look_that_was_broken_off_goes_on_where_it_stopped(tmp_path):
    log, reader = EventLog(tmp_path), EventReader(tmp_path)
    for number in range(3):
        log.emit("n", number=number)
    assert next(iter(reader.new_events()))["number"] == 0
    assert [event["number"] for event in reader.new_events()] == [1, 2]


def test_another_process_sees_every_event_whole_while_it_is_written(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom common.system.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "for number in range(300): log.emit('n', number=number, text='x' * (number * 37 % 5000))"
    )
    reader, seen = EventReader(tmp_path), []
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) as writer:
        while writer.poll() is None:
            seen += reader.new_events()
    seen += reader.new_events()
    assert writer.returncode == 0
    assert [event["number"] for event in seen] == list(range(300))


def test_threads_do_not_mix_their_lines(tmp_path):
    log = EventLog(tmp_path)
    threads = [
        threading.Thread(target=lambda who=who: [log.emit("n", who=who, text="y" * 3000) for _ in range(40)])
        for who in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(EventReader(tmp_path).new_events())) == 160
