"""A package that is installed by hand hides a missing line: what our packages import must be declared."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "clients", "server", "simulation", "facefed", "configs")
IMPORTED_AS = {"PIL": "pillow", "grpc": "grpcio", "sklearn": "scikit-learn"}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _normal(name: str) -> str:
    """The name as PyPI compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_the_packages_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[\[<>=~! ]", line)[0] for line in project["dependencies"]}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    imported = set().union(*map(_imported, files)) - set(sys.stdlib_module_names) - set(PACKAGES)

    missing = {IMPORTED_AS.get(name, name) for name in imported} - declared

    assert not missing, f"add to [project] dependencies: {sorted(missing)}"


def test_what_is_declared_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    pinned = {_normal(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}

    missing = {_normal(re.split(r"[\[<>=~! ]", line)[0]) for line in lines} - pinned

    assert not missing, f"add to constraints.txt: {sorted(missing)}"


# -- the lock ----------------------------------------------------------------------------------------------------------


def _locked(name: str) -> dict[str, str]:
    """Package -> its entry: NAME==VERSION and a line for each hash."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if not entry.startswith("#")]
    return {entry.partition("==")[0]: entry for entry in entries if entry}


def test_the_lock_has_the_pins_and_a_hash_for_each() -> None:
    """What is needed at all is the other tests' affair: here the two lists of versions are one."""
    run, develop = _locked("run.txt"), _locked("develop.txt")
    assert not run.keys() & develop.keys()
    locked = run | develop
    pins = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    pinned = {_normal(line.partition("==")[0]): line.partition("==")[2] for line in pins}

    assert {name: re.split(r"[ \\]", entry.partition("==")[2])[0] for name, entry in locked.items()} == pinned
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}$", entry, re.MULTILINE) for entry in locked.values())
    assert not re.search(r"^-|://|;", "".join(locked.values()), re.MULTILINE), "an index, an address or a condition"


def test_what_runs_is_in_the_first_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["postgresql"]
    assert {_normal(re.split(r"[\[<>=~! ]", line)[0]) for line in lines} <= _locked("run.txt").keys()


def test_another_file_of_the_same_name_and_version_is_not_installed(tmp_path: Path) -> None:
    """An index that was broken into, or a mirror: without the hashes pip takes what it is handed."""
    entry = _locked("develop.txt")["iniconfig"]
    pin = entry.split()[0]
    name, _, version = pin.partition("==")
    with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        about = f"{name}-{version}.dist-info"
        wheel.writestr(f"{name}.py", "raise SystemExit('taken over')\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    command = [
        *(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-index",
            "--find-links",
            tmp_path,
            "--no-deps",
            "--ignore-installed",
        ),
        *("--isolated", "--disable-pip-version-check", "--target", tmp_path / "taken"),
    ]
    (tmp_path / "locked.txt").write_text(entry)
    (tmp_path / "pinned.txt").write_text(pin)

    refused = subprocess.run(
        [*command, "--require-hashes", "-r", tmp_path / "locked.txt"], capture_output=True, text=True, timeout=120
    )
    taken = subprocess.run([*command, "-r", tmp_path / "pinned.txt"], capture_output=True, text=True, timeout=120)

    assert refused.returncode == 1
    assert "HASHES" in refused.stderr
    assert taken.returncode == 0, taken.stderr  # the control: the attack works on a version alone


def test_everything_is_installed_by_hash() -> None:
    """In the Makefile and the image; our own files need no hash, and torch of another index has none in the lock.

    Nor has another Flower, which `make test-flower` puts aside for its tests.
    """
    seen = 0
    for path in (ROOT / "Makefile", *(ROOT / "docker").glob("*ockerfile")):
        text = re.sub(r"^PIP .*", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert "--extra-index-url" not in text, path
        for line in re.findall(r"(?:pip install|\$\(PIP\)) [^&;\n]*", text):
            allowed = (
                "--require-hashes",
                "--no-deps --no-build-isolation",
                '--index-url "${TORCH_INDEX}" -r torch.txt',
                '--index-url "$(TORCH_INDEX)" -r $(VENV)/torch.txt',
                "--target build/flwr-$(FLWR) flwr==$(FLWR)",
            )
            assert any(one in line for one in allowed), f"{path}: {line}"
            seen += 1
    assert seen > 7


def test_torch_of_another_index_takes_the_place_of_the_locked_one_alone() -> None:
    spec = importlib.util.spec_from_file_location("without_torch", ROOT / "requirements" / "without_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = _locked("run.txt")
    kept = module.without_torch("".join(run.values()))
    gone = {name for name in run if f"{name}==" not in kept}
    assert {"torch", "torchvision", "triton"} <= gone
    assert all(name.startswith(("torch", "triton", "nvidia-", "cuda-")) for name in gone)
    assert kept == "".join(entry for name, entry in run.items() if name not in gone)
