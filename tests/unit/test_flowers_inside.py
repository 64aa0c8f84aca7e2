"""What stands of Flower's inside in the product: in its rooms only, as the page lists it, and still in Flower."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adr" / "0022-flowers-inside.md").read_text(encoding="utf-8")
PRODUCT = ("common", "server", "clients", "simulation", "docker")
ROOMS = ("server/flower/", "clients/flower/", "simulation/engine/")
# The modules of Flower's API reference; what they export is its public interface.
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.common", "flwr.simulation")


def is_public(module, name):
    return module in PUBLIC and name in importlib.import_module(module).__all__


class Uses(ast.NodeVisitor):
    """Fills `names` with what a file uses of Flower that is not public."""

    def __init__(self):
        self.names, self._bound = set(), {}  # the second: by the name that it has in the file

    def visit_Import(self, node):
        self.names |= {one.name for one in node.names if one.name.split(".")[0] == "flwr" and one.name not in PUBLIC}

    def visit_ImportFrom(self, node):
        for one in node.names:
            if (node.module or "").split(".")[0] == "flwr" and not is_public(node.module, one.name):
                self._bound[one.asname or one.name] = f"{node.module}.{one.name}"
        self.names |= set(self._bound.values())

    def visit_AnnAssign(self, node):
        """`loop: Any = start_client_internal` is the same under a name that the type checker lets us write to."""
        if isinstance(node.value, ast.Name) and node.value.id in self._bound:
            self._bound[node.target.id] = self._bound[node.value.id]
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if isinstance(node.value, ast.Name) and node.value.id in self._bound:
            self.names.add(f"{self._bound[node.value.id]}.{node.attr}")
        self.generic_visit(node)


def uses(source):
    """The dotted names; of a module or a class only the parts, where parts of it are used."""
    found = Uses()
    found.visit(ast.parse(source))
    return {name for name in found.names if not any(other.startswith(f"{name}.") for other in found.names)}


def uses_of_the_product():
    files = [path for top in PRODUCT for path in (ROOT / top).rglob("*.py")]
    return {(name, path.relative_to(ROOT).as_posix()) for path in files for name in uses(path.read_text("utf-8"))}


def rows(title):
    """The cells of the table under that title of the page."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert lines, title
    return [[re.findall(r"`([^`]+)`", cell) for cell in line] for line in lines]


def listed(title):
    """(dotted name, file), for each name and file of a table."""
    return {(f"{of[0]}.{name}", file) for of, files, *_ in rows(title) for name in of[1:] for file in files}


USES = uses_of_the_product()
CALLED = listed("Called on what is imported")
TEXTS = [(text[0], file, where[0]) for text, files, where in rows("Read, written or passed as text") for file in files]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from flwr.app import Array, Message\nfrom flwr.serverapp.strategy import FedAvg\nimport flwr.app", set()),
        ("from flwr.app.message import make_message", {"flwr.app.message.make_message"}),
        ("from flwr.common import EventType, constant", {"flwr.common.constant"}),
        ("def f():\n    import flwr.proto.fleet_pb2", {"flwr.proto.fleet_pb2"}),
        ("from flwr.supercore import heartbeat as h\nh.exponential()", {"flwr.supercore.heartbeat.exponential"}),
        (
            "from flwr.supernode import start_client_internal\nloop: Any = start_client_internal\nloop.time = 1",
            {"flwr.supernode.start_client_internal.time"},
        ),
        ("from flowers import tulip\nfrom . import flwr", set()),
    ],
)
def test_this_finds_what_is_not_public(source, found):
    assert uses(source) == found


def test_it_stands_in_its_rooms_only():
    assert {use for use in USES if not use[1].startswith(ROOMS)} == set()
    assert {file.rpartition("/")[0] + "/" for _, file in USES} == set(ROOMS)


def test_the_page_lists_it_and_nothing_else():
    assert listed("Imported") == USES


def closure(*modules):
    """The files of our own that these import, one by way of the other, where the import stands at a file's top."""
    found, left = set(), list(modules)
    while left:
        path = ROOT / (left.pop().replace(".", "/") + ".py")
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                left += [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_flwr_run_works_without_any_of_it():
    """The public fallback of all of it: stock Flower, our doors to it, and a Grid that is used as it is meant."""
    files = closure("server.stock", "clients.app", "clients.message_handler")
    assert {"server/rounds.py", "clients/local_update.py", "server/flower/public_grid.py"} <= files
    assert {use for use in USES if use[1] in files} == set()


@pytest.mark.parametrize("name", sorted({name for name, _ in USES | CALLED}))
def test_flower_still_has(name):
    found_in_flower(name)


def found_in_flower(name):
    """What has that dotted name."""
    module, parts = name, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, part = module.rpartition(".")
            assert module, f"Flower has no {name}"
            parts.insert(0, part)
    for part in parts:
        assert hasattr(found, part), f"Flower has no {name}"
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("name", "file"), sorted(CALLED))
def test_what_is_called_is_called_there(name, file):
    assert f".{name.rpartition('.')[2]}" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(("text", "file", "module"), TEXTS)
def test_the_text_stands_here_and_in_flower(text, file, module):
    assert text in (ROOT / file).read_text(encoding="utf-8")
    assert text in inspect.getsource(importlib.import_module(module)), f"{module} has no {text!r}"


def shapes(module):
    """The `Protocol`s of a file of ours, by their names: what it reads of objects that Flower hands over."""
    found = vars(importlib.import_module(module)).items()
    return {name: one for name, one in found if getattr(one, "_is_protocol", False) and one.__module__ == module}


def parts_of(shape):
    """What that shape wants: fields and methods."""
    kinds = [kind for kind in shape.__mro__ if getattr(kind, "_is_protocol", False) and kind.__name__ != "Protocol"]
    own = {part for kind in kinds for part in (*kind.__annotations__, *vars(kind))}
    return {part for part in own if part == "__contains__" or not part.startswith("_")}


def fields_of(flowers):
    """Of a message, or of a dataclass; all else `hasattr` finds."""
    described = getattr(flowers, "DESCRIPTOR", None)
    return {*(described.fields_by_name if described else ()), *getattr(flowers, "__dataclass_fields__", ())}


READ = [(file, ours, flowers[0]) for flowers, ours_in, files in rows("Read of what Flower hands over") for file in files
        for ours in ours_in]  # fmt: skip


@pytest.mark.parametrize(("file", "ours", "flowers"), READ)
def test_flower_has_what_is_read_of_it(file, ours, flowers):
    wanted, kind = parts_of(shapes(file.removesuffix(".py").replace("/", "."))[ours]), found_in_flower(flowers)
    assert wanted
    assert {part for part in wanted if part not in fields_of(kind) and not hasattr(kind, part)} == set(), flowers


def test_the_page_lists_each_shape_of_ours():
    files = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).glob("*.py")}
    ours = {(file, name) for file in files for name in shapes(file.removesuffix(".py").replace("/", "."))}
    assert ours == {(file, name) for file, name, _ in READ}


def counts():
    """How many there are of each kind, as the page says it."""
    imported, called = {name for name, _ in USES}, {name for name, _ in CALLED}
    texts, read = {text for text, *_ in TEXTS}, {flowers for *_, flowers in READ}
    return (
        f"{len(imported)} names are imported ({len(USES)} uses), {len(called)} called on what is imported, {len(texts)}"
        f" texts\nshared, and parts of {len(read)} classes read without an import"
    )


def test_the_page_says_how_many_there_are():
    assert counts() in PAGE


if __name__ == "__main__":
    print(counts())  # noqa: T201
