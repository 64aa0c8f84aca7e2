"""`facefed evaluate`: models trained by the programs, found, compared and reported; what it refuses."""

import csv
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import SMALL
from programs import assert_one_line
from warm import WarmPrograms

from tests.pages import commands_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
]


@dataclass(frozen=True)
class Ready:
    """A folder as the demo leaves it, in which docs/COMPARING.md's trainings were typed, and the same run elsewhere."""

    programs: WarmPrograms
    base: tuple[object, ...]
    cache: tuple[object, ...]
    fedavg: Path

    @property
    def runs(self) -> Path:
        return self.programs.cwd / "runs"

    def evaluate(self, *arguments: object):
        return self.programs.run("facefed", "evaluate", *self.base, *arguments)

    def typed(self, mode: str, *arguments: object):
        """The page's comparison of that mode."""
        [line] = commands_of("COMPARING", f"facefed evaluate --config demo --mode {mode}")
        return self.programs.run(*shlex.split(line), *self.cache, *arguments)

    def left(self) -> set[str]:
        """The runs that are there."""
        return {path.name for path in self.runs.iterdir()} if self.runs.exists() else set()


@pytest.fixture(scope="module")
def ready(faces, simulated, tmp_path_factory, with_tables, warm):
    programs = WarmPrograms(tmp_path_factory.mktemp("evaluate"), warm)
    (programs.cwd / "data").symlink_to(faces.folder / "data")
    (programs.cwd / "configs").mkdir()
    (programs.cwd / "configs" / "demo.toml").write_text(SMALL)
    with_tables(programs.cwd)
    assert simulated.ended.code == 0, simulated.ended
    [fedavg] = [path.parent for path in (simulated.cwd / "runs").glob("*/run.json")]
    cache = ("--cache-dir", simulated.cwd / ".facefed" / "packs")  # where the secret of that run's digests is
    shutil.copytree(simulated.cwd / "runs", programs.cwd / "runs")
    lines = [
        line
        for kind in ("local", "centralized")
        for line in commands_of("COMPARING", f"facefed train {kind} --config demo")
    ]
    assert len(lines) == 3
    for line in lines:
        ended = programs.run(*shlex.split(line), *cache, "--no-mlflow", "--epochs", 1, "--set", "tracking.plots=none")
        assert ended.code == 0, ended
    yield Ready(programs, (*faces.small, *cache), cache, fedavg)
    programs.close()


def test_all_clients(ready):
    before = ready.left()
    ended = ready.typed("all")
    assert ended.code == 0, ended
    assert ended.err == ""
    for model in ("local-celeba", "local-vggface2", "centralized", "fedavg"):
        assert re.search(rf"^{model} +0\.\d{{3}} \[\d\.\d{{3}}, \d\.\d{{3}}\]", ended.out, re.MULTILINE), ended.out
    assert re.search(r"^fedavg minus centralized +pooled +[+-]0\.\d{3} ", ended.out, re.MULTILINE)
    assert re.search(r"^fedavg minus local-vggface2 +vggface2 ", ended.out, re.MULTILINE)
    assert re.search(r"^note: the budgets differ: .*fedavg 2", ended.out, re.MULTILINE)
    assert "no accuracy on own people" not in ended.out  # all heads are here
    [name] = ready.left() - before
    folder = ready.runs / name
    rows = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    content = json.loads((folder / "comparison.json").read_text())
    auc = content["models"]["fedavg"]["tested_at"]["pooled"]["roc_auc"]
    assert {"local-celeba", "fedavg"} <= {row["model"] for row in rows}
    assert json.loads((ready.fedavg / "metrics.json").read_text())["best"]["roc_auc"] == pytest.approx(
        auc["value"], abs=1e-3
    )  # what the run itself found
    text = (folder / "report.html").read_text()
    assert text.count("data:image/png;base64,") == len(list((folder / "plots").glob("*.png"))) == 4
    assert "http" not in text.replace("http-equiv", "")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{ready.programs.cwd}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("facial_recognition_evaluation").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["client"] == "celeba+vggface2"
    assert (run.data.params["model"], run.data.params["mode"]) == ("cnn", "all")
    assert (run.data.tags["device"], run.data.tags["gpu_type"]) == ("cpu", "none")
    assert run.data.metrics["fedavg/test_roc_auc"] == pytest.approx(auc["value"])
    assert {"comparison.csv", "report.html", "plots"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_one_client_without_mlflow(ready):
    ended = ready.typed("single", "--no-mlflow")
    assert ended.code == 0, ended
    assert "vggface2" not in ended.out.split("scoring")[0]  # its pictures are not needed
    assert re.search(r"^centralized +0\.\d{3} \[.*\]( +\d\.\d{3}){5}$", ended.out, re.MULTILINE), ended.out
    assert "local-vggface2" not in ended.out
    assert "tested at celeba" not in ended.err


def test_what_it_refuses_leaves_nothing(ready):
    before = ready.left()
    refused = {
        ("--mode", "all"): (
            "no trained cnn model in ", "of fedprox.", "`facefed train federated --client celeba --client"
            " vggface2 --method fedprox --model cnn --config ", "--compare local,centralized,fedavg.",
        ),
        ("--compare", "local,fedpro"): ("--compare = 'fedpro' is unknown; did you mean 'fedprox'",),
        ("--mode", "single"): ("--mode single", "0 were named", "--client NAME"),
        ("--mode", "single", "--client", "celeba", "--client", "vggface2"): ("--mode single", "2 were named"),
        ("--run", "fedavg"): ("--run fedavg: write KIND=RUN",),
        ("--run", "fed=x"): ("--run: the kind = 'fed' is unknown",),
        ("--run", "fedavg=nowhere"): ("--run fedavg=nowhere: there is no such run",),
        ("--compare", "local", "--model", "resnet18"): ("no trained resnet18 model", "local-celeba, local-vggface2"),
        ("--compare", "fedavg", "--run", f"fedavg={ready.fedavg}", "--model", "resnet18"): (
            "has model.backbone = cnn, --model has resnet18",
        ),
        ("--compare", "local", "--data-dir", "celeba=nowhere", "--mode", "single", "--client", "celeba"): (
            "nowhere: no such folder",
        ),
    }  # fmt: skip
    for arguments, fragments in refused.items():
        assert_one_line(ready.evaluate("--no-mlflow", *arguments), "facefed", *fragments)
    assert ready.left() == before


def test_a_checkpoint_cut_short(ready):
    [run] = [
        path.parent for path in ready.runs.glob("*/run.json") if json.loads(path.read_text())["clients"] == ["celeba"]
        and json.loads(path.read_text())["mode"] == "local"
    ]  # fmt: skip
    copy = ready.programs.cwd / "cut"
    shutil.copytree(run, copy)
    best = copy / "checkpoints" / "best.safetensors"
    best.write_bytes(best.read_bytes()[:-1000])
    one = ("--mode", "single", "--client", "celeba", "--compare", "local", "--no-mlflow")
    ended = ready.evaluate(*one, "--run", f"local={copy}")
    assert_one_line(ended, "facefed", f"{best} is not a whole safetensors file")
