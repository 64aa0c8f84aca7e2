"""`facefed serve` under load: seconds a request by 1 and by 8 users, and memory over many requests.

    python -m bench.serving --pictures DIR [--gallery DIR] [--users 1 8] [--seconds 30] [--requests 2000] [--within 240]

--pictures: photographs, one folder a person.  Without --gallery one is made of the first photograph of 100 people, with
a ResNet-18 that nobody trained and thresholds that nobody measured: what is timed does not depend on either.  After
--within seconds it ends with the requests there were, and says how many.  Each user asks `identify` for one photograph
after the other, of a gallery that is served at its own pace (the rate of one address is raised for the measurement;
nothing else is changed).  Memory is that of the server's process: after 100 requests, after those of --users, and after
all of them, the rest by two users.  The users are in the same process: their memory and time are in the figures.
"""

import argparse
import asyncio
import base64
import itertools
import json
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import uvicorn

from bench.machine import describe
from common.metrics.sums import NUM_BINS
from common.metrics.thresholds import thresholds_from
from common.models.recogniser import EmbeddingModel, build_backbone
from common.settings import Settings
from simulation.recognition.asking import Recognition
from simulation.recognition.door import Door, Limits
from simulation.recognition.gallery import Binding, add_people, open_gallery
from simulation.recognition.model import FaceModel, weights_sha256
from simulation.recognition.photographs import Photographs, whose
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


def made_gallery(pictures: Path, folder: Path, num_people: int = 100) -> Path:
    """A gallery of the first photograph with one face of each person; says how many there are."""
    settings = Settings()
    embedder = EmbeddingModel(build_backbone(settings.model, settings.data.image_size))
    pairs = np.zeros((2, NUM_BINS), dtype=np.int64)
    pairs[0, -1], pairs[1, NUM_BINS // 2] = 1000, 100_000  # genuine at cosine 1, impostors at 0
    binding = Binding(sha256=weights_sha256(embedder), source="untrained")
    model = FaceModel(binding=binding, settings=settings, embedder=embedder, thresholds=thresholds_from([pairs]))
    photographs, rows = Photographs(model.image_size), {}
    for path in sorted(pictures.rglob("*.jpg")):
        if path.parent.name in rows or len(rows) == num_people:
            continue
        face, _ = whose(photographs.faces(path))
        if face is not None:
            rows[path.parent.name] = model.embed(face.picture[None])
    add_people(folder, binding, rows, keep_model=model.keep, again="")
    print(f"a gallery of {len(rows)} people, a template each")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=Path)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--within", type=float, default=240)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(arguments, arguments.gallery or made_gallery(arguments.pictures, Path(scratch) / "gallery"))


def memory_line(process: psutil.Process, done: int) -> str:
    return f"memory after {done:,} requests: {process.memory_info().rss / 2**20:.0f} MiB (with the users')"


def measure(arguments: argparse.Namespace, gallery: Path) -> None:
    began = time.monotonic()
    paths = sorted(arguments.pictures.rglob("*.jpg"))[:50]
    questions = itertools.cycle([{"picture": base64.b64encode(path.read_bytes()).decode()} for path in paths])
    server, address = started(gallery)
    print(json.dumps(describe()))
    asyncio.run(load(address, questions, 1, 60, 100))
    process = psutil.Process()
    done = 100
    print(memory_line(process, done), flush=True)
    for users in arguments.users:
        cpu_began = time.process_time()
        took = sorted(asyncio.run(load(address, questions, users, arguments.seconds, 10**9)))
        cpu = (time.process_time() - cpu_began) / len(took)
        done += len(took)
        p99 = took[min(len(took) - 1, int(0.99 * len(took)))]
        told = f"p50 {statistics.median(took):.3f} s, p99 {p99:.3f} s, {cpu:.3f} CPU-s each"
        print(f"{users} users: {len(took)} requests, {told}", flush=True)
    print(memory_line(process, done), flush=True)
    left = began + arguments.within - time.monotonic()
    if done < arguments.requests and left > 0:
        done += len(asyncio.run(load(address, questions, 2, left, arguments.requests - done)))
        print(memory_line(process, done))
    if done < arguments.requests:
        print(f"{arguments.requests:,} were asked for; {arguments.within:g} s were over before")
    server.should_exit = True


if __name__ == "__main__":
    main()
