"""Hands connections on to one address: the published port of a service whose own network has no way out.

python run_relay.py LISTEN_PORT HOST PORT

Docker publishes no port of a container that is in internal networks alone. This one is in another network as well, and
holds nothing: who breaks into the service behind it finds here a program that begins no connection but to that service.
"""

import asyncio
import contextlib
import signal
import sys

CHUNK_BYTES = 1 << 16


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction, until its end, which is passed on."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def serve(port: int, behind: tuple[str, int], listen: str) -> None:
    """Until it is cancelled.  listen: the addresses of this machine that are listened at."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            other_reader, other_writer = await asyncio.open_connection(*behind)
            with contextlib.closing(other_writer):
                await asyncio.gather(pump(reader, other_writer), pump(other_reader, writer))

    async with await asyncio.start_server(relay, listen, port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(int(sys.argv[1]), (sys.argv[2], int(sys.argv[3])), "0.0.0.0"))  # noqa: S104 - the container's
