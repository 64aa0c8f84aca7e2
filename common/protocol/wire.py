"""What crosses the wire: every record name and key of a message, in both directions, stands in this file.

    join      -> task settings                      <- who the client is and what it holds (counts)
    train     -> task settings, shared parameters   <- their change, num-examples, sums, histograms
    evaluate  -> task settings, shared parameters   <- sums, histograms
                 (of these once what training does not move; later only the rest)
    keys, shares, unmask  -> task settings          <- of secure aggregation, see secure_words.py
    any of them, asked again for its answer         <- the answer, or after `beat_s` how far it is (beats.py)

Heads, embeddings and pictures have no place in any of them.

An array is its bytes, little-endian, under a header of Flower's own: dtype, shape, and as its serialisation type one of
two names of ours.  The header is checked before the bytes are looked at, and they are not copied.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.errors import ReplyRefused
from common.metrics.group_names import GROUPS
from common.metrics.groups import GROUP_ROW
from common.metrics.sums import CLOSED_FIELDS, COUNTS, MOST_GROUPS, NOTHING, EvaluationSums
from common.protocol import beats, codec
from common.protocol.beats import Beat
from common.protocol.codec import MASKED, Coded
from common.protocol.secure_words import SMALL
from common.settings import CODECS

MESSAGE_TYPES = {"join": MessageType.QUERY, "train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}
MESSAGE_TYPES |= dict.fromkeys(SMALL, MessageType.QUERY)
TASK, ARRAYS, SUMS, SITE = "task", "arrays", "sums", "site"
SECURE, ANSWER, MOST_WORDS = "secure", "answer", 2**17  # of an answer of secure aggregation, in characters
SHARED, FROZEN, CHANGE = "shared", "frozen", "change"
WITHHELD_NAME, LONGEST_WITHHELD = "{split}-withheld", 20  # two words in place of a split's counts
COUNTS_NAME = "{split}-counts"  # one array for all of a split's counts: Flower's transfer costs by the object
FLAT = "facefed.flat"  # a flat buffer: dtype names the codec, shape its elements
PLAIN = "facefed.plain"  # whole numbers
_COUNT_DTYPES = (
    "uint8",
    "uint16",
    "uint32",
    "int64",
)  # most counts are small, and the smallest that holds them travels
AGAIN = "again"  # stands for the round in Flower's log of a message that asks for an answer once more
CLIENT_FAILED = 500  # our error code in Flower's Error; its reason is the client's one line
NODE_UNAVAILABLE = 5  # Flower's own, of a module that is not public
TRAIN_FIELDS = (
    "num_pictures", "num_steps", "correct", "loss_sum", "gradient_norm_sum", "num_warmup_pictures", "num_warmup_steps",
    "num_halvings",
    "receive_seconds", "evaluate_seconds", "warmup_seconds", "seconds", "send_seconds",
)  # fmt: skip
# Follow from the pictures' content, so they stay at the client where the run has differential privacy.
OF_CONTENT = ("correct", "loss_sum", "gradient_norm_sum")

_REPLY_NAMES: Mapping[str, frozenset[str]] = {
    SUMS: frozenset(
        ["num-examples", "server-round", *(f"train-{name}" for name in TRAIN_FIELDS)]
        + [f"{split}-{name}" for split in ("val", "test") for name in CLOSED_FIELDS]
    ),
    ARRAYS: frozenset([CHANGE, GROUPS, *(COUNTS_NAME.format(split=split) for split in ("val", "test"))]),
    TASK: frozenset(["manifest", FROZEN, *(WITHHELD_NAME.format(split=split) for split in ("val", "test"))]),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the server asks of a client, beside the shared parameters."""

    kind: str  # of MESSAGE_TYPES
    run_id: str
    server_round: int  # the round whose training is asked for; evaluate: the round whose model this is
    settings: str  # the run settings as JSON
    manifest: str = ""  # digest of the shared parameters' layout
    frozen: str = ""  # SHA-256 of those that training does not move; they come along, or are there; empty: all move
    splits: str = ""  # what to evaluate the received model on: "val test", or "groups" (metrics/group_names.py)
    best_round: int = 0  # the client keeps its private state of this round
    precision: str = ""
    memory_format: str = ""
    compiled: bool = False
    threads: int = 1
    last: bool = False  # nothing follows: the run is over
    received: str = ""  # what came of this client last, for its egress ledger; see server/exchange/receipts.py
    beat_s: float = 0.0  # after so long a client that works on says how far it is; 0: it answers when it is done
    scored_round: int = -1  # the newest round whose model's validation AUC over all sites is known; -1: none
    val_auc: float = -1.0  # that AUC
    seconds_left: float = -1.0  # of all rounds, by the newest ones; -1: not known
    version: str = ""  # of the server's FaceFed; "" or "unknown": it does not say
    secure: str = ""  # of secure aggregation, as secure_words.py writes it; empty without it
    again: str = ""  # id of the message whose answer is asked for once more, after a beat; the model is not sent again


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a client tells of itself when it joins: names and counts."""

    name: str
    dataset: str
    num_people: int
    num_pictures: int
    num_training_people: int
    num_training_pictures: int
    num_quarantined: int
    val_people: str  # digest of the validation people, to compare champions on the same people only
    test_pairs: str  # digest of the test people, to compare models on the same pairs only
    machine: str  # equal for clients on one machine, so that they share its cores
    cores: int
    device: str
    precision: str
    memory_format: str
    compiled: bool = False
    policy: str = ""  # digest of the site's own policy
    num_pairs: int = 0  # of validation and of test people
    num_scored_pairs: int = 0  # of those, in a round: fewer where verification.max_pairs are
    cut: str = ""  # how its pictures were cut out in truth, of `common.cuts.CUTS`


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A client's answer to a train or evaluate task."""

    server_round: int
    manifest: str
    num_examples: int
    train: Mapping[str, float]  # TRAIN_FIELDS, with differential privacy not OF_CONTENT; empty after evaluate
    evaluations: Mapping[str, EvaluationSums]  # by split
    withheld: Mapping[str, str] = dataclasses.field(default_factory=dict)  # split -> why nothing else of it leaves
    frozen: str = ""  # `Task.frozen` of what the client keeps, so that it need not be sent again
    groups: NDArray[np.int64] | None = None  # [G, GROUP_ROW], of groups of test people, where they were asked for
    change: Coded | None  # None after evaluate; with secure aggregation a site's masked words, after evaluate too


def counts_nbytes(reply: Reply) -> int:
    """The size of a reply's counts: its arrays but the change."""
    return sum(_flat_counts(sums).nbytes for split, sums in reply.evaluations.items() if split not in reply.withheld)


def _flat_counts(sums: EvaluationSums) -> NDArray[Any]:
    """All of a split's counts in one array, of the smallest of the dtypes that holds them."""
    arrays = sums.arrays()
    return _smallest(np.concatenate([part.reshape(-1) for part in arrays.values()]))


def _smallest(counts: NDArray[np.int64]) -> NDArray[Any]:
    largest = int(counts.max(initial=0))
    return counts.astype(next(name for name in _COUNT_DTYPES if largest <= np.iinfo(name).max))


def _plain_array(counts: NDArray[Any]) -> Array:
    data = counts.astype(counts.dtype.newbyteorder("<"), copy=False).tobytes()
    return Array(dtype=str(counts.dtype), shape=counts.shape, stype=PLAIN, data=data)


def words_of(task: Task) -> dict[str, str]:
    """What a task says that is the same for all clients, and that their answers follow from."""
    return {name: getattr(task, name) for name in ("kind", "settings", "splits", "manifest")}


def _task_record(task: Task) -> ConfigRecord:
    return ConfigRecord(dataclasses.asdict(task))


def pack_shared(shared: Coded, frozen: Coded | None = None) -> ArrayRecord:
    """The flat global model as a record; made once, it serves the messages to all clients.

    shared: what training moves.  frozen: the rest, for a client that does not keep it; None: all moves, or it does.
    """
    arrays = {SHARED: shared} | ({FROZEN: frozen} if frozen is not None else {})
    return _record({name: _flat_array(coded) for name, coded in arrays.items()})


def _record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """The record of these very arrays; the constructor's would be copies, and of bytes only."""
    record = ArrayRecord()
    record.update(arrays)
    return record


def _flat_array(coded: Coded) -> Array:
    array = Array(dtype=coded.codec, shape=(coded.size,), stype=FLAT, data=b"")
    array.data = coded.data  # type: ignore[assignment]  # which the constructor refuses where it is a view
    return array


def task_content(task: Task, shared: ArrayRecord | None) -> RecordDict:
    """The content of one task's message; `shared` is from `pack_shared`, or None for join."""
    content = RecordDict({TASK: _task_record(task)})
    if shared is not None:
        content[ARRAYS] = shared
    return content


def task_message(task: Task, shared: ArrayRecord | None, *, node_id: int, ttl_s: float) -> Message:
    """The message of one task to one node; `shared` as in `task_content`."""
    content = task_content(task, shared)
    # What a site's own program tells its user of a message is told once.
    group = AGAIN if task.again else str(task.server_round)
    return Message(content, node_id, MESSAGE_TYPES[task.kind], ttl=ttl_s, group_id=group)


def read_task(content: RecordDict) -> tuple[Task, NDArray[np.float32] | None]:
    """The inverse of `task_message` at the client, from a message's content.  Raises ReplyRefused for none of ours.

    The parameters are those that training moves, [size] float32; with the codec float32 they may be the content's own
    bytes.
    """
    try:
        fields: dict[str, Any] = dict(content[TASK])
        task = Task(**fields)
        arrays = content.get(ARRAYS)
        if arrays is None:
            return task, None
        shared = _read_flat(typing.cast("Mapping[str, Any]", arrays), SHARED)
        if shared.codec == MASKED:
            raise ReplyRefused("the server's model is masked, and no model of ours is.")
        return task, codec.take(shared)
    except (KeyError, TypeError) as error:
        raise ReplyRefused(f"the server's message is not one of FaceFed's ({error}); use equal versions.") from None


def read_frozen(content: RecordDict) -> Coded | None:
    """The parameters that training does not move, of a message that `read_task` took; None: they did not come."""
    arrays: Any = content.get(ARRAYS, {})
    return _read_flat(arrays, FROZEN) if FROZEN in arrays else None


def _header(record: Mapping[str, Any], name: str, stype: str) -> Array:
    """The array of that name, one-dimensional and of that kind.  Raises KeyError or ReplyRefused."""
    array = record[name]
    if not isinstance(array, Array):
        raise ReplyRefused(f"{name!r} is no array but a {type(array).__name__}")
    if array.stype != stype or len(array.shape) != 1:
        raise ReplyRefused(
            f"the array {name!r} is {array.stype!r} {tuple(array.shape)}, not {stype!r} of one dimension"
        )
    return array


def _check_length(array: Array, name: str, wanted: int) -> None:
    if len(array.data) != wanted:
        raise ReplyRefused(
            f"the array {name!r} has {len(array.data)} bytes; {array.dtype} {tuple(array.shape)} takes {wanted}"
        )


def _read_flat(record: Mapping[str, Any], name: str) -> Coded:
    array = _header(record, name, FLAT)
    if array.dtype not in (*CODECS, MASKED):
        raise ReplyRefused(
            f"the array {name!r} is in the codec {array.dtype!r}; this version knows {', '.join(CODECS)}"
        )
    size = int(array.shape[0])
    _check_length(array, name, codec.num_bytes(array.dtype, size))
    return Coded(codec=array.dtype, size=size, data=array.data)


def _read_counts(record: Mapping[str, Any], name: str) -> NDArray[np.int64]:
    array = _header(record, name, PLAIN)
    if array.dtype not in _COUNT_DTYPES:
        raise ReplyRefused(f"{name} is {array.dtype}, not {', '.join(_COUNT_DTYPES)}")
    dtype = np.dtype(array.dtype).newbyteorder("<")
    _check_length(array, name, int(array.shape[0]) * dtype.itemsize)
    return np.frombuffer(array.data, dtype=dtype).astype(np.int64)


def _number(sums: Mapping[str, Any], name: str) -> int | float:
    value = sums[name]
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, not a number")
    return value


def _whole(sums: Mapping[str, Any], name: str) -> int:
    value = sums[name]
    if type(value) is not int:
        raise TypeError(f"{name} is {value!r}, not a whole number")
    return int(value)


def _refuse_error(message: Message) -> None:
    """Raise ReplyRefused for a client's error: its line, or the last line of an engine's traceback."""
    if not message.has_error():
        return
    if message.error.code == NODE_UNAVAILABLE:  # Flower's own words are of heartbeats
        raise ReplyRefused("the connection to the client was lost")
    reason = message.error.reason or ""
    lines = [line for line in reason.splitlines() if line.strip()]
    raise ReplyRefused(lines[-1] if lines else f"the client failed (code {message.error.code})", whole=reason)


def _refuse_extras(content: RecordDict) -> None:
    """Raise ReplyRefused for a record or a name that no reply of ours has."""
    for record, values in content.items():
        known = _REPLY_NAMES.get(record)
        if known is None:
            raise ReplyRefused(f"the reply holds the record {record!r}, which no reply has")
        extra = [name for name in values if name not in known]
        if extra:
            raise ReplyRefused(f"the reply holds {extra[0]!r} in {record!r}, which no reply has")


def beat_content(beat: Beat) -> RecordDict:
    """The content of what a client says before it has its answer."""
    return RecordDict({beats.RECORD: ConfigRecord(beat.values())})


def read_beat(message: Message) -> Beat | None:
    """The inverse of `beat_content` at the server; None for an answer or an error.  Raises ReplyRefused."""
    if message.has_error() or beats.RECORD not in message.content:
        return None
    extra = [name for name in message.content if name != beats.RECORD]
    if extra:
        raise ReplyRefused(f"a beat holds the record {extra[0]!r}, which no beat has")
    return beats.read_beat(dict(typing.cast("Mapping[str, Any]", message.content[beats.RECORD])))


def secure_content(answer: str) -> RecordDict:
    """The content of an answer to one of `secure_words.SMALL`."""
    return RecordDict({SECURE: ConfigRecord({ANSWER: answer})})


def read_secure(message: Message) -> str:
    """The inverse of `secure_content` at the server.  Raises ReplyRefused, also for a client's error reply."""
    _refuse_error(message)
    record: Any = message.content.get(SECURE)
    answer = record.get(ANSWER) if isinstance(record, ConfigRecord) else None
    if not (isinstance(answer, str) and len(answer) <= MOST_WORDS and len(record) == len(message.content) == 1):
        raise ReplyRefused("the answer is not one of secure aggregation; use equal versions of FaceFed.")
    return answer


def site_content(site: Site) -> RecordDict:
    """The content of the answer to join."""
    return RecordDict({SITE: ConfigRecord(dataclasses.asdict(site))})


def read_site(message: Message) -> Site:
    """The inverse of `site_content` at the server.  Raises ReplyRefused, also for a client's error reply."""
    _refuse_error(message)
    try:
        fields: dict[str, Any] = dict(message.content[SITE])
        site = Site(**fields)
    except (KeyError, TypeError) as error:
        raise ReplyRefused(f"the answer to join is malformed ({error}); use equal versions of FaceFed.") from None
    for name, kind in typing.get_type_hints(Site).items():
        value = getattr(site, name)
        # The round loop computes with these, and no client may stop it.
        if type(value) is not kind or (kind is int and value < 0):
            raise ReplyRefused(f"the answer to join is malformed: {name} is {value!r}; use equal versions of FaceFed.")
    return site


def reply_content(reply: Reply) -> RecordDict:
    """The content of the answer to train or evaluate: at most three arrays and one record of numbers."""
    sums: dict[str, Any] = {"num-examples": reply.num_examples, "server-round": reply.server_round}
    sums |= {f"train-{name}": value for name, value in reply.train.items()}
    arrays = {}
    for split, values in reply.evaluations.items():
        if values.confusion is None:  # of size 0 where it stays at the client
            raise ValueError("only one client's own evaluation travels")
        sums |= {f"{split}-{name}": value for name, value in values.numbers().items()}
        arrays[COUNTS_NAME.format(split=split)] = _plain_array(_flat_counts(values))
    if reply.groups is not None:
        arrays[GROUPS] = _plain_array(_smallest(reply.groups.reshape(-1)))
    if reply.change is not None:
        arrays[CHANGE] = _flat_array(reply.change)
    content = RecordDict({SUMS: MetricRecord(sums), ARRAYS: _record(arrays)})
    withheld = {WITHHELD_NAME.format(split=split): words for split, words in reply.withheld.items()}
    kept = {FROZEN: reply.frozen} if reply.frozen else {}
    content[TASK] = ConfigRecord({"manifest": reply.manifest, **kept, **withheld})
    return content


def _read_split(split: str, sums: Mapping[str, Any], arrays: Any) -> EvaluationSums:  # noqa: ANN401
    name = COUNTS_NAME.format(split=split)
    counts = _read_counts(arrays, name)
    ends = np.cumsum([math.prod(shape) for shape in COUNTS.values() if shape]).tolist()
    groups = math.isqrt(max(counts.size - ends[-1], 0))
    size = ends[-1] + groups**2
    if counts.shape != (size,) or groups > MOST_GROUPS:
        raise ReplyRefused(f"{name} has the shape {counts.shape}, this version's counts ({size},)")
    if bool((counts < 0).any()):
        raise ReplyRefused(f"{name} holds {counts.min()}, not counts")
    shapes = {part: shape or (groups, groups) for part, shape in COUNTS.items()}
    if groups == 0:  # the client's policy keeps its confusion
        shapes = {part: shape for part, shape in shapes.items() if COUNTS[part]}
    parts = zip(shapes.items(), np.split(counts, ends)[: len(shapes)], strict=True)
    return EvaluationSums.from_parts(
        {name: _number(sums, f"{split}-{name}") for name in CLOSED_FIELDS},
        {part: own.reshape(shape) for (part, shape), own in parts},
    )


def _read_withheld(record: Mapping[str, Any], splits: str) -> dict[str, str]:
    """Which splits have no score, and the client's two words why."""
    found = {}
    for split in splits.split():
        words = record.get(WITHHELD_NAME.format(split=split))
        if words is not None:
            if not (isinstance(words, str) and len(words) <= LONGEST_WITHHELD and words.isprintable()):
                raise ReplyRefused(f"{split} is withheld for {words!r}, no reason of ours")
            found[split] = words
    return found


def _read_groups(arrays: Mapping[str, Any]) -> NDArray[np.int64]:
    counts = _read_counts(arrays, GROUPS)
    if counts.size % GROUP_ROW or bool((counts < 0).any()):
        raise ReplyRefused(f"{GROUPS!r} holds {counts.size} numbers, {GROUP_ROW} a group and none below 0 are meant")
    return counts.reshape(-1, GROUP_ROW)


def read_reply(message: Message, splits: str) -> Reply:
    """The inverse of `reply_content` at the server, for the splits that were asked for.

    Raises ReplyRefused with the reason when a record, a key or an array is missing or malformed, or when the client
    answered with an error.
    """
    _refuse_error(message)
    try:
        _refuse_extras(message.content)
        sums: Mapping[str, Any] = message.content[SUMS]
        arrays: Mapping[str, Any] = message.content[ARRAYS]
        withheld = _read_withheld(message.content[TASK], splits)
        return Reply(
            server_round=_whole(sums, "server-round"),
            manifest=str(message.content[TASK]["manifest"]),
            num_examples=sums["num-examples"],
            train={name: float(sums[f"train-{name}"]) for name in TRAIN_FIELDS if f"train-{name}" in sums},
            evaluations={
                split: NOTHING if split in withheld else _read_split(split, sums, arrays)
                for split in splits.split()
                if split != GROUPS
            },
            groups=_read_groups(arrays) if GROUPS in splits.split() else None,
            withheld=withheld,
            frozen=str(message.content[TASK].get(FROZEN, "")),
            change=_read_flat(arrays, CHANGE) if CHANGE in arrays else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ReplyRefused(f"the reply is malformed: {type(error).__name__}: {error}") from None


def read_change(content: RecordDict) -> NDArray[np.float32]:
    """The change of a train reply alone, as it was sent, [size] float32.  Raises KeyError where there is none."""
    arrays: Any = content[ARRAYS]
    return codec.decode(_read_flat(arrays, CHANGE))


def error_message(reason: str, request: Message) -> Message:
    """A client's refusal or failure, as one line."""
    return Message(Error(code=CLIENT_FAILED, reason=reason), reply_to=request)
