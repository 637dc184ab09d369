"""Cancelling a flow and its members."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.ready import with_hints
from ff_fast._core.steps import applied_in_part
from ff_fast.errors import DeadlineExceeded
from ff_fast.types import CancelFlowOutcome, CancelFlowPolicy

if TYPE_CHECKING:
    from ff_fast._core.steps import Steps

MEMBERS_A_CALL = 100
# After this long a supervisor cancels the members that are left.
_BACKLOG_MS = 2_000


def cancel_flow(
    flow_id: str, slot_tag: str, reason: str, policy: CancelFlowPolicy, wait_s: float | None
) -> Steps[CancelFlowOutcome]:
    """Cancel a flow; then, for up to *wait_s* seconds, cancel its members as the policy says.

    Raises:
        DeadlineExceeded: Members were left when the wait ended; a supervisor cancels them.
    """
    cancel = ops.cancel_flow(flow_id, slot_tag, reason, policy, _BACKLOG_MS)
    held, still_open = yield from ops.call(cancel)
    cancelled = 0
    if wait_s is None or held is CancelFlowPolicy.FLOW_ONLY:
        return CancelFlowOutcome(held, 0, still_open)
    deadline = time.monotonic() + wait_s
    with applied_in_part():
        while True:
            count, left = yield from with_hints(
                ops.cancel_members(flow_id, slot_tag, MEMBERS_A_CALL), keys.index_of(slot_tag)
            )
            cancelled += count
            if left == 0:
                break
            if time.monotonic() >= deadline:
                raise DeadlineExceeded
        described = yield from ops.call(ops.describe_flow(flow_id, slot_tag))
    return CancelFlowOutcome(held, cancelled, len(described.open_members))
