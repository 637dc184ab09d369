"""Executions on a real server, as the tests of the lifecycle drive them: what is due is made due by hand."""

from typing import NamedTuple

import ff_fast
from ff_fast import ScannerFilter, keys
from ff_fast._core import ops
from ff_fast._core import supervision as supervision_core
from ff_fast._core.operations import Call

from .. import router
from ..heads import set_head

WORKER = {"worker_id": "w", "worker_instance_id": "w-1"}
TERMINAL = ("completed", "failed", "cancelled", "expired")


TIMERS = [keys.timers(f"{{fp:{index}}}") for index in range(keys.DEFAULT_PARTITIONS)]
"""The timers of all partitions."""

NEEDS = ("", "gpu")
"""What the executions of these tests require."""


class Look(NamedTuple):
    """An execution as it is stored."""

    core: dict[str, str]
    timers: dict[str, int]
    is_eligible: bool
    completions: list[dict[bytes, bytes]]


def _timers_of(eid, timers):
    return {
        name.decode("utf-8", "replace").partition(":")[0]: int(score)
        for name, score in timers
        if eid.encode() in name
    }


OPEN = ("waiting", "delayed", "waiting_children", "active", "suspended")
UNSUCCESSFUL = ("failed", "cancelled", "expired")


class World:
    """One backend, one lane and a namespace of that name, and a plain client to look behind it."""

    def __init__(self, url, raw, lane):
        self.backend = ff_fast.ValkeyBackend.connect(url)
        self.raw = raw
        self.lane = lane
        self.scope = ScannerFilter(namespace=lane)
        # A round counts what it fires, so timers that earlier tests left on the server must be gone.
        router.delete(raw, TIMERS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.backend.close()

    def create(self, **options):
        options = {"retention": 60.0, "namespace": self.lane, **options}
        return self.backend.create_execution(lane=self.lane, **options)

    def create_flow(self):
        return self.backend.create_flow(namespace=self.lane)

    def claim(self, **options):
        return self.backend.claim(lane=self.lane, **WORKER, **options)

    def owned(self, **options):
        """A fresh execution and its handle."""
        eid = self.create(**options)
        handle = self.claim()
        assert handle.fields().execution_id == eid
        return eid, handle

    # -- looking ------------------------------------------------------------------------------------

    def now(self):
        seconds, micros = self.raw.time()
        return seconds * 1000 + micros // 1000

    def core(self, eid):
        return {k.decode(): v.decode() for k, v in self.raw.hgetall(keys.core(eid)).items()}

    def state(self, eid):
        return self.core(eid)["state"]

    def timers(self, eid):
        """The timers of an execution: kind to when it is due."""
        found = self.raw.zrange(keys.timers(keys.slot_tag_of(eid)), 0, -1, withscores=True)
        return _timers_of(eid, found)

    def look(self, eid):
        """Its fields, its timers, whether it is eligible and its completions, in one round trip."""
        tag = keys.slot_tag_of(eid)
        with self.raw.pipeline(transaction=False) as pipeline:
            pipeline.hgetall(keys.core(eid))
            pipeline.zrange(keys.timers(tag), 0, -1, withscores=True)
            for needs in NEEDS:
                pipeline.zscore(keys.eligible(tag, self.lane, needs), eid)
            pipeline.xrange(keys.completions(tag))
            core, timers, *scores, records = pipeline.execute()
        found = {needs for needs, score in zip(NEEDS, scores, strict=True) if score is not None}
        assert found <= {core.get(b"required_capabilities", b"").decode()}
        return Look(
            {k.decode(): v.decode() for k, v in core.items()},
            _timers_of(eid, timers),
            bool(found),
            [fields for _, fields in records if fields[b"execution_id"] == eid.encode()],
        )

    def is_eligible(self, eid):
        """Whether it waits where workers look."""
        needs = self.raw.hget(keys.core(eid), "required_capabilities") or b""
        key = keys.eligible(keys.slot_tag_of(eid), self.lane, needs.decode())
        return self.raw.zscore(key, eid) is not None

    def is_held(self, core):
        """Whether a cancelled flow keeps it from all workers."""
        if core["state"] != "waiting" or not core.get("flow_id"):
            return False
        flow = keys.flow(keys.slot_tag_of(core["execution_id"]), core["flow_id"])
        state, policy = self.raw.hmget(flow, "state", "cancel_policy")
        # One that waits for a worker to go on counts as running, which nothing but the cancellation of all stops.
        return state != b"open" and (core.get("interrupted") != "1" or policy == b"cancel_all")

    def completions(self, eid):
        records = self.raw.xrange(keys.completions(keys.slot_tag_of(eid)))
        return [fields for _, fields in records if fields[b"execution_id"] == eid.encode()]

    def keys_of(self, eid):
        """Every key that names the execution."""
        return set(self.raw.keys(f"*{eid[-36:]}*"))

    def waitpoint(self, eid, point, **changes):
        """The stored fields of a waitpoint, after *changes*."""
        key = f"ff:exec:{keys.slot_tag_of(eid)}:{eid}:waitpoints"
        names = ("attempt_index", "created_at", "expires_at", "signal_count", "suspension_id")
        stored = self.raw.hget(key, point.waitpoint_id).decode().split(" ")
        fields = dict(zip(names, stored, strict=True)) | changes
        self.raw.hset(key, point.waitpoint_id, " ".join(map(str, fields.values())))
        return fields

    def check(self, eid, *, suspension_timer=None, attempt_timer=None):
        """The execution is in exactly the index that its state names; returns what was seen."""
        core, timers, is_eligible, completions = look = self.look(eid)
        state = core["state"]
        if not self.is_held(core):
            assert is_eligible == (state == "waiting"), state
        assert ("delay" in timers) == (state == "delayed"), (state, timers)
        assert ("lease" in timers) == (state == "active"), (state, timers)
        if suspension_timer is not None:
            assert ("suspension" in timers) == suspension_timer, (state, timers)
        assert state == "suspended" or "suspension" not in timers, (state, timers)
        if attempt_timer is not None:
            assert ("attempt" in timers) == attempt_timer, (state, timers)
        assert state == "active" or "attempt" not in timers, (state, timers)
        if state != "active":
            with self.raw.pipeline(transaction=False) as pipeline:
                for attempt in range(int(core["total_attempt_count"]) + 1):
                    pipeline.get(keys.head(eid, attempt))
                heads = [head for head in pipeline.execute() if head is not None]
                assert all(head.split(b" ")[2] == b"-" for head in heads)
        assert self.listed(eid) == self.listing(core), state
        assert len(completions) == (state in TERMINAL), state
        if state in TERMINAL:
            assert timers == {}, (state, timers)
            endless = [key for key in self.keys_of(eid) if self.raw.pttl(key) < 0]
            assert endless == [], state
        return look

    def listed(self, eid):
        """The indexes that list the execution, with its score in each."""
        tag, member = (
            keys.slot_tag_of(eid),
            f"{eid} {self.raw.hget(keys.core(eid), 'lane_id').decode()}",
        )
        index = {"open": keys.listed(tag)} | {end: keys.ended(tag, end) for end in UNSUCCESSFUL}
        with self.raw.pipeline(transaction=False) as pipeline:
            for key in index.values():
                pipeline.zscore(key, member)
            scores = dict(zip(index, pipeline.execute(), strict=True))
        return {name: int(score) for name, score in scores.items() if score is not None}

    @staticmethod
    def listing(core):
        """The same as the core says."""
        state = core["state"]
        if state in UNSUCCESSFUL:
            return {state: int(core["completed_at"])}
        if state == "completed":
            return {}
        return {"open": (OPEN.index(state) + 1) * 10**13 + int(core["created_at"])}

    # -- time ---------------------------------------------------------------------------------------

    def due(self, eid, *kinds):
        """Make timers of an execution due now, and the lease, if that is one of them, lapsed."""
        key = keys.timers(keys.slot_tag_of(eid))
        for name in self.raw.zrange(key, 0, -1):
            kind = name.decode("utf-8", "replace").partition(":")[0]
            if eid.encode() in name and kind in kinds:
                self.raw.zadd(key, {name: 1})
        index = self.core(eid).get("current_attempt_index")
        if "lease" in kinds and index is not None:
            set_head(self.raw, keys.head(eid, int(index)), lease_expires_at=1)

    def call(self, op):
        """Send one call of a Lua function, past the checks of the public operation."""
        return self.backend._run(Call(lambda: ops.call(op)))

    def round(self, scope=None):
        """One round of a supervisor; of one that looks after this world alone, if no scope is named."""
        scope = self.scope if scope is None else scope
        supervision = supervision_core.Supervision(self.backend._deployment, scope)
        return self.backend._run(Call(supervision.round))

    def fire(self, eid, *kinds):
        """Make timers due and let a supervisor find them."""
        self.due(eid, *kinds)
        return self.round()


def beside(eid):
    """An id in the partition of another execution."""
    return f"{keys.slot_tag_of(eid)}:{keys.new_uuid()}"
