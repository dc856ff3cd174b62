"""infra/kubernetes: valid for the versions named, nothing in it that should not be, names and times that go together."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml

from cmacc.flows.agent import AGAIN, STOPPED

KUBERNETES = Path(__file__).parents[1] / "infra" / "kubernetes"
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
TORCH_KILLS_S = 30  # its agent's ranks


def documents(folder: Path = KUBERNETES) -> list[dict[str, Any]]:
    """All manifests, without kustomize's own files."""
    files = [file for file in sorted(folder.rglob("*.yaml")) if file.name != "kustomization.yaml"]
    assert files
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


def one(kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in documents() if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def pod_specs(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m["spec"]["template"]["spec"] for m in manifests if m["kind"] in ("Job", "Deployment")]


def faults(pod: dict[str, Any]) -> list[str]:
    """What a pod must not have."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    whole = pod.get("securityContext", {})
    if not (whole.get("runAsNonRoot") and whole.get("runAsUser")):
        found.append("may be root")
    found += [f"volume {v['name']} is the host's" for v in pod.get("volumes", []) if "hostPath" in v]
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        own = container.get("securityContext", {})
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False or own["capabilities"] != {"drop": ["ALL"]}:
            found.append("privileged")
        if not re.fullmatch(r"[a-z0-9./-]+:\d[\w.-]*", container.get("image", "")):
            found.append(f"image {container.get('image')} has no version")
        found += ["a port of the host" for port in container.get("ports", []) if "hostPort" in port]
        for entry in container.get("env", []):
            if re.search("SECRET|PASSWORD|TOKEN|ACCESS_KEY|AUTH_STRING$|LEDGER", entry["name"]) and "value" in entry:
                found += [] if entry["name"].endswith(("_SECRET_NAME", "_SECRET_KEY")) else [f"{entry['name']} is a secret"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_keep_to_the_schemas(version: str) -> None:
    for manifest in documents():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_schema_sees_a_wrong_name() -> None:
    job = one("Job", "pretrain")
    job["spec"]["podFailurePolicies"] = job["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


def test_nothing_is_root_privileged_unversioned_or_secret() -> None:
    pods = pod_specs(documents())
    assert len(pods) == 2
    assert [faults(pod) for pod in pods] == [[], []]
    assert not any(document["kind"] == "Secret" for document in documents())
    pod = pods[0]
    pod["securityContext"], pod["hostNetwork"] = {}, True
    pod["containers"][0] |= {"image": "cmacc/trainer:latest", "env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]}
    pod["containers"][0]["securityContext"]["privileged"] = True
    assert len(faults(pod)) == 5, "each of them is seen"


@pytest.mark.parametrize("folder", ["", "pretrain"])
def test_one_command_applies_it(folder: str) -> None:
    """What `kubectl apply -k` would send: names that are referred to are there, and all of it in one namespace."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl, which no wheel of its makers brings")
    done = subprocess.run(["kubectl", "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifests = list(yaml.safe_load_all(done.stdout))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "cmacc"
    maps = {m["metadata"]["name"] for m in manifests if m["kind"] == "ConfigMap"}
    asked = set(re.findall(r"configMap(?:Ref)?:\n\s+name: (\S+)", done.stdout))
    assert asked == maps
    assert [faults(pod) for pod in pod_specs(manifests)] == [[]]


def test_times_and_names_go_together() -> None:
    from cmacc.train.running.checkpointer import CheckpointConfig

    job, service, budget = one("Job", "pretrain"), one("Service", "pretrain"), one("PodDisruptionBudget", "pretrain")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (trainer,) = pod["containers"]
    grace_s = next(float(a.partition("grace_s=")[2]) for a in trainer["args"] if "grace_s" in a)
    assert grace_s == CheckpointConfig().grace_s < TORCH_KILLS_S < pod["terminationGracePeriodSeconds"]
    assert budget["spec"]["minAvailable"] == spec["completions"] - 1 == spec["parallelism"] - 1
    # A pod of an Indexed Job is NAME-INDEX.SUBDOMAIN, and the service of that name selects it.
    name, port = "pretrain-0.pretrain.$(NAMESPACE).svc.cluster.local", service["spec"]["ports"][0]["port"]
    assert {"name": "RENDEZVOUS", "value": f"{name}:{port}"} in trainer["env"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    labels = job["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= labels
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    # Who saved and left is no failure; a Job's policy wants pods that are not restarted in place.
    ignored = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert ignored[0] == {"containerName": trainer["name"], "operator": "In", "values": [AGAIN, STOPPED]}
    assert pod["restartPolicy"] == "Never"
    shm = next(v for v in pod["volumes"] if v["name"] == "shared-memory")
    assert shm["emptyDir"]["medium"] == "Memory"
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in trainer["volumeMounts"]
    # Every name in the arguments is set.
    given = dict(re.findall(r"^(\w+)=(.*)$", (KUBERNETES / "pretrain" / "run.env").read_text(), re.MULTILINE))
    wanted = set(re.findall(r"\$\((\w+)\)", " ".join(trainer["args"])))
    assert wanted <= {*given, *(entry["name"] for entry in trainer["env"])}


# --- the work pool ---


def template() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((KUBERNETES / "base-job-template.json").read_text())
    return found


def manifest_of(values: dict[str, Any]) -> dict[str, Any]:
    """The Job that a Kubernetes worker would make of a flow run with these job variables."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import Flow, FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    # A client that reaches nobody: there is no block to look up, and without one a server would be started.
    client = PrefectClient("http://127.0.0.1:9/api")
    configuration = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template(), values, client=client))
    flow = Flow(id=uuid4(), name="ingest")
    configuration.prepare_for_flow_run(FlowRun(flow_id=flow.id, name="brave-crow"), None, flow)
    found: dict[str, Any] = configuration.job_manifest
    return found


def test_the_template_is_prefects_own_and_more() -> None:
    from prefect_kubernetes.worker import KubernetesWorker

    own, ours = KubernetesWorker.get_default_base_job_template(), template()
    assert set(own["variables"]["properties"]) < set(ours["variables"]["properties"])
    configuration, theirs = dict(ours["job_configuration"]), dict(own["job_configuration"])
    del configuration["job_manifest"], theirs["job_manifest"]
    assert configuration == theirs
    said = json.dumps(ours["job_configuration"])
    for name in ours["variables"]["properties"]:
        assert f"{{{{ {name} }}}}" in said, f"{name} is asked for, and used nowhere"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"image": "cmacc/trainer:0.1.0", "gpu": 1, "shared_memory": "16Gi", "memory_limit": "64Gi",
         "env": {"CMACC_CACHE": "/tmp/cache"}, "node_selector": {"cloud.google.com/gke-spot": "true"}},
    ],
)  # fmt: skip
def test_a_flow_run_becomes_a_job(values: dict[str, Any]) -> None:
    job = manifest_of(values)
    pod = job["spec"]["template"]["spec"]
    assert faults(pod) == []
    # Prefect's own template has these two in the wrong place, and its worker wants them there; a cluster leaves them out.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    for version in VERSIONS:
        kubernetes_validate.validate(job, version, strict=True)
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert job["metadata"]["namespace"] == "cmacc" and pod["serviceAccountName"] == "cmacc-run"
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule", "an evicted run is begun again"
    assert values.get("env", {}).items() <= environment.items()
    assert container["resources"]["limits"]["nvidia.com/gpu"] == values.get("gpu", 0)
    assert pod["nodeSelector"] == values.get("node_selector", {})
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [one("PersistentVolumeClaim", "cmacc-data")["metadata"]["name"]]
    assert pod["terminationGracePeriodSeconds"] > 60, "a flow gives its ranks 60 s"


def test_the_image_is_the_same_everywhere() -> None:
    images = {
        image["name"]: image for image in yaml.safe_load((KUBERNETES / "images" / "kustomization.yaml").read_text())["images"]
    }
    named = [container["image"] for pod in pod_specs(documents()) for container in pod["containers"]]
    named.append(template()["variables"]["properties"]["image"]["default"])
    for name in named:
        image = images[name.partition(":")[0]]
        assert name == f"{image['newName']}:{image['newTag']}"
