"""``ff_fast.errors``: one class per code, facts a caller can act on, and no secret in any text."""

import copy
import pickle

import pytest

from ff_fast import _library, errors
from ff_fast.errors import FFError, Outcome

CANARY = "s3cr3t-canary"

NOT_APPLIED = {
    "invalid_input": errors.InvalidInput,
    "invalid_type": errors.InvalidType,
    "invalid_id": errors.InvalidId,
    "invalid_payload": errors.InvalidPayload,
    "payload_too_large": errors.PayloadTooLarge,
    "invalid_sequence": errors.InvalidSequence,
    "invalid_patch": errors.InvalidPatch,
    "invalid_cursor": errors.InvalidCursor,
    "invalid_capabilities": errors.InvalidCapabilities,
    "corrupt_handle": errors.InvalidHandle,
    "handle_from_other_backend": errors.HandleFromOtherBackend,
    "writer_closed": errors.WriterClosed,
    "wrong_loop": errors.WrongLoop,
    "forked_client": errors.ForkedClient,
    "library_mismatch": errors.LibraryMismatch,
    "deployment_mismatch": errors.DeploymentMismatch,
    "missing_dependency": errors.MissingDependency,
    "execution_not_found": errors.ExecutionNotFound,
    "stale_owner": errors.StaleOwner,
    "state_lost": errors.StateLost,
    "suspended": errors.ExecutionSuspended,
    "stream_closed": errors.StreamClosed,
    "lease_expired": errors.LeaseExpired,
    "writer_superseded": errors.WriterSuperseded,
    "sequence_gap": errors.SequenceGap,
    "frames_lost": errors.FramesLost,
    "execution_not_active": errors.ExecutionNotActive,
    "execution_failed": errors.ExecutionFailed,
    "execution_cancelled": errors.ExecutionCancelled,
    "execution_expired": errors.ExecutionExpired,
    "attempt_not_found": errors.AttemptNotFound,
    "execution_not_claimable": errors.ExecutionNotClaimable,
    "capability_mismatch": errors.CapabilityMismatch,
    "flow_not_found": errors.FlowNotFound,
    "flow_already_terminal": errors.FlowAlreadyTerminal,
    "waitpoint_conflict": errors.WaitpointConflict,
    "waitpoint_closed": errors.WaitpointClosed,
    "invalid_token": errors.InvalidToken,
    "signal_limit_exceeded": errors.SignalLimitExceeded,
    "rotation_conflict": errors.RotationConflict,
    "budget_not_found": errors.BudgetNotFound,
    "corruption": errors.Corruption,
    "authentication_failed": errors.AuthenticationFailed,
    "permission_denied": errors.PermissionDenied,
    "credentials_unavailable": errors.CredentialsUnavailable,
    "tls_failed": errors.TlsFailed,
    "cluster_mode_required": errors.ClusterModeRequired,
    "not_a_cluster": errors.NotACluster,
    "unsupported_server": errors.UnsupportedServer,
    "error": FFError,
}
RETRYABLE = {
    "overloaded": errors.Overloaded,
    "summary_conflict": errors.SummaryConflict,
    "unavailable": errors.Unavailable,
    "primary_not_found": errors.PrimaryNotFound,
    "server_busy": errors.ServerBusy,
    "out_of_memory": errors.OutOfMemory,
    "storage_unavailable": errors.StorageUnavailable,
    "not_primary": errors.NotPrimary,
    "not_enough_replicas": errors.NotEnoughReplicas,
    "function_missing": errors.FunctionMissing,
    "redirected": errors.Redirected,
}
UNKNOWN_RETRYABLE = {
    "outcome_unknown": errors.OutcomeUnknown,
    "deadline_exceeded": errors.DeadlineExceeded,
}
APPLIED_RETRYABLE = {"not_replicated": errors.NotReplicated}
UNKNOWN = {
    "protocol_error": errors.ProtocolError,
    "internal_function_error": errors.InternalFunctionError,
}
TABLE = [
    (code, cls, retryable, outcome)
    for classes, retryable, outcome in (
        (NOT_APPLIED, False, Outcome.NOT_APPLIED),
        (RETRYABLE, True, Outcome.NOT_APPLIED),
        (APPLIED_RETRYABLE, True, Outcome.APPLIED),
        (UNKNOWN_RETRYABLE, True, Outcome.UNKNOWN),
        (UNKNOWN, False, Outcome.UNKNOWN),
    )
    for code, cls in classes.items()
]


def make(cls):
    """Make an error of any class, with arguments where it needs them."""
    arguments = {
        errors.PayloadTooLarge: ((10, 11), {}),
        errors.SequenceGap: ((5, 9), {}),
        errors.FramesLost: ((5, 8), {}),
        errors.SummaryConflict: ((2, 1), {}),
        errors.LibraryMismatch: ((4, 3), {}),
        errors.DeploymentMismatch: ((256, 64), {}),
        errors.ExecutionNotActive: (("completed", "success"), {}),
        errors.CapabilityMismatch: ((("a100", "gpu"),), {}),
        errors.ExecutionFailed: (("The model is overloaded", "permanent"), {}),
        errors.ExecutionCancelled: (("nobody reads it any more",), {}),
        errors.ExecutionExpired: (("execution_deadline",), {}),
        errors.Redirected: ((), {"ask": True, "slot": 7, "address": "h:1"}),
    }
    args, kwargs = arguments.get(cls, ((), {}))
    return cls(*args, **kwargs)


def subclasses(cls):
    return {cls}.union(*(subclasses(each) for each in cls.__subclasses__()))


def test_the_table_names_every_class():
    here = {
        cls
        for cls in subclasses(FFError)
        if cls.__module__ == errors.__name__ and not cls.__name__.startswith("_")
    }
    assert {cls for _, cls, _, _ in TABLE} == here


def test_facts_of_every_class(subtests):
    for code, cls, retryable, outcome in TABLE:
        with subtests.test(f"{code!r:.60}"):
            error = make(cls)
            assert (error.code, error.retryable, error.outcome) == (code, retryable, outcome)
            assert isinstance(error, FFError)
            assert error.unstored == ()
            assert cls.__doc__
            text = str(error)
            assert text[0].isupper()
            assert text.endswith(".")
            assert "\n" not in text


def test_pickle_and_copy_keep_everything_but_what_was_not_stored(subtests):
    for cls in [cls for _, cls, _, _ in TABLE]:
        with subtests.test(f"{cls!r:.60}"):
            error = make(cls)
            error.unstored = (CANARY,)
            pickled = pickle.dumps(error)
            assert CANARY.encode() not in pickled
            assert CANARY not in f"{error} {error!r} {error.args}"
            for twin, unstored in (
                (pickle.loads(pickled), ()),
                (copy.copy(error), (CANARY,)),
                (copy.deepcopy(error), (CANARY,)),
            ):
                assert type(twin) is cls
                assert (twin.args, twin.unstored) == (error.args, unstored)
                assert {**vars(twin), "unstored": 0} == {**vars(error), "unstored": 0}
                assert str(twin) == str(error)


@pytest.mark.parametrize("cls", [errors.Unavailable, errors.DeadlineExceeded, errors.TlsFailed])
def test_pickle_and_copy_keep_what_the_system_said(cls):
    error = cls("Refused.")
    error.errno, error.strerror, error.host = 111, "Connection refused", "h"
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (twin.errno, twin.strerror, twin.host) == (111, "Connection refused", "h")
        assert (str(twin), twin.args) == ("Refused.", ("Refused.",))
    assert copy.copy(error).__cause__ is error.__cause__


def test_builtin_families(subtests):
    for cls, builtin in (
        (errors.InvalidInput, ValueError),
        (errors.InvalidType, TypeError),
        (errors.InvalidHandle, ValueError),
        (errors.MissingDependency, ImportError),
        (errors.ExecutionNotFound, LookupError),
        (errors.AttemptNotFound, LookupError),
        (errors.FlowNotFound, LookupError),
        (errors.BudgetNotFound, LookupError),
        (errors.Unavailable, ConnectionError),
        (errors.OutcomeUnknown, ConnectionError),
        (errors.TlsFailed, ConnectionError),
        (errors.DeadlineExceeded, TimeoutError),
        (errors.AuthenticationFailed, PermissionError),
        (errors.PermissionDenied, PermissionError),
    ):
        with subtests.test(f"{cls!r:.60}"):
            with pytest.raises(builtin) as caught:
                raise make(cls)
            assert type(caught.value) is cls


def test_an_end_without_a_result_shows_the_beginning_of_its_reason_on_one_line():
    reason = "no\nroom\x00 " + "x" * 1000
    error = errors.ExecutionFailed(reason, "permanent")
    assert "(no room? xxx" in str(error)
    assert len(str(error)) < 300
    assert (error.reason, error.failure_class) == (reason, "permanent")
    assert "(" not in str(errors.ExecutionCancelled()).partition(";")[0]
    assert errors.ExecutionCancelled().reason is None


def test_what_was_not_found_is_not_a_missing_key():
    assert not issubclass(errors.ExecutionNotFound, KeyError | IndexError)


def test_a_code_is_claimed_once():
    with pytest.raises(TypeError, match="'stale_owner' belongs to StaleOwner"):
        type("Mine", (FFError,), {"code": "stale_owner"})


def test_a_subclass_without_a_code_keeps_its_parents():
    class Special(errors.StaleOwner):
        pass

    assert Special.code == "stale_owner"
    assert type(errors.for_code("stale_owner")) is errors.StaleOwner


def test_answers_of_the_functions(subtests):
    for code, details, cls, attributes in (
        ("stale_owner", [], errors.StaleOwner, {}),
        ("stale_owner", [CANARY.encode()], errors.StaleOwner, {}),
        ("sequence_gap", [b"5", b"9"], errors.SequenceGap, {"expected": 5, "got": 9}),
        ("summary_conflict", [b"2", b"1"], errors.SummaryConflict, {"expected": 2, "got": 1}),
        (
            "payload_too_large",
            [b"10", b"11"],
            errors.PayloadTooLarge,
            {"limit": 10, "size": 11, "what": "frame"},
        ),
        (
            "payload_too_large",
            [b"10", b"11", b"signal"],
            errors.PayloadTooLarge,
            {"limit": 10, "size": 11, "what": "payload of a signal"},
        ),
        (
            "payload_too_large",
            [b"10", b"11", CANARY.encode()],
            errors.PayloadTooLarge,
            {"limit": 10, "size": 11, "what": "frame"},
        ),
        (
            "execution_not_active",
            [b"completed", b"success"],
            errors.ExecutionNotActive,
            {"state": "completed", "terminal_outcome": "success"},
        ),
        (
            "execution_not_active",
            [CANARY.encode()],
            errors.ExecutionNotActive,
            {"state": None, "terminal_outcome": None},
        ),
        (
            "execution_not_active",
            [b"suspended", b""],
            errors.ExecutionNotActive,
            {"state": "suspended", "terminal_outcome": None},
        ),
        (
            "capability_mismatch",
            [b"gpu,a100"],
            errors.CapabilityMismatch,
            {"missing": ("gpu", "a100")},
        ),
        ("invalid_token", [CANARY.encode()], errors.InvalidToken, {}),
        ("execution_not_claimable", [b"active"], errors.ExecutionNotClaimable, {}),
        ("invalid_input", [b"previous_sequence"], errors.InvalidInput, {}),
        ("invalid_input", [CANARY.encode()], errors.InvalidInput, {}),
        # What cannot be trusted is never half understood.
        ("no_such_code", [], errors.ProtocolError, {}),
        (CANARY, [], errors.ProtocolError, {}),
        ("sequence_gap", [], errors.ProtocolError, {}),
        ("sequence_gap", [b"5"], errors.ProtocolError, {}),
        ("sequence_gap", [b" 5 ", b"9"], errors.ProtocolError, {}),
        ("sequence_gap", [b"1e3", b"9"], errors.ProtocolError, {}),
        ("execution_not_active", [b"\xff"], errors.ProtocolError, {}),
        ("capability_mismatch", [b"\xff"], errors.ProtocolError, {}),
        ("capability_mismatch", [], errors.ProtocolError, {}),
        ("redirected", [], errors.ProtocolError, {}),
    ):
        with subtests.test(f"{code!r:.60}"):
            error = errors.for_code(code, details)
            assert type(error) is cls
            assert {name: getattr(error, name) for name in attributes} == attributes
            assert CANARY not in f"{error} {error!r}"


def test_invalid_input_names_the_argument():
    assert "previous_sequence" in str(errors.for_code("invalid_input", [b"previous_sequence"]))


def test_server_errors_by_their_first_word(subtests):
    for text, cls in (
        ("NOAUTH Authentication required.", errors.AuthenticationFailed),
        ("WRONGPASS invalid username-password pair", errors.AuthenticationFailed),
        (
            "ERR AUTH <password> called without any password configured for the default user.",
            errors.AuthenticationFailed,
        ),
        ("NOPERM User u has no permissions to run the 'set' command", errors.PermissionDenied),
        ("DENIED Valkey is running in protected mode", errors.PermissionDenied),
        ("OOM command not allowed when used memory > 'maxmemory'.", errors.OutOfMemory),
        ("MISCONF Valkey is configured to save RDB snapshots", errors.StorageUnavailable),
        ("LOADING Valkey is loading the dataset in memory", errors.Unavailable),
        ("MASTERDOWN Link with MASTER is down", errors.Unavailable),
        ("CLUSTERDOWN The cluster is down", errors.Unavailable),
        ("TRYAGAIN Multiple keys request during rehashing of slot", errors.Unavailable),
        ("UNBLOCKED force unblock from blocking operation", errors.Unavailable),
        ("ERR max number of clients reached", errors.Unavailable),
        *(
            (f"ERR {words}ttempted to access a non local key in a cluster node", errors.Unavailable)
            for words in ("A", "Script a")
        ),
        ("READONLY You can't write against a read only replica.", errors.NotPrimary),
        ("BUSY Valkey is busy running a script.", errors.ServerBusy),
        ("NOREPLICAS Not enough good replicas to write.", errors.NotEnoughReplicas),
        ("ERR WAIT cannot be used with replica instances.", errors.NotPrimary),
        ("ERR WAITAOF cannot be used with replica instances.", errors.NotPrimary),
        (
            "ERR WAITAOF cannot be used when numlocal is set but appendonly is disabled.",
            errors.UnsupportedServer,
        ),
        ("ERR Function not found", errors.FunctionMissing),
        ("WRONGTYPE Operation against a key", errors.Corruption),
        ("ERR The ID specified in XADD is equal or smaller than the target", errors.Corruption),
        ("ERR The stream has exhausted the last possible ID, unable", errors.Corruption),
        ("ERR user_function:3: boom script: on @user_function:3.", errors.InternalFunctionError),
        ("ERR not: Function not found", errors.InternalFunctionError),
        ("OOMPH", errors.InternalFunctionError),
        ("", errors.InternalFunctionError),
        ("MOVED 99999 h:1", errors.ProtocolError),
        ("MOVED elsewhere", errors.ProtocolError),
    ):
        with subtests.test(f"{text!r:.60}"):
            error = errors.from_server_error(f"{text} {CANARY}" if " " in text else text)
            assert type(error) is cls
            assert error.outcome is cls.outcome
            assert CANARY not in f"{error} {error!r} {vars(error)}"


@pytest.mark.parametrize(
    "text, cls",
    [
        (
            "ERR ACL failure in script: User u has no permissions script: on @user_function:5.",
            errors.PermissionDenied,
        ),
        (
            "NOREPLICAS Not enough good replicas script: on @user_function:5.",
            errors.NotEnoughReplicas,
        ),
    ],
)
def test_a_failure_inside_a_function_may_follow_a_write(text, cls):
    # Valkey 9.1.2 ends such texts with the place in the function.
    error = errors.from_server_error(text)
    assert type(error) is cls
    assert error.outcome is Outcome.UNKNOWN
    assert pickle.loads(pickle.dumps(error)).outcome is Outcome.UNKNOWN


USER = f"{CANARY}@'get'"  # no blank may stand in a user's name; everything else may


def test_what_was_refused_is_named(subtests):
    for text, denied, command, sentence in (
        (
            f"NOPERM User {USER} has no permissions to run the 'fcall' command",
            "command",
            "fcall",
            "The user may not run the command fcall that ff_append needs;",
        ),
        (
            f"NOPERM User {USER} has no permissions to run the 'config|get' command",
            "command",
            "config|get",
            "run the command config|get that ff_append",
        ),
        (
            "NOPERM this user has no permissions to run the 'XADD' command",
            "command",
            "xadd",
            "run the command xadd that",
        ),
        ("NOPERM No permissions to access a key", "key", None, "may not use a key that ff_append"),
        ("NOPERM No permissions to access a channel", "channel", None, "use a channel that"),
        (f"NOPERM {CANARY}", None, None, "The user lacks a permission"),
        (
            "ERR The user executing the script can't run this command or subcommand script: ff_append, on @user_function:1.",
            "command",
            None,
            "may not use a command that ff_append needs (lua/prelude.lua:1);",
        ),
        (
            f"ERR ACL failure in script: User {USER} has no permissions to run the 'set' command script: on @user_function:1.",
            "command",
            "set",
            "run the command set that ff_append needs (lua/prelude.lua:1);",
        ),
    ):
        with subtests.test(f"{text!r:.60}"):
            error = errors.from_server_error(text, "ff_append")
            assert type(error) is errors.PermissionDenied
            assert (error.denied, error.command, error.function) == (denied, command, "ff_append")
            assert sentence in str(error)
            assert CANARY not in f"{error} {error!r} {vars(error)}"


@pytest.mark.parametrize(
    "text, fault",
    [
        ("NOAUTH Authentication required.", "missing"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "refused"),
        ("invalid username-password pair or user is disabled.", "refused"),
        ("ERR AUTH <password> called without any password configured for", "not_configured"),
    ],
)
def test_credentials_are_missing_or_wrong(text, fault):
    error = (
        errors.credentials_error(text)
        if text.startswith("invalid")
        else errors.from_server_error(text)
    )
    assert (type(error), error.fault) == (errors.AuthenticationFailed, fault)


def line_in(part):
    """A line of the assembled library that was written in lua/<part>.lua, and that place."""
    for number in range(1, len(_library.source().splitlines()) + 1):
        if (where := _library.line_of(number)).startswith(f"lua/{part}.lua:7"):
            return number, where
    raise AssertionError(part)


@pytest.mark.parametrize(
    "text",
    [
        "ERR user_function:{n}: boom {canary} script: on @user_function:{n}.",
        "ERR user_function:{n}: boom {canary} script: ff_append, on @user_function:{n}.",
        "ERR {canary} script: ff_append, on user_function:{n}",
    ],
)
def test_a_failure_inside_a_function_names_the_place(text):
    number, where = line_in("append")
    error = errors.from_server_error(text.format(n=number, canary=CANARY), "ff_append")
    assert type(error) is errors.InternalFunctionError
    assert (error.function, error.location) == ("ff_append", where)
    assert f"ff_append stopped with an error at {where};" in str(error)
    assert CANARY not in f"{error} {error!r} {vars(error)}"


@pytest.mark.parametrize(
    "text, kind",
    [
        ("WRONGTYPE {canary} @user_function:3 script: on @user_function:{n}.", "one of its keys"),
        ("CORRUPT timers script: ff_append, on @user_function:{n}.", "a key of the kind timers"),
        ("CORRUPT {canary} script: on @user_function:{n}.", "one of its keys"),
        ("ERR The ID specified in XADD is equal or smaller {canary} script: on @user_function:{n}.", "one of its keys"),
    ],
)  # fmt: skip
def test_foreign_data_that_a_function_meets_names_the_place_and_was_not_changed(text, kind):
    number, where = line_in("append")
    error = errors.from_server_error(text.format(n=number, canary=CANARY), "ff_append")
    assert type(error) is errors.Corruption
    assert (error.function, error.location) == ("ff_append", where)
    assert (error.outcome, error.retryable) == (errors.Outcome.NOT_APPLIED, False)
    assert f"ff_append found foreign data in {kind} ({where})" in str(error)
    assert CANARY not in f"{error} {error!r} {vars(error)}"


@pytest.mark.parametrize("text", ["ERR boom", "ERR x script: on @user_function:9999999."])
def test_a_place_that_is_not_ours_is_not_named(text):
    error = errors.from_server_error(text)
    assert (error.function, error.location) == (None, None)


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("MOVED 1 h:1", True),
        ("ASK 1 h:1", True),
        ("CROSSSLOT Keys in request don't hash to the same slot", True),
        ("ERR SELECT is not allowed in cluster mode", True),
        ("# Cluster\r\ncluster_enabled:1\r\n", True),
        ("# Cluster\r\ncluster_enabled:0\r\n", False),
        ("ERR unknown", False),
    ],
)
def test_a_cluster_node_is_recognised(text, is_one):
    assert errors.shows_cluster(text) is is_one


@pytest.mark.parametrize(
    "text, ask, slot, address",
    [
        ("MOVED 3999 127.0.0.1:6381", False, 3999, "127.0.0.1:6381"),
        ("ASK 0 ::1:6381", True, 0, "::1:6381"),
        ("MOVED 16383 :6381", False, 16383, ":6381"),
    ],
)
def test_redirects(text, ask, slot, address):
    error = errors.from_server_error(text)
    assert isinstance(error, errors.Redirected)
    assert error.address in str(error)
    assert (error.ask, error.slot, error.address) == (ask, slot, address)


@pytest.mark.parametrize("value", [True, 1.0, "1", " 5 ", b"1", None, 1j])
def test_check_int_converts_nothing(value):
    with pytest.raises(errors.InvalidType, match="count must be an int, not"):
        errors.check_int("count", value, 0, 10)


@pytest.mark.parametrize("value", [-1, 11, 2**100])
def test_check_int_bounds(value):
    assert errors.check_int("count", 0, 0, 10) == 0
    assert errors.check_int("count", 10, 0, 10) == 10
    with pytest.raises(errors.InvalidInput, match="from 0 to 10"):
        errors.check_int("count", value, 0, 10)
