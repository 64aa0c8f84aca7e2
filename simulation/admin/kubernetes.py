"""`facefed k8s render`: a federation's manifests for Kubernetes, as docker-compose.yml has it for one machine.

MLflow, the server (a Job, as it ends with its run), the front door, and for each site a Deployment with its volumes and
its secret.  No key and no password stands in a manifest: the head says which secrets are made of what `facefed certs
init` wrote.  A secret's files belong to root and, with a group, can be read by it, which our programs refuse of a
private key; so a first container lays them into memory, for the program's account alone.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TextIO

from common.errors import UserError, unknown_name
from common.faces.datasets import DATASETS
from common.system.certs import CLIENTS, PEERS

Manifest = dict[str, Any]

ACCOUNT: Final = 10001  # of docker/Dockerfile
DOCKER: Final = "/opt/facefed/docker"
HOME: Final = "/var/lib/facefed"
SUPERLINK_PORT, DOOR_PORT, MLFLOW_PORT = 8000, 8443, 5000
OURS: Final = ("mlflow", "server", "superlink", "proxy")  # names that no site can have
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")  # of RFC 1123, with room for what stands before it
_PLAIN: Final = re.compile(r"[A-Za-z_/][A-Za-z0-9_./:@-]*")  # a YAML text that needs no quotes
_WORDS: Final = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the manifests are of.  sites: name -> data set."""

    sites: Mapping[str, str]
    has_gpu: bool = False
    namespace: str = "facefed"
    image: str = "facefed:0.1.0"
    config: str = "demo"
    storage: str = "10Gi"


def sites_of(text: str) -> dict[str, str]:
    """NAME or NAME:DATASET, divided by commas -> name -> data set.  Raises UserError."""
    sites: dict[str, str] = {}
    for item in text.split(","):
        name, colon, dataset = item.strip().partition(":")
        require_label("--sites", name)
        if name in OURS or name in sites:
            raise UserError(f"--sites {text}: {name!r} is there already; give each site a name of its own.")
        if (dataset or name) not in DATASETS:
            hint = unknown_name("data set", dataset or name, DATASETS)
            raise UserError(f"--sites {item.strip()}: {hint} For another name write NAME:DATASET.")
        sites[name] = dataset if colon else name
    return sites


def require_label(option: str, name: str) -> None:
    """Raises UserError unless Kubernetes takes it for a name."""
    if not _LABEL.fullmatch(name):
        raise UserError(
            f"{option} {name}: Kubernetes takes 1 to 40 of a-z, 0-9 and '-' with a letter or digit at both ends."
        )


def render(cluster: Cluster, out: TextIO) -> None:
    """Write all manifests as one YAML stream, with a head that says what has to be there first."""
    out.write(_head(cluster))
    out.writelines(f"---\n{as_yaml(manifest)}" for manifest in manifests(cluster))


def manifests(cluster: Cluster) -> list[Manifest]:
    """All of them, in the order in which they are applied."""
    found = [_namespace(cluster), *_network(cluster), *_mlflow(cluster), *_server(cluster), *_proxy(cluster)]
    for name, dataset in cluster.sites.items():
        found += _site(cluster, name, dataset)
    return found


def _head(cluster: Cluster) -> str:
    sites, space = list(cluster.sites), cluster.namespace
    secret = f"kubectl -n {space} create secret generic"
    names = " ".join(f"--client {name}" for name in sites)
    lines = [
        f"FaceFed for {', '.join(sites)}, made by `facefed k8s render`.",
        "Checked against Kubernetes' schemas; FaceFed's makers did not apply it to a cluster.",
        "Before kubectl apply -f THIS_FILE:",
        "",
        f"  kubectl create namespace {space}",
        f"  facefed certs init certs --server-name proxy --server-name superlink {names}",
        f"  {secret} facefed-certs-server --from-file=certs/ca.crt --from-file=certs/server.crt"
        " --from-file=certs/server.key",
        f"  {secret} {_ACCEPTED} --from-file=certs/{CLIENTS}",
        *(f"  {secret} facefed-certs-{name} --from-file=certs/{name}" for name in sites),
        f"  {secret} facefed-mlflow --from-literal=password=\"$(python3 -c 'import secrets;"
        " print(secrets.token_urlsafe(18))')\"",
        "",
        f"{_ACCEPTED} are the public keys of all sites: whom the server lets in, and for each site the others'",
        "keys, with which secure aggregation masks. Pods read keys when they start, so after `facefed certs accept` or",
        "`facefed certs revoke` the secret is replaced and all who read it start again:",
        "",
        f"  {secret} {_ACCEPTED} --from-file=certs/{CLIENTS} --dry-run=client -o yaml | kubectl replace -f -",
        f"  kubectl -n {space} delete pods -l app.kubernetes.io/name=facefed,app.kubernetes.io/component!=mlflow",
        "",
        "certs/ca.key stays with you. A site's pictures go into its volume facefed-pictures-SITE before it starts; its",
        "pod has them read-only. The image is built from docker/Dockerfile and pushed to where the cluster finds it.",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


# -- parts -------------------------------------------------------------------------------------------------------------


def _meta(cluster: Cluster, name: str, part: str) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "facefed", "app.kubernetes.io/component": part}
    return {"name": name, "namespace": cluster.namespace, "labels": labels}


def _chosen(part: str) -> dict[str, Any]:
    return {"matchLabels": {"app.kubernetes.io/name": "facefed", "app.kubernetes.io/component": part}}


def _namespace(cluster: Cluster) -> Manifest:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.namespace, "labels": labels}}


def _network(cluster: Cluster) -> list[Manifest]:
    """Nobody reaches anybody, but a site the door, the door the server, the server MLflow, and all the names."""
    every: list[Manifest] = [_policy(cluster, "nobody", {}, ["Ingress", "Egress"])]
    names = [{"ports": [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]}]
    every.append(_policy(cluster, "names", {}, ["Egress"], egress=names))
    ways = [("server", "mlflow", MLFLOW_PORT), ("proxy", "server", SUPERLINK_PORT)]
    ways += [(f"site-{name}", "proxy", DOOR_PORT) for name in cluster.sites]
    for source, target, port in ways:
        ports = [{"port": port, "protocol": "TCP"}]
        out_of = [{"to": [{"podSelector": _chosen(target)}], "ports": ports}]
        into = [{"from": [{"podSelector": _chosen(source)}], "ports": ports}]
        every.append(_policy(cluster, f"{source}-to-{target}", _chosen(source), ["Egress"], egress=out_of))
        every.append(_policy(cluster, f"{target}-from-{source}", _chosen(target), ["Ingress"], ingress=into))
    return every


def _policy(
    cluster: Cluster, name: str, chosen: Mapping[str, Any], kinds: Sequence[str], **ways: list[dict[str, Any]]
) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _meta(cluster, f"facefed-{name}", "network"),
        "spec": {"podSelector": dict(chosen), "policyTypes": list(kinds), **ways},
    }


def _claim(cluster: Cluster, name: str, part: str) -> Manifest:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": cluster.storage}}}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _meta(cluster, f"facefed-{name}", part),
        "spec": spec,
    }


def _service(cluster: Cluster, name: str, part: str, port: int, *, before_ready: bool = False) -> Manifest:
    """before_ready: its name leads to a pod that is not ready yet, whose own check goes that way."""
    spec: dict[str, Any] = {
        "selector": _chosen(part)["matchLabels"],
        "ports": [{"name": "https" if port != MLFLOW_PORT else "http", "port": port, "targetPort": port}],
    }
    if before_ready:
        spec["publishNotReadyAddresses"] = True
    return {"apiVersion": "v1", "kind": "Service", "metadata": _meta(cluster, name, part), "spec": spec}


_FORBIDDEN: Final[Manifest] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


@dataclass(frozen=True, kw_only=True)
class _Pod:
    """One part's pod.

    claims: volume claim -> where; secrets: secret -> where, as root has it; keys: secret -> where below /certs, for the
    account alone.
    """

    part: str
    command: Sequence[str]
    claims: Mapping[str, str]
    secrets: Mapping[str, str]
    keys: Mapping[str, str]
    health: str  # which check of docker/health.py
    cpu: str
    memory: str
    read_only: frozenset[str] = frozenset()  # of the claims
    environment: Mapping[str, str] | None = None
    gpus: int = 0
    stop_s: int = 60

    def template(self, cluster: Cluster, restart: str = "Always") -> Manifest:
        """As a Deployment and a Job have it."""
        spec: dict[str, Any] = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "restartPolicy": restart,
            "terminationGracePeriodSeconds": self.stop_s,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": ACCOUNT,
                "runAsGroup": ACCOUNT,
                "fsGroup": ACCOUNT,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **({"initContainers": [self._lays_keys(cluster)]} if self.keys else {}),
            "containers": [self._container(cluster)],
            "volumes": self._volumes(),
        }
        return {"metadata": {"labels": _chosen(self.part)["matchLabels"]}, "spec": spec}

    def _container(self, cluster: Cluster) -> Manifest:
        mounts: list[Manifest] = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - the pod's own
        mounts += [{"name": "certs", "mountPath": "/certs", "readOnly": True}] if self.keys else []
        mounts += [{"name": name, "mountPath": at, "readOnly": True} for name, at in self.secrets.items()]
        for name, at in self.claims.items():
            is_read_only: Manifest = {"readOnly": True} if name in self.read_only else {}
            mounts.append({"name": name, "mountPath": at} | is_read_only)
        limits = {"cpu": self.cpu, "memory": self.memory} | ({"nvidia.com/gpu": self.gpus} if self.gpus else {})
        environment = [{"name": name, "value": value} for name, value in (self.environment or {}).items()]
        return {
            "name": "facefed",
            "image": cluster.image,
            "command": list(self.command),
            **({"env": environment} if environment else {}),
            "readinessProbe": {
                "exec": {"command": ["python", "-P", f"{DOCKER}/health.py", self.health]},
                "initialDelaySeconds": 5,
                "periodSeconds": 10,
                "timeoutSeconds": 60,
                "failureThreshold": 6,
            },
            "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": limits},
            "securityContext": _FORBIDDEN,
            "volumeMounts": mounts,
        }

    def _lays_keys(self, cluster: Cluster) -> Manifest:
        """Copies each secret's files into memory, for this account alone."""
        lines = ["umask 077"]
        for number, at in enumerate(self.keys.values()):
            lines += [f"mkdir -p /certs{at}", f"cp -L /secrets/{number}/* /certs{at}/"]
        mounts: list[Manifest] = [{"name": "certs", "mountPath": "/certs"}]
        mounts += [
            {"name": name, "mountPath": f"/secrets/{number}", "readOnly": True}
            for number, name in enumerate(self.keys)
        ]  # fmt: skip
        return {
            "name": "keys",
            "image": cluster.image,
            "command": ["sh", "-ec", " && ".join(lines)],
            "resources": {"requests": {"cpu": "50m", "memory": "32Mi"}, "limits": {"cpu": "250m", "memory": "64Mi"}},
            "securityContext": _FORBIDDEN,
            "volumeMounts": mounts,
        }

    def _volumes(self) -> list[Manifest]:
        volumes: list[Manifest] = [{"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}}]
        volumes += [{"name": "certs", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}] if self.keys else []
        volumes += [
            {"name": name, "secret": {"secretName": name, "defaultMode": 0o440}} for name in (*self.secrets, *self.keys)
        ]
        return volumes + [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in self.claims]


def _deployment(cluster: Cluster, pod: _Pod, name: str) -> Manifest:
    """One pod, and never two at a time: they would share a volume, or a name."""
    spec = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": _chosen(pod.part),
        "template": pod.template(cluster),
    }
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": _meta(cluster, name, pod.part), "spec": spec}


def _mlflow(cluster: Cluster) -> list[Manifest]:
    serve = f"--host 0.0.0.0 --port {MLFLOW_PORT} --allowed-hosts mlflow".split()
    pod = _Pod(
        part="mlflow",
        command=["python", "-P", f"{DOCKER}/run_tracking.py", "/database-key/pgpass", "/tracking-key/password", *serve],
        claims={"facefed-mlflow-files": HOME},
        secrets={"facefed-mlflow": "/tracking-key"},
        keys={},
        health="tracking",
        cpu="2",
        memory="3Gi",
    )
    return [
        _claim(cluster, "mlflow-files", "mlflow"),
        _service(cluster, "mlflow", "mlflow", MLFLOW_PORT),
        _deployment(cluster, pod, "facefed-mlflow"),
    ]


_ACCEPTED: Final = "facefed-accepted-keys"  # public, of all sites
_OF_SERVER: Final = {"facefed-certs-server": "/server", _ACCEPTED: f"/server/{CLIENTS}"}


def _server(cluster: Cluster) -> list[Manifest]:
    """A Job: it ends with the run, and goes on with an unfinished one when its pod is made again."""
    where = f"--address 0.0.0.0:{SUPERLINK_PORT} --no-front-door --tls /certs/server".split()
    wanted = ["--config", cluster.config, "--min-clients", str(len(cluster.sites))]
    pod = _Pod(
        part="server",
        command=["python", "-P", f"{DOCKER}/run_server.py", *where, "--", *wanted],
        claims={"facefed-runs": HOME},
        secrets={"facefed-mlflow": "/tracking-key"},
        keys=_OF_SERVER,
        health="server",
        cpu="2",
        memory="4Gi",
        environment={"MLFLOW_TRACKING_URI": f"http://mlflow:{MLFLOW_PORT}"},
    )
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _meta(cluster, "facefed-server", "server"),
        "spec": {"backoffLimit": 20, "template": pod.template(cluster, restart="OnFailure")},
    }
    return [
        _claim(cluster, "runs", "server"),
        _service(cluster, "superlink", "server", SUPERLINK_PORT, before_ready=True),
        job,
    ]


def _proxy(cluster: Cluster) -> list[Manifest]:
    at = [str(DOOR_PORT), "superlink", str(SUPERLINK_PORT), "/certs/server"]
    pod = _Pod(
        part="proxy",
        command=["python", "-P", f"{DOCKER}/run_proxy.py", *at],
        claims={},
        secrets={},
        keys=_OF_SERVER,
        health="proxy",
        cpu="1",
        memory="512Mi",
    )
    return [_service(cluster, "proxy", "proxy", DOOR_PORT), _deployment(cluster, pod, "facefed-proxy")]


def _site(cluster: Cluster, name: str, dataset: str) -> list[Manifest]:
    """One site: its state, its pictures, its key, and no way to anybody but the door."""
    state, pictures = f"facefed-state-{name}", f"facefed-pictures-{name}"
    where = f"--tls /certs/{name} --server proxy:{DOOR_PORT} --connect-timeout 86400".split()
    pod = _Pod(
        part=f"site-{name}",
        command=["flower-client", "--dataset", dataset, "--name", name, "--data-dir", f"/data/{name}", *where],
        claims={state: HOME, pictures: f"/data/{name}"},
        read_only=frozenset({pictures}),
        secrets={},
        # kubectl takes no folder into a secret, so what is its peers/ comes from the accepted keys, which are the same.
        keys={f"facefed-certs-{name}": f"/{name}", _ACCEPTED: f"/{name}/{PEERS}"},
        health="site",
        cpu="4",
        memory="8Gi",
        gpus=int(cluster.has_gpu),
    )
    claims = [_claim(cluster, claim.removeprefix("facefed-"), pod.part) for claim in (state, pictures)]
    return [*claims, _deployment(cluster, pod, f"facefed-site-{name}")]


# -- YAML --------------------------------------------------------------------------------------------------------------


def as_yaml(value: Mapping[str, Any]) -> str:
    """A mapping of mappings, lists, texts, numbers and truths as YAML in blocks."""
    return "".join(f"{line}\n" for line in _lines(value))


def _lines(value: object) -> Iterable[str]:
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _under(f"{_scalar(key)}:", one)
    elif isinstance(value, list) and value:
        for one in value:
            first, *rest = _lines(one)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    else:
        yield _scalar(value)


def _under(head: str, value: object) -> Iterable[str]:
    if isinstance(value, Mapping | list) and value:
        yield head
        yield from (f"  {line}" for line in _lines(value))
    else:
        yield f"{head} {_scalar(value)}"


def _scalar(value: object) -> str:
    is_plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    return value if is_plain and isinstance(value, str) and not value.endswith(":") else json.dumps(value)
