"""``_connect_errors``: what each failure of connecting becomes, without a server."""

import errno
import pickle
import socket
import ssl

import pytest
import redis.exceptions as theirs

from ff_fast import errors
from ff_fast._connect_errors import connect_error
from ff_fast.errors import Outcome
from ff_fast.types import BackendConfig

CANARY = "s3cr3t-canary"
PLAIN = BackendConfig.from_url(f"valkey://u:{CANARY}@h:7/1")
TLS = BackendConfig.from_url(f"valkeys://u:{CANARY}@[::1]:7")
SOCKET = BackendConfig.from_url(f"unix://u:{CANARY}@/run/v.sock")


def wrapped(cause, kind=theirs.ConnectionError):
    """What redis-py makes of an error: its own, with a text that quotes, and the cause behind it."""
    error = kind(f"Error connecting. {CANARY}")
    error.__context__ = cause
    return error


def tls_error(reason=None, library="SSL", kind=ssl.SSLError, code=None):
    error = kind(1, f"[SSL: {reason}] {CANARY}")
    error.reason, error.library = reason, library
    if code is not None:
        error.verify_code, error.verify_message = code, CANARY
    return error


NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
SEVERAL = OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 7), [Errno 111] …")
VERIFY = ssl.SSLCertVerificationError


@pytest.mark.parametrize(
    "error, config, cls, number, text",
    [
        (wrapped(ConnectionRefusedError(111, CANARY)), PLAIN, errors.Unavailable, 111, "h:7 was refused"),
        (wrapped(SEVERAL), PLAIN, errors.Unavailable, 111, "h:7 was refused"),
        (wrapped(NAME), PLAIN, errors.Unavailable, socket.EAI_NONAME, "name of h:7 was not found"),
        (wrapped(OSError(errno.EHOSTUNREACH, CANARY)), PLAIN, errors.Unavailable, errno.EHOSTUNREACH, "no route"),
        (wrapped(ConnectionResetError(104, CANARY)), TLS, errors.Unavailable, 104, r"\[::1\]:7 was closed"),
        (wrapped(FileNotFoundError(2, CANARY)), SOCKET, errors.Unavailable, 2, "no socket at /run/v.sock"),
        (wrapped(PermissionError(13, CANARY)), SOCKET, errors.Unavailable, 13, "may not open the socket"),
        (wrapped(TimeoutError(), theirs.TimeoutError), PLAIN, errors.DeadlineExceeded, errno.ETIMEDOUT, "within 3 s"),
        (theirs.TimeoutError(CANARY), TLS, errors.DeadlineExceeded, errno.ETIMEDOUT, "does not use TLS"),
        (theirs.ConnectionError(CANARY), PLAIN, errors.Unavailable, None, "h:7 failed"),
        (theirs.ConnectionError("max number of clients reached"), PLAIN, errors.Unavailable, None, "maxclients"),
        (theirs.InvalidResponse(f'{CANARY} got "H"'), PLAIN, errors.Unavailable, None, "not a Valkey server"),
        (theirs.InvalidResponse('Protocol error, got "\\x15" as'), PLAIN, errors.TlsFailed, None, "speaks TLS"),
        (theirs.ResponseError(f"DB index is out of range {CANARY}"), PLAIN, errors.InvalidInput, None, "h:7 has no database 1"),
        (theirs.ResponseError("SELECT is not allowed in cluster mode"), PLAIN, errors.ClusterModeRequired, None, "cluster=true"),
        (theirs.NoPermissionError(f"User {CANARY} has no permissions to run the 'select' command"), PLAIN, errors.PermissionDenied, None, "command select"),
        (wrapped(theirs.AuthenticationError(f"invalid username-password pair {CANARY}")), PLAIN, errors.AuthenticationFailed, None, "refused the user name"),
        # Of the steps after the handshake.
        (errors.Redirected(ask=False, slot=1, address="x:1"), PLAIN, errors.ClusterModeRequired, None, "cluster=true"),
        (errors.OutcomeUnknown(), PLAIN, errors.Unavailable, None, "before the first answer"),
        (errors.DeadlineExceeded(), PLAIN, errors.DeadlineExceeded, None, "in time while connecting"),
        (errors.ProtocolError(), PLAIN, errors.Unavailable, None, "is not understood"),
        (errors.from_server_error("ERR unknown command"), PLAIN, errors.Unavailable, None, "Valkey 7.2 or newer"),
        (errors.from_server_error("ERR ACL failure in script: x"), PLAIN, errors.PermissionDenied, None, "lacks a permission"),
        (errors.ServerBusy(), PLAIN, errors.ServerBusy, None, "busy"),
    ],
)  # fmt: skip
def test_what_each_failure_becomes(error, config, cls, number, text):
    found = connect_error(error, config, 3.0)
    assert type(found) is cls
    assert found.outcome is Outcome.NOT_APPLIED
    with pytest.raises(cls, match=text):
        raise found
    assert getattr(found, "errno", None) == number
    assert (found.__cause__ is None) == (number is None)
    if number is not None:
        assert found.__cause__.errno == number
    if hasattr(found, "host"):
        server = config.connection
        assert (found.host, found.port) == ((None, None) if server.unix_path else (server.host, 7))
        assert found.unix_path == server.unix_path
    shown = f"{found} {found!r} {vars(found)} {found.__cause__!r} {pickle.dumps(found)!r}"
    assert CANARY not in shown


@pytest.mark.parametrize(
    "error, fault",
    [
        *((tls_error("CERTIFICATE_VERIFY_FAILED", kind=VERIFY, code=code), "unknown_authority") for code in (18, 19, 20, 21)),
        *((tls_error("CERTIFICATE_VERIFY_FAILED", kind=VERIFY, code=code), "wrong_host") for code in (62, 64)),
        *((tls_error("CERTIFICATE_VERIFY_FAILED", kind=VERIFY, code=code), "expired") for code in (9, 10)),
        (tls_error("CERTIFICATE_VERIFY_FAILED", kind=VERIFY, code=23), None),
        (tls_error("WRONG_VERSION_NUMBER"), "not_tls"),
        (tls_error("TLSV13_ALERT_CERTIFICATE_REQUIRED"), "client_certificate"),
        (tls_error("TLSV1_ALERT_UNKNOWN_CA"), "client_certificate"),
        (tls_error("NO_CERTIFICATE_OR_CRL_FOUND", "X509"), "files"),
        (FileNotFoundError(2, CANARY), "files"),
        (tls_error("NO_SHARED_CIPHER"), None),
        (tls_error(kind=ssl.SSLEOFError), None),
    ],
)  # fmt: skip
def test_why_tls_failed(error, fault):
    found = connect_error(wrapped(error), TLS, 3.0)
    assert type(found) is errors.TlsFailed
    assert found.fault == fault
    assert type(found.__cause__) is type(error)
    assert getattr(found.__cause__, "reason", None) == getattr(error, "reason", None)
    assert (found.host, found.port) == ("::1", 7)
    assert CANARY not in f"{found} {vars(found)} {found.__cause__!r} {vars(found.__cause__)}"
    assert not found.retryable


def test_an_error_without_end_is_looked_at_for_a_while():
    error = theirs.ConnectionError(CANARY)
    error.__context__ = again = theirs.ConnectionError(CANARY)
    again.__cause__ = error
    assert type(connect_error(error, PLAIN, 3.0)) is errors.Unavailable
