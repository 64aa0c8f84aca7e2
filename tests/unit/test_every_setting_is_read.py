"""A setting that nobody reads is a promise nobody keeps: each field is read as an attribute outside of its own file."""

import ast
import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from common import config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "server", "clients", "simulation", "facefed")
SECTIONS = {section: kind.__name__ for section, kind in config._section_types().items()}


def fields_defined(settings_file: Path) -> set[tuple[str, str]]:
    """(section, field) of every settings class in a settings.py, by its source."""
    classes = {
        node.name: node for node in ast.parse(settings_file.read_text("utf-8")).body if isinstance(node, ast.ClassDef)
    }
    return {
        (section, line.target.id)
        for section, name in SECTIONS.items()
        for line in classes[name].body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def _holders(tree: ast.Module) -> dict[str, set[str]]:
    """Names that stand for a section in this file: `training = settings.training`, `data: DataSettings`, ..."""
    by_class = {name: section for section, name in SECTIONS.items()}
    holders: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else getattr(node.target, "id", "")
            for part in ast.walk(node.annotation):
                if isinstance(part, ast.Name) and part.id in by_class:
                    holders.setdefault(name, set()).add(by_class[part.id])
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                for one, value in zip(names, values, strict=False):
                    name = getattr(one, "id", getattr(one, "attr", ""))
                    if isinstance(value, ast.Attribute) and value.attr in SECTIONS:
                        holders.setdefault(name, set()).add(value.attr)
                    if isinstance(value, ast.Name):
                        holders.setdefault(name, set()).update(holders.get(value.id, set()))
    return holders


def attributes_read(files: Iterable[Path]) -> set[tuple[str, str]]:
    """(section, field) of every attribute that is read of a section, however the file calls it."""
    read = set()
    for file in files:
        tree = ast.parse(file.read_text("utf-8"))
        holders = _holders(tree)
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
                continue
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            sections = holders.get(name, set()) | ({name} if name in SECTIONS else set())
            sections |= holders.get(name.lstrip("_"), set())
            read |= {(section, node.attr) for section in sections}
    return read


def unread(root: Path) -> set[tuple[str, str]]:
    defined = fields_defined(root / "common/settings.py")
    own = (root / "common/settings.py", root / "common/config.py")
    files = [p for package in PACKAGES for p in (root / package).rglob("*.py") if p not in own]
    inside = ast.parse((root / "common/settings.py").read_text("utf-8"))
    # `total_epochs` and its like in Settings are part of what others read: they count as readers.
    properties = {
        (node.value.attr, node.attr)
        for node in ast.walk(next(n for n in inside.body if isinstance(n, ast.ClassDef) and n.name == "Settings"))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)
    }
    return defined - attributes_read(files) - properties


def test_every_setting_is_read_somewhere():
    assert unread(ROOT) == set()


def test_the_source_and_the_objects_agree():
    known = {(s, f.name) for s, kind in config._section_types().items() for f in dataclasses.fields(kind)}
    assert fields_defined(ROOT / "common/settings.py") == known


def test_a_setting_that_nobody_reads_is_found(tmp_path):
    """Seen red: a field of a new name, and one whose name is read in another section only."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "common/settings.py"
    text = file.read_text("utf-8")
    line = "    seed: int = setting(1, low=0)\n"
    assert line in text
    added = line + "    sparkle: float = setting(0.0, low=0.0)\n    momentum: float = setting(0.0, low=0.0)\n"
    file.write_text(text.replace(line, added), encoding="utf-8")
    assert unread(tmp_path) == {("run", "sparkle"), ("run", "momentum")}
