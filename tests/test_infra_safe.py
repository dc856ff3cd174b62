"""Every file of infra/, whoever wrote it: no secret, no `latest`, no root, no port that is open to others.

`faults` reads a file by its kind; the table of bad files below proves that it finds them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from infra_files import INFRA, REPOSITORY, documents, last, stages

TEXT = {".yaml", ".yml", ".json", ".sh", ".sbatch", ".slurm", ".service", ".env", ".example", ".toml", ".conf", ".timer", ""}
"""Kinds of files that start something. What only measures (Python) or shows results is not among them."""
RESULTS = ("study", "bench")

_SECRET_NAME = re.compile(r"(password|passwd|secret|token|credential|private_?key|access_?key|auth_?string|api_?key)", re.I)
_SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|gh[pousr]_\w{20,}|hf_\w{20,}|pn[ub]_\w{20,}|xox[bp]-\S{10,}|"
    r"\w+://[^\s:/@${}]+:[^\s:/@${}<>]+@",  # a password in an address
)
_NAMES_ONLY = re.compile(r"_(NAME|NAMESPACE|FILE|PATH|AUTH_STRING_SECRET_KEY)$|[a-z](Names?|Ref|Path|Mounts?|Generator)$")
"""Variables and fields whose name has `secret` in it but that only say which one, or where it is."""
_ASSIGNED = re.compile(r"^\s*(?:export\s+|Environment=|-e\s+|--env\s+)?\"?([A-Z][A-Z0-9_]*)=(.*)$", re.M)


def files() -> list[Path]:
    kept = [path for path in sorted(INFRA.rglob("*")) if path.is_file() and path.relative_to(INFRA).parts[0] not in RESULTS]
    return [path for path in kept if path.suffix in TEXT] + [REPOSITORY / "prefect.yaml", REPOSITORY / "prefect.toml"]


def faults(name: str, text: str) -> list[str]:
    """What is wrong with a file, as sentences. name: its path; by it, it is read as what it is."""
    found = [f"a secret: {secret[:12]}…" for secret in _SECRET.findall(text)]
    found += [f"{variable} has a value" for variable, value in _ASSIGNED.findall(text) if _secret(variable, value)]
    if re.search(r"[\w/]:latest\b", text):
        found.append("an image is tagged latest")
    path = Path(name)
    if path.name.startswith("Dockerfile"):
        return found + list(_dockerfile(text))
    if path.suffix in (".yaml", ".yml"):
        for document in documents(text):
            found += _tree(document)
            found += _compose(document) if "compose" in path.name else []
            found += _pods(document) if "kubernetes" in path.parts and isinstance(document, dict) else []
    elif path.suffix == ".json":
        document = json.loads(text)
        found += _tree(document)
        found += _pods(document) if "kubernetes" in path.parts else []
    elif path.suffix == ".service":
        found += _unit(text)
    if path.suffix not in (".yaml", ".yml", ".json") and re.search(r"\b0\.0\.0\.0\b", text):
        found.append("it listens on 0.0.0.0")
    return found


def _secret(name: str, value: object) -> bool:
    """Whether this is a secret's value, and not where to find it."""
    if not isinstance(value, str) or not _SECRET_NAME.search(name) or _NAMES_ONLY.search(name):
        return False
    words = value.strip().strip("'\"")
    return bool(words) and not re.match(r"(\w+:)?\$|\{\{|<|/|[$%]", words)


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _walk(child)


def _tree(document: Any) -> Iterator[str]:
    """What holds for any YAML or JSON: values of secrets, images, ports of SkyPilot's resources."""
    for node in _walk(document):
        for key, value in node.items():
            if _secret(str(key), value):
                yield f"{key} has a value"
        if isinstance(node.get("name"), str) and _secret(node["name"].upper(), node.get("value")):
            yield f"{node['name']} has a value"
        if node.get("kind") == "Secret" and (node.get("data") or node.get("stringData")):
            yield "a Secret with data"
        image = node.get("image")
        if isinstance(image, str) and "{{" not in image and not re.search(r"(:[\w.-]+|@sha256:[0-9a-f]{64})$", image):
            yield f"the image {image} has no tag"
        if isinstance(node.get("resources"), dict) and node["resources"].get("ports"):
            yield "resources.ports opens a port to the world"
        if node.get("privileged") is True or node.get("allowPrivilegeEscalation") is True:
            yield "it is privileged"


def _compose(document: dict[str, Any]) -> Iterator[str]:
    for name, service in document["services"].items():
        if not re.match(r"[1-9]\d*(:[1-9]\d*)?$", str(service.get("user", ""))):
            yield f"{name} runs as root, or as a user that only its image knows"
        if service.get("network_mode") == "host":
            yield f"{name} is in the host's network"
        for port in service.get("ports", ()):
            host = port.get("host_ip", "") if isinstance(port, dict) else port
            if not host.startswith("127.0.0.1"):
                yield f"{name}: port {port} is not on 127.0.0.1"


def _pods(document: dict[str, Any]) -> Iterator[str]:
    for node in _walk(document):
        if node.get("kind") == "Ingress" or node.get("type") in ("LoadBalancer", "NodePort"):
            yield f"{node.get('kind') or node['type']} opens a port"
        if any(node.get(name) for name in ("hostNetwork", "hostPID", "hostIPC", "hostPort", "hostPath")):
            yield "it is in the host's namespaces, or in its files"
        if isinstance(node.get("containers"), list):
            for container in [*node["containers"], *node.get("initContainers", ())]:
                own = {**node.get("securityContext", {}), **container.get("securityContext", {})}
                if own.get("runAsNonRoot") is not True or own.get("runAsUser") == 0:
                    yield f"the container {container.get('name')} may run as root"


def _dockerfile(text: str) -> Iterator[str]:
    found = stages(text)
    inner = {stage.base for stage in found.values()} | set(re.findall(r"--from=(\S+)", text))
    for name, stage in found.items():
        if stage.base not in found and not re.search(r":[\w.-]*\d[\w.-]*(@sha256:\w+)?$", stage.base):
            yield f"the base {stage.base} is not pinned"
        user = last(found, name, "USER")
        if name not in inner and (not user or user.split(":")[0] in ("root", "0")):
            yield f"{name} runs as root"
        if any(re.search(r"https?://|git@", line) for line in stage.of("ADD")):
            yield "ADD fetches from a network"
        if any(_SECRET_NAME.search(line) for line in stage.of("ARG") + stage.of("ENV")):
            yield "a secret would stay in the image"


def _unit(text: str) -> Iterator[str]:
    """A systemd unit of the system names its user; one that is a template of a user's own manager says so by its target."""
    user = re.findall(r"^User=(.*)$", text, re.M)
    if "DynamicUser=yes" not in text and (not user or user[-1].strip() in ("", "root", "0")) and "default.target" not in text:
        yield "the unit runs as root"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_is_safe(path: Path) -> None:
    assert faults(str(path.relative_to(REPOSITORY)), path.read_text()) == []


def test_all_kinds_of_files_are_read() -> None:
    """A new kind of file must be looked at before it is left out."""
    seen = set(files())
    others = [
        path
        for path in INFRA.rglob("*")
        if path.is_file() and path not in seen and path.relative_to(INFRA).parts[0] not in RESULTS
    ]
    assert {path.suffix for path in others if "__pycache__" not in path.parts} <= {".png", ".py", ".md"}
    assert {INFRA / "Dockerfile", INFRA / "compose.yaml", INFRA / "install.sh", INFRA / "compose.env.example"} <= seen


COMPOSE = "services: {{a: {{image: 'a:1', user: '1000:1000', {}}}}}"
POD = "spec: {{securityContext: {{runAsNonRoot: true}}, containers: [{{name: a, image: 'a:1', {}}}], {}}}"
IMAGE = "FROM python:3.11 AS a\n{}\nUSER 1000:1000\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("compose.yaml", "services: {a: {image: 'a:1'}}"),
        ("compose.yaml", "services: {a: {image: 'a:1', user: '0'}}"),
        ("compose.yaml", "services: {a: {image: 'a:1', user: root}}"),
        ("compose.yaml", "services: {a: {image: 'a', user: '1000'}}"),
        ("compose.yaml", "services: {a: {image: 'a:latest', user: '1000'}}"),
        ("compose.yaml", COMPOSE.format("ports: ['4200:4200']")),
        ("compose.yaml", COMPOSE.format("ports: ['0.0.0.0:4200:4200']")),
        ("compose.yaml", COMPOSE.format("ports: [{target: 4200, published: '4200'}]")),
        ("compose.yaml", COMPOSE.format("privileged: true")),
        ("compose.yaml", COMPOSE.format("network_mode: host")),
        ("compose.yaml", COMPOSE.format("environment: {POSTGRES_PASSWORD: prefect}")),
        ("compose.yaml", COMPOSE.format("environment: {URL: 'postgresql://prefect:prefect@db/prefect'}")),
        ("kubernetes/a.yaml", "spec: {containers: [{name: a, image: 'a:1'}]}"),
        ("kubernetes/a.yaml", POD.format("securityContext: {runAsUser: 0}", "")),
        ("kubernetes/a.yaml", POD.format("securityContext: {privileged: true}", "")),
        ("kubernetes/a.yaml", POD.format("ports: [{containerPort: 1, hostPort: 1}]", "")),
        ("kubernetes/a.yaml", POD.format("env: [{name: AWS_SECRET_ACCESS_KEY, value: abc}]", "")),
        ("kubernetes/a.yaml", POD.format("", "hostNetwork: true")),
        ("kubernetes/a.yaml", POD.format("", "initContainers: [{name: b, image: b}]")),
        ("kubernetes/a.yaml", "kind: Service\nspec: {type: LoadBalancer}"),
        ("kubernetes/a.yaml", "kind: Ingress"),
        ("kubernetes/a.yaml", "kind: Secret\nstringData: {a: b}"),
        ("kubernetes/a.json", json.dumps(yaml.safe_load(POD.format("securityContext: {runAsNonRoot: false}", "")))),
        ("sky/a.yaml", "resources: {ports: 8080}"),
        ("sky/a.yaml", "envs: {HF_TOKEN: hf_abcdefghijklmnopqrstuv}"),
        ("sky/a.yaml", "envs: {AWS_SECRET_ACCESS_KEY: abc}"),
        ("systemd/a.service", "[Service]\nExecStart=/bin/true\n"),
        ("systemd/a.service", "[Service]\nUser=root\n"),
        ("systemd/a.service", "[Service]\nUser=cmacc\nEnvironment=PREFECT_API_KEY=abc\n"),
        ("a.sh", "export AWS_SECRET_ACCESS_KEY=abc\n"),
        ("a.sh", "prefect server start --host 0.0.0.0\n"),
        ("a.env", "PREFECT_API_AUTH_STRING=me:mine\n"),
        ("a.sbatch", "id=AKIAABCDEFGHIJKLMNOP\n"),
        ("Dockerfile", "FROM python:3.11\n"),
        ("Dockerfile", "FROM python\nUSER 1000:1000\n"),
        ("Dockerfile", "FROM python:latest\nUSER 1000:1000\n"),
        ("Dockerfile", "FROM python:3.11\nUSER root\n"),
        ("Dockerfile", IMAGE.format("ADD https://example.org/a /a")),
        ("Dockerfile", IMAGE.format("ENV API_TOKEN=abc")),
        ("Dockerfile", IMAGE.format("ARG DB_PASSWORD")),
    ],
)  # fmt: skip
def test_a_bad_file_is_found(name: str, text: str) -> None:
    assert faults(f"infra/{name}", text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("compose.yaml", COMPOSE.format("ports: ['127.0.0.1:4200:4200'], environment: {DB_PASSWORD: '${DB:?set it}'}")),
        ("kubernetes/a.yaml", POD.format("env: [{name: A_TOKEN, valueFrom: {secretKeyRef: {name: a, key: b}}}]", "")),
        ("kubernetes/a.yaml", POD.format("envFrom: [{secretRef: {name: cmacc-secret}}]", "volumes: [{secret: {secretName: a}}]")),
        ("systemd/a.service", "[Service]\nUser=cmacc\nEnvironmentFile=/etc/cmacc.env\n"),
        ("a.sh", 'export AWS_SECRET_ACCESS_KEY="$1"\n'),
        ("Dockerfile", IMAGE.format("ENV A=1")),
    ],
)
def test_a_good_file_is_let_pass(name: str, text: str) -> None:
    assert faults(f"infra/{name}", text) == []
