"""The rights of each role, as rules of ACL users.

They are the only place that has them: ``ff-fast acl`` prints them, ``ff-fast doctor`` compares a user with them, and the
tests derive them from what the roles do (``tests/faults/rights.py``).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ff_fast.errors import InvalidInput


class Role(NamedTuple):
    """What a part of a program does, and the rules of a user that may do it and nothing else."""

    does: str
    rules: str


FROM_NOTHING = "clearselectors resetkeys resetchannels -@all"
"""What takes all rights from a user, and leaves its passwords: the rules of a role come behind."""

IN_A_CLUSTER = "+cluster|slots +asking +readonly"
"""Further rules of every user of a cluster."""

ROLES = {
    "deploy": Role(
        "Loads the library, may store the partition count, and rotates the secrets of waitpoint tokens.",
        "~ff:config:* ~ff:sec:* ~ff:part:* +fcall|ff_rotate_waitpoint_secret "
        "+fcall_ro|ff_version +function|load +client|setinfo +client|setname +get +hdel +hgetall +hmget +hset "
        "+persist +pexpireat +set +time",
    ),
    "producer": Role(
        "Creates executions, flows and their members, and sets tags.",
        "%R~ff:config:* ~ff:exec:*:core ~ff:exec:*:payload ~ff:exec:*:tags "
        "%W~ff:exec:*:children ~ff:flow:* %W~ff:idx:* ~ff:lane:* +fcall|ff_create_execution "
        "+fcall|ff_create_flow +fcall|ff_hint +fcall|ff_set_tags +fcall_ro|ff_version +client|setinfo "
        "+client|setname +exists +get +hexists +hget +hgetall +hlen +hset +persist +pexpire +pttl +sadd +set "
        "+time +type +zadd +zcard +zremrangebyrank +zrevrangebyscore +zscore",
    ),
    "worker": Role(
        "Claims, opens named streams, takes over from lost workers, streams, reports, suspends, creates children, ends, and supervises.",
        "%R~ff:config:* ~ff:exec:* ~ff:attempt:* ~ff:stream:* ~ff:sec:* ~ff:flow:* "
        "~ff:budget:* ~ff:idx:* ~ff:lane:* ~ff:part:* &ff:exec:* &ff:part:* &ff:stream:* +fcall|ff_append "
        "+fcall|ff_cancel_execution +fcall|ff_cancel_members +fcall|ff_charge_budget +fcall|ff_claim "
        "+fcall|ff_claim_execution +fcall|ff_complete_execution +fcall|ff_create_execution "
        "+fcall|ff_create_waitpoint +fcall|ff_delay_execution +fcall|ff_fail_execution +fcall|ff_fire_timer "
        "+fcall|ff_forget_hints +fcall|ff_give_back +fcall|ff_hint +fcall|ff_open_stream "
        "+fcall|ff_open_writer +fcall|ff_release_charge +fcall|ff_renew_lease +fcall|ff_report_progress "
        "+fcall|ff_report_usage +fcall|ff_suspend_execution +fcall|ff_wait_children "
        "+fcall_ro|ff_describe_attempt +fcall_ro|ff_describe_execution +fcall_ro|ff_list_executions "
        "+fcall_ro|ff_observe_signals +fcall_ro|ff_read_payload +fcall_ro|ff_read_summary +fcall_ro|ff_version +bzmpop +client|setinfo "
        "+client|setname +del +exists +get +hdel +hexists +hget +hgetall +hlen +hmget +hset +lrange +persist "
        "+pexpire +pexpireat +rpush +sadd +scard +set +setrange +spublish +srandmember +srem +ssubscribe "
        "+sunsubscribe +time +type +unlink +wait +waitaof +xadd +xinfo|stream +xlen +xrange +xrevrange +xtrim "
        "+zadd +zcard +zpopmin +zrange +zrangebylex +zrangebyscore +zrem +zremrangebyrank +zrevrangebyscore "
        "+zscore",
    ),
    "supervisor": Role(
        "Fires due timers: expired leases, delays, timeouts, cancellations.",
        "%R~ff:config:* ~ff:exec:*:core %W~ff:exec:* %R~ff:exec:*:suspension:current "
        "%R~ff:exec:*:tags %W~ff:attempt:* %W~ff:stream:* %R~ff:stream:*:head %R~ff:stream:*:meta ~ff:flow:* "
        "~ff:idx:* ~ff:lane:* ~ff:part:* %W~ff:sec:* &ff:exec:* &ff:part:* &ff:stream:* "
        "+fcall|ff_cancel_members +fcall|ff_fire_timer +fcall|ff_hint +fcall_ro|ff_version +client|setinfo "
        "+client|setname +exists +get +hdel +hget +hgetall +hlen +hmget +hset +persist +pexpire +pexpireat "
        "+sadd +scard +set +spublish +srem +time +type +xadd +zadd +zcard +zrangebylex +zrangebyscore +zrem "
        "+zremrangebyrank +zrevrangebyscore +zscore",
    ),
    "operator": Role(
        "Looks at everything but payloads, cancels and removes executions, cancels flows, and sets budgets.",
        "%R~ff:config:* ~ff:exec:*:core %W~ff:exec:* ~ff:flow:* ~ff:budget:* ~ff:idx:* "
        "~ff:lane:* ~ff:part:* %W~ff:sec:* ~ff:attempt:* ~ff:stream:* %R~ff:exec:*:history "
        "%R~ff:exec:*:suspension:current %R~ff:exec:*:tags %R~ff:exec:*:usage %R~ff:exec:*:children &ff:exec:* &ff:part:* "
        "&ff:stream:* +fcall|ff_cancel_execution +fcall|ff_cancel_flow +fcall|ff_cancel_members "
        "+fcall|ff_create_budget +fcall|ff_delete_execution +fcall|ff_hint +fcall_ro|ff_describe_attempt "
        "+fcall_ro|ff_describe_execution +fcall_ro|ff_describe_flow +fcall_ro|ff_list_executions "
        "+fcall_ro|ff_list_lanes +fcall_ro|ff_version +client|setinfo +client|setname +del +exists +get +hdel "
        "+hget +hgetall +hlen +hmget +hset +persist +pexpire +pexpireat +sadd +scard +set +spublish +srem +sscan "
        "+time +type +unlink +wait +waitaof +xadd +xinfo|stream +xlen +xrevrange +zadd +zcard +zrangebylex "
        "+zrangebyscore +zrem +zremrangebyrank +zrevrangebyscore +zscore",
    ),
    "signaller": Role(
        "Delivers signals. It checks tokens, so it can read the secrets that sign them: a user for gateways alone.",
        "%R~ff:config:* ~ff:exec:*:core %W~ff:exec:* ~ff:exec:*:suspension:current "
        "%R~ff:exec:*:signals %R~ff:exec:*:signals:dedup %R~ff:exec:*:waitpoints %W~ff:attempt:* "
        "%W~ff:stream:* %R~ff:stream:*:head %R~ff:stream:*:meta ~ff:sec:* ~ff:flow:* ~ff:idx:* ~ff:lane:* "
        "~ff:part:* &ff:exec:* &ff:part:* &ff:stream:* +fcall|ff_deliver_signal +fcall|ff_hint "
        "+fcall_ro|ff_version +client|setinfo +client|setname +exists +get +hdel +hexists +hget +hgetall "
        "+hlen +hmget +hset +persist +pexpire +pexpireat +rpush +sadd +scard +set +spublish +srem +time +type "
        "+xadd +zadd +zcard +zrem +zremrangebyrank +zrevrangebyscore +zscore",
    ),
    "agent": Role(
        "Saves and reads tasks of the A2A protocol, beside the rules of `ff_worker` and `ff_operator` for the leases of those that run.",
        "%R~ff:config:* ~ff:task:* ~ff:tasks:* &ff:task:* +fcall|ff_delete_task "
        "+fcall|ff_note_task +fcall|ff_save_task +fcall_ro|ff_list_tasks +fcall_ro|ff_read_task "
        "+fcall_ro|ff_version +client|setinfo +client|setname +exists +get +hdel +hget +hmget +hset +pexpire "
        "+pttl +spublish +ssubscribe +sunsubscribe +time +type +unlink +xadd +xrange +zadd +zcard +zcount "
        "+zrangebyscore +zrem +zrevrange +zscore",
    ),
    "reader": Role(
        "Reads: tails, pages, summaries, results, descriptions, listings, completions. No way to write, and no secret.",
        "%R~ff:config:* %R~ff:exec:*:children %R~ff:exec:*:core %R~ff:exec:*:history %R~ff:exec:*:result "
        "%R~ff:exec:*:suspension:current %R~ff:exec:*:tags %R~ff:exec:*:usage %R~ff:stream:* %R~ff:flow:* "
        "%R~ff:part:* %R~ff:attempt:* %R~ff:idx:* %R~ff:lane:* &ff:exec:* &ff:part:* &ff:stream:* "
        "+fcall_ro|ff_describe_attempt +fcall_ro|ff_describe_execution +fcall_ro|ff_describe_flow "
        "+fcall_ro|ff_list_executions +fcall_ro|ff_list_lanes +fcall_ro|ff_read_payload "
        "+fcall_ro|ff_read_range +fcall_ro|ff_read_state +fcall_ro|ff_read_summary +fcall_ro|ff_read_tags "
        "+fcall_ro|ff_version +client|setinfo +client|setname +exists +get +hget +hgetall +hmget +scard "
        "+sscan +ssubscribe +sunsubscribe +time +xinfo|stream +xlen +xrange +xrevrange +zcard +zrangebylex "
        "+zrangebyscore +zrevrangebyscore +zscore",
    ),
}
"""Each role by its name."""


def rules_of(names: list[str], *, cluster: bool = False) -> str:
    """Return the rules that give a user, whatever it had before, the rights of these roles together."""
    rules = [rule for name in names for rule in ROLES[name].rules.split()]
    if cluster:
        rules += IN_A_CLUSTER.split()
    kinds = ("%R~", "~", "%W~", "&", "+")
    merged = set(rules)
    # A pattern for both covers those for one.
    merged -= {f"%{mode}{rule}" for rule in merged if rule.startswith("~") for mode in "RW"}
    ordered = sorted(
        merged,
        key=lambda rule: (next(i for i, k in enumerate(kinds) if rule.startswith(k)), rule),
    )
    return f"{FROM_NOTHING} {' '.join(ordered)}"


def acl_line(names: list[str], user: str | None = None, *, cluster: bool = False) -> str:
    """Return the ACL line of a user that has these roles together, and what they do as a comment above it.

    Raises:
        InvalidInput: *user* cannot be the name of a user: what follows a blank in it would be taken as further rules.
    """
    if user is not None and re.fullmatch(r"[!-~]{1,256}", user) is None:
        raise InvalidInput(
            "The name of a user must be 1 to 256 printable ASCII characters without blank."
        )
    does = "\n".join(f"# {ROLES[name].does}" for name in names)
    rules = rules_of(names, cluster=cluster)
    return f"{does}\nACL SETUSER {user or f'ff_{names[0]}'} {rules}"
