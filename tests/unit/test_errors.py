"""What the other side said, in the lines of ours that quote it."""

import hashlib

import pytest
from flwr.app import Error, Message, RecordDict

from common.errors import LONGEST_QUOTE, ReplyRefused, one_line, quoted
from common.protocol import wire

pytestmark = pytest.mark.usefixtures("in_a_run")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", ""), ("as it is", "as it is"), ("a\nb\x1b[31m  c\x00", "a b [31m c"), ("ü" * 400, "ü" * 400)],
)
def test_a_short_text_is_shown_whole_in_one_line(text, shown):
    assert one_line(text) == quoted(text) == shown


@pytest.mark.parametrize("text", ["x" * 401, "x" * 7_000_000, "\n" * 5000 + "x"])
def test_a_long_one_is_cut_and_the_hash_of_the_whole_stands_there(text):
    line = quoted(text)
    assert len(line) < LONGEST_QUOTE + 120
    assert line.endswith(f"({len(text):,} bytes, SHA-256 {hashlib.sha256(text.encode()).hexdigest()})")


def test_a_clients_error_is_refused_with_the_hash_that_the_servers_record_has():
    reason = "Traceback\n" + "y" * 10_000
    request = Message(RecordDict(), 7, "train")
    reply = Message(Error(code=wire.CLIENT_FAILED, reason=reason), reply_to=request)
    with pytest.raises(ReplyRefused) as seen:
        wire.read_reply(reply, "")
    assert f"10,010 bytes, SHA-256 {hashlib.sha256(reason.encode()).hexdigest()}" in str(seen.value)
    assert len(str(seen.value)) < 600
