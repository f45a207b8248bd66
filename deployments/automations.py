"""Automations: what the server does by itself when a run falls silent, or when too many items collide."""

from __future__ import annotations

import os
from datetime import timedelta
from uuid import UUID

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState, DoNothing, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture

SILENCE = timedelta(seconds=90)
"""Three heartbeats of 30 s, the shortest that Prefect sends: deployments and `tasks.parameters.start` ask for them."""
FLOWS = ("build", "sweep", "cell", "encode-new-items")
"""Whose runs are watched: those of other projects on the same server may send theirs less often."""
NOTIFICATION = "SEMIDS_NOTIFICATION"
"""Variable that names a notification block as TYPE/NAME, for example slack-webhook/alarms; without it, alarms are only
in the event feed."""
ENDS = ("Completed", "CompletedWithFailures", "Failed", "Cancelled", "Crashed")


def crash_silent_runs() -> Automation:
    """Return the automation that marks a run as crashed whose process is gone."""
    heartbeat = "prefect.flow-run.heartbeat"
    action: ActionTypes = ChangeFlowRunState(
        name=None,
        state=StateType.CRASHED,
        message="No heartbeat: its process is gone. Finished work is kept; run it again, and it goes on.",
        force=False,
    )
    return Automation(
        name="semids: mark runs without a heartbeat as crashed",
        description="A process that was killed tells nobody. Its work is kept: run the same again, and it goes on.",
        trigger=EventTrigger(
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{end}" for end in ENDS)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},  # type: ignore[arg-type]
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[action],
    )


def alarm_on_collisions(notification: UUID | None) -> Automation:
    """Return the automation that tells of runs in which more items collide than should.

    Args:
        notification: the block that sends the message; None sends none.
    """
    body = (
        "{{ event.resource['prefect.resource.name'] }}: collision rate {{ event.payload.collision_rate }}, "
        "floor {{ event.payload.floor }}, excess {{ event.payload.excess_collisions }}"
    )
    action: ActionTypes = (
        SendNotification(block_document_id=notification, subject="semids: too many items collide", body=body)
        if notification
        else DoNothing()
    )
    return Automation(
        name="semids: alarm on collisions",
        description=f"Runs above their collision rate, and collisions that need not be. Messages: {NOTIFICATION}.",
        trigger=EventTrigger(
            expect={"semids.collision-rate.exceeded", "semids.excess-collisions.found"},
            match={"prefect.resource.id": "semids.*"},  # type: ignore[arg-type]
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[action],
    )


def find_notification() -> UUID | None:
    """Return the notification block that the environment names, None where it names none.

    Raises:
        ValueError: it names one in another form than TYPE/NAME.
        ObjectNotFound: the server has no such block.
    """
    named = os.environ.get(NOTIFICATION)
    if not named:
        return None
    kind, slash, name = named.partition("/")
    if not slash or not name:
        raise ValueError(f"expected {NOTIFICATION}=TYPE/NAME, such as slack-webhook/alarms, got {named!r}")
    with get_client(sync_client=True) as client:
        return client.read_block_document_by_name(name, kind).id


def put_automation(automation: Automation) -> None:
    """Create an automation, or change the one of its name, which stays off if it was switched off.

    An alarm that sends messages goes on sending them where the environment names no notification.
    """
    with get_client(sync_client=True) as client:
        found = client.read_automations_by_name(automation.name)
    if not found:
        automation.create()
        return
    automation.id, automation.enabled = found[0].id, found[0].enabled
    if automation.actions == [DoNothing()]:
        automation.actions = found[0].actions
    automation.update()
