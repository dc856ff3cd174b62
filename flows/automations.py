"""What a Prefect server does by itself about lost runs: it marks them Crashed, and starts them again a few times.

A run's own process sends a heartbeat every 30 s, as prefect.yaml and `settings` say. When it, its worker or its machine dies,
the beats stop; the run would stay "Running" for ever.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import AutomationCore
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from cmacc.flows.settings import LOST_AFTER_S, RESTARTS

_PENDING_S = 600
_PARTS = "ingest-part"
_RESTARTED = ("ingest", "reshard", "pretrain", "evaluate")
"""Whose flow runs continue when they are run again. Lost parts of an ingest are begun again by the ingest itself."""


_QUIET = {
    f"prefect.flow-run.{state}"
    for state in (
        "Completed",
        "Failed",
        "Cancelled",
        "Crashed",
        "TimedOut",
        "AwaitingRetry",
        "Scheduled",
        "Late",
        "Paused",
        "Suspended",
    )
}
"""After these nobody beats, and nobody is lost. (Not Running: that event may come after the first heartbeat.)"""


def automations(lost_after_s: int = LOST_AFTER_S, restarts: int = RESTARTS) -> list[AutomationCore]:
    """The automations, none of them on the server yet. restarts: of one flow run, at most; 0 leaves lost runs Crashed."""
    each_run = {"prefect.resource.id"}
    lost = EventTrigger(
        posture=Posture.Proactive,
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=_of_flows(*_RESTARTED, _PARTS),
        for_each=each_run,
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat"} | _QUIET,
        within=timedelta(seconds=lost_after_s),
    )
    never_begun = EventTrigger(
        posture=Posture.Proactive,
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        # A pod may wait for its node for hours; a process may not.
        match_related=[_of_flows(*_RESTARTED, _PARTS), _related("work-pool", "local")],
        for_each=each_run,
        after={"prefect.flow-run.Pending", "prefect.flow-run.Submitting", "prefect.flow-run.InfrastructurePending"},
        expect={"prefect.flow-run.*"},
        within=timedelta(seconds=max(_PENDING_S, lost_after_s)),
    )
    crashed = EventTrigger(
        posture=Posture.Reactive,
        match=ResourceSpecification(
            {
                "prefect.resource.id": "prefect.flow-run.*",
                # How often it has begun. Who never did, for want of an image say, would be started for ever.
                "prefect.run-count": [str(begun) for begun in range(1, restarts + 1)],
            }
        ),
        # Without a deployment nobody would take it up.
        match_related=[_of_flows(*_RESTARTED), ResourceSpecification({"prefect.resource.role": "deployment"})],
        for_each=each_run,
        expect={"prefect.flow-run.Crashed"},
        # A server that finds SQLite locked reads an event again; with a period of its own, it fires once for it all the same.
        within=timedelta(seconds=1),
    )
    crash, again = StateType.CRASHED, StateType.SCHEDULED
    mark = ChangeFlowRunState(state=crash, name="Crashed", message=f"no sign of life for {lost_after_s} s", force=False)
    drop = ChangeFlowRunState(state=crash, name="Crashed", message="its worker took it and never began", force=False)
    retry = ChangeFlowRunState(state=again, name="AwaitingRetry", message="started again after a crash", force=False)
    return [
        AutomationCore(name="cmacc: lost runs are Crashed", trigger=lost, actions=[mark]),
        AutomationCore(name="cmacc: runs that never begin are Crashed", trigger=never_begun, actions=[drop]),
        AutomationCore(
            name="cmacc: Crashed runs start again",
            description=f"At most {restarts} times.",
            trigger=crashed,
            actions=[retry],
            enabled=restarts > 0,
        ),
    ]


def ensure(client: SyncPrefectClient, wanted: list[AutomationCore]) -> None:
    """Make the server's automations these: one of each name, changed where it differs. A second time does nothing."""
    for automation in wanted:
        found = client.read_automations_by_name(automation.name)
        if not found:
            client.create_automation(automation)
            continue
        client.update_automation(found[0].id, automation)
        for other in found[1:]:
            client.delete_automation(other.id)


def _of_flows(*names: str) -> ResourceSpecification:
    return _related("flow", *names)


def _related(role: str, *names: str) -> ResourceSpecification:
    return ResourceSpecification({"prefect.resource.role": role, "prefect.resource.name": list(names)})
