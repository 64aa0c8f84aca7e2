"""`facefed serve` under load: seconds a request by 1 and by 8 users, and memory over many requests.

    python -m bench.serving --gallery DIR --pictures DIR [--users 1 8] [--seconds 30] [--requests 2000]

Each user asks `identify` for one photograph after the other, of a gallery that is served at its own pace (the rate of
one address is raised for the measurement; nothing else is changed).  Memory is that of the server's process, after 100
requests and after all of them.  The users are in the same process: their memory and time are in the figures.
"""

import argparse
import asyncio
import base64
import itertools
import json
import socket
import statistics
import threading
import time
from pathlib import Path

import httpx
import psutil
import uvicorn

from bench.machine import describe
from simulation.recognition.asking import Recognition
from simulation.recognition.door import Door, Limits
from simulation.recognition.gallery import open_gallery
from simulation.recognition.service import Desk, app_of
from simulation.recognition.verbs import model_of

TOKEN = "token-of-the-measurement"  # noqa: S105 - of a server that ends with it


def started(folder: Path) -> tuple[uvicorn.Server, str]:
    """A server in a thread of this process, and its address."""
    gallery = open_gallery(folder)
    asked = Recognition.of(model_of(gallery), far=None, anyway=True)
    limits = Limits(requests_a_minute=1e9, at_once=64)
    door = Door(
        app=app_of(Desk(folder=folder, asked=asked, limits=limits)),
        hosts=frozenset(["127.0.0.1"]),
        token=TOKEN,
        limits=limits,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(door, log_level="warning", access_log=False, lifespan="off", ws="none"))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return server, f"http://127.0.0.1:{listener.getsockname()[1]}"


async def user(address: str, questions, took: list[float], deadline: float, most: int) -> None:
    """One user, until the deadline or so many answers in all."""
    async with httpx.AsyncClient(
        base_url=address, timeout=300, headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False
    ) as client:
        while time.monotonic() < deadline and len(took) < most:
            began = time.perf_counter()
            answer = await client.post("/api/identify", json=next(questions))
            assert answer.status_code == 200, answer.text
            took.append(time.perf_counter() - began)


async def load(address: str, questions, users: int, seconds: float, most: int) -> list[float]:
    took: list[float] = []
    deadline = time.monotonic() + seconds
    await asyncio.gather(*(user(address, questions, took, deadline, most) for _ in range(users)))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args()
    paths = sorted(arguments.pictures.rglob("*.jpg"))[:50]
    questions = itertools.cycle([{"picture": base64.b64encode(path.read_bytes()).decode()} for path in paths])
    server, address = started(arguments.gallery)
    print(json.dumps(describe()))
    asyncio.run(load(address, questions, 1, 60, 100))
    process = psutil.Process()
    early, done = process.memory_info().rss, 100
    for users in arguments.users:
        cpu_began = time.process_time()
        took = sorted(asyncio.run(load(address, questions, users, arguments.seconds, 10**9)))
        cpu = (time.process_time() - cpu_began) / len(took)
        done += len(took)
        p99 = took[min(len(took) - 1, int(0.99 * len(took)))]
        told = f"p50 {statistics.median(took):.3f} s, p99 {p99:.3f} s, {cpu:.3f} CPU-s each"
        print(f"{users} users: {len(took)} requests, {told}", flush=True)
    while done < arguments.requests:
        done += len(asyncio.run(load(address, questions, 2, 600, arguments.requests - done)))
    late = process.memory_info().rss
    print(f"memory after 100 requests {early / 2**20:.0f} MiB, after {done:,} {late / 2**20:.0f} MiB (with the users')")
    server.should_exit = True


if __name__ == "__main__":
    main()
