"""A registered model, served by MLflow's own programs: both answer the model's own example, with the same numbers."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from common.system.processes import free_port

pytestmark = pytest.mark.e2e
NAME = "cnn_federated_fedavg"
ANSWERS_WITHIN_S = 120.0


@pytest.fixture
def served(simulated):
    """(environment, the model's address, its example): a user's shell with the programs on its path."""
    uri = f"sqlite:///{simulated.cwd}/mlflow.db"
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    model = f"models:/{NAME}/1"  # whether it became champion is of no matter here
    [example, *_] = sorted((simulated.cwd / "mlruns").rglob("serving_input_example.json"))
    return environment, model, example


def _asked(server, port, example):
    """What the server answers the example, when it is up."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", example.read_bytes(), {"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + ANSWERS_WITHIN_S
    while True:
        try:
            with direct.open(request, timeout=20) as answer:
                return json.load(answer)["predictions"]
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert server.poll() is None, server.stdout.read()
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def test_mlflow_serve_and_predict_answer_the_models_own_example(served):
    environment, model, example = served
    assert list(json.loads(example.read_text())) == ["inputs"]  # as docs/TRACKING.md says
    mlflow, port = shutil.which("mlflow", path=environment["PATH"]), free_port()
    local = ["--env-manager", "local"]
    with subprocess.Popen(
        [mlflow, "models", "serve", "-m", model, *local, "-h", "127.0.0.1", "-p", str(port), "-w", "1"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        try:
            predicted = subprocess.run(
                [mlflow, "models", "predict", "-m", model, *local, "-i", example, "-t", "json"],
                env=environment, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            answered = _asked(server, port, example)
        finally:
            server.terminate()
            server.communicate(timeout=30)
    assert predicted.returncode == 0, predicted.stderr
    embeddings = json.loads(predicted.stdout.splitlines()[-1])["predictions"]
    assert [len(row) for row in embeddings] == [32, 32]
    assert answered == [pytest.approx(row, abs=1e-6) for row in embeddings]
    assert sum(value * value for value in embeddings[0]) == pytest.approx(1.0, abs=1e-5)
