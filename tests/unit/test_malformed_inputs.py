"""A thousand files that are damaged or made up: each is a clear line or a line of the quarantine, and nothing else.

No traceback, no hang (an alarm a case), no large memory, nothing written beside the folder. The damage is made from
seeds, so a failure names the case that repeats it.
"""

import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from faces_on_disk import make_celeba, make_folder, picture, write, write_shard
from malformed import damaged_bytes, damaged_json, damaged_text
from PIL import Image
from tiny_federation import (
    MANIFEST,
    ScriptedMailbox,
    client,
    federation_over,
    reply_to,
    settings_with,
    tiny_pack,
    tiny_workplace,
)

from clients.own_machine import ClientOption
from clients.private_state import load_private, load_residue, save_private
from common import config
from common.errors import ConfigError, FaceFedError
from common.faces import pack_store
from common.faces.decode import Job, Recipe, decode_job
from common.faces.index import read_index
from common.faces.pack import load_pack, open_pack
from common.models.pretrained import load_pretrained
from common.settings import DataSettings, Settings
from common.system.events import EventReader
from common.tracking.spool import entries_of, load_sent
from common.tracking.sync import _last_words, _num_corrupt, unsent
from server.global_model import GlobalModel, ServerOptimiser
from server.record.checkpoint import RunCheckpoints
from server.record.history import History
from server.resume import resume
from simulation.compare.model_lookup import find_model
from simulation.data.audit import audit
from simulation.sites import audit_data

pytestmark = pytest.mark.usefixtures("in_a_run", "no_syncing")

A_CASE_S = 60  # of a machine that is busy; the slowest takes a second
MOST_MEMORY = 2**30  # that all cases of a kind may add, in bytes
counted = Counter()


@pytest.fixture
def no_syncing(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _file: None)


@contextlib.contextmanager
def alarm(what):
    """Fails where a case does not end."""

    def ring(_signal, _frame):
        raise TimeoutError(f"{what} hangs")

    before, left = signal.signal(signal.SIGALRM, ring), signal.setitimer(signal.ITIMER_REAL, A_CASE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MOST_MEMORY, f"{grown} bytes more"


def outside(folder):
    """What lies beside the folder of a test."""
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.parent.iterdir() if path != folder)


@pytest.fixture
def inside(tmp_path):
    """A folder; nothing may appear or change beside it."""
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "beside").write_text("untouched")
    before = outside(folder)
    yield folder
    assert outside(folder) == before


def check(kind, case, call):
    """The result, or None where a clear error was raised."""
    counted[kind] += 1
    try:
        with alarm(f"{kind} {case}"):
            return call()
    except FaceFedError as error:
        lines = error.problems if isinstance(error, ConfigError) else [str(error)]
        for line in lines:
            assert line, f"{kind} {case}: an error without a word"
            assert len(line) < 3000, f"{kind} {case}: {len(line)} characters: {line[:200]}"
            assert line.isprintable(), f"{kind} {case}: {line!r:.300}"
        counted[f"{kind}: refused"] += 1
        return None
    except Exception as error:
        raise AssertionError(f"{kind} {case}: {type(error).__name__}: {error!s:.300}") from error


# ---- pictures


def png_of(width, height, depth=8, colour=2, body=b""):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body or zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def odd_pictures():
    """Name -> bytes of made-up ones that are whole, or claim to be."""
    face = picture(1, 40, 40)
    frames = [picture(number, 40, 40) for number in range(4)]
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "empty.jpg": b"",
        "one.jpg": b"\xff",
        "text.png": b"this is no picture",
        "zeros.bmp": bytes(5000),
        "bomb.png": png_of(60_000, 60_000, body=zlib.compress(bytes(10**6))),
        "wide.png": png_of(2**31 - 1, 1),
        "tall.png": png_of(1, 2**31 - 1),
        "none.png": png_of(0, 0),
        "lying.png": png_of(4000, 4000),
        "text-bomb.png": saved(face, format="PNG")[:33]
        + (lambda d: struct.pack(">I", len(d)) + b"zTXt" + d + struct.pack(">I", zlib.crc32(b"zTXt" + d)))(
            b"Comment\x00\x00" + zlib.compress(bytes(50_000_000))
        )
        + saved(face, format="PNG")[33:],
        "grey16.png": saved(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40), format="PNG"),
        "cmyk.jpg": saved(face.convert("CMYK"), format="JPEG"),
        "palette.png": saved(face.convert("P"), format="PNG"),
        "alpha.png": saved(face.convert("RGBA"), format="PNG"),
        "bits.png": saved(face.convert("1"), format="PNG"),
        "animated.webp": saved(frames[0], format="WEBP", save_all=True, append_images=frames[1:]),
        "animated.png": saved(frames[0], format="PNG", save_all=True, append_images=frames[1:]),
        "gif.jpg": saved(face, format="GIF"),
        "tiff.jpg": saved(face, format="TIFF"),
        "eps.jpg": saved(face, format="EPS"),
        "turned.jpg": saved(face, format="JPEG", exif=exif),
        "dot.png": saved(picture(2, 1, 1), format="PNG"),
        "line.png": saved(picture(2, 3000, 1), format="PNG"),
    }


def make_odd_files(folder):
    """What is no file of a picture at all; returns the names."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "passwd.jpg").symlink_to("/etc/passwd")
    (folder / "up.jpg").symlink_to("..")
    (folder / "new\nline.jpg").write_bytes(b"x")
    (folder / "red\x1b[31m.jpg").write_bytes(b"x")
    with open(os.fsencode(folder) + b"/no-\xff-utf8.jpg", "wb") as file:  # noqa: PTH123
        file.write(b"x")
    return 10


def fill_with_odd_pictures(folder, number):
    folder.mkdir()
    for name, content in odd_pictures().items():
        (folder / name).write_bytes(content)
    kinds = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp")]
    whole = [saved(picture(seed, 48, 56), format=kind) for seed, (kind, _) in enumerate(kinds)]
    for case in range(number):
        which = case % len(kinds)
        (folder / f"{case:04d}.{kinds[which][1]}").write_bytes(damaged_bytes(whole[which], case))
    return make_odd_files(folder)


def test_pictures(inside):
    make_folder(inside, {f"person{n}": 6 for n in range(5)})
    fill_with_odd_pictures(inside / "odd", 240)
    recipe = Recipe(alignment="resize", image_size=32, box_margin=0.0)
    names = sorted(os.listdir(inside / "odd"))  # noqa: PTH208 - names that are no UTF-8 too
    assert len(names) > 270
    for name in names:
        done = check(
            "picture", name, lambda n=name: decode_job(Job(root=inside / "odd", paths=(n,), points=None, recipe=recipe))
        )
        assert done is not None
        [reason] = done.reasons
        assert reason.isprintable()
        assert len(reason) < 500
        assert len(done.pictures) == (not reason)
        counted["picture: quarantined"] += bool(reason)
    data = DataSettings(image_size=32, max_quarantined_fraction=1.0)
    pack = check("picture", "all packed", lambda: open_pack("folder", inside, data, inside / "packs", workers=1))
    assert {f"person{n}" for n in range(5)} <= set(pack.people)
    report = check("picture", "all audited", lambda: audit("folder", inside, data))
    assert report.lines()
    limited = DataSettings(image_size=32)
    assert (
        check("picture", "too many", lambda: open_pack("folder", inside, limited, inside / "packs", workers=1)) is None
    )


def test_an_audit_of_names_that_no_terminal_can_show_is_printed(inside):
    make_folder(inside, {f"person{n}": 6 for n in range(5)})
    fill_with_odd_pictures(inside / "odd\x1b[31m", 0)
    for shape in ("text", "json"):
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        option = ClientOption(name="a", dataset="folder", data_dir=inside)
        assert (
            check("picture", shape, lambda s=shape, o=out, c=option: audit_data(Settings(), [c], shape=s, out=o, err=o))
            == 0
        )
        out.flush()
        assert b"\x1b" not in out.buffer.getvalue()


# ---- metadata


def celeba_at(folder):
    make_celeba(folder, {n: (n % 3, 3) for n in range(1, 9)})
    return [folder / n for n in ("identity_CelebA.txt", "list_eval_partition.txt", "list_landmarks_align_celeba.txt")]


def vggface2_at(folder):
    names = {"train": ["n000002/0001_01", "n000002/0002_01", "n000003/0001_01"], "test": ["n000001/0001_01"]}
    for part, listed in names.items():
        (folder / part).mkdir(parents=True)
        write(folder / f"{part}_list.txt", [f"{name}.jpg" for name in listed])
        rows = [f'"{name}",' + ",".join(str(10 + n) for n in range(10)) for name in listed]
        write(folder / "bb_landmark" / f"loose_landmark_{part}.csv", ["NAME_ID,P1X,...", *rows])
        rows = [f'"{name}",1,2,30,40' for name in listed]
        write(folder / "bb_landmark" / f"loose_bb_{part}.csv", ["NAME_ID,X,Y,W,H", *rows])
    write(
        folder / "identity_meta.csv",
        ["Class_ID, Name, Sample_Num, Flag, Gender", 'n000002, "A_B", 2, 1, m', 'n000003, "C", 1, 1, f'],
    )
    return sorted(path for path in folder.rglob("*") if path.is_file())


def twins_at(folder):
    for part, people in (("train", ["1", "2", "3"]), ("test", ["4", "5"])):
        listed = {person: [f"{person}/{person}d{n}.jpg" for n in (1, 2)] for person in people}
        (folder / f"{part}_dataset_infor.json").write_text(json.dumps(listed))
        (folder / f"{part}_twin_pairs.json").write_text(json.dumps([people[:2]]))
    return sorted(folder.glob("*.json"))


@pytest.mark.parametrize(
    ("dataset", "make", "number"), [("celeba", celeba_at, 120), ("vggface2", vggface2_at, 120), ("twins", twins_at, 80)]
)
def test_the_files_about_pictures(inside, dataset, make, number):
    files = make(inside)
    assert check("metadata", "whole", lambda: read_index(dataset, inside)) is not None
    for case in range(number):
        file = files[case % len(files)]
        whole = file.read_bytes()
        spoil = damaged_bytes if case % 3 == 0 else damaged_json if file.suffix == ".json" else damaged_text
        file.write_bytes(spoil(whole, case))
        index = check("metadata", f"{file.name} {case}", lambda: read_index(dataset, inside))
        for path in index.paths if index else ():
            place = os.path.normpath(inside / path)
            assert "\0" not in path
            assert place.startswith(f"{inside}{os.sep}"), f"{file.name} {case}: {path!r} leaves the folder"
        file.write_bytes(whole)
    assert counted["metadata: refused"] > 0


# ---- settings


def test_configurations(inside):
    whole = config.to_toml(Settings()).encode()
    path = inside / "a.toml"
    for case in range(160):
        path.write_bytes((damaged_bytes if case % 4 == 0 else damaged_text)(whole, case))
        check("config", case, lambda: config.load(path))
    raw = json.dumps(config.to_mapping(Settings())).encode()
    for case in range(60):
        text = damaged_json(raw, case).decode()
        settings = check("config", f"json {case}", lambda t=text: config.from_json(t))
        assert settings is None or config.from_json(config.to_json(settings)) == settings
    for text in (
        "[" * 100_000,
        "a = " + "[" * 5000 + "]" * 5000,
        "a." * 5000 + "b = 1",
        "[federation]\nrounds = " + "9" * 5000,
    ):
        path.write_text(text)
        assert check("config", text[:20], lambda: config.load(path)) is None
    assert counted["config: refused"] > 100


# ---- checkpoints


# The made-up changes are far longer than the model that they are of.
HARD = {"federation__strategy": "fedadam", "federation__download_codec": "int8", "federation__rounds": 2}
HARD |= {"federation__max_change_factor": "off"}


def federation_in(folder):
    nodes = {n: client(f"c{n}", lambda task, n=n: reply_to(task, change=n / 10)) for n in (1, 2)}
    return federation_over(ScriptedMailbox(nodes), settings_with(**HARD), folder)


def resumed(federation, folder):
    """Go on from the checkpoints of `folder` with the record of another run, whose file is locked by now."""
    fresh = dataclasses.replace(
        federation,
        checkpoints=RunCheckpoints(folder, MANIFEST),
        model=GlobalModel(np.zeros(MANIFEST.size, dtype=np.float32), "int8"),
        optimiser=ServerOptimiser.of(federation.settings.federation, MANIFEST, {one.name for one in MANIFEST.entries}),
        history=History(),
    )
    resume(fresh)
    return fresh


def test_checkpoints_of_the_server(inside):
    federation_in(inside / "run").run()
    kept = inside / "kept"
    shutil.copytree(inside / "run" / "checkpoints", kept)
    files = sorted(path.name for path in kept.iterdir())
    assert {"state.json", "moments-000002.safetensors", "scores-000000.safetensors"} <= set(files)
    other, gone_back = federation_in(inside / "again"), 0
    assert resumed(other, inside / "run" / "checkpoints").first_round == 3
    for case in range(150):
        name = files[case % len(files)]
        spoil = damaged_json if name == "state.json" and case % 2 else damaged_bytes
        path = inside / "run" / "checkpoints" / name
        path.write_bytes(spoil((kept / name).read_bytes(), case))
        found = check("checkpoint", f"{name} {case}", lambda: resumed(other, inside / "run" / "checkpoints"))
        if found is not None:
            assert np.isfinite(found.model.received).all()
            assert found.model.received.shape == (MANIFEST.size,)
            gone_back += found.first_round < 3
        shutil.copyfile(kept / name, path)
    assert counted["checkpoint: refused"] + gone_back > 30


def test_state_of_a_client_and_given_weights(inside):
    place = tiny_workplace(settings_with(), inside)
    optimiser = __import__("torch").optim.SGD(place.recogniser.parameters(), lr=0.1, momentum=0.9)
    save_private(inside / "p", 1, place.recogniser, optimiser, place.private, np.zeros(7, dtype=np.float32))
    path = inside / "p" / "round-000001.safetensors"
    whole = path.read_bytes()
    weights = inside / "weights.safetensors"
    for case in range(60):
        path.write_bytes(damaged_bytes(whole, case))
        check(
            "checkpoint",
            f"private {case}",
            lambda: load_private(inside / "p", 1, place.recogniser, optimiser, place.private),
        )
        check("checkpoint", f"residue {case}", lambda: load_residue(inside / "p", 1, 7))
        weights.write_bytes(damaged_bytes(whole, 1000 + case))
        check(
            "checkpoint",
            f"weights {case}",
            lambda: load_pretrained(place.recogniser.backbone, name="cnn", pretrained=str(weights)),
        )


# ---- packs


def test_packs(inside):
    pack, folder = tiny_pack("alpha"), inside / ("0" * 64)
    folder.mkdir()
    for name, array in (("person", pack.person), ("split", pack.split)):
        np.save(folder / f"{name}.npy", array)
    about = {
        **write_shard(folder, pack.pictures),
        "key": folder.name,
        "dataset": "folder",
        "people": list(pack.people),
        "quarantined": [["a", "b"]],
        "family": None,
    }
    pack_store.write_manifest(folder, ["00000"], about)
    files = [folder / name for name in (pack_store.MANIFEST, *pack_store.ARRAYS)]
    assert len(load_pack(folder)) == len(pack)
    for case in range(100):
        file = files[case % 4]
        whole = {path: path.read_bytes() for path in files}
        is_manifest = file.suffix == ".json"
        file.write_bytes((damaged_json if is_manifest and case % 8 else damaged_bytes)(whole[file], case))
        if not is_manifest and case % 3 == 0:  # whoever altered the file altered its digest too
            pack_store.write_manifest(folder, ["00000"], about)
        found = check("pack", f"{file.name} {case}", lambda: load_pack(folder))
        if found is not None:
            assert len(found.pictures) == len(found.person) == len(found.split)
            assert found.person.max(initial=0) < len(found.people)
        for path, content in whole.items():
            path.write_bytes(content)
    assert counted["pack: refused"] > 50


# ---- the records of runs


def read_everything(run, settings):
    """As `facefed tracking sync|doctor`, a watching terminal and `facefed evaluate` read a run's folder."""
    list(entries_of(run / "spool.jsonl"))
    load_sent(run, "sqlite:///x.db")
    unsent(run)
    _last_words(run / "spool.jsonl")
    _num_corrupt(run / "spool.jsonl")
    list(EventReader(run).new_events())
    find_model(settings, str(run), "--run")


def test_records_of_runs(inside):
    run = inside / "run"
    federation = federation_in(run)
    outcome = federation.run()
    (run / "metrics.json").write_text(json.dumps(federation.record.finished(outcome.history, 2, outcome.sha256)))
    (run / "config.toml").write_text(config.to_toml(federation.settings))
    sent = {"uri": "sqlite:///x.db", "offset": 10, "run_key": "k", "run_ids": {"": "1"}, "aside": [5]}
    (run / "spool.sent.json").write_text(json.dumps(sent | {"nonfinite": {"": ["a"]}, "versions": {"m": "1"}}))
    if not (run / "run.json").exists():
        (run / "run.json").write_text(json.dumps({"mode": "federated", "strategy": "fedadam", "clients": ["c1", "c2"]}))
    read_everything(run, federation.settings)
    files = [
        run / n for n in ("spool.jsonl", "spool.sent.json", "events.jsonl", "metrics.json", "run.json", "config.toml")
    ]
    for case in range(150):
        file = files[case % len(files)]
        whole = file.read_bytes()
        if file.suffix == ".json" and case % 4:
            spoil = damaged_json
        elif file.suffix == ".jsonl" and case % 4:

            def spoil(content, seed):
                lines = content.splitlines()
                row = seed % len(lines)
                lines[row] = damaged_json(lines[row], seed)
                return b"\n".join(lines) + b"\n"

        else:
            spoil = damaged_bytes
        file.write_bytes(spoil(whole, case))
        check("record", f"{file.name} {case}", lambda: read_everything(run, federation.settings))
        file.write_bytes(whole)


def test_a_thousand_cases_were_tried():
    """Runs last in this file, after all of the above."""
    kinds = {kind: number for kind, number in counted.items() if ":" not in kind}
    if len(kinds) < 6:
        pytest.skip("only with the tests above")
    assert sum(kinds.values()) >= 1000, kinds
