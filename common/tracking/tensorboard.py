"""TensorBoard's copy of a run: the calls that write the spool also append events to logs/tensorboard/RUN[/NESTED].

Each event is one write to a file, so TensorBoard shows it at its next look. The records are TensorBoard's own messages
in its own framing. SummaryWriter adds a thread, whose errors come up elsewhere, and loads TensorFlow where that is
installed; it makes only what nothing else makes, a network's graph.
"""

import contextlib
import io
import logging
import re
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor, nn

OFF = "none"  # the word of tracking.tensorboard for: nowhere
FILE_PREFIX = "events.out.tfevents"  # how TensorBoard knows its files
_VERSION = "brain.Event:2"  # of the format; before it a repeated step wiped out what followed on its curve
_PNG = b"\x89PNG\r\n\x1a\n"

_log = logging.getLogger("facefed.tracking")


class Board:
    """The events of one run, or of one nested run; nothing here raises, and trouble is told once."""

    def __init__(self, folder: Path, told: threading.Event | None = None) -> None:
        """folder: made with the first event; what an earlier process left there is continued.  told: see `child`."""
        self._folder = folder
        self._told = told or threading.Event()  # one warning for a run and its nested runs
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._closed = False
        self.is_continued = any(folder.glob(f"{FILE_PREFIX}.*"))

    def child(self, name: str) -> "Board":
        """The board of a nested run, in a folder below."""
        return Board(self._folder / (re.sub(r"[^\w .=,-]", "_", name).lstrip(". ") or "_"), self._told)

    def scalars(self, metrics: Mapping[str, float], step: int, time_ms: int) -> None:
        """Add a point to each curve; TensorBoard keeps 32 bits of a value."""
        with self._guarded():
            from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

            self._write(time_ms, step, [Summary.Value(tag=key, simple_value=v) for key, v in metrics.items()])

    def picture(self, path: Path, name: str, step: int, time_ms: int) -> None:
        """Show a PNG under its name without the suffix; other formats are left out."""
        with self._guarded():
            from tensorboard.compat.proto.summary_pb2 import Summary

            data = path.read_bytes()
            if not data.startswith(_PNG):
                return
            width, height = struct.unpack(">II", data[16:24])
            image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=data)
            self._write(time_ms, step, [Summary.Value(tag=name.rpartition(".")[0], image=image)])

    def table(self, name: str, rows: Mapping[str, str], time_ms: int) -> None:
        """Show names and values as a text; a later table of the same name replaces an earlier one."""
        with self._guarded():
            from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
            from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
            from tensorboard.compat.proto.types_pb2 import DT_STRING  # type: ignore[import-untyped]

            lines = [f"| {key} | {value} |".replace("\n", " ") for key, value in rows.items()]
            text = "\n".join(["| name | value |", "|---|---|", *lines])
            plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
            tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
            self._write(time_ms, 0, [Summary.Value(tag=f"{name}/text_summary", metadata=plugin, tensor=tensor)])

    def graph(self, module: "nn.Module", example: "Tensor") -> None:
        """Show a network's graph, as it is in evaluation; a run that goes on has it already."""
        if self.is_continued:
            return
        try:
            records = _graph_records(module, example)
        except Exception as error:  # tracing fails in many ways
            _log.info("TensorBoard: no graph of %s (%s).", type(module).__name__, (str(error).splitlines() or ["?"])[0])
            return
        with self._guarded():
            self._append(records)

    def close(self) -> None:
        """End; later events are dropped."""
        with self._guarded():
            self._closed = True
            if self._file is not None:
                self._file.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """One thread at a time; whatever goes wrong is told once, and the next event opens a new file."""
        with self._lock:
            try:
                yield
            except Exception as error:  # whatever it is: training goes on
                if self._file is not None:  # what it holds of a record cannot be read
                    with contextlib.suppress(OSError):
                        self._file.close()
                    self._file = None
                if not self._told.is_set():
                    self._told.set()
                    _log.warning("TensorBoard: %s cannot be written (%s); training goes on.", self._folder, error)

    def _write(self, time_ms: int, step: int, values: Sequence[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary

        event = Event(wall_time=time_ms / 1000, step=step, summary=Summary(value=values))
        self._append(_record(event.SerializeToString()))

    def _append(self, records: bytes) -> None:
        if self._closed:
            return
        if self._file is None:
            self._file = self._opened()
        self._file.write(records)
        self._file.flush()

    def _opened(self) -> BinaryIO:
        """A new file behind all earlier ones: TensorBoard reads them in the order of their names, each once."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._folder.mkdir(parents=True, exist_ok=True)
        now_ns = time.time_ns()
        file = (self._folder / f"{FILE_PREFIX}.{now_ns // 10**9:010d}.{now_ns % 10**9:09d}").open("ab")
        file.write(_record(Event(wall_time=now_ns / 1e9, file_version=_VERSION).SerializeToString()))
        return file


def _record(message: bytes) -> bytes:
    """A message in the framing of event files: length, checksum, message, checksum."""
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

    buffer = io.BytesIO()
    RecordWriter(buffer).write(message)
    return buffer.getvalue()


def _graph_records(module: "nn.Module", example: "Tensor") -> bytes:
    """The records of a module's graph, as SummaryWriter writes them; the module is left as it was.

    Raises whatever tracing raises.
    """
    # TensorBoard's own switch, looked up as a module: its stub, even where TensorFlow is installed
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    import torch
    from torch.utils.tensorboard import SummaryWriter

    modes = [(part, part.training) for part in module.modules()]
    quiet = contextlib.redirect_stdout(io.StringIO())  # it prints why it fails, and then raises it
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), quiet, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        try:
            module.eval()
            with SummaryWriter(folder) as writer:
                writer.add_graph(module, example)
        finally:
            for part, mode in modes:
                part.training = mode
        (file,) = Path(folder).iterdir()
        return file.read_bytes()
