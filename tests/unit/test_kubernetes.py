"""The manifests: each fits its schema, and they say who may reach whom, who sees which key, and who has a GPU."""

import json
import subprocess

import kubernetes_validate
import pytest
import yaml

from common.errors import UserError
from simulation.admin.kubernetes import ACCOUNT, Cluster, as_yaml, manifests, require_label, sites_of
from simulation.cli import facefed_parser, main

SITES = {"celeba": "celeba", "north": "folder"}


def rendered(capsys, *more):
    """What `facefed k8s render` prints: its head, and its manifests."""
    assert main(["k8s", "render", "--sites", "celeba,north:folder", *more]) == 0
    text = capsys.readouterr().out
    return text.partition("---\n")[0], list(yaml.safe_load_all(text))


def named(found, kind, name):
    (one,) = [one for one in found if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return one


def pods(found):
    return {
        one["metadata"]["name"]: one["spec"]["template"]["spec"]
        for one in found
        if one["kind"] in ("Deployment", "Job")
    }


@pytest.mark.parametrize("gpu", [[], ["--gpu"]])
def test_every_manifest_fits_its_schema_and_the_text_says_what_was_meant(capsys, gpu):
    _, found = rendered(capsys, *gpu)

    assert found == json.loads(json.dumps(manifests(Cluster(sites=SITES, has_gpu=bool(gpu)))))
    for one in found:
        kubernetes_validate.validate(one, "1.37", strict=True)
    assert {one["kind"] for one in found} == {
        "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "Service", "Deployment", "Job",
    }  # fmt: skip
    limits = {name: pod["containers"][0]["resources"]["limits"] for name, pod in pods(found).items()}
    with_gpu = {name for name, limit in limits.items() if "nvidia.com/gpu" in limit}
    assert with_gpu == ({"facefed-site-celeba", "facefed-site-north"} if gpu else set())


def test_a_wrong_manifest_is_seen():
    pod = manifests(Cluster(sites=SITES))[-1]
    pod["spec"]["template"]["spec"]["containers"][0]["imagge"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.37", strict=True)


def test_each_site_has_its_own_volumes_its_own_secret_and_no_other(capsys):
    _, found = rendered(capsys)
    for site, other in (("celeba", "north"), ("north", "celeba")):
        pod = pods(found)[f"facefed-site-{site}"]
        claims = {one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"] if "persistentVolumeClaim" in one}
        assert claims == {f"facefed-state-{site}", f"facefed-pictures-{site}"}
        secrets = {one["secret"]["secretName"] for one in pod["volumes"] if "secret" in one}
        assert secrets == {f"facefed-certs-{site}", "facefed-accepted-keys"}  # the public keys of all are its peers
        lays = pod["initContainers"][0]["command"][-1]
        assert f"cp -L /secrets/1/* /certs/{site}/peers/" in lays
        assert other not in json.dumps(pod)
        command = pod["containers"][0]["command"]
        assert command[:5] == ["flower-client", "--dataset", SITES[site], "--name", site]
        mounts = {one["name"]: one for one in pod["containers"][0]["volumeMounts"]}
        assert mounts[f"facefed-pictures-{site}"]["readOnly"]
        assert "readOnly" not in mounts[f"facefed-state-{site}"]


def test_a_site_reaches_the_door_and_the_names_and_nothing_else(capsys):
    _, found = rendered(capsys)
    policies = [one["spec"] for one in found if one["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies  # nobody, but for what follows

    def of(part):
        return [one for one in policies if one["podSelector"].get("matchLabels", {}).get(KEY) == part]

    (way,) = of("site-celeba")
    (to,) = way["egress"]
    assert to["to"][0]["podSelector"]["matchLabels"][KEY] == "proxy"
    assert to["ports"] == [{"port": 8443, "protocol": "TCP"}]
    ways = {(one["policyTypes"][0], json.dumps(one.get("ingress", one.get("egress")))) for one in of("mlflow")}
    assert len(ways) == 1
    assert "server" in ways.pop()[1]


KEY = "app.kubernetes.io/component"


def test_no_pod_may_more_than_it_needs(capsys):
    _, found = rendered(capsys, "--gpu")
    for pod in pods(found).values():
        assert pod["automountServiceAccountToken"] is False
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsNonRoot"]) == (ACCOUNT, True)
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


def test_keys_are_laid_into_memory_for_one_account_and_stand_in_no_manifest(capsys, tmp_path):
    head, found = rendered(capsys)
    assert not [one for one in found if one["kind"] == "Secret"]
    assert "create secret generic facefed-certs-north --from-file=certs/north" in head
    (init,) = [line.split()[2:] for line in head.splitlines() if "facefed certs init" in line]
    asked = facefed_parser().parse_args(init)
    assert (asked.server_names, asked.client) == (["proxy", "superlink"], list(SITES))
    assert "create secret generic facefed-accepted-keys --from-file=certs/clients --dry-run=client -o yaml" in head
    pod = pods(found)["facefed-server"]
    (volume,) = [one for one in pod["volumes"] if one["name"] == "certs"]
    assert volume["emptyDir"]["medium"] == "Memory"
    (first,) = pod["initContainers"]
    (secrets, certs) = (tmp_path / "secrets", tmp_path / "certs")
    for number, name in enumerate(("server.key", "north.pub")):
        (secrets / str(number)).mkdir(parents=True)
        (secrets / str(number) / name).write_text(name)
    line = first["command"][-1].replace("/secrets", str(secrets)).replace("/certs", str(certs))
    subprocess.run([*first["command"][:-1], line], check=True)
    assert (certs / "server" / "clients" / "north.pub").read_text() == "north.pub"
    assert (certs / "server" / "server.key").stat().st_mode & 0o777 == 0o600


def test_the_head_says_how_changed_keys_reach_the_pods_that_read_them(capsys):
    """A pod copies its keys when it starts: one that goes on would let a site in whose key was revoked."""
    head, found = rendered(capsys)
    (again,) = [line for line in head.splitlines() if "delete pods" in line]
    *_, chosen = again.split()
    reads = {one for one, pod in pods(found).items() if "facefed-accepted-keys" in json.dumps(pod["volumes"])}
    assert reads == pods(found).keys() - {"facefed-mlflow"}
    assert chosen == "app.kubernetes.io/name=facefed,app.kubernetes.io/component!=mlflow"
    labels = {
        one["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        for one in found
        if one["metadata"]["name"] in reads and "template" in one["spec"]
    }
    assert "mlflow" not in labels


def test_the_server_is_a_job_that_goes_on_and_its_name_leads_to_it_before_it_is_ready(capsys):
    _, found = rendered(capsys)
    job = named(found, "Job", "facefed-server")["spec"]["template"]["spec"]
    assert job["restartPolicy"] == "OnFailure"
    command = job["containers"][0]["command"]
    assert command[command.index("--") :] == ["--", "--config", "demo", "--min-clients", "2"]
    assert named(found, "Service", "superlink")["spec"]["publishNotReadyAddresses"] is True


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ("Celeba", "Kubernetes takes"),
        ("celeba,celeba", "is there already"),
        ("proxy:folder", "is there already"),
        ("north", "For another name write NAME:DATASET"),
        ("north:foldr", "foldr"),
        ("", "Kubernetes takes"),
        ("a_b:folder", "Kubernetes takes"),
    ],
)
def test_bad_sites_are_told_in_one_line(sites, words):
    with pytest.raises(UserError, match=words) as caught:
        sites_of(sites)
    assert "\n" not in str(caught.value)


def test_a_namespace_that_is_none_and_a_configuration_that_is_not_there(capsys):
    with pytest.raises(UserError, match="Kubernetes takes"):
        require_label("--namespace", "a" * 41)
    assert main(["k8s", "render", "--sites", "celeba", "--run-config", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_yaml_keeps_what_looks_like_something_else():
    odd = {"a": ["yes", "8080", "", "- x", "key: value", {"b": []}, None, True, 0o440, [1, [2]]], "on": {}, "c": "#x"}
    assert yaml.safe_load(as_yaml(odd)) == odd
