"""Ids and keys: the only place that checks an id's form, and the only place that spells a key.

An id is checked and brought to its one canonical form when it enters the library; from then on it
is plain text.  The key functions take canonical text and check nothing again.

Every key of an execution carries the slot tag of its partition, ``{fp:N}``, so one call touches one
slot.  (A cluster calls it a hash tag: only the text in the braces decides the slot.)  These are all
keys::

    ff:exec:{fp:N}:<eid>:core                core                hash    state, current attempt, lease
    ff:exec:{fp:N}:<eid>:payload             payload             string  the input
    ff:exec:{fp:N}:<eid>:result              result              string  the output
    ff:exec:{fp:N}:<eid>:tags                tags                hash    user tags
    ff:exec:{fp:N}:<eid>:usage               usage               hash    dimension to amount
    ff:exec:{fp:N}:<eid>:usage:dedup         usage_dedup         hash    the last reports with a key
    ff:exec:{fp:N}:<eid>:usage:recent        usage_recent        hash    the last reports without one
    ff:exec:{fp:N}:<eid>:history             history             stream  transitions
    ff:exec:{fp:N}:<eid>:children            children            set     children that have not ended
    ff:exec:{fp:N}:<eid>:waitpoints          waitpoints          hash    state of each waitpoint
    ff:exec:{fp:N}:<eid>:tokens              tokens              hash    SHA-1 of a token to waitpoint
    ff:exec:{fp:N}:<eid>:signals             signals             hash    every signal, by <waitpoint>:<id>
    ff:exec:{fp:N}:<eid>:signals:buffered    signals_buffered    zset    signals before a suspension
    ff:exec:{fp:N}:<eid>:signals:dedup       signals_dedup       hash    idempotency key to signal
    ff:exec:{fp:N}:<eid>:suspension:current  suspension          hash    the last suspension
    ff:exec:{fp:N}:<eid>:suspension:signals  suspension_signals  list    signals that contributed to it
    ff:attempt:{fp:N}:<eid>:<i>              attempt             hash    worker and start of an attempt
    ff:attempt:{fp:N}:<eid>:<i>:summary      summary             hash    the rolling summary
    ff:stream:{fp:N}:<eid>:<i>               stream              stream  the log
    ff:stream:{fp:N}:<eid>:<i>:live          live                stream  the live window
    ff:stream:{fp:N}:<eid>:<i>:head          head                string  last id, writer, end of the lease
    ff:stream:{fp:N}:<eid>:<i>:meta          meta                hash    begin and end, what readers need
    ff:idx:{fp:N}:lane:<lane><needs>:eligible  eligible          zset    executions that can be claimed
    ff:idx:{fp:N}:lane:<lane>:needs          needs               set     what executions there require
    ff:idx:{fp:N}:leases                     leases              hash    lease digest to execution
    ff:idx:{fp:N}:listed                     listed              zset    executions that have not ended, by state and age
    ff:idx:{fp:N}:ended:<state>              ended               zset    the newest ones that ended without success
    ff:idx:{fp:N}:queues                     queues              zset    its eligible sets that are not empty
    ff:idx:{fp:N}:timers                     timers              zset    what is due at some time
    ff:part:{fp:N}:completions               completions         stream  executions that ended
    ff:part:{fp:0}:supervisor                supervisor          string  who supervises the deployment, for some seconds
    ff:part:{fp:N}:written                   written             string  a write that a wait for replicas covers
    ff:sec:{fp:N}:waitpoint_hmac             waitpoint_secrets   hash    secrets that sign tokens
    ff:part:{fp:N}:waitpoints                waitpoint_use       hash    how long secrets are needed
    ff:flow:{fp:N}:<flow>                    flow                hash    state of a flow
    ff:flow:{fp:N}:<flow>:members            flow_members        set     its executions
    ff:flow:{fp:N}:<flow>:open               flow_open           zset    those that have not ended
    ff:budget:{b:<budget>}:limits            budget_limits       hash    hard and soft limits
    ff:budget:{b:<budget>}:usage             budget_usage        hash    dimension to amount
    ff:budget:{b:<budget>}:charges:<eid>     budget_charges      hash    the last reports of an execution
    ff:lane:{<lane>}<needs>:ready            ready               zset    partitions with work
    ff:lane:{<lane>}<needs>:hinted           hinted              hash    partition to its last hint
    ff:lane:{<lane>}:needs                   lane_needs          zset    what executions require
    ff:lane:{<lane>}:news:<seen>             lane_news           zset    wakes who knows no newer entry
    ff:task:{fp:N}:<task>                    task                hash    documents of a task, of each owner
    ff:task:{fp:N}:<task>:events             task_events         stream  what has changed them
    ff:tasks:{<owner>}:order                 task_order          zset    tasks of an owner by time of their status
    ff:tasks:{<owner>}:due                   task_due            zset    when they are removed
    ff:tasks:{<owner>}:facts                 task_facts          hash    their versions, states and contexts
    ff:config:partitions                     PARTITIONS_CONFIG   string  the partition count

``<eid>`` is the execution id and contains the slot tag as well; ``<i>`` is the attempt index; ``<needs>`` is empty
for executions that require no capabilities, else a colon and the required ones, in one text with commas; ``<seen>`` is
a score in ``lane_needs``; ``<state>`` is ``failed``, ``cancelled`` or ``expired``; ``<task>`` is a UUID that stands for the name of a task, ``<owner>`` a digest of the owner's.  The second column is the name of a function here, of a row
of ``ff.KEYS`` in ``lua/prelude.lua``, or of both: a key has one name.  A budget, a lane and the
configuration have slots of their own, because executions of all partitions use them.

What is published is on channels of sharded pub/sub, each in the slot of what it is about.  A push is never the truth:
it says what was stored, or that there is something to read::

    ff:stream:{fp:N}:<eid>:<i>:head          attempt_channel     frames, the end, changes of the lease
    ff:exec:{fp:N}:<eid>:core                execution_channel   moves of the execution
    ff:part:{fp:N}:leases                    leases_channel      what the holders of its leases have to know
    ff:part:{fp:N}:completions               completions_channel  that an execution of the partition has ended
    ff:task:{fp:N}:<task>:events             task_channel        that a task was saved or removed

Their messages are in ``lua/prelude.lua``.

A lane's name and a capability may hold any printable character.  In a key everything but ``A-Z a-z 0-9 . _ ~ -`` is
percent-encoded, so that no lane closes the braces, adds a part to the key, or acts as a wildcard in
an ACL rule.
"""

from __future__ import annotations

import os
import re
from binascii import crc_hqx
from functools import lru_cache
from hashlib import sha1
from typing import TYPE_CHECKING

from .errors import InvalidId, InvalidInput, InvalidType, check_int

if TYPE_CHECKING:
    from collections.abc import Iterable, Set

DEFAULT_PARTITIONS = 256
MAX_PARTITIONS = 65_535
"""The partition count is stored as an unsigned 16-bit number, as in FlowFabric."""

MAX_ATTEMPT_INDEX = 2**32 - 1
NAME_LIMIT = 512
"""Limit of the name of a stream, in bytes of UTF-8."""

FREE_TEXT_LIMIT = 256
"""Default limit of free text such as a worker's name, in bytes of UTF-8."""

SLOTS = 16_384
PARTITIONS_CONFIG = b"ff:config:partitions"
CLUSTER_PROBE = b"ff:config:cluster"
"""A key that is never written. Its slot is another one than that of the partition count."""
"""The partition count of the deployment, stored once; ``ff_version`` answers it."""

# The namespace, in the sense of RFC 9562, of the UUIDs that names stand for. Another one gives every name another id.
_NAMES = bytes.fromhex("122273cdc4db44398e9a2e898f681f5f")

# So many consecutive numbers give a key in each of the slots.
_KEYS_TO_TRY = 1 << 18

# Patterns are text: re compiles and keeps them at their first use, not at import.
_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_EXECUTION_ID = r"\{fp:(0|[1-9][0-9]{0,4})\}:(" + _UUID + ")"
_URL_ID = "fp(0|[1-9][0-9]{0,4})-(" + _UUID + ")"
_LANE = r"[\x20-\x7e]{1,64}"
_HANDLER_CAPABILITY = "handler:"
_HANDLER = r"[!-+\--~]{1,64}"
# C0, DEL, C1 and the two Unicode line separators: what breaks a log line or a terminal.
_CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
_TAG_KEY = r"[a-z][a-z0-9_]*\.[a-z0-9_][a-z0-9_.]*"
OPAQUE_ID = r"[A-Za-z0-9_-]{1,64}"
_NOT_PLAIN = r"[^A-Za-z0-9._~-]"


# -- ids -------------------------------------------------------------------------------------------


def new_execution_id(num_partitions: int = DEFAULT_PARTITIONS) -> str:
    """Return a fresh execution id, ``{fp:N}:<uuid4>``.

    The partition comes from the id itself, so executions of one lane spread over all partitions.

    Args:
        num_partitions: Partition count of the deployment, 1 to 65535.
    """
    check_int("num_partitions", num_partitions, 1, MAX_PARTITIONS)
    identity = _new_uuid()
    return f"{{fp:{crc_hqx(identity, 0) % num_partitions}}}:{_uuid_text(identity)}"


def execution_id_for(
    name: str, *, namespace: str = "default", num_partitions: int = DEFAULT_PARTITIONS
) -> str:
    """Return the execution id that a name stands for: the same one in every process, and at any time.

    It is a UUID of version 5 over namespace and name, in a partition that follows from it.

    Args:
        name: 1 to 512 bytes of UTF-8 without control characters.
        namespace: Tenant, free text of at most 256 bytes. Equal names of two namespaces are two ids.
        num_partitions: Partition count of the deployment, 1 to 65535; with another count a name has another id.

    Raises:
        InvalidId: *name* or *namespace* is not such a text.
    """
    check_int("num_partitions", num_partitions, 1, MAX_PARTITIONS)
    free_text("name", name, NAME_LIMIT)
    free_text("namespace", namespace)
    # Neither text has the separator in it.
    named = f"{namespace}\0{name}".encode()
    digest = sha1(_NAMES + named, usedforsecurity=False).digest()
    identity = _versioned(digest[:16], 5)
    return f"{{fp:{crc_hqx(identity, 0) % num_partitions}}}:{_uuid_text(identity)}"


def url_id(execution_id: str | bytes) -> str:
    """Return an execution id of letters, digits and hyphens alone, ``fp86-<uuid>``, for URLs, headers and cookies.

    Whatever takes an execution id takes this form as well.

    Raises:
        InvalidId, InvalidType: As of `canonical_execution_id`.
    """
    eid = canonical_execution_id(execution_id)
    return f"fp{partition_index(eid)}-{eid[-36:]}"


def execution_id_for_flow(flow_id: str, num_partitions: int = DEFAULT_PARTITIONS) -> str:
    """Return a fresh execution id in the partition of a flow, so that both share a slot.

    Raises:
        InvalidId: *flow_id* is not a UUID in its hyphenated form.
    """
    check_int("num_partitions", num_partitions, 1, MAX_PARTITIONS)
    return f"{flow_slot_tag(flow_id, num_partitions)}:{_uuid_text(_new_uuid())}"


def flow_slot_tag(flow_id: str, num_partitions: int = DEFAULT_PARTITIONS) -> str:
    """Return the slot tag of the partition of a flow and its executions."""
    flow_bytes = bytes.fromhex(canonical_uuid("flow_id", flow_id).replace("-", ""))
    return slot_tag(crc_hqx(flow_bytes, 0) % num_partitions)


def new_execution_id_beside(eid: str) -> str:
    """Return a fresh execution id in the partition of another execution."""
    return f"{slot_tag_of(eid)}:{_uuid_text(_new_uuid())}"


def canonical_execution_id(text: str | bytes) -> str:
    """Return the one canonical form of an execution id, ``{fp:N}:<uuid>`` in lower case.

    The form of `url_id`, ``fpN-<uuid>``, is accepted too.  N is a decimal number from 0 to 65535 without sign or leading zeros.  It is not compared with
    the deployment's partition count: an id keeps the partition it was made with.

    Raises:
        InvalidId: The text is anything else.
        InvalidType: The value is neither ``str`` nor ``bytes``.
    """
    if isinstance(text, bytes):
        # Latin-1 maps every byte, so a foreign byte fails below like any other bad character.
        text = text.decode("latin-1")
    if not isinstance(text, str):
        raise InvalidType(f"An execution id must be str or bytes, not {type(text).__name__}.")
    found = re.fullmatch(_EXECUTION_ID, text) or re.fullmatch(_URL_ID, text)
    if found is None or int(found[1]) > 65_535:
        raise InvalidId(
            "An execution id must look like {fp:<partition>}:<uuid> or fp<partition>-<uuid>; pass it unchanged."
        )
    return f"{{fp:{found[1]}}}:{found[2].lower()}"


def slot_tag_of(eid: str) -> str:
    """Return the slot tag of a canonical execution id, such as ``{fp:86}``."""
    return eid[: eid.index("}") + 1]


def partition_index(eid: str) -> int:
    """Return the partition of a canonical execution id, such as 86."""
    return int(eid[4 : eid.index("}")])


def slot_tag(partition: int) -> str:
    """Return the slot tag of a partition, ``{fp:N}``; N is 0 to 65535."""
    return f"{{fp:{check_int('partition', partition, 0, 65_535)}}}"


def index_of(text: str) -> int:
    """Return the partition that a slot tag, a key or an execution id names by its ``{fp:N}``."""
    found = re.search(r"\{fp:(\d+)\}", text)
    if found is None:
        raise InvalidId("The text must hold a partition's slot tag, such as {fp:7}.")
    return int(found[1])


def canonical_uuid(name: str, text: str) -> str:
    """Return a UUID in its canonical form: lower case, with hyphens.

    Args:
        name: What to call the value in an error.

    Raises:
        InvalidId: The text is not a UUID in its hyphenated form.
        InvalidType: The value is not ``str``.
    """
    _check_str(name, text)
    if re.fullmatch(_UUID, text) is None:
        raise InvalidId(f"{name} must be a UUID in its hyphenated form.")
    return text.lower()


def opaque_id(name: str, text: str) -> str:
    """Return *text* if it is an id that only its maker reads: 1 to 64 of ``A-Z a-z 0-9 _ -``.

    A kid, the id of a secret that signs waitpoint tokens, has this form too; Lua checks it again.

    Raises:
        InvalidId: It is not; the message names *name* and never the value, which may be a secret.
        InvalidType: The value is not ``str``.
    """
    _check_str(name, text)
    if re.fullmatch(OPAQUE_ID, text) is None:
        raise InvalidId(f"{name} must be 1 to 64 letters, digits, '_' or '-'.")
    return text


def lane_id(text: str) -> str:
    """Return *text* if it can name a lane: 1 to 64 printable ASCII characters.

    Raises:
        InvalidId: It cannot.
        InvalidType: The value is not ``str``.
    """
    _check_str("lane", text)
    if re.fullmatch(_LANE, text) is None:
        raise InvalidId("A lane must be 1 to 64 printable ASCII characters.")
    return text


def handler_name(text: str) -> str:
    """Return *text* if it can name a handler: 1 to 64 printable ASCII characters without blank and comma.

    Raises:
        InvalidId: It cannot.
        InvalidType: The value is not ``str``.
    """
    _check_str("handler", text)
    if re.fullmatch(_HANDLER, text) is None:
        raise InvalidId(
            "A handler's name must be 1 to 64 printable ASCII characters without blank and comma."
        )
    return text


def handler_capability(name: str) -> str:
    """Return the capability that a worker with a handler of this checked name has."""
    return f"{_HANDLER_CAPABILITY}{name}"


def handler_in(capabilities: Iterable[str]) -> str | None:
    """Return the name of the handler that required capabilities contain; None without one."""
    for each in capabilities:
        if each.startswith(_HANDLER_CAPABILITY):
            return each.removeprefix(_HANDLER_CAPABILITY)
    return None


def free_text(
    name: str,
    text: str,
    limit: int = FREE_TEXT_LIMIT,
    *,
    empty: bool = False,
    error: type[InvalidInput] = InvalidId,
) -> str:
    """Return *text* if it is one line of text of at most *limit* bytes of UTF-8.

    Args:
        name: What to call the value in an error, for instance ``worker_id``.
        empty: Whether the empty text is accepted.
        error: What to raise for a bad value.

    Raises:
        InvalidId: Empty, too long, a control character, or not encodable as UTF-8 (a lone
            surrogate); or *error* in its place.
        InvalidType: The value is not ``str``.
    """
    _check_str(name, text)
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        size = -1
    if size < 0 or re.search(_CONTROL, text) is not None:
        raise error(f"{name} must be text without control characters or lone surrogates.")
    if size > limit or (size == 0 and not empty):
        raise error(f"{name} must be {0 if empty else 1} to {limit} bytes of UTF-8.")
    return text


def tag_key(text: str) -> str:
    """Return *text* if it can be the key of a user tag, ``<namespace>.<name>`` in lower case.

    Raises:
        InvalidId: It does not match ``[a-z][a-z0-9_]*\\.[a-z0-9_][a-z0-9_.]*`` or has more than
            256 bytes.
        InvalidType: The value is not ``str``.
    """
    free_text("tag key", text)
    if re.fullmatch(_TAG_KEY, text) is None:
        raise InvalidId("A tag key must look like <namespace>.<name>, in lower case.")
    return text


def attempt_index(value: int) -> int:
    """Return *value* if it can be an attempt index: a whole number from 0 to 2^32-1.

    Raises:
        InvalidInput: It is out of range.
        InvalidType: The value is not an ``int``.
    """
    return check_int("attempt_index", value, 0, MAX_ATTEMPT_INDEX)


def _check_str(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise InvalidType(f"{name} must be str, not {type(text).__name__}.")


def new_uuid() -> str:
    """Return a fresh random UUID (version 4) in its canonical text form."""
    return _uuid_text(_new_uuid())


def _new_uuid() -> bytes:
    return _versioned(os.urandom(16), 4)


def _versioned(random: bytes, version: int) -> bytes:
    """Return a UUID of a version that is made of 16 bytes, RFC 9562 §5."""
    identity = bytearray(random)
    identity[6] = identity[6] & 0x0F | version << 4
    identity[8] = identity[8] & 0x3F | 0x80
    return bytes(identity)


def _uuid_text(identity: bytes) -> str:
    digits = identity.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# -- keys of one execution; eid is canonical -------------------------------------------------------


def core(eid: str) -> bytes:
    """Hash: state, current attempt, lease."""
    return _execution(eid, "core")


def payload(eid: str) -> bytes:
    """String: the input."""
    return _execution(eid, "payload")


def result(eid: str) -> bytes:
    """String: the output."""
    return _execution(eid, "result")


def children(eid: str) -> bytes:
    """Set: children that have not ended."""
    return _execution(eid, "children")


def tags(eid: str) -> bytes:
    """Hash: user tags."""
    return _execution(eid, "tags")


def usage(eid: str) -> bytes:
    """Hash: what the execution reported as used."""
    return _execution(eid, "usage")


def history(eid: str) -> bytes:
    """Stream: the transitions of the execution."""
    return _execution(eid, "history")


def attempt(eid: str, index: int) -> bytes:
    """Hash: one attempt."""
    return _attempt("attempt", eid, index)


def summary(eid: str, index: int) -> bytes:
    """Hash: the rolling summary of an attempt."""
    return _attempt("attempt", eid, index, ":summary")


def stream(eid: str, index: int) -> bytes:
    """Stream: the log, durable frames and the end entry."""
    return _attempt("stream", eid, index)


def live(eid: str, index: int) -> bytes:
    """Stream: the live window, best-effort frames and summary patches."""
    return _attempt("stream", eid, index, ":live")


def head(eid: str, index: int) -> bytes:
    """String: last id and writer of an attempt's stream, end of its lease, whether a cancel was requested."""
    return _attempt("stream", eid, index, ":head")


def meta(eid: str, index: int) -> bytes:
    """Hash: begin and end of an attempt's stream, and what readers need."""
    return _attempt("stream", eid, index, ":meta")


# -- channels --------------------------------------------------------------------------------------


def attempt_channel(eid: str, index: int) -> bytes:
    """What happens to an attempt's stream. It has the text of the head key."""
    return head(eid, index)


def execution_channel(eid: str) -> bytes:
    """What becomes of an execution. It has the text of the core key."""
    return core(eid)


def leases_channel(slot_tag: str) -> bytes:
    """What the workers that hold leases of one partition have to know."""
    return f"ff:part:{slot_tag}:leases".encode("ascii")


def completions_channel(slot_tag: str) -> bytes:
    """That executions of one partition have ended. It has the text of the key with their completions."""
    return completions(slot_tag)


def _execution(eid: str, name: str) -> bytes:
    return f"ff:exec:{slot_tag_of(eid)}:{eid}:{name}".encode("ascii")


def _attempt(family: str, eid: str, index: int, suffix: str = "") -> bytes:
    return f"ff:{family}:{slot_tag_of(eid)}:{eid}:{index}{suffix}".encode("ascii")


# -- keys of a partition, of a budget and of a lane ------------------------------------------------


def eligible(slot_tag: str, lane: str, needs: str = "") -> bytes:
    """Sorted set: executions of a lane in one partition that can be claimed, and require *needs*."""
    return f"ff:idx:{slot_tag}:lane:{_in_key(lane)}{_part(needs)}:eligible".encode("ascii")


def needs(slot_tag: str, lane: str) -> bytes:
    """Set: what waiting executions of a lane in one partition require."""
    return f"ff:idx:{slot_tag}:lane:{_in_key(lane)}:needs".encode("ascii")


def leases(slot_tag: str) -> bytes:
    """Hash: digests of the leases of one partition, and the executions that are under them."""
    return f"ff:idx:{slot_tag}:leases".encode("ascii")


def listed(slot_tag: str) -> bytes:
    """Sorted set: executions of one partition that have not ended, with their lanes, by state and age."""
    return f"ff:idx:{slot_tag}:listed".encode("ascii")


def ended(slot_tag: str, state: str) -> bytes:
    """Sorted set: the newest executions of one partition that have ended in *state*, by the time of their end."""
    return f"ff:idx:{slot_tag}:ended:{state}".encode("ascii")


def queues(slot_tag: str) -> bytes:
    """Sorted set: lane and requirements of each eligible set of one partition, as in its key."""
    return f"ff:idx:{slot_tag}:queues".encode("ascii")


def timers(slot_tag: str) -> bytes:
    """Sorted set: timers of one partition, by the time at which they are due."""
    return f"ff:idx:{slot_tag}:timers".encode("ascii")


def completions(slot_tag: str) -> bytes:
    """Stream: executions of one partition that ended."""
    return f"ff:part:{slot_tag}:completions".encode("ascii")


def supervisor() -> bytes:
    """String with a TTL: who supervises the deployment."""
    return f"ff:part:{slot_tag(0)}:supervisor".encode("ascii")


def written(slot_tag: str) -> bytes:
    """String: written before a wait for replicas, which covers only what its own connection has written."""
    return f"ff:part:{slot_tag}:written".encode("ascii")


def waitpoint_secrets(slot_tag: str) -> bytes:
    """Hash: the secrets that sign waitpoint tokens in one partition."""
    return f"ff:sec:{slot_tag}:waitpoint_hmac".encode("ascii")


def flow(slot_tag: str, flow_id: str) -> bytes:
    """Hash: state of a flow."""
    return f"ff:flow:{slot_tag}:{flow_id}".encode("ascii")


def flow_members(slot_tag: str, flow_id: str) -> bytes:
    """Set: executions of a flow."""
    return flow(slot_tag, flow_id) + b":members"


def flow_open(slot_tag: str, flow_id: str) -> bytes:
    """Sorted set: executions of a flow that have not ended, all with score 0."""
    return flow(slot_tag, flow_id) + b":open"


def budget_limits(budget_id: str) -> bytes:
    """Hash: limits of a budget."""
    return f"ff:budget:{{b:{budget_id}}}:limits".encode("ascii")


def budget_usage(budget_id: str) -> bytes:
    """Hash: what is used of a budget."""
    return f"ff:budget:{{b:{budget_id}}}:usage".encode("ascii")


def budget_charges(budget_id: str, eid: str) -> bytes:
    """Hash: what the last reports of an execution added to a budget, so that they can be taken back."""
    return f"ff:budget:{{b:{budget_id}}}:charges:{eid}".encode("ascii")


def ready(lane: str, needs: str = "") -> bytes:
    """Sorted set: a ready queue of a lane, partitions with work that requires *needs* by their best score."""
    return f"ff:lane:{{{_in_key(lane)}}}{_part(needs)}:ready".encode("ascii")


def hinted(lane: str, needs: str = "") -> bytes:
    """Hash: the partitions that may have such work, also while their hint is taken, with a mark of their last hint."""
    return f"ff:lane:{{{_in_key(lane)}}}{_part(needs)}:hinted".encode("ascii")


def lane_needs(lane: str) -> bytes:
    """Sorted set: what executions of a lane require, in the order in which it was registered."""
    return f"ff:lane:{{{_in_key(lane)}}}:needs".encode("ascii")


def lane_news(lane: str, seen: int) -> bytes:
    """Sorted set with one member once `lane_needs` has an entry after the one with the score *seen*."""
    return f"ff:lane:{{{_in_key(lane)}}}:news:{seen}".encode("ascii")


def task(slot_tag: str, name: str) -> bytes:
    """Hash: the documents of a task, of each owner."""
    return f"ff:task:{slot_tag}:{name}".encode("ascii")


def task_events(slot_tag: str, name: str) -> bytes:
    """Stream: what has changed the documents of a task."""
    return task(slot_tag, name) + b":events"


def task_channel(slot_tag: str, name: str) -> bytes:
    """That a task was saved or removed. It has the text of the key with its events."""
    return task_events(slot_tag, name)


def task_order(owner: str) -> bytes:
    """Sorted set: the tasks of an owner, by the time of their status in microseconds."""
    return f"ff:tasks:{{{owner}}}:order".encode("ascii")


def task_due(owner: str) -> bytes:
    """Sorted set: when the tasks of an owner are removed, in ms."""
    return f"ff:tasks:{{{owner}}}:due".encode("ascii")


def task_facts(owner: str) -> bytes:
    """Hash: version, state and context of the tasks of an owner."""
    return f"ff:tasks:{{{owner}}}:facts".encode("ascii")


def _part(needs: str) -> str:
    return f":{_in_key(needs)}" if needs else ""


@lru_cache(maxsize=1024)
def _in_key(text: str) -> str:
    if not text.isascii():
        # Each byte as a character, so that bytes are encoded.
        text = text.encode("utf-8").decode("latin-1")
    return re.sub(_NOT_PLAIN, lambda found: f"%{ord(found[0]):02X}", text)


# -- slots -----------------------------------------------------------------------------------------


def absent(key: bytes) -> bytes | None:
    """Return a key in the slot of *key* that is never written, for a call that touches keys that it does not name.

    While a slot moves from one node to another key by key, a node refuses a call before it begins if it has some of its
    keys and not others. A key that no node has makes it refuse every such call; otherwise a function would stop in the
    middle, at a key that has gone or is not there yet. The users who may make the call may use the key.
    """
    begin, end = key.find(b"{"), key.find(b"}") + 1
    if not 0 < begin < end:
        return None
    family = key[: key.find(b":", 3) + 1]
    if family in (b"ff:exec:", b"ff:idx:", b"ff:flow:"):
        return b"ff:exec:" + key[begin:end] + b":core"
    return family + key[begin:end]


def key_in(slots: Set[int]) -> bytes | None:
    """Return a configuration key in one of *slots*, for a call that is addressed to a node; None where there is none."""
    for number in range(_KEYS_TO_TRY if slots else 0):
        key = b"ff:config:%d" % number
        if key_slot(key) in slots:
            return key
    return None


def key_slot(key: bytes) -> int:
    """Return the cluster slot of a key, 0 to 16383.

    Only the text between the first ``{`` and the next ``}`` counts, unless it is empty; then, and
    without braces, the whole key does (Valkey Cluster specification, "Hash tags").
    """
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) % SLOTS
