"""What is stored, and what readers got, against what was said: each function returns what does not agree."""

from ff_fast import End, Gap, StreamFrame
from ff_fast.errors import AttemptNotFound, ExecutionNotFound

from ...soak.account import DONE


async def execution(load, known, *, lossy):
    """Hold one execution against all that was said about it."""
    safe = any(attempt.safe or attempt.is_safe for attempt in known.attempts.values())
    try:
        found = await load._repeated(lambda: load.writes.describe(known.eid))
    except ExecutionNotFound:
        known.is_gone = True
        if lossy and not safe:
            return [*_reads(known, {}, lossy=lossy)]
        return ["there is no such execution"]
    wrong = []
    if found.state != "completed":
        wrong.append(f"it is {found.state}: {found.failure_reason}")
    elif (result := await load._repeated(lambda: load.writes.read_result(known.eid))) != (
        known.eid.encode()
    ):
        wrong.append(f"its result is {result!r}")
    if not lossy and found.attempt_count != 1:
        wrong.append(f"it took {found.attempt_count} attempts: {found.failure_reason}")
    streams = {}
    for attempt in range(found.attempt_count):
        last = attempt == found.attempt_count - 1
        streams[attempt] = await _stream(load, known.eid, attempt)
        wrong += _frames(known, attempt, *streams[attempt], lossy=lossy, success=last)
    return [*wrong, *_reads(known, streams, lossy=lossy)]


async def _stream(load, eid, attempt):
    """Frames and gaps of an attempt in order, and why it ended."""
    try:
        page = await load._repeated(lambda: load.writes.read_stream(eid, attempt, count=10_000))
    except AttemptNotFound:
        return [], [], None
    return list(page), list(page.gaps), page.end_reason


def _frames(known, attempt, frames, gaps, reason, *, lossy, success):
    """Every frame is there, once and in order, or its loss is explicit, to the caller too."""
    told = known.attempts[attempt]
    name = f"attempt {attempt}"
    missing = [range(gap.first_missing, gap.next_sequence) for gap in gaps]
    at = 0
    for each in frames:
        for absent in range(at + 1, each.sequence):
            if not any(absent in gap for gap in missing):
                yield f"{name} lacks frame {absent} in silence"
        if each.sequence <= at:
            yield f"{name} has {each.sequence} after {at}"
        at = each.sequence
        if each.payload != known.payload(attempt, at):
            yield f"{name}: frame {at} has another payload"
    last = max([at] + [gap[-1] for gap in missing if gap])
    if missing and not lossy:
        yield f"{name} has gaps: {gaps}"
    for absent in (sequence for gap in missing for sequence in gap):
        if reason == "attempt_success" and not told.has_told(absent):
            yield f"{name} is a success without frame {absent}, and its caller was not told"
    # Of what is lost after the attempt has ended nobody can be told.
    if last < told.acknowledged and not (lossy and (told.error or told.completed)):
        yield f"{name} ends at {last}; {told.acknowledged} was acknowledged, and nobody was told"
    if last < told.safe:
        yield f"{name} ends at {last}; {told.safe} was to be on a replica"
    if success and (reason != "attempt_success" or last != known.length):
        yield f"{name} ended as {reason} with {last} of {known.length} frames"
    if told.is_safe and not success:
        yield f"{name} was completed, and that was to be on a replica"
    if not lossy and told.error is not None:
        yield f"the caller of {name} was told {told.error!r}"


def _reads(known, streams, *, lossy):
    """A reader got every frame once and in order, or a gap; then one end, or an error."""
    for attempt, items in enumerate(known.reads):
        name = f"the reader of attempt {attempt}"
        if not items or not isinstance(items[-1], End | Exception):
            yield f"{name} has no end: {items[-1:]}"
            continue
        if isinstance(items[-1], Exception) and not lossy:
            yield f"{name} was told {items[-1]!r}"
        # What is written by another claim after a failover has lost the first one has other ids.
        at, got, gone, again = 0, {}, set(), []
        for item in items[:-1]:
            first = item.sequence if isinstance(item, StreamFrame) else item.first_missing
            if first != at + 1:
                yield f"{name} got {type(item).__name__} {first} after {at}"
            if isinstance(item, Gap):
                at = item.next_sequence - 1
                gone.update(range(first, at + 1))
                if not lossy:
                    yield f"{name} got {item!r}"
                continue
            at = first
            if got.get(at) == item.stream_id:
                again.append(at)
            got[at] = item.stream_id
            if item.payload != known.payload(attempt, at):
                yield f"{name} got another frame {at} than was written"
        if again:
            gaps = [item for item in items if isinstance(item, Gap)]
            yield f"{name} got {again[0]} to {again[-1]} twice, behind {gaps}"
        if attempt not in streams or isinstance(items[-1], Exception):
            continue
        frames, _, reason = streams[attempt]
        # An end that was lost after it was read may be followed by another one.
        if items[-1].reason != reason and not (lossy and attempt + 1 < len(streams)):
            yield f"{name} ended as {items[-1].reason}, and the attempt as {reason}"
        stored = {each.sequence: each.stream_id for each in frames}
        if skipped := stored.keys() - got.keys() - gone:
            yield f"{name} has skipped {min(skipped)} to {max(skipped)}"
        for sequence in stored.keys() & got.keys():
            if stored[sequence] != got[sequence]:
                yield f"{name} got {got[sequence]}, and {stored[sequence]} is stored"


def completions(load, *, lossy):
    """Each end was told once; after a failover that loses ends, at least once."""
    for eid, known in load.executions.items():
        times = load.completions[eid]
        if known.is_gone:
            continue
        if known.created == DONE and times != 1 and not (lossy and times):
            yield f"the subscriber was told {times} times of the end of {eid}"
    for eid in load.completions.keys() - load.executions.keys():
        yield f"the subscriber was told of the end of {eid}, that nobody created"
