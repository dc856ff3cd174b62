"""Deployments, work pools and automations: what prefect.yaml says, and what `cmacc server-setup` makes of a server.

That a run whose worker is killed goes on by them, `test_flows_prefect` shows.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cmacc
from infra_files import REPOSITORY
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.types._datetime import now
from test_infra_safe import faults

from cmacc.flows import pools
from cmacc.flows.automations import automations, ensure

FLOWS = ("ingest", "ingest_part", "reshard", "pretrain", "evaluate")
DEPLOYMENTS = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]


def test_each_flow_has_a_deployment_on_each_pool() -> None:
    found = [(each["entrypoint"].partition(":")[2], each["name"], each["work_pool"]["name"]) for each in DEPLOYMENTS]
    named = {"local": "local", "docker": "docker", "k8s": "kubernetes"}
    assert found == [(flow, name, pool) for name, pool in named.items() for flow in FLOWS], "those of local come first"
    assert set(named.values()) == set(pools.TYPES)


def test_deployments_of_a_flow_differ_in_where_they_run_alone() -> None:
    for flow in FLOWS:
        of_flow = [each for each in DEPLOYMENTS if each["entrypoint"].endswith(f":{flow}")]
        assert len({json.dumps(each.get("parameters")) for each in of_flow}) == 1
        assert len({each["work_pool"]["work_queue_name"] for each in of_flow}) == 1
        assert all(each["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30" for each in of_flow)


@pytest.mark.parametrize("where", ["parameters", "job_variables", "address"])
def test_a_secret_in_a_deployment_would_be_found(where: str) -> None:
    document = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
    first = document["deployments"][0]
    if where == "parameters":
        first["parameters"]["proxy_password"] = "abc"
    elif where == "job_variables":
        first["work_pool"]["job_variables"]["env"]["AWS_SECRET_ACCESS_KEY"] = "abc"
    else:
        first["parameters"]["ledger"] = "postgresql://cmacc:abc@db/cmacc"
    assert faults("prefect.yaml", yaml.safe_dump(document))
    assert not faults("prefect.yaml", (REPOSITORY / "prefect.yaml").read_text())


def test_without_a_server_it_is_one_sentence(cmacc: Cmacc) -> None:
    said = cmacc("server-setup", code=1).stderr
    assert "PREFECT_API_URL is not set" in said
    assert "Traceback" not in said


def state_event(name: str, flow: str, run_count: int, deployment: bool = True, pool: str = "local") -> ReceivedEvent:
    """As a server tells of a run's new state."""
    related = [("flow", flow), ("work-pool", pool), *([("deployment", "local")] if deployment else [])]
    resource = {"prefect.resource.id": "prefect.flow-run.1", "prefect.run-count": str(run_count)}
    return ReceivedEvent.model_validate(
        {
            "id": "00000000-0000-0000-0000-000000000001", "occurred": now("UTC"), "event": f"prefect.flow-run.{name}",
            "resource": resource, "related": [
                {"prefect.resource.id": f"prefect.{role}.1", "prefect.resource.role": role, "prefect.resource.name": named}
                for role, named in related
            ],
        }
    )  # fmt: skip


def taken(automation: int, event: ReceivedEvent, **options: int) -> bool:
    """Whether the server's own trigger takes this event for its beginning."""
    trigger = EventTrigger.model_validate(automations(**options)[automation].trigger.model_dump())
    begins = trigger.starts_after(event.event) if trigger.after else trigger.expects(event.event)
    return begins and trigger.covers(event)


LOST, NEVER_BEGUN, AGAIN = range(3)


def test_who_beats_no_more_is_lost() -> None:
    for flow in ("ingest", "ingest-part", "reshard", "pretrain", "evaluate"):
        assert taken(LOST, state_event("heartbeat", flow, 1))
    assert not taken(LOST, state_event("heartbeat", "of somebody else", 1)), "it may beat less often than ours"
    assert all(taken(NEVER_BEGUN, state_event(name, "ingest", 0)) for name in ("Pending", "Submitting"))
    assert not taken(NEVER_BEGUN, state_event("Pending", "ingest", 0, pool="kubernetes")), "a pod may wait for its node"


def test_crashed_runs_start_again_so_often_and_no_more() -> None:
    begun = [taken(AGAIN, state_event("Crashed", "pretrain", count), restarts=2) for count in range(6)]
    assert begun == [False, True, True, False, False, False]
    assert not taken(AGAIN, state_event("Failed", "pretrain", 1))
    assert not taken(AGAIN, state_event("Crashed", "pretrain", 1, deployment=False)), "nobody would take it up"
    assert not taken(AGAIN, state_event("Crashed", "ingest-part", 1)), "its ingest begins it again"


@pytest.fixture
def client(prefect_server: None) -> Any:
    with get_client(sync_client=True) as client:
        yield client


def test_automations_are_there_once(client: SyncPrefectClient) -> None:
    for lost_after in (150, 150, 90):
        ensure(client, automations(lost_after))
    found = sorted(client.read_automations(), key=lambda automation: automation.name)
    assert [automation.name for automation in found] == sorted(automation.name for automation in automations())
    lost = next(automation for automation in found if "lost" in automation.name)
    assert lost.trigger.within.total_seconds() == 90


def test_pools_are_made_once_and_keep_what_is_theirs(client: SyncPrefectClient, tmp_path: Path) -> None:
    assert [line.endswith("made") for line in pools.ensure(client, None, {})][::2] == [True, True]
    own = client.read_work_pool("local").base_job_template
    assert all("is there" in line for line in pools.ensure(client, None, {}))
    assert client.read_work_pool("local").base_job_template == own
    assert {name: client.read_work_pool(name).type for name in pools.TYPES} == pools.TYPES

    template = json.loads(json.dumps(client.read_work_pool("kubernetes").base_job_template))
    template["variables"]["properties"]["gpu"] = {"type": "integer", "default": 0}
    path = tmp_path / "template.json"
    path.write_text(json.dumps(template))
    assert "renewed" in pools.ensure(client, path, {})[2]
    assert client.read_work_pool("kubernetes").base_job_template == template
    assert "renewed" not in "".join(pools.ensure(client, path, {}))
    for bad in ("{", "{}"):
        path.write_text(bad)
        with pytest.raises(ValueError, match="base job template of a Kubernetes work pool"):
            pools.ensure(client, path, {})


def test_a_container_gets_what_its_deployment_says(client: SyncPrefectClient) -> None:
    """By the Docker worker's own code: image, volume, GPU and the secret, whose value only the block has."""
    from prefect_docker.worker import DockerWorkerJobConfiguration

    pools.ensure(client, None, {"AWS_SECRET_ACCESS_KEY": "a-value-of-its-own"})
    template = client.read_work_pool("docker").base_job_template
    assert "a-value-of-its-own" not in json.dumps(template)

    async def resolved(variables: dict[str, Any]) -> DockerWorkerJobConfiguration:
        async with get_client() as asking:
            return await DockerWorkerJobConfiguration.from_template_and_values(template, variables, client=asking)

    for each in DEPLOYMENTS:
        if each["name"] == "docker":
            configuration = asyncio.run(resolved(each["work_pool"]["job_variables"]))
            gpu = each["work_pool"]["work_queue_name"] == "gpu"
            assert configuration.image == ("cmacc/trainer:0.1.0" if gpu else "cmacc/worker:0.1.0")
            assert bool((configuration.container_create_kwargs or {}).get("device_requests")) == gpu
            assert configuration.volumes == ["cmacc-data:/data"]
            assert not configuration.privileged
            assert configuration.env["AWS_SECRET_ACCESS_KEY"] == "a-value-of-its-own"
            assert configuration.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


def test_a_cluster_knows_the_variables_of_its_deployments() -> None:
    if not (REPOSITORY / pools.KUBERNETES_TEMPLATE).exists():
        pytest.skip(f"there is no {pools.KUBERNETES_TEMPLATE}")
    known = json.loads((REPOSITORY / pools.KUBERNETES_TEMPLATE).read_text())["variables"]["properties"]
    for each in DEPLOYMENTS:
        if each["name"] == "k8s":
            assert set(each["work_pool"]["job_variables"]) <= set(known)
