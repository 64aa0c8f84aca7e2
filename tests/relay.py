"""A wire between two addresses that can be made as bad as a real one: slow, cut, silent. Standard library only.

    with Relay(to=("127.0.0.1", 8000), cuts_per_s=0.2, seed=3) as relay:
        ...  # clients connect to relay.port
        relay.cut("silence")
        relay.heal()

`Relay` works in a thread of the process that made it; `RelayProcess` in a process of its own, which may stand in
another network namespace, and takes the same words.  Whatever arrives goes on after `delay_s`, in its order; nothing
else is limited.  Three ways to fail:

    reset    open connections end with RST, and so does each new one as soon as it is accepted
    silence  nothing arrives at either side, nobody is told; after `heal` all of it does, as TCP sends again
    loss     the same, but what it caught stays silent for ever, as behind a router that forgot its connections
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, get_args

Kind = Literal["reset", "silence", "loss"]
Address = tuple[str, int]

DELAY_S = 0.05  # each way
PIECE = 1 << 16
MOST_ON_ITS_WAY = 1 << 10  # pieces; 64 MiB would need 1.3 GB/s at the usual delay
RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


class _Connection:
    """One client's connection and ours to the server, piped both ways."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        self._reader, self._writer, self._delay_s = reader, writer, delay_s
        self._writers = [writer]
        self._task = asyncio.current_task()
        self.speaks = asyncio.Event()  # cleared: what is on its way stays there
        self.speaks.set()

    async def run(self, to: Address) -> None:
        """Until both sides have ended, or one failed: then the other is told by RST, as a dead wire's would be."""
        try:
            await asyncio.sleep(2 * self._delay_s)  # its handshake would have gone there and back
            await self.speaks.wait()
            there, theirs = await asyncio.open_connection(*to)
            self._writers.append(theirs)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pipe(self._reader, theirs))
                both.create_task(self._pipe(there, self._writer))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            self._reset()
        finally:
            for writer in self._writers:
                writer.close()

    def end(self) -> None:
        """Cut it."""
        if self._task is not None:
            self._task.cancel()

    def _reset(self) -> None:
        for writer in self._writers:
            with contextlib.suppress(OSError):  # it was reset from the other side, and is closed already
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
            writer.transport.abort()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_ON_ITS_WAY)

        async def take() -> None:
            piece = b"-"
            while piece:
                piece = await reader.read(PIECE)
                await on_its_way.put((clock() + self._delay_s, piece))

        async def give() -> None:
            while True:
                due, piece = await on_its_way.get()
                await asyncio.sleep(max(0.0, due - clock()))
                await self.speaks.wait()
                if not piece:
                    writer.write_eof()
                    return
                writer.write(piece)
                await writer.drain()

        async with asyncio.TaskGroup() as both:
            both.create_task(take())
            both.create_task(give())


class Relay:
    """A relay in a thread of this process, while the block lasts."""

    def __init__(
        self,
        *,
        to: Address,
        host: str = "127.0.0.1",
        port: int = 0,
        delay_s: float = DELAY_S,
        cuts_per_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        """to: where it leads.  host, port: where it listens; 0 finds a port.

        cuts_per_s: how often, on average, one open connection ends with RST; when and which is drawn from the seed.
        """
        self.to, self.host, self.port = to, host, port
        self.num_connections = self.num_cut = 0  # so far
        self._delay_s, self._cuts_per_s, self._random = delay_s, cuts_per_s, random.Random(seed)
        self._connections: dict[_Connection, None] = {}  # in the order of their coming
        self._kind: Kind | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    @property
    def address(self) -> str:
        """Where clients connect to."""
        return f"{self.host}:{self.port}"

    def cut(self, kind: Kind) -> None:
        """Fail in this way until healed."""
        self._do(self._cut(kind))

    def heal(self) -> None:
        """Carry everything again."""
        self._do(self._heal())

    def counts(self) -> dict[str, int]:
        """How many connections there were, are open, and ended by RST of ours."""
        return {"connections": self.num_connections, "open": len(self._connections), "cut": self.num_cut}

    def _do(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._cutter = asyncio.create_task(self._cut_now_and_then())

    async def _close(self) -> None:
        self._server.close()
        self._cutter.cancel()
        self._end_all()
        while self._connections:
            await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(reader, writer, self._delay_s)
        self.num_connections += 1
        self._connections[connection] = None
        try:
            if self._kind == "reset":
                self._end(connection)
            elif self._kind is not None:
                connection.speaks.clear()
            await connection.run(self.to)
        finally:
            del self._connections[connection]

    def _end(self, connection: _Connection) -> None:
        self.num_cut += 1
        connection.end()

    def _end_all(self) -> None:
        for connection in self._connections:
            self._end(connection)

    async def _cut(self, kind: Kind) -> None:
        self._kind = kind
        if kind == "reset":
            self._end_all()
        for connection in self._connections:
            connection.speaks.clear()

    async def _heal(self) -> None:
        was, self._kind = self._kind, None
        for connection in self._connections:
            if was != "loss":
                connection.speaks.set()

    async def _cut_now_and_then(self) -> None:
        while self._cuts_per_s > 0:
            await asyncio.sleep(self._random.expovariate(self._cuts_per_s))
            chosen = self._random.random()
            if self._connections and self._kind is None:
                self._end(list(self._connections)[int(chosen * len(self._connections))])


class RelayProcess:
    """A relay in a process of its own, while the block lasts."""

    def __init__(self, *, wrapper: Sequence[str] = (), **how: object) -> None:
        """wrapper: a command that becomes the relay, such as `ip netns exec NAME`.  how: `Relay`'s own."""
        self._command = [*wrapper, sys.executable, "-P", str(Path(__file__).resolve()), json.dumps(how)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
        )
        self.host, self.port = json.loads(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    @property
    def address(self) -> str:
        """Where clients connect to."""
        return f"{self.host}:{self.port}"

    def cut(self, kind: Kind) -> None:
        """Fail in this way until healed."""
        self._ask(f"cut {kind}")

    def heal(self) -> None:
        """Carry everything again."""
        self._ask("heal")

    def counts(self) -> dict[str, int]:
        """How many connections there were, are open, and ended by RST of ours."""
        return self._ask("counts")

    def _ask(self, words: str) -> dict[str, int]:
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def main() -> None:
    """Relay as the argument (JSON) says, until standard input ends; each line there is a word of `RelayProcess`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how", type=json.loads)
    how = parser.parse_args().how
    with Relay(**{**how, "to": tuple(how["to"])}) as relay:
        print(json.dumps([relay.host, relay.port]), flush=True)  # noqa: T201
        for line in sys.stdin:
            match line.split():
                case ["cut", kind] if kind in get_args(Kind):
                    relay.cut(kind)
                case ["heal"]:
                    relay.heal()
            print(json.dumps(relay.counts()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
