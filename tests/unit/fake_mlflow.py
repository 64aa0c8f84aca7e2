"""A small MLflow server in this process that can answer 403, freeze, or cut connections before or after it acts.

It keeps points as MLflow's database does: an identical (name, time, step, value) of a run is one row.
"""

import http.server
import itertools
import json
import threading
import urllib.parse
import uuid


class FakeMlflow:
    """Start with `with FakeMlflow() as server`; its state is open to the tests."""

    def __init__(self):
        self.experiments = {}  # id -> {"name", "stage"}
        self.runs = {}  # id -> {"experiment", "start", "end", "status", "stage", "tags", "params", "points", ...}
        self.artifacts = {}  # path -> bytes
        self.status = 200  # another one is answered to everything
        self.refused = ()  # artifacts whose path ends so get 500
        self.thaw = threading.Event()
        self.thaw.set()
        self.faults = iter(())  # for each request "": well, "before" or "after": cut off before or after acting
        self.num_requests = 0
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def __enter__(self):
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else the answer's second part waits 40 ms for the client's word

            def answer(self):
                fake.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.uri = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.thaw.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.thaw.wait()
        with self._lock:
            self.num_requests += 1
            fault = next(self.faults, "")
            status, content = (0, {}) if fault == "before" else self._act(handler.path, body)
        if fault:
            handler.close_connection = True
            return
        data = json.dumps(content).encode() if isinstance(content, dict) else content
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _act(self, path, body):
        if self.status != 200:
            return self.status, b"Invalid Host header - possible DNS rebinding attack detected"
        parts = urllib.parse.urlsplit(path)
        if "/mlflow-artifacts/" in parts.path:
            if self.refused and parts.path.endswith(self.refused):
                return 500, {"error_code": "INTERNAL_ERROR", "message": "the store of artifacts is full"}
            self.artifacts[parts.path.partition("/artifacts/")[2]] = body
            return 200, {}
        given = dict(urllib.parse.parse_qsl(parts.query)) | (json.loads(body) if body else {})
        name = parts.path.partition("/mlflow/")[2].replace("/", "_").replace("-", "_")
        act = getattr(self, f"_{name}", None)
        return act(given) if act else (404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path})

    def _experiments_search(self, _given):
        return 200, {"experiments": []}

    def _experiments_get_by_name(self, given):
        for number, about in self.experiments.items():
            if about["name"] == given["experiment_name"]:
                shown = {"experiment_id": number, "name": about["name"], "lifecycle_stage": about["stage"]}
                return 200, {"experiment": shown}
        return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}

    def _experiments_create(self, given):
        if any(about["name"] == given["name"] for about in self.experiments.values()):
            return 400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": given["name"]}
        number = str(next(self._numbers))
        self.experiments[number] = {"name": given["name"], "stage": "active"}
        return 200, {"experiment_id": number}

    def _runs_search(self, given):
        found = [
            self._shown(number)
            for number, run in self.runs.items()
            if run["stage"] == "active" and any(f"= '{value}'" in given["filter"] for value in run["tags"].values())
        ]
        return 200, {"runs": found}

    def _runs_create(self, given):
        number = uuid.uuid4().hex  # MLflow's client keeps what it knows of one for the whole process
        self.runs[number] = {
            "experiment": given["experiment_id"], "name": given.get("run_name", ""), "start": int(given["start_time"]),
            "end": 0, "status": "RUNNING", "stage": "active", "params": {}, "points": {}, "inputs": set(),
            "tags": {tag["key"]: tag["value"] for tag in given.get("tags", [])},
        }  # fmt: skip
        return 200, {"run": self._shown(number)}

    def _runs_get(self, given):
        if given["run_id"] not in self.runs:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": given["run_id"]}
        return 200, {"run": self._shown(given["run_id"])}

    def _runs_update(self, given):
        run = self.runs[given["run_id"]]
        if run["stage"] != "active":
            return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "not active"}
        run["status"] = given.get("status", run["status"])
        run["end"] = int(given.get("end_time", run["end"]))
        return 200, {"run_info": self._shown(given["run_id"])["info"]}

    def _runs_log_batch(self, given):
        run = self.runs[given["run_id"]]
        metrics = given.get("metrics", [])
        if run["stage"] != "active" or any("!" in metric["key"] for metric in metrics):
            return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "not active, or a bad name"}
        for metric in metrics:
            row = (metric["key"], int(metric["timestamp"]), int(metric.get("step", 0)), str(metric["value"]))
            run["points"][row] = run["points"].get(row, 0) + 1
        run["params"] |= {param["key"]: param["value"] for param in given.get("params", [])}
        run["tags"] |= {tag["key"]: tag["value"] for tag in given.get("tags", [])}
        return 200, {}

    def _runs_log_inputs(self, given):
        self.runs[given["run_id"]]["inputs"] |= {one["dataset"]["digest"] for one in given["datasets"]}
        return 200, {}

    def _shown(self, number):
        run = self.runs[number]
        info = {
            "run_id": number, "run_uuid": number, "experiment_id": run["experiment"], "status": run["status"],
            "start_time": run["start"], "lifecycle_stage": run["stage"], "artifact_uri": f"mlflow-artifacts:/{number}",
        }  # fmt: skip
        return {"info": info, "data": {"tags": [{"key": k, "value": v} for k, v in run["tags"].items()]}}
