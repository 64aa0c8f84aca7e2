"""Nothing that arrives or is loaded can run code: no source reads such a format, and files that would are refused.

The first half reads our sources. The second makes files whose unpickling would write a marker, gives them to every
loader, and looks for the marker; a control shows that the very same bytes do write it where they are unpickled.
"""

import ast
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from faces_on_disk import write_shard
from tiny_federation import MANIFEST, settings_with, tiny_pack, tiny_workplace

from clients.private_state import load_private, load_residue
from common import config
from common.errors import CheckpointError, FaceFedError
from common.faces.datasets import DATASETS
from common.faces.decode import Job, Recipe, decode_job
from common.faces.index import read_index
from common.faces.pack import load_pack
from common.models.pretrained import load_pretrained
from common.system.checkpoints import read_flat, read_tensors
from common.system.files import read_json
from common.tracking.registry import CONFIG, NotPlain, read_exported
from common.tracking.spool import read_entries
from server.record.checkpoint import RunCheckpoints
from server.record.history import RoundRecord, read_scores
from simulation.admin.wandb_log import read_records

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "clients", "server", "simulation", "facefed", "configs")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "yaml"}
# What is imported all the same: (file, name) -> why no file or message can reach it.
ALLOWED = {
    (
        "simulation/engine/flow.py",
        "pickle.PickleBuffer",
    ): "hands Ray a buffer of this process without a copy; loads nothing",
}
CALLS = {"eval", "exec", "compile", "__import__"}
# Functions that unpickle, or whose default does, with the argument that makes them safe.
SAFE_WITH = {
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
FORBIDDEN = {
    "torch.jit.load", "torch.export.load", "torch.hub.load", "mlflow.pytorch.load_model", "mlflow.pyfunc.load_model",
    "pickle.loads", "pickle.load", "pd.read_pickle", "np.fromregex", "joblib.load", "runpy.run_path",
}  # fmt: skip


def sources():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def unsafe_call(node):
    """What is wrong with a call, or an empty text."""
    name = dotted(node.func)
    if name in CALLS or name in FORBIDDEN:
        return name
    if name in SAFE_WITH:
        argument, wanted = SAFE_WITH[name]
        given = next((one.value for one in node.keywords if one.arg == argument), None)
        return (
            "" if isinstance(given, ast.Constant) and given.value is wanted else f"{name} without {argument}={wanted}"
        )
    return ""


def faults_of(path, text):
    found = []
    for node in ast.walk(ast.parse(text)):
        found += [
            f"{path}:{node.lineno} imports {name}"
            for name in imports(node)
            if name.partition(".")[0] in MODULES and (path, name) not in ALLOWED
        ]
        if isinstance(node, ast.Call) and unsafe_call(node):
            found.append(f"{path}:{node.lineno} calls {unsafe_call(node)}")
    return found


def test_no_source_of_ours_reads_a_format_that_can_run_code():
    files = sources()
    assert len(files) > 100
    found = [fault for path in files for fault in faults_of(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert not found, "use safetensors, JSON or NumPy without pickle, or say in ALLOWED why this is harmless"


def test_each_exception_is_still_needed():
    for path, name in ALLOWED:
        names = [one for node in ast.walk(ast.parse((ROOT / path).read_text())) for one in imports(node)]
        assert name in names


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import cloudpickle as c",
        "from dill import loads",
        "import joblib",
        "from marshal import loads",
        "import yaml",
        "eval(text)",
        "exec(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "mlflow.pytorch.load_model(uri)",
        "torch.export.load(path)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert faults_of("common/x.py", line)


# ---- files that would run code where they are unpickled


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "a loader ran the code that a file brought"


def evil_bytes(marker):
    return pickle.dumps(Marker(marker))


def evil_torch(path, marker):
    torch.save({"weight": Marker(marker)}, path)


def evil_npy(path, marker):
    array = np.empty(1, dtype=object)
    array[0] = Marker(marker)
    np.save(path, array, allow_pickle=True)


def test_the_same_bytes_do_run_where_they_are_unpickled(tmp_path):
    """Else the tests below would show nothing."""
    for number, load in enumerate([pickle.loads]):
        path = tmp_path / f"ran-{number}"
        load(evil_bytes(path)).close()
        assert path.exists()
    evil_npy(tmp_path / "a.npy", tmp_path / "ran-npy")
    np.load(tmp_path / "a.npy", allow_pickle=True)[0].close()
    assert (tmp_path / "ran-npy").exists()


EVIL = {
    "pickle": lambda path, marker: path.write_bytes(evil_bytes(marker)),
    "torch": evil_torch,
    "npy": lambda path, marker: (evil_npy(path.with_suffix(".npy"), marker), path.with_suffix(".npy").replace(path)),
}


@pytest.fixture(params=sorted(EVIL))
def evil(request, marker):
    """Writes an evil file at a path."""

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        EVIL[request.param](path, marker)
        return path

    return write


def test_checkpoints(evil, tmp_path):
    path = evil(tmp_path / "checkpoints" / "round-000001.safetensors")
    for load in (
        read_tensors,
        read_json,
        lambda at: read_flat(at, [("a", (3,))]),
        lambda at: read_scores(at, RoundRecord(1)),
    ):
        with pytest.raises(CheckpointError):
            load(path)
    with pytest.raises(CheckpointError):
        RunCheckpoints(tmp_path / "checkpoints", MANIFEST).load(1)
    evil(tmp_path / "checkpoints" / "moments-000001.safetensors")
    with pytest.raises(CheckpointError):
        RunCheckpoints(tmp_path / "checkpoints", MANIFEST).load_moments(1, "sha")
    evil(tmp_path / "checkpoints" / "state.json")
    with pytest.raises(CheckpointError):
        RunCheckpoints(tmp_path / "checkpoints", MANIFEST).read_state(tmp_path / "checkpoints" / "state.json")


def test_a_clients_private_state(evil, tmp_path):
    place = tiny_workplace(settings_with(), tmp_path)
    evil(tmp_path / "private" / "round-000001.safetensors")
    assert load_private(tmp_path / "private", 1, place.recogniser, None, place.private) == -1, "as if there were none"
    with pytest.raises(CheckpointError):
        load_residue(tmp_path / "private", 1, 7)


def test_pretrained_weights(evil, tmp_path):
    place = tiny_workplace(settings_with(), tmp_path)
    for name in ("weights.safetensors", "weights.pt", "weights.pth"):
        path = evil(tmp_path / name)
        with pytest.raises(FaceFedError):
            load_pretrained(place.recogniser.backbone, name="cnn", pretrained=str(path))


@pytest.mark.parametrize("name", ["places.npy", "person.npy", "split.npy"])
def test_packs_even_with_a_manifest_that_vouches_for_the_file(evil, tmp_path, name):
    from common.faces import pack_store

    pack, folder = tiny_pack("alpha"), tmp_path / ("0" * 64)
    folder.mkdir()
    form = write_shard(folder, pack.pictures)
    np.save(folder / "person.npy", pack.person)
    np.save(folder / "split.npy", pack.split)
    evil(folder / name)
    about = {"key": folder.name, "dataset": "folder", "people": list(pack.people), "quarantined": [], "family": None}
    pack_store.write_manifest(folder, ["00000"], {**about, **form})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pack(folder)


def test_pictures_and_the_files_about_them(evil, tmp_path):
    path = evil(tmp_path / "person" / "1.jpg")
    recipe = Recipe(alignment="resize", image_size=32, box_margin=0.0)
    done = decode_job(Job(root=tmp_path, paths=(path.relative_to(tmp_path).as_posix(),), points=None, recipe=recipe))
    assert done.reasons[0].startswith("unreadable")
    names = {
        "celeba": ["identity_CelebA.txt", "list_eval_partition.txt", "list_landmarks_align_celeba.txt"],
        "vggface2": ["train_list.txt", "identity_meta.csv", "bb_landmark/loose_bb_train.csv"],
        "twins": ["train_dataset_infor.json", "train_twin_pairs.json"],
        "folder": [],
    }
    assert set(names) == set(DATASETS)
    for dataset, files in names.items():
        root = tmp_path / dataset
        (root / "train").mkdir(parents=True)
        for name in files:
            evil(root / name)
        with pytest.raises(FaceFedError):
            read_index(dataset, root)


def test_settings_records_and_offline_runs(evil, tmp_path):
    for name in ("config.toml", "metrics.json"):
        with pytest.raises(FaceFedError):
            config.load(evil(tmp_path / name))
    assert read_entries(evil(tmp_path / "spool.jsonl"), 0, 10)[0] == []
    with pytest.raises(FaceFedError):
        list(read_records(evil(tmp_path / "run-x.wandb")))


def exported(path, marker, *, use_pickle):
    """An archive as torch.export writes it, of one tensor."""
    sizes = {"sizes": [{"as_int": 2}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "dtype": 7}
    about = {"path_name": "weight_0", "is_param": True, "use_pickle": use_pickle, "tensor_meta": sizes}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"model/{CONFIG}", json.dumps({"config": {"backbone.weight": about}}))
        data = evil_bytes(marker) if use_pickle else np.float32([1.5, -2.0]).tobytes()
        archive.writestr("model/data/weights/weight_0", data)


def test_models_from_a_registry(evil, tmp_path, marker):
    with pytest.raises(NotPlain):
        read_exported(evil(tmp_path / "model.pt2"))
    exported(tmp_path / "a.pt2", marker, use_pickle=True)
    with pytest.raises(NotPlain, match="no plain float32"):
        read_exported(tmp_path / "a.pt2")
    exported(tmp_path / "b.pt2", marker, use_pickle=False)
    assert read_exported(tmp_path / "b.pt2")["backbone.weight"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": 6},
        {"sizes": [{"as_int": 3}]},
        {"sizes": [{"as_int": 10**12}]},
        {"strides": [{"as_int": 2}]},
        {"strides": []},
        {"sizes": [{"as_int": -1}]},
        {"storage_offset": {"as_int": 1}},
        {"storage_offset": {"as_int": -1}},
        {"sizes": 5},
        {"sizes": [{"as_expr": "__import__('os')"}]},
    ],
)
def test_a_tensor_that_claims_more_than_its_bytes_is_refused(tmp_path, marker, change):
    path = tmp_path / "a.pt2"
    exported(path, marker, use_pickle=False)
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read(f"model/{CONFIG}"))
    about["config"]["backbone.weight"]["tensor_meta"].update(change)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"model/{CONFIG}", json.dumps(about))
        archive.writestr("model/data/weights/weight_0", np.float32([1.5, -2.0]).tobytes())
    with pytest.raises(NotPlain):
        read_exported(path)
