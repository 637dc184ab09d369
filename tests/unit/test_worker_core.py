"""What a worker does with a claimed execution, action by action: no server, no handler, no thread."""

import asyncio
import logging
from collections import defaultdict
from types import SimpleNamespace

import pytest

from ff_fast import ScannerFilter, TaskFailed, TaskReleased, errors
from ff_fast._core import operations, slots, worker
from ff_fast._core.deployment import Deployment
from ff_fast._core.durability import STORED
from ff_fast._core.supervision import Watch
from ff_fast._core.worker import (
    CallHandler,
    CloseWriter,
    Raised,
    Returned,
    Run,
    Stopped,
    TaskState,
    UseWriter,
    WaitLost,
    attend,
    failure_of,
    is_handlers_own,
    is_release,
    result_of,
)
from ff_fast.types import (
    FailureClass,
    FailureReason,
    Handle,
    HandleKind,
    StreamMode,
)

from .script import functions, request_of, run, words
from .test_ops import DESCRIBED, STORED_SIGNAL

EID = "{fp:1}:550e8400-e29b-41d4-a716-446655440000"


def handle_of(attempt_index):
    return Handle.encode(
        execution_id=EID,
        attempt_index=attempt_index,
        attempt_id="attempt-1",
        lease_id="11111111-2222-4333-8444-555555555555",
        lease_epoch=4,
        lease_ttl_ms=30_000,
        lane_id="lane",
        worker_instance_id="w-1",
    )


HANDLE = handle_of(2)
OK = [1, b"OK"]
NO_HINTS = [*OK, b"completed"]
OPENED = [*OK, b"0-0", b"0", b"", b"0", b"1"]

LOAD = "ff_read_payload"
START = [LOAD, "use writer", "handler"]
COMPLETE = "ff_complete_execution"
CANCEL = "ff_describe_execution"

RETURNED = Returned(b"result")
BROKEN = Raised(ValueError("broken"))
LOST = errors.LeaseExpired()
AWAY = errors.Unavailable()
# Not retryable, and no word about the lease.
REFUSED = errors.PermissionDenied()
# What no call of this worker passes.
BARRED = errors.AuthenticationFailed()


class Keeper:
    held = True
    cancel_requested = False
    error = None

    def lose(self, error):
        self.held, self.error = False, error

    def _wake(self):
        """Nobody waits."""


class Attended:
    """One run of `attend`: what it did, and the error that it ended with.

    Args:
        outcomes: For an action, what comes of it each time that it is performed: a value, an error to be raised, or a
            function of the task that returns one of these. Where they are used up, it just succeeds.
        task: Attributes of the task.
        closed: Whether the backend is closed.
    """

    def __init__(self, outcomes=None, *, closed=False, **task):
        self.task = TaskState(None, HANDLE)
        self.task._keeper = Keeper()
        self.backend = SimpleNamespace(closed=closed, _deployment=Deployment(4))
        self.did = []
        self.calls = []
        self.error = None
        self.over = None
        for name, value in task.items():
            setattr(self.task, name, value)
        self._outcomes = defaultdict(list, {k: list(v) for k, v in (outcomes or {}).items()})
        self._drive(attend(self.backend, self.task))

    def _drive(self, actions):
        try:
            action = next(actions)
            while True:
                try:
                    value = self._perform(action)
                except BaseException as error:  # noqa: BLE001 - the core decides what it means
                    action = actions.throw(error)
                else:
                    action = actions.send(value)
        except StopIteration as stop:
            self.over = stop.value
        except BaseException as error:  # noqa: BLE001 - what the worker ends with
            self.error = error

    def _perform(self, action):
        name = self._name(action)
        self.did.append(name)
        outcome = self._outcomes[name].pop(0) if self._outcomes[name] else None
        if callable(outcome):
            outcome = outcome(self)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _name(self, action):
        match action:
            case Run(made):
                (first, *_) = words(request_of(next(made.steps())))
                self.calls.append(first)
                if first[1] == b"ff_fail_execution":
                    return f"fail {first[-2].decode()}"
                return functions([first])[0]
            case UseWriter():
                self.task._current_writer = SimpleNamespace(cancel_requested=False, error=None)
                return "use writer"
            case CallHandler():
                return "handler"
            case CloseWriter(None):
                return "close"
            case CloseWriter(seconds):
                return f"close within {seconds:g} s"
            case WaitLost(seconds):
                return f"wait {seconds:g} s"


def released(of):
    """The handler has released the lease, as ``suspend`` does."""
    of.task._released = True
    return Raised(TaskReleased())


def released_in_tasks(of):
    of.task._released = True
    return Raised(
        BaseExceptionGroup("", [TaskReleased(), BaseExceptionGroup("", [TaskReleased()])])
    )


def released_and_more(of):
    of.task._released = True
    return Raised(BaseExceptionGroup("", [TaskReleased(), ValueError()]))


def swallowed(of):
    of.task._released = True
    return RETURNED


def cancelled_through(where):
    """The news of a cancellation came, with a renewal or an append; the handler returns."""

    def ended(of):
        getattr(of.task, where).cancel_requested = True
        return RETURNED

    return ended


def cancelled_and_broken(of):
    of.task._keeper.cancel_requested = True
    return BROKEN


def cancelled_and_stopped(of):
    of.task._keeper.cancel_requested = True
    return Stopped()


def refused_and_stopped(of):
    """A renewal was refused for good, as by a missing right: the server still takes an end."""
    of.task._keeper.lose(REFUSED)
    return Stopped()


def refused_and_returned(of):
    of.task._keeper.lose(REFUSED)
    return RETURNED


def loses(outcome):
    """The lease is lost meanwhile."""

    def then(of):
        of.task._keeper.lose(LOST)
        return outcome

    return then


def lapses(of):
    of.task._keeper.held = False


def refuses_renewal(of):
    """The keeper stops, since its renewal was refused; the lease runs on until it lapses."""
    of.task._keeper.lose(REFUSED)


def closes(of):
    of.backend.closed = True


# -- what a handler's end means -----------------------------------------------------------------------------------------

ENDS = {
    "returns": (Returned(b"x"), ["close", COMPLETE]),
    "returns nothing": (Returned(None), ["close", COMPLETE]),
    "returns what is no result": (Returned(7), ["close", "fail permanent"]),
    "returns half a character": (Returned("\ud800"), ["close", "fail permanent"]),
    "returns too much": (Returned(bytes((16 << 20) + 1)), ["close", "close", "fail permanent"]),
    "raises": (BROKEN, ["close", "fail transient"]),
    "fails for good": (Raised(TaskFailed("no")), ["close", "fail permanent"]),
    "fails as it says": (
        Raised(TaskFailed("no", FailureClass.INFRA_CRASH)),
        ["close", "fail infra_crash"],
    ),
    "raises an error of another execution": (
        Raised(errors.ExecutionNotFound()),
        ["close", "fail permanent"],
    ),
    "releases": (released, []),
    "releases in tasks of its own": (released_in_tasks, []),
    "releases, and a task of its own fails": (released_and_more, ["close"]),
    "swallows the release": (swallowed, ["close"]),
    "pretends to release": (Raised(TaskReleased()), ["close", "fail transient"]),
    "returns, told by a renewal": (cancelled_through("_keeper"), ["close", CANCEL]),
    "returns, told by an append": (cancelled_through("_current_writer"), ["close", CANCEL]),
    "raises, told to stop": (cancelled_and_broken, ["close", CANCEL]),
    "is cancelled, told to stop": (cancelled_and_stopped, ["close", CANCEL]),
    "is cancelled as the lease is lost": (loses(Stopped()), ["close"]),
    "is cancelled as no renewal is accepted": (refused_and_stopped, ["close", "fail permanent"]),
    "returns after the loss of the lease": (loses(RETURNED), ["close", "close"]),
    "returns as no renewal is accepted": (
        refused_and_returned,
        ["close", "close", "fail permanent"],
    ),
    "raises after the loss of the lease": (loses(BROKEN), ["close"]),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_execution_ends_as_its_handler(end):
    outcome, then = ENDS[end]
    attended = Attended({"handler": [outcome]})
    assert attended.did == START + then
    assert attended.error is None


@pytest.mark.parametrize(
    "interrupt", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()]
)
def test_an_interrupt_hands_back_and_is_raised(interrupt):
    attended = Attended({"handler": [interrupt]})
    assert attended.did == [*START, "close within 2 s", "fail infra_crash"]
    assert attended.error is interrupt
    # What the handler has left running hears of it.
    assert attended.task.lost


def test_the_result_is_sent_with_the_fence_of_the_handle():
    (_, complete) = Attended({"handler": [Returned("é")]}).calls
    assert complete[4:] == [b"2", b"11111111-2222-4333-8444-555555555555", b"4", b"", "é".encode()]


def test_the_failure_is_sent_with_its_reason_and_detail():
    failure = TaskFailed(FailureReason("no", b"{}"), FailureClass.TIMEOUT)
    (_, fail) = Attended({"handler": [Raised(failure)]}).calls
    assert fail[-3:] == [b"no", b"timeout", b"{}"]


# -- the start ----------------------------------------------------------------------------------------------------------

STARTS = {
    "the lease is lost": ({LOAD: [LOST]}, [LOAD], None),
    "the server is away": ({LOAD: [AWAY]}, [LOAD, "close within 2 s", "fail infra_crash"], None),
    "the server is away, also for that": (
        {LOAD: [AWAY], "fail infra_crash": [AWAY]},
        [LOAD, "close within 2 s", "fail infra_crash"],
        None,
    ),
    "refused for good": ({LOAD: [REFUSED]}, [LOAD, "fail permanent"], None),
    "refused for good, as is its failure": (
        {LOAD: [REFUSED], "fail permanent": [REFUSED]},
        [LOAD, "fail permanent"],
        None,
    ),
    "what is stored is of another kind": (
        {LOAD: [errors.InternalFunctionError()]},
        [LOAD, "fail permanent"],
        None,
    ),
    "the answer is malformed": ({LOAD: [errors.ProtocolError()]}, [LOAD, "fail permanent"], None),
    "what is stored cannot be read": (
        {LOAD: [errors.Corruption()]},
        [LOAD, "fail permanent"],
        None,
    ),
    "whatever the worker calls will be refused": (
        {LOAD: [BARRED]},
        [LOAD, "close within 2 s", "fail infra_crash"],
        BARRED,
    ),
    "its failure is refused, as is all else": (
        {LOAD: [REFUSED], "fail permanent": [BARRED]},
        [LOAD, "fail permanent", "close within 2 s", "fail infra_crash"],
        BARRED,
    ),
    "no writer": (
        {"use writer": [AWAY]},
        [LOAD, "use writer", "close within 2 s", "fail infra_crash"],
        None,
    ),
    "a defect": (
        {"use writer": [ZeroDivisionError()]},
        [LOAD, "use writer", "close within 2 s", "fail infra_crash"],
        ZeroDivisionError,
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_handler_that_cannot_start(start):
    outcomes, did, error = STARTS[start]
    attended = Attended(outcomes)
    assert attended.did == did
    assert attended.error is error or isinstance(attended.error, error)
    left = error is None and ("also" in start or "as is" in start)
    assert attended.over is (None if error else not left)


RENEWED = [*OK, b"1000", b"4", b"0"]


def loading(replies, kind=HandleKind.FRESH, mode=None, attempt_index=0):
    """The first action of a worker, carried out: what was asked, its value, and the task."""
    task = TaskState(None, handle_of(attempt_index).replace(kind=kind), mode)
    task._keeper = SimpleNamespace(told=[], _ask_to_stop=lambda: task._keeper.told.append("stop"))
    backend = SimpleNamespace(closed=False, _deployment=Deployment(4))
    action = next(attend(backend, task))
    asked, value = run(action.call.steps(), replies)
    return functions(asked), value, task


def test_it_reads_the_payload_and_opens_the_writer_in_one_round_trip():
    asked, state, task = loading([[*OK, b"prompt"], OPENED], mode=StreamMode.durable_summary())
    assert asked == [LOAD, "ff_open_writer"]
    assert (task.payload, task.signals, task.resumed) == (b"prompt", (), False)
    assert (task.execution_id, task.attempt_index) == (EID, 0)
    assert state.options.mode == StreamMode.durable_summary()
    assert state.opened.last_sequence == 0


def test_one_that_goes_on_reads_its_signals_too():
    replies = [[*OK, b""], OPENED, RENEWED, [*OK, [STORED_SIGNAL], b""]]
    asked, _, task = loading(replies, HandleKind.RESUMED)
    assert asked == [LOAD, "ff_open_writer", "ff_renew_lease", "ff_observe_signals"]
    assert task.resumed
    assert [each.signal_name for each in task.signals] == ["go"]


@pytest.mark.parametrize("asked, told", [(b"0", []), (b"1", ["stop"])])
def test_a_later_lease_asks_whether_it_shall_stop(asked, told):
    replies = [[*OK, b""], OPENED, [*RENEWED[:-1], asked]]
    _, _, task = loading(replies, attempt_index=2)
    assert task._keeper.told == told


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_refusal_of_any_part_is_raised(at):
    replies = [[*OK, b""], OPENED, RENEWED]
    replies[at] = [0, b"execution_not_found"]
    assert isinstance(loading(replies, attempt_index=2)[1], errors.ExecutionNotFound)


# -- storing the rest, and the end ----------------------------------------------------------------------------------------

AGAIN = "wait 0.25 s"
LATER = {
    "frames that cannot be stored": (
        {"close": [errors.OutOfMemory()]},
        ["close", "close", "fail transient"],
    ),
    "frames that cannot be stored, twice": (
        {"close": [errors.OutOfMemory(), errors.OutOfMemory()]},
        ["close", "close", "fail transient"],
    ),
    "a result that the server refuses": (
        {COMPLETE: [errors.PayloadTooLarge(1, 2)]},
        ["close", COMPLETE, "close", "fail permanent"],
    ),
    "a stream that lost frames": (
        {COMPLETE: [errors.SequenceGap(1, 2)]},
        ["close", COMPLETE, "close", "fail transient"],
    ),
    "frames that are refused for good": (
        {"close": [errors.InvalidPatch()]},
        ["close", "close", "fail permanent"],
    ),
    "a renewal that is refused": (
        {"close": [refuses_renewal]},
        ["close", COMPLETE],
    ),
    "a renewal that is refused, and a server that is away": (
        {"close": [refuses_renewal], COMPLETE: [AWAY]},
        ["close", COMPLETE],
    ),
    "frames that are refused with the renewal": (
        {"close": [lambda of: refuses_renewal(of) or REFUSED]},
        ["close", "close", "fail permanent"],
    ),
    "a server that is away": (
        {COMPLETE: [AWAY, errors.OutcomeUnknown()]},
        ["close", COMPLETE, AGAIN, COMPLETE, AGAIN, COMPLETE],
    ),
    "a lease that is lost to the call": ({COMPLETE: [LOST]}, ["close", COMPLETE]),
    "an execution that ended meanwhile": (
        {COMPLETE: [errors.ExecutionNotActive()]},
        ["close", COMPLETE],
    ),
    "a lease that is lost while it waits": (
        {COMPLETE: [AWAY], AGAIN: [loses(None)]},
        ["close", COMPLETE, AGAIN],
    ),
    "a lease that lapses while it waits": (
        {COMPLETE: [AWAY], AGAIN: [lapses]},
        ["close", COMPLETE, AGAIN],
    ),
    "a backend that closes while it waits": (
        {COMPLETE: [AWAY], AGAIN: [closes]},
        ["close", COMPLETE, AGAIN],
    ),
}


@pytest.mark.parametrize("what", LATER)
def test_the_end_is_told_as_long_as_the_lease_is_held(what):
    outcomes, did = LATER[what]
    attended = Attended({"handler": [RETURNED], **outcomes})
    assert attended.did == START + did
    assert attended.error is None


def test_a_failure_is_told_again_too():
    attended = Attended({"handler": [BROKEN], "fail transient": [AWAY]})
    assert attended.did == [*START, "close", "fail transient", AGAIN, "fail transient"]


REFUSALS = {
    "a failure": (
        {"handler": [BROKEN], "fail transient": [REFUSED]},
        ["close", "fail transient"],
        False,
    ),
    "a cancellation": (
        {"handler": [cancelled_through("_keeper")], CANCEL: [REFUSED]},
        ["close", CANCEL, "fail cancelled"],
        True,
    ),
    "a result": (
        {"handler": [RETURNED], COMPLETE: [REFUSED]},
        ["close", COMPLETE, "close", "fail permanent"],
        True,
    ),
    "a result and the failure": (
        {"handler": [RETURNED], COMPLETE: [REFUSED], "fail permanent": [REFUSED]},
        ["close", COMPLETE, "close", "fail permanent"],
        False,
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_an_end_that_is_refused_for_good_is_left_and_the_worker_goes_on(what, caplog):
    outcomes, did, over = REFUSALS[what]
    attended = Attended(outcomes)
    assert attended.did == [*START, *did]
    assert attended.error is None
    assert attended.over is over
    said = [text for text in caplog.messages if "cannot be ended" in text]
    left = f"Execution {EID} cannot be ended, and comes back when its lease lapses: {REFUSED}"
    assert said == ([] if over else [left])


@pytest.mark.parametrize(
    "outcomes, did",
    [
        ({"handler": [RETURNED], COMPLETE: [BARRED]}, ["close", COMPLETE]),
        ({"handler": [BROKEN], "fail transient": [BARRED]}, ["close", "fail transient"]),
        ({"handler": [cancelled_through("_keeper")], CANCEL: [BARRED]}, ["close", CANCEL]),
    ],
)
def test_what_every_call_of_a_worker_meets_ends_it(outcomes, did):
    attended = Attended(outcomes)
    assert attended.did == [*START, *did, "close within 2 s", "fail infra_crash"]
    assert attended.error is BARRED


def test_a_slot_pauses_longer_with_each_failure_in_a_row():
    patience = slots.Patience()
    assert patience.attended(over=True) == 0
    unreadable = errors.InternalFunctionError()
    pauses = [patience.attended(over=False) for _ in range(3)]
    assert pauses == [0.25, 0.5, 1.0]
    assert patience.refused(unreadable) == 0.25
    assert max(patience.attended(over=False) for _ in range(2_000)) == 5
    assert patience.refused(AWAY) == operations.CLAIM_WAIT_S
    assert patience.attended(over=True) == 0
    assert patience.refused(errors.ProtocolError()) == 0.25


@pytest.mark.parametrize(
    "error",
    [
        REFUSED,
        BARRED,
        errors.LibraryMismatch(2, 1),
        errors.DeploymentMismatch(1, 2),
        errors.InvalidInput(),
    ],
    ids=lambda error: error.code,
)
def test_a_worker_that_may_not_claim_ends(error):
    with pytest.raises(type(error)):
        slots.Patience().refused(error)


# -- handing back -------------------------------------------------------------------------------------------------------

BACK = {
    "stores what was written": ({}, ["close within 2 s", "fail infra_crash"]),
    "tells also where nothing can be stored": (
        {"close within 2 s": [AWAY]},
        ["close within 2 s", "fail infra_crash"],
    ),
    "does not try again": (
        {"fail infra_crash": [AWAY]},
        ["close within 2 s", "fail infra_crash"],
    ),
    "gives up when its time is over": (
        {"close within 2 s": [TimeoutError()]},
        ["close within 2 s"],
    ),
}


@pytest.mark.parametrize("what", BACK)
def test_a_worker_that_is_interrupted(what):
    outcomes, did = BACK[what]
    attended = Attended({"handler": [KeyboardInterrupt()], **outcomes})
    assert attended.did == START + did
    assert isinstance(attended.error, KeyboardInterrupt)


def test_what_was_released_is_not_handed_back():
    def interrupted(of):
        of.task._released = True
        return KeyboardInterrupt()

    attended = Attended({"handler": [interrupted]})
    assert attended.did == START


def test_a_closed_backend_hands_nothing_back():
    attended = Attended({"handler": [lambda of: closes(of) or KeyboardInterrupt()]})
    assert attended.did == START
    assert isinstance(attended.error, KeyboardInterrupt)


def test_a_worker_that_is_thrown_away_does_nothing():
    attended = attend(
        SimpleNamespace(closed=False, _deployment=Deployment(4)), TaskState(None, HANDLE)
    )
    next(attended)
    attended.close()


# -- a cancellation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told, reason",
    [
        ([b"cancellation_reason", b"too expensive"], b"too expensive"),
        ([], worker.CANCEL_REASON.encode()),
    ],
)
def test_a_cancelled_task_ends_with_the_reason_of_whoever_asked(told, reason):
    core = [*DESCRIBED[0], *told]
    described = [*OK, core, *DESCRIBED[1:]]
    cancelled = [*OK, b"cancelled", b"active"]
    asked, value = run(
        worker.cancellation(Deployment(4), EID, HANDLE, STORED).steps(), [described, cancelled]
    )
    assert functions(asked) == ["ff_describe_execution", "ff_cancel_execution"]
    assert asked[1][4:] == [reason, b"0", HANDLE.fields().lease_id.encode()]
    assert value.cancelled


# -- values -------------------------------------------------------------------------------------------------------------


class HostileError(Exception):
    def __str__(self):
        raise RuntimeError("no text either")


@pytest.mark.parametrize(
    "failure, reason",
    [
        (HostileError(), "HostileError"),
        (ValueError("\ud800 x"), "ValueError: ? x"),
        (ValueError("é" * 10_000), "ValueError: " + "é" * 2_042),
        (TaskFailed("\ud800 y"), "? y"),
        (TaskFailed("é" * 10_000), "é" * 2_048),
        (TaskReleased("by itself"), "TaskReleased: by itself"),
        (ExceptionGroup("some", [ValueError("a")]), "ExceptionGroup: some (1 sub-exception)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_handler_raises_can_be_said(failure, reason):
    told = failure_of(failure)
    assert told.reason.message == reason
    permanent = isinstance(failure, TaskFailed)
    assert told.failure_class is (FailureClass.PERMANENT if permanent else FailureClass.TRANSIENT)


FOR_GOOD = errors.PayloadTooLarge(65_536, 65_537)
DENIED_INSIDE = errors.PermissionDenied()
DENIED_INSIDE.outcome = errors.Outcome.UNKNOWN
TOLD = TaskFailed("told", FailureClass.TIMEOUT)


def caused(error, cause):
    error.__cause__ = cause
    return error


def in_a_circle():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    return first


PERMANENT, TRANSIENT = FailureClass.PERMANENT, FailureClass.TRANSIENT
CLASSES = {
    "a frame over the limit": (FOR_GOOD, PERMANENT),
    "a surrogate": (errors.InvalidPayload(), PERMANENT),
    "a bad patch": (errors.InvalidPatch(), PERMANENT),
    "a wrong argument": (errors.InvalidType(), PERMANENT),
    "a right that is missing": (errors.PermissionDenied(), PERMANENT),
    "a right that is missing inside a function": (DENIED_INSIDE, PERMANENT),
    "a budget that is not there": (errors.BudgetNotFound(), PERMANENT),
    "a waitpoint that is closed": (errors.WaitpointClosed(), PERMANENT),
    "data that cannot be read": (errors.Corruption(), PERMANENT),
    "another execution that is not there": (errors.ExecutionNotFound(), PERMANENT),
    "another execution that has ended": (errors.ExecutionNotActive("failed"), PERMANENT),
    "another execution that is suspended": (errors.ExecutionSuspended(), TRANSIENT),
    "in a group": (ExceptionGroup("", [ValueError(), ExceptionGroup("", [FOR_GOOD])]), PERMANENT),
    "in a group with a failure that was told": (ExceptionGroup("", [TOLD, FOR_GOOD]), PERMANENT),
    "as a cause": (caused(ValueError(), caused(KeyError(), FOR_GOOD)), PERMANENT),
    "as a cause in a group": (ExceptionGroup("", [caused(ValueError(), FOR_GOOD)]), PERMANENT),
    "as the cause of a group": (caused(ExceptionGroup("", [KeyError()]), FOR_GOOD), PERMANENT),
    "as the cause of what was told": (caused(TaskFailed("x", TRANSIENT), FOR_GOOD), TRANSIENT),
    "a failure that was told, in a group": (
        ExceptionGroup("", [ValueError(), TOLD]),
        TOLD.failure_class,
    ),
    "causes in a circle": (in_a_circle(), TRANSIENT),
    "a server that is away": (errors.Unavailable(), TRANSIENT),
    "too much at once": (errors.Overloaded(), TRANSIENT),
    "no answer in time": (errors.DeadlineExceeded(), TRANSIENT),
    "no memory": (errors.OutOfMemory(), TRANSIENT),
    "a lost lease": (errors.StaleOwner(), TRANSIENT),
    "another writer": (errors.WriterSuperseded(), TRANSIENT),
    "a stream that lost frames": (errors.SequenceGap(1, 2), TRANSIENT),
    "a stream that says which frames it lost": (errors.FramesLost(1, 2), TRANSIENT),
    "a malformed answer": (errors.ProtocolError(), TRANSIENT),
    "a function that stopped": (errors.InternalFunctionError(), TRANSIENT),
    "wrong credentials": (errors.AuthenticationFailed(), TRANSIENT),
}


@pytest.mark.parametrize("what", CLASSES)
def test_what_is_refused_for_good_is_not_tried_again(what):
    error, failure_class = CLASSES[what]
    assert failure_of(error).failure_class is failure_class


def test_the_reason_names_what_decided():
    wrapped = caused(RuntimeError("model"), FOR_GOOD)
    assert failure_of(wrapped).reason.message == f"RuntimeError: model: PayloadTooLarge: {FOR_GOOD}"
    grouped = ExceptionGroup("some", [ValueError(), TOLD])
    assert failure_of(grouped).reason.message == "told"


@pytest.mark.parametrize("arguments", [(7,), (b"x",), ("x", "permanent"), ("x", None)])
def test_what_a_task_failed_with_must_be_sayable(arguments):
    with pytest.raises(errors.InvalidType):
        TaskFailed(*arguments)


@pytest.mark.parametrize(
    "value, stored",
    [(None, b""), (b"\x00\xff", b"\x00\xff"), ("é", "é".encode()), (bytearray(b"b"), b"b")],
)
def test_results(value, stored):
    assert result_of(value) == stored


@pytest.mark.parametrize("value", [7, [b"x"], "\ud800", {"a": 1}])
def test_what_is_no_result(value):
    with pytest.raises(TaskFailed, match="result of a handler") as caught:
        result_of(value)
    assert caught.value.failure_class is FailureClass.PERMANENT


@pytest.mark.parametrize(
    "error, release, own",
    [
        (TaskReleased(), True, True),
        (BaseExceptionGroup("", [TaskReleased()]), True, True),
        (BaseExceptionGroup("", [TaskReleased(), KeyboardInterrupt()]), False, False),
        (BaseExceptionGroup("", [TaskReleased(), ValueError()]), False, True),
        (ExceptionGroup("", [ValueError()]), False, True),
        (ValueError(), False, True),
        (SystemExit(), False, False),
        (asyncio.CancelledError(), False, False),
    ],
)
def test_whose_an_error_is(error, release, own):
    assert is_release(error) is release
    assert is_handlers_own(error) is own


def test_a_task_whose_lease_is_lost_refuses_to_write():
    task = TaskState(None, HANDLE)
    task._keeper = Keeper()
    task._current_writer = SimpleNamespace(cancel_requested=False, write=lambda payload: 1)
    assert task.write(b"x") == 1
    task._keeper.lose(LOST)
    with pytest.raises(errors.LeaseExpired) as caught:
        task.write(b"x")
    # Each gets an error of its own: a traceback is added to it.
    assert caught.value is not LOST
    assert not task._holds_lease


def test_before_it_has_a_writer_a_task_has_heard_of_no_cancellation():
    task = TaskState(None, HANDLE)
    assert (task.cancelled, task.lost) == (False, False)


STORMS = {
    "a result that no replica confirms": (
        {"handler": [RETURNED], COMPLETE: [errors.NotReplicated()]},
        "has ended. ",
    ),
    "an end that is refused": (REFUSALS["a result and the failure"][0], " cannot be ended"),
    "an attempt that is broken off": ({"handler": [KeyboardInterrupt()]}, " was broken off"),
}


@pytest.mark.parametrize("what", STORMS)
def test_what_all_executions_meet_at_once_is_one_line(what, caplog):
    outcomes, text = STORMS[what]
    for _ in range(50):
        Attended(outcomes)
    assert len([each for each in caplog.messages if text in each]) == 1


@pytest.mark.parametrize(
    "error, level, text",
    [
        (None, logging.INFO, "Worker w of lane l has stopped."),
        (KeyboardInterrupt(), logging.INFO, "Worker w of lane l has stopped."),
        (BARRED, logging.ERROR, f"Worker w of lane l has ended with an error: {BARRED}"),
        # The text of an error that is not ours may hold anything.
        (
            KeyError("s3cr3t"),
            logging.ERROR,
            "Worker w of lane l has ended with an error: KeyError.",
        ),
    ],
)
def test_a_worker_says_how_it_ends(error, level, text, caplog):
    caplog.set_level(logging.DEBUG, "ff_fast")
    slots.say_stopped(SimpleNamespace(worker_id="w", lane="l"), error)
    (record,) = caplog.records
    assert (record.levelno, record.getMessage(), record.worker_id) == (level, text, "w")


def test_a_supervisor_says_how_it_ends(caplog):
    caplog.set_level(logging.INFO, "ff_fast")
    for error in (BARRED, KeyError("s3cr3t")):
        with pytest.raises(type(error)), Watch(ScannerFilter()):
            raise error
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR] == [
        f"A supervisor has ended with an error: {BARRED}",
        "A supervisor has ended with an error: KeyError.",
    ]
