"""The rolling summary as readers see it: whoever joins, whenever, comes to the same document."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ff_fast
from ff_fast import (
    Corruption,
    PatchKind,
    StreamFrame,
    StreamMode,
    SummaryConflict,
    SummaryDocument,
    SummaryView,
    keys,
)
from ff_fast._core.summary import fold
from ff_fast.errors import InvalidType

from ..conftest import connect_raw
from ..reference_frames import run_of
from ..shells import KINDS, Opener
from .readers import BEST_EFFORT, DURABLE, SUMMARY, Reader, begin, wait_listening

TEXT = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
DEEP = StreamMode.durable_summary(PatchKind.STRING_APPEND("/a~1b/0"))


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture(params=KINDS)
def shell(request, server):
    """A backend of each shell."""
    opener = Opener(request.param)
    yield opener(server.url)
    opener.close()


@pytest.fixture
def attempt(backend, lane):
    return begin(backend, lane)


def summary_of(raw, attempt):
    return raw.hgetall(keys.summary(attempt.eid, 0))


def continued(backend, attempt, summary):
    """The document of a reader that starts from *summary* and reads on to where the stream stands now."""
    view = SummaryView(summary)
    cursor = None if summary is None else summary.cursor
    page = backend.read_stream(attempt.eid, after=cursor, count=10_000)
    assert page.gaps == ()
    applied = sum(view.apply(frame) for frame in page)
    assert applied == view.version - (0 if summary is None else summary.version)
    return view.document_json, view.version


def patches(count, size=10):
    """Patches of every kind in turns, single ones and runs."""
    for n in range(count):
        if n % 50 < 20:
            yield TEXT, f"t{n}é".encode() + b"x" * size
        elif n % 50 < 40:
            yield (
                SUMMARY,
                json.dumps({f"k{n % 9}": {"n": n, "gone": None, "pad": "y" * size}}).encode(),
            )
        elif n % 2:
            yield SUMMARY, b'{"n":%d,"null":"__ff_null__","big":123456789012345678901234567890}' % n
        else:
            yield TEXT, b"."


@pytest.mark.parametrize("per_flush", [1, 7])
def test_whoever_joins_comes_to_the_same_document(per_flush, backend, raw, attempt):
    joined = [None]
    compactions = 0
    with backend.open_writer(attempt.handle) as writer:
        for n, (mode, patch) in enumerate(patches(200, size=120)):
            writer.write(patch, mode=mode)
            if n % 30 == 5:
                writer.write(b"no patch", mode=DURABLE if n % 2 else BEST_EFFORT)
            if (n + 1) % per_flush == 0:
                writer.flush()
                joined.append(backend.read_summary(attempt.eid))
                compactions += len(summary_of(raw, attempt)) < 8
    assert compactions >= 2, "the document was never stored anew"
    want = continued(backend, attempt, None)
    assert want[1] == 200
    for summary in joined:
        assert continued(backend, attempt, summary) == want
    final = backend.read_summary(attempt.eid)
    assert (final.document_json, final.version) == want
    assert [s.version for s in joined[1:]] == [per_flush * (n + 1) for n in range(len(joined) - 1)]
    assert b"__ff_null__" not in final.document_json
    document = json.loads(final.document_json)
    assert document["null"] is None
    assert document["big"] == 123456789012345678901234567890
    assert b'"gone"' not in final.document_json


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_from_the_cursor_continues_the_document_live(
    kind, shell, backend, server, raw, attempt
):
    with backend.open_writer(attempt.handle, mode=TEXT) as writer:
        for n in range(30):
            writer.write(b"%d " % n)
        writer.flush()
        summary = shell.read_summary(attempt.eid)
        assert summary.version == 30
        reader = Reader(kind, server.url, attempt.eid, after=summary.cursor)
        wait_listening(raw)
        for n in range(30, 60):
            writer.write(b"%d " % n)
            if n % 4 == 0:
                writer.flush()
    backend.complete(attempt.handle)
    view = SummaryView(summary)
    for item in reader.result():
        if isinstance(item, StreamFrame):
            assert view.apply(item)
    assert json.loads(view.document_json) == {"text": "".join(f"{n} " for n in range(60))}
    assert view.version == 60
    assert view.document_json == shell.read_summary(attempt.eid).document_json


def test_the_numbers_of_a_summary_are_exact(shell, backend, raw, attempt):
    assert shell.read_summary(attempt.eid) is None
    with backend.open_writer(attempt.handle) as writer:
        writer.write(b"before")
        writer.write(b'{"a":[]}', mode=SUMMARY)
        outcome = writer.flush()
        first = shell.read_summary(attempt.eid)
        entry_ms = int(outcome.stream_id.split("-")[0])
        assert first == SummaryDocument(
            b'{"a":[]}', 1, PatchKind.JSON_MERGE_PATCH, entry_ms, entry_ms, f"0.{outcome.stream_id}"
        )
        writer.write(b"between")
        writer.write(b"hi", mode=TEXT)
        writer.write(b" there", mode=TEXT)
        outcome = writer.flush()
        second = shell.read_summary(attempt.eid)
        assert second.document_json == b'{"a":[],"text":"hi there"}'
        assert (second.version, second.patch_kind) == (3, PatchKind.STRING_APPEND("/text"))
        assert second.cursor == f"0.{outcome.stream_id}"
        assert second.first_applied_ms == entry_ms
        assert second.last_updated_ms >= entry_ms
        assert outcome.summary_version == 3
        # A frame behind that is no patch moves neither numbers nor cursor.
        writer.write(b"after")
        writer.flush()
        assert shell.read_summary(attempt.eid) == second
    # Closing stores the document; it is the same to a reader.
    assert set(summary_of(raw, attempt)) >= {b"document", b"document_version"}
    assert not any(name.startswith((b"run:", b"patch:")) for name in summary_of(raw, attempt))
    assert shell.read_summary(attempt.eid) == second
    backend.complete(attempt.handle)
    assert shell.read_summary(attempt.eid) == second


@pytest.mark.parametrize("closed", [True, False])
def test_a_later_writer_continues_the_document(closed, backend, attempt):
    joined = []
    for round_ in range(4):
        writer = backend.open_writer(attempt.handle)
        for n in range(10):
            writer.write(b"%d.%d " % (round_, n), mode=TEXT)
            writer.write(b'{"round":%d}' % round_, mode=SUMMARY)
        writer.flush()
        joined.append(backend.read_summary(attempt.eid))
        if closed:
            writer.close()
    assert [summary.version for summary in joined] == [20, 40, 60, 80]
    want = continued(backend, attempt, None)
    assert json.loads(want[0]) == {
        "text": "".join(f"{r}.{n} " for r in range(4) for n in range(10)),
        "round": 3,
    }
    for summary in joined:
        assert continued(backend, attempt, summary) == want


def test_the_sentinel_is_no_value_of_a_document(backend, attempt):
    with backend.open_writer(attempt.handle) as writer:
        writer.write(
            b'{"a":"__ff_null__","b":["__ff_null__",{"c":"__ff_null__"}],"d":{"e":"__ff_null__"}}',
            mode=SUMMARY,
        )
        writer.write(b'{"f":"\\u005f_ff_null__","keep":"__ff_null__!"}', mode=SUMMARY)
        writer.flush()
        pending = backend.read_summary(attempt.eid)
    stored = backend.read_summary(attempt.eid)
    assert stored == pending
    assert json.loads(stored.document_json) == {
        "a": None, "b": [None, {"c": None}], "d": {"e": None}, "f": None, "keep": "__ff_null__!",
    }  # fmt: skip


mixed = st.lists(
    st.one_of(
        st.tuples(st.just(TEXT), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
        st.tuples(
            st.just(SUMMARY),
            st.dictionaries(
                st.sampled_from(["a", "b", "text2"]),
                st.recursive(
                    st.one_of(st.none(), st.booleans(), st.integers(), st.just("__ff_null__")),
                    lambda inner: st.one_of(
                        st.lists(inner, max_size=3),
                        st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
                    ),
                    max_leaves=6,
                ),
                max_size=3,
            ).map(json.dumps),
        ),
        st.tuples(st.just(DURABLE), st.just("d")),
        st.tuples(st.just(None), st.just("")),
    ),
    min_size=1,
    max_size=30,
)


@pytest.fixture(scope="module")
def shared(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected, connect_raw(server.url) as raw:
        yield connected, raw


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mixed, st.integers(0, 30))
def test_any_patches_any_join_point(shared, plan, reopened):
    backend, _ = shared
    attempt = begin(backend, keys.new_uuid())
    joined = [None]
    writer = backend.open_writer(attempt.handle)
    for n, (mode, payload) in enumerate(plan):
        if n == reopened:
            writer.close()
            writer = backend.open_writer(attempt.handle)
        if mode is None:
            writer.flush()
            joined.append(backend.read_summary(attempt.eid))
        else:
            writer.write(payload, mode=mode)
    writer.close()
    want = continued(backend, attempt, None)
    for summary in joined:
        assert continued(backend, attempt, summary) == want
    final = backend.read_summary(attempt.eid)
    if final is None:
        assert want == (b"{}", 0)
    else:
        assert (final.document_json, final.version) == want
        assert b'"__ff_null__"' not in final.document_json


# -- a summary that is not ours --------------------------------------------------------------------

GOOD = {
    b"document": b'{"a":1}', b"document_version": b"2", b"version": b"5", b"last_updated_ms": b"9",
    b"first_applied_ms": b"8", b"cursor": b"9-7", b"patch_kind": b"json-merge-patch:",
    b"run:4:2:string-append:/t": run_of([b"x", b"y"], [1, 0]), b"patch:5:1:json-merge-patch:": b'{"b":2}',
}  # fmt: skip


def test_a_good_hash_folds():
    assert fold(GOOD) == SummaryDocument(
        b'{"a":1,"t":"xy","b":2}', 5, PatchKind.JSON_MERGE_PATCH, 9, 8, "0.9-7"
    )
    # The order of the hash says nothing.
    assert fold(dict(reversed(GOOD.items()))) == fold(GOOD)
    assert fold({}) is None


DAMAGE = {
    "no document": {b"document": None},
    "the document is no JSON": {b"document": b'{"a":'},
    "the document is no object": {b"document": b"[]"},
    "the document is not UTF-8": {b"document": b'{"a":"\xff"}'},
    "no document version": {b"document_version": None},
    "version is behind": {b"version": b"4"},
    "version is ahead": {b"version": b"6"},
    "version is no number": {b"version": b"many"},
    "version is zero": {b"version": b"0"},
    "a patch is missing": {b"patch:5:1:json-merge-patch:": None},
    "a run in the middle is missing": {b"run:4:2:string-append:/t": None},
    "a patch does not apply": {b"patch:5:1:json-merge-patch:": b"[]"},
    "a patch is no JSON": {b"patch:5:1:json-merge-patch:": b"{"},
    "an append to something else": {b"run:4:2:string-append:/t": None, b"run:4:2:string-append:/a": run_of([b"x", b"y"], [0, 0])},
    "the run is damaged": {b"run:4:2:string-append:/t": b"\x02\x05"},
    "the run has another count": {b"run:4:2:string-append:/t": run_of([b"x"], [0])},
    "the run is not UTF-8": {b"run:4:2:string-append:/t": run_of([b"\xff", b"y"], [0, 0])},
    "a kind of patch that nobody knows": {b"patch:5:1:json-merge-patch:": None, b"patch:5:1:other:": b"{}"},
    "a name without its parts": {b"patch:5": b"{}"},
    "a name with a number that is none": {b"patch:x:1:json-merge-patch:": b"{}"},
    "a count that is none": {b"run:4:2:string-append:/t": None, b"run:4:x:string-append:/t": run_of([b"x", b"y"], [0, 0])},
    "a count that is negative": {b"run:4:-2:string-append:/t": run_of([b"x"], [0])},
    "a pointer that is none": {b"patch:5:1:json-merge-patch:": None, b"patch:5:1:string-append:t": b"x"},
    "the kind is damaged": {b"patch_kind": b"\xff:"},
    "no cursor": {b"cursor": None},
    "a cursor that is none": {b"cursor": b"x"},
    "a cursor that is no text": {b"cursor": b"\xff"},
    "no times": {b"last_updated_ms": None},
    "a time that is none": {b"first_applied_ms": b"soon"},
    "a time that is negative": {b"first_applied_ms": b"-1"},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_hash_is_corruption(damage):
    fields = {**GOOD, **DAMAGE[damage]}
    with pytest.raises(Corruption) as caught:
        fold({name: value for name, value in fields.items() if value is not None})
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_damaged_hash_on_the_server(shell, backend, raw, attempt):
    with backend.open_writer(attempt.handle, mode=SUMMARY) as writer:
        writer.write(b'{"a":1}')
    raw.hset(keys.summary(attempt.eid, 0), "version", "7")
    with pytest.raises(Corruption):
        shell.read_summary(attempt.eid)
    with pytest.raises((Corruption, SummaryConflict)):
        shell.open_writer(attempt.handle)


def test_patches_on_another_version_than_the_stored_are_a_conflict(shell, raw, attempt):
    writer = shell.open_writer(attempt.handle, mode=SUMMARY)
    writer.write(b'{"a":1}')
    writer.flush()
    raw.hset(keys.summary(attempt.eid, 0), "version", "4")
    writer.write(b'{"a":2}')
    with pytest.raises(SummaryConflict) as caught:
        writer.flush(timeout=5)
    assert (caught.value.expected, caught.value.got) == (4, 1)


# -- the view --------------------------------------------------------------------------------------


def patch_frame(version, payload=b'{"a":1}', kind=PatchKind.JSON_MERGE_PATCH):
    return StreamFrame(
        stream_id=f"1-{version}", frame_type="t", payload=payload, ts_ms=1, mode="summary",
        summary_version=version, patch_kind=kind,
    )  # fmt: skip


def test_a_view_applies_what_comes_next_and_nothing_else():
    view = SummaryView()
    assert (view.version, view.document_json) == (0, b"{}")
    assert view.apply(patch_frame(1))
    assert not view.apply(patch_frame(1, b'{"a":2}'))
    assert not view.apply(StreamFrame(stream_id="1-2", frame_type="t", payload=b"x", ts_ms=1))
    assert (view.version, view.document_json) == (1, b'{"a":1}')
    with pytest.raises(SummaryConflict) as caught:
        view.apply(patch_frame(3))
    assert (caught.value.expected, caught.value.got) == (2, 3)
    assert (view.version, view.document_json) == (1, b'{"a":1}')
    with pytest.raises(InvalidType):
        view.apply(b"{}")
    assert view.apply(patch_frame(2, b"!", PatchKind.STRING_APPEND("/s")))
    assert view.document_json == b'{"a":1,"s":"!"}'
    assert repr(view) == "SummaryView(version=2, document_json=<15 bytes>)"


def test_a_view_takes_no_patch_of_another_history(subtests):
    for stream_id, version in [
        ("9-8", 6),  # later than the document, with a version that it has
        ("4-6", 6),  # earlier, and not the patch that it has last
        ("9-5", 5),
        ("4-7", 7),  # the next version, but earlier
    ]:
        view = SummaryView(SummaryDocument(b"{}", 6, PatchKind.JSON_MERGE_PATCH, 1, 1, "5-6"))
        other = patch_frame(version)
        frame = StreamFrame(
            stream_id=stream_id, frame_type="t", payload=b"{}", ts_ms=1, mode="summary",
            summary_version=version, patch_kind=other.patch_kind,
        )  # fmt: skip
        with subtests.test(stream_id):
            with pytest.raises(SummaryConflict):
                view.apply(frame)
            assert (view.version, view.document_json) == (6, b"{}")


def test_a_view_starts_from_a_summary():
    start = SummaryDocument(b'{"a":{"b":1}}', 6, PatchKind.JSON_MERGE_PATCH, 1, 1, "1-6")
    view = SummaryView(start)
    assert view.apply(patch_frame(7, b'{"a":{"b":null,"c":2}}'))
    assert view.document_json == b'{"a":{"c":2}}'
    assert start.document_json == b'{"a":{"b":1}}'


def test_a_patch_that_does_not_apply_leaves_the_view_as_it_was():
    view = SummaryView()
    view.apply(patch_frame(1))
    with pytest.raises(ValueError, match=r"pointer|patch|string"):
        view.apply(patch_frame(2, b"x", PatchKind.STRING_APPEND("/a")))
    assert (view.version, view.document_json) == (1, b'{"a":1}')
