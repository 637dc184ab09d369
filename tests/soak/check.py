"""What is stored against what was said: each function returns what does not agree, as sentences."""

import asyncio
import collections
import re

from ff_fast import End, Gap, StreamFrame, keys
from ff_fast.errors import AttemptNotFound, ExecutionNotFound

from .account import DONE, NOT_APPLIED
from .job import frame
from .load import TERMINAL
from .site import LANES, PARTITIONS

PAGE = 10_000


async def execution(site, backend, account, known):
    """Hold one ended execution against all that was said about it."""
    try:
        found = await backend.describe(known.eid)
    except ExecutionNotFound:
        return ["there is no such execution"] if known.created == DONE else []
    if known.created == NOT_APPLIED:
        return ["its creation was not applied, and it is there"]
    wrong = []
    if found.state not in TERMINAL:
        return [
            f"it has not ended: {found.state}, attempt {found.attempt_index}, worker {found.worker_id}"
        ]
    result = await backend.read_result(known.eid)
    if known.told - {(found.outcome, result)}:
        wrong.append(f"subscribers were told of another end than {found.outcome}")
    streams = [await _stream(backend, known.eid, i) for i in range(found.attempt_count)]
    if known.job is None:
        wrong += _marks(found, result, streams, known.said)
        wrong += _claims(site, account, known.eid, found.attempt_count)
    else:
        wrong += _end(known, found, result)
        for attempt, (frames, gaps, reason) in enumerate(streams):
            wrong += _frames(known, attempt, frames, gaps, reason)
    wrong += [text for read in known.reads for text in _read(known, read, streams)]
    for attempt, document in {
        r.attempt: r.document for r in known.reads if r.document is not None
    }.items():
        stored = await backend.read_summary(known.eid, attempt)
        if (b"{}" if stored is None else stored.document_json) != document:
            wrong.append(f"attempt {attempt}: a reader folded another document than is stored")
    return wrong


async def _stream(backend, eid, attempt):
    """All frames of an attempt, its gaps, and why it ended."""
    frames, gaps, after = [], [], None
    while True:
        try:
            page = await backend.read_stream(eid, attempt, after=after, count=PAGE)
        except AttemptNotFound:
            return [], [], None
        frames += page
        gaps += page.gaps
        if len(page) == 0 or page.end_reason is not None:
            return frames, gaps, page.end_reason
        after = page.cursor


def _end(known, found, result):
    wanted = {"success": "completed", "failed": "failed"}[known.job.end]
    if found.state == wanted:
        of_this = re.fullmatch(rb"(.{36,})/(\d+)", result)
        if wanted == "completed" and not (of_this and of_this[1].decode() == known.eid):
            return [f"its result is {result[:80]!r}"]
        return []
    if found.state in ("cancelled", "expired") and known.may_be_cancelled:
        return []
    return [f"it ended as {found.state}, not {wanted}: {found.failure_reason}"]


def _frames(known, attempt, frames, gaps, reason):
    """The stream of an attempt is what its worker had to write, whole, up to where it was broken off."""
    wrong = []
    expected = 1
    missing = [range(gap.first_missing, gap.next_sequence) for gap in gaps]
    for each in frames:
        wrong += [
            f"attempt {attempt} lacks frame {absent}"
            for absent in range(expected, each.sequence)
            if known.job.is_kept(absent) or not any(absent in gap for gap in missing)
        ]
        expected = each.sequence + 1
        burst = known.job.burst_of(each.sequence)
        if burst is None or each.payload != frame(known.eid, attempt, each.sequence, burst):
            wrong.append(f"attempt {attempt}: frame {each.sequence} has another payload")
    last = max([frames[-1].sequence if frames else 0] + [gap[-1] for gap in missing if gap])
    acknowledged = known.acknowledged[attempt]
    if last < acknowledged:
        wrong.append(f"attempt {attempt} ends at {last}; {acknowledged} was acknowledged")
    if reason == "attempt_success" and last != known.job.length:
        wrong.append(f"attempt {attempt} is a success with {last} of {known.job.length} frames")
    if reason is None:
        wrong.append(f"attempt {attempt} has no end")
    return wrong


def _claims(site, account, eid, attempts):
    """No attempt is of a claim that was told that it got nothing."""
    with site.raw() as raw:
        for attempt in range(attempts):
            instance = raw.hget(keys.attempt(eid, attempt), "worker_instance_id") or b""
            if said := account.refused_claims.get(instance.decode()):
                yield f"attempt {attempt} is of a claim that was told {said}"


def _read(known, read, streams):
    """A reader got every frame once and in order, or a gap; then one end."""
    frames, _, _ = streams[read.attempt] if read.attempt < len(streams) else ([], [], None)
    name = f"a reader of attempt {read.attempt}"
    if not read.items or not isinstance(read.items[-1], End):
        return [f"{name} got no end"]
    wrong = []
    at = 0 if read.whole else None
    payloads = {each.sequence: each.payload for each in frames}
    for item in read.items[:-1]:
        if isinstance(item, Gap):
            if at is not None and not _follows(known, read, at, item.first_missing):
                wrong.append(f"{name} got a gap from {item.first_missing} after {at}")
            at = item.next_sequence - 1
        elif isinstance(item, StreamFrame):
            if at is not None and not _follows(known, read, at, item.sequence):
                wrong.append(f"{name} got {item.sequence} after {at}")
            at = item.sequence
            if payloads.get(at, item.payload) != item.payload:
                wrong.append(f"{name} got another frame {at} than is stored")
        else:
            wrong.append(f"{name} got {item!r} before the end")
    if frames and at is not None and not _follows(known, read, at, frames[-1].sequence + 1):
        wrong.append(f"{name} ended at {at}; {frames[-1].sequence} is stored")
    return wrong


def _follows(known, read, at, sequence):
    """Whether nothing that the reader wanted is between two sequences."""
    if not read.hidden or known.job is None:
        return sequence == at + 1
    between = range(at + 1, sequence)
    return sequence > at and all(known.job.burst_of(each).mode == "best_effort" for each in between)


# -- marks of calls -------------------------------------------------------------------------------------------------


def _marks(found, result, streams, said):
    """A call that was done has left its mark, once; one that was not applied has left none."""
    frames = collections.Counter(f.payload.decode() for stream, _, _ in streams for f in stream)
    for each in said:
        count = {
            "frame": frames[each.mark],
            "usage": found.usage.get(each.mark, 0),
            "tag": int(f"soak.m{each.mark.replace('-', '')}" in found.tags),
            "progress": int(found.progress_message == each.mark),
            "complete": int(found.state == "completed" and result.decode() == each.mark),
            "fail": int(found.state == "failed" and found.failure_reason == each.mark),
            "retry": int(found.failure_reason == each.mark),
            "cancel": int(found.state == "cancelled" and found.cancellation_reason == each.mark),
        }.get(each.what)
        if count is None:
            continue
        if each.outcome == NOT_APPLIED and count:
            yield f"{each.what} {each.mark} was not applied ({each.code}), and it is there"
        elif count > 1:
            yield f"{each.what} {each.mark} is there {count} times"
        elif each.outcome == DONE and not count and each.what in LASTING:
            yield f"{each.what} {each.mark} was done, and it is not there: {found.state}"


LASTING = ("frame", "usage", "tag", "complete", "fail")
"""Marks that nothing overwrites."""


# -- all of them ------------------------------------------------------------------------------------------------------


def completions(account):
    """Each execution that exists was told to each subscriber exactly once."""
    told = set().union(*account.completions.values())
    for name, got in account.completions.items():
        for eid in told - set(got):
            yield f"{name} was not told of {eid}"
        for eid, times in got.items():
            if times != 1:
                yield f"{name} was told {times} times of {eid}"
    for eid, known in account.executions.items():
        if known.created == DONE and eid not in told:
            yield f"no subscriber was told of {eid}"


def indexes(site):
    """No index names an execution, since all have ended."""
    with site.raw() as raw:
        for partition in range(PARTITIONS):
            tag = keys.slot_tag(partition)
            for lane in LANES:
                if left := raw.zrange(keys.eligible(tag, lane), 0, 5):
                    yield f"{tag} has eligible executions of {lane}: {left}"
            timers = raw.zrange(keys.timers(tag), 0, -1)
            if left := [name for name in timers if not name.startswith(b"flow:")]:
                yield f"{tag} has timers: {left[:5]}"


def sizes(name, before, after, slack):
    """What is as large as it was, within *slack* of each quantity."""
    for what, most in slack.items():
        if after[what] > before[what] + most:
            yield f"{name} has {after[what]} {what}, and had {before[what]}; {most} more are allowed"


async def ended(backend, account):
    """Executions that have not ended; those that nobody created are struck off."""
    left = []
    for known in [each for each in account.executions.values() if not each.told]:
        try:
            found = await backend.describe(known.eid)
        except ExecutionNotFound:
            if known.created == DONE:
                left.append((known, "gone"))
            continue
        if found.state not in TERMINAL:
            said = f"{found.state}, attempt {found.attempt_index}, retry {found.retry_count}"
            left.append((known, f"{said}, {found.worker_instance_id}: {found.failure_reason}"))
        await asyncio.sleep(0)
    return left
