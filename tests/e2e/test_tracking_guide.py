"""docs/TRACKING.md: every command and program in it is executed, in order, and every output shown there is printed."""

import contextlib
import re
import shutil
import sqlite3
import tomllib

import pytest
from conftest import SMALL
from databases import ObjectStore, PostgreSQL
from guide_commands import FENCE, Block, Reader, Substitution, assert_printed, blocks_of
from programs import free_port

from tests.conftest import ROOT, skip_or_fail

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]  # one block alone needs all blocks before it

GUIDE = (ROOT / "docs" / "TRACKING.md").read_text(encoding="utf-8")
PROSE = FENCE.sub("", GUIDE)
BLOCKS = blocks_of(GUIDE)
PORTS = (5000, 5002, 5433, 6006)
NEEDED = ("bash", "psql", "pg_dump", "pg_restore", "strace", "unshare", "ip", "du")
NO_DRIVER = """\
import importlib.util

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if "psycopg" in name else find_spec(name, package)
"""
# Checking a password takes 0.1 s of a core on purpose, and the server does it for each of 600 requests.
SHORT_CHECK = """\
import functools
import werkzeug.security

werkzeug.security.generate_password_hash = functools.partial(
    werkzeug.security.generate_password_hash, method="pbkdf2:sha256:1"
)
"""
FINAL = """
[tracking]
plots = "final"
"""


def substitutions(postgresql, store):
    """All ways in which what is executed differs from what the guide says."""
    administrator = postgresql.uri(database="postgres")
    full = "mkdir -p full && mount -t tmpfs -o size=20m none full"  # a disk of its own, gone with the command
    return [
        # Where the guide takes the default port, the test may not.
        Substitution(r"(facefed tracking serve)(?![^\n]*--port)", r"\1 --port 5000"),
        Substitution(r"postgresql://postgres:secret@localhost:5432/postgres", administrator),
        Substitution(r"localhost:5432", f"127.0.0.1:{postgresql.port}"),
        Substitution(r"http://localhost:9000", store.address),
        # A name under which this machine is reached but which the server was not told.
        Substitution(r"gpu1\.example\.org", "127.0.0.2", back=True),
        # Trained so shortly, the model may be no better than the untrained one, and then it is no champion.
        Substitution(r"(models:/\w+)@champion", r"\1/2"),
        Substitution(r'get_model_version_by_alias\("(\w+)", "champion"\)', r'get_model_version("\1", "2")'),
        # The small configuration of the end-to-end tests instead of the demo's; see `folder`.
        Substitution(r"resnet18", "cnn"),
        Substitution(r"size = 64", "size = 32"),
        Substitution(r"^(facefed train local .* --out full)$", rf"unshare -rm sh -c '{full} && \1'"),
        Substitution(r"^(facefed tracking serve .*@db\.example\.org)", r"PYTHONPATH=../hidden:$PYTHONPATH \1"),
        *(Substitution(rf"\b{port}\b", str(free_port()), back=True) for port in PORTS),
    ]


@pytest.fixture(scope="module")
def folder(faces, tmp_path_factory):
    """What a reader has who made the demo's data, and once used wandb offline."""
    folder = tmp_path_factory.mktemp("guide") / "here"
    for name in ("configs", ".facefed", "../hidden", "../short"):
        (folder / name).mkdir(parents=True)
    (folder / "data").symlink_to(faces.folder / "data")
    (faces.folder / "packs").mkdir(exist_ok=True)
    (folder / ".facefed" / "packs").symlink_to(faces.folder / "packs")
    (folder / "configs" / "demo.toml").write_text(SMALL + FINAL)
    (folder / "../hidden/sitecustomize.py").write_text(NO_DRIVER)
    (folder / "../short/sitecustomize.py").write_text(SHORT_CHECK)
    shutil.copytree(ROOT / "tests" / "data" / "wandb" / "wandb-0.31.0" / "wandb", folder / "wandb")
    return folder


@pytest.fixture(scope="module")
def reader(folder):
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        skip_or_fail(f"not installed: {', '.join(missing)}")
    with contextlib.ExitStack() as at_end:
        database = PostgreSQL()
        at_end.callback(database.close)
        store = ObjectStore()
        at_end.callback(store.close)
        of_servers = {"PYTHONPATH": str(folder.parent / "short")}
        made = Reader(BLOCKS, folder, substitutions(database, store), of_servers)
        at_end.callback(made.close)
        yield made


@pytest.mark.parametrize("index", range(len(BLOCKS)), ids=map(str, BLOCKS))
def test_block(reader, index):
    reader.read(index)


def test_nothing_is_replaced_that_the_guide_does_not_have(reader):
    reader.read(len(BLOCKS) - 1)
    assert [one.pattern for one in reader.substitutions if not one.used] == []


def test_what_the_guide_says_is_recorded_is_recorded(reader, folder):
    """The rows of the programs that it runs: experiments, metrics, tags in the database, artifacts among the files."""
    reader.read(len(BLOCKS) - 1)
    rows = {row.split("|")[1].strip(): row.split("|")[1:] for row in PROSE.splitlines() if row.startswith("|")}
    tags = re.search(r"The tags are (.*?)\.", PROSE, re.DOTALL)[1]
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:

        def ask(statement, *values):
            return [row[0] for row in database.execute(statement, values)]

        experiments = set(ask("select name from experiments"))
        assert {"facial_recognition_local_celeba", "facial_recognition_federated_fedavg"} <= experiments & names(PROSE)
        for row, mode in (("local", "local"), ("federated", "federated"), ("its nested clients", "federated_client")):
            run = ask("select run_uuid from tags where key = 'mode' and value = ?", mode)[0]
            metrics = set(ask("select key from latest_metrics where run_uuid = ?", run))
            assert names(rows[row][1]) - {"test_...", "val_...", "round_test_...", "val_", "test_"} <= metrics, row
            assert mode == "federated_client" or any(name.startswith("system/") for name in metrics)
            assert names(tags) <= set(ask("select key from tags where run_uuid = ?", run)), row
            artifacts = next(folder.glob(f"mlartifacts/*/{run}/artifacts"))
            assert all((artifacts / name).is_file() for name in names(rows[row][2])), row


def names(text):
    """What stands in code marks."""
    return set(re.findall(r"`([^`]+)`", text))


def test_every_function_that_takes_the_place_of_one_of_wandb_exists():
    import mlflow

    import common.tracking
    from common.tracking.run import TrackedRun

    table = GUIDE[GUIDE.index("| wandb |") : GUIDE.index("Runs that wandb kept")]
    found = re.findall(r"(?:`(common\.tracking|mlflow)\.|(the run's) `)(\w+)`", table)
    assert len(found) > 14
    owners = {"common.tracking": common.tracking, "mlflow": mlflow, "the run's": TrackedRun}
    assert not [name for library, run, name in found if not hasattr(owners[library or run], name)]


def test_every_extra_stands_in_a_guide():
    """Those of a tracking server in this one, that of photographs where photographs are used."""
    guides = GUIDE + (ROOT / "docs" / "USING.md").read_text(encoding="utf-8")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert names(" ".join(re.findall(r"`pip install \"facefed\[\w+\]\"`", guides))) == {
        f'pip install "facefed[{extra}]"' for extra in needed["optional-dependencies"] if extra != "dev"
    }


def test_an_output_that_is_not_as_shown_is_seen():
    """The control of the comparison."""
    printed = "one 1\ntwo\nthree"
    for good in ("one …\ntwo", "one 1\n…\nthree", "two", "…\nthree"):
        assert_printed(good, printed)
    for bad in ("one\n", "one 1\nthree", "two\none 1", "two\n…\ntwo", "on"):
        with pytest.raises(AssertionError, match="not printed"):
            assert_printed(bad, printed)


@pytest.mark.parametrize(
    ("language", "text"), [("bash", "du\n"), ("sh", "wget x\n"), ("console", "$ printf a\nb\n"), ("sh", "du nothing\n")]
)
def test_what_cannot_be_executed_or_goes_wrong_is_a_failure(tmp_path, language, text):
    """The control of the execution: an unknown language, an unknown program, another output, an exit code."""
    (tmp_path / "here").mkdir()
    with pytest.raises(AssertionError):
        Reader([Block(1, language, text)], tmp_path / "here", []).read(0)
