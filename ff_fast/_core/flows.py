"""Cancelling a flow and its members."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.ready import with_hints
from ff_fast._core.steps import applied_in_part, command, send_one
from ff_fast.errors import DeadlineExceeded
from ff_fast.types import CancelFlowOutcome, CancelFlowPolicy, FlowDescription

if TYPE_CHECKING:
    from ff_fast._core.steps import Steps

# Cancelling a member takes the server about 50 us.
MEMBERS_A_CALL = 16
_PAGE = 1_000
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
    return CancelFlowOutcome(held, cancelled, described.open_count)


def describe_flow(flow_id: str, slot_tag: str) -> Steps[FlowDescription]:
    """Read a flow and its members, in pages: a flow may have any number of them."""
    counts = yield from ops.call(ops.describe_flow(flow_id, slot_tag))
    members = yield from _members(keys.flow_members(slot_tag, flow_id))
    still_open = yield from _open_members(keys.flow_open(slot_tag, flow_id))
    return FlowDescription(flow_id, counts.state, members, still_open)


def _members(key: bytes) -> Steps[tuple[str, ...]]:
    found: set[str] = set()
    cursor = b"0"
    while True:
        page = yield from send_one(command(b"SSCAN", key, cursor, b"COUNT", b"%d" % _PAGE))
        cursor, members = ops.scan_page(page)
        found.update(members)
        if cursor == b"0":
            return tuple(sorted(found))


def _open_members(key: bytes) -> Steps[tuple[str, ...]]:
    found: list[str] = []
    after = b"-"
    while True:
        page = yield from send_one(
            command(b"ZRANGEBYLEX", key, after, b"+", b"LIMIT", b"0", b"%d" % _PAGE)
        )
        members = ops.texts(page)
        found += members
        if len(members) < _PAGE:
            return tuple(sorted(found))
        after = b"(" + page[-1]
