"""Errors of connecting, in our own words: redis-py's messages may quote user names and commands.

Every error names the address, and has a cleaned copy of the system's or the TLS library's error as its cause. The copy
holds only numbers and fixed texts.
"""

from __future__ import annotations

import errno as numbers
import os
import re
import socket
import ssl
from typing import TYPE_CHECKING, TypeVar

from ff_fast.errors import (
    AuthenticationFailed,
    ClusterModeRequired,
    DeadlineExceeded,
    FFError,
    InternalFunctionError,
    InvalidInput,
    Outcome,
    OutcomeUnknown,
    ProtocolError,
    Redirected,
    TlsFailed,
    Unavailable,
    causes,
    credentials_error,
    from_server_error,
    shows_cluster,
)

if TYPE_CHECKING:
    from ff_fast.errors import TlsFault
    from ff_fast.types import BackendConfig, ValkeyConnection

_E = TypeVar("_E", bound=OSError)


def connect_error(error: BaseException, config: BackendConfig, timeout: float) -> FFError:
    """Return our error for a failure to connect; the caller's own call was not sent.

    Raise it outside the ``except`` block: inside it, the original with its text would become the context.

    Args:
        error: Error of redis-py, of the system, or of a step after the handshake.
        config: Configuration of the connection.
        timeout: Timeout of connecting, in seconds.
    """
    found = _after_handshake(error, config) if isinstance(error, FFError) else None
    for cause in () if found else causes(error):
        found = _from_cause(cause, config, timeout)
        if found is not None:
            break
    if found is None:
        found = Unavailable(
            f"Connecting to {_address_of(config.connection)} failed; try again later."
        )
    if (
        isinstance(found, AuthenticationFailed)
        and config.connection.credential_provider is not None
    ):
        # The next connect asks the provider again, which may have others by then.
        found.retryable = True
    return _with_address(found, config.connection)


def _after_handshake(error: FFError, config: BackendConfig) -> FFError:
    """Return our error for one of a step after the handshake; those steps apply no call of the caller."""
    if isinstance(error, Redirected) and not config.connection.cluster:
        return ClusterModeRequired()
    if error.outcome is Outcome.NOT_APPLIED:
        return error
    where = _address_of(config.connection)
    if isinstance(error, DeadlineExceeded):
        return _timed_out(config.connection, None)
    if isinstance(error, OutcomeUnknown):
        return Unavailable(
            f"The connection to {where} broke before the first answer; {_tls_hint(config.connection)}."
        )
    if isinstance(error, ProtocolError):
        return Unavailable(
            f"The answer from {where} is not understood; check that it is a Valkey server,"
            " and whether the port uses TLS."
        )
    if isinstance(error, InternalFunctionError):
        return Unavailable(
            f"The server at {where} refused the first commands of every client; check that it is Valkey 7.2 or newer, and no"
            " Sentinel: that takes a URL with valkey+sentinel://."
        )
    # Only steps of connecting were sent, so the caller's call was not applied.
    error.outcome = Outcome.NOT_APPLIED
    return error


def _from_cause(error: BaseException, config: BackendConfig, timeout: float) -> FFError | None:
    import redis.exceptions as theirs  # noqa: PLC0415 - loaded by the first connection

    server, where = config.connection, _address_of(config.connection)
    if isinstance(error, ssl.SSLError):
        return _tls_failed(error, server)
    if server.tls and isinstance(error, FileNotFoundError | PermissionError):
        failed = TlsFailed("A file of certificates or keys cannot be read; check the paths.")
        return _with_cause(_with_fault(failed, "files"), error)
    # First, since redis-py's AuthenticationError is a ConnectionError.
    if isinstance(error, theirs.AuthenticationError):
        return credentials_error(str(error))
    if isinstance(error, theirs.NoPermissionError):
        return from_server_error(f"NOPERM {error}")
    if isinstance(error, theirs.TimeoutError | TimeoutError):
        return _with_cause(
            _timed_out(server, timeout), error if isinstance(error, OSError) else TimeoutError()
        )
    if str(error) == "max number of clients reached":
        return Unavailable(f"The server at {where} has as many clients as its maxclients allows.")
    if isinstance(error, theirs.InvalidResponse):
        if not server.tls and 'got "\\x15"' in str(error):  # first byte of a TLS alert
            failed = TlsFailed(f"{where} speaks TLS; connect with valkeys:// or tls=True.")
            return _with_fault(failed, "tls_required")
        return Unavailable(f"The program at {where} is not a Valkey server; check the address.")
    if isinstance(error, theirs.ResponseError):
        if shows_cluster(str(error)):
            return ClusterModeRequired()
        refusal = from_server_error(str(error))
        if isinstance(refusal, InternalFunctionError):
            # The handshake sends AUTH and SELECT, and a refused AUTH was handled above.
            return InvalidInput(f"The server at {where} has no database {server.db}.")
        return refusal
    if isinstance(error, OSError):
        if error.errno is None and (found := re.search(r"\[Errno ([0-9]+)\]", str(error))):
            # asyncio joins the errors of several addresses into one without errno.
            error = OSError(int(found[1]), os.strerror(int(found[1])))
        return _with_cause(_unreachable(error, server), error)
    return None


def _unreachable(error: OSError, server: ValkeyConnection) -> Unavailable:
    where = _address_of(server)
    if isinstance(error, socket.gaierror):
        return Unavailable(f"The host name of {where} was not found; check it.")
    if isinstance(error, ConnectionRefusedError):
        return Unavailable(
            f"Connecting to {where} was refused; check that a server is listening there."
        )
    if isinstance(error, ConnectionResetError | ConnectionAbortedError | BrokenPipeError):
        return Unavailable(
            f"The connection to {where} was closed while it was made; {_tls_hint(server)}."
        )
    if server.unix_path is not None and isinstance(error, FileNotFoundError):
        return Unavailable(f"There is no socket at {where}; check the path and the server.")
    if server.unix_path is not None and isinstance(error, PermissionError):
        return Unavailable(f"This user may not open the socket {where}; check its permissions.")
    why = f": {os.strerror(error.errno).lower()}" if error.errno else ""
    return Unavailable(f"{where} cannot be reached{why}; check the address and the network.")


def _timed_out(server: ValkeyConnection, timeout: float | None) -> DeadlineExceeded:
    within = "in time" if timeout is None else f"within {timeout:g} s"
    hint = "; if the port does not use TLS, connect with valkey://" if server.tls else ""
    late = DeadlineExceeded(
        f"{_address_of(server)} did not answer {within} while connecting; the call was not sent{hint}."
    )
    late.outcome = Outcome.NOT_APPLIED
    return late


def _tls_hint(server: ValkeyConnection) -> str:
    if server.tls:
        return "check that the port uses TLS and whether it wants a client certificate"
    if server.unix_path is not None:
        return "check the server's log"
    return "check the server's log, and whether the port uses TLS"


# -- TLS -------------------------------------------------------------------------------------------

# Numbers of OpenSSL's X509_V_ERR_*.
_VERIFY_FAULTS: dict[int, TlsFault] = {
    **dict.fromkeys((2, 18, 19, 20, 21, 27), "unknown_authority"),
    **dict.fromkeys((62, 64), "wrong_host"),
    **dict.fromkeys((9, 10), "expired"),
}
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "HTTP_REQUEST",
)
_CLIENT_CERTIFICATE = (
    "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    "TLSV1_ALERT_UNKNOWN_CA",
    "SSLV3_ALERT_BAD_CERTIFICATE",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    "SSLV3_ALERT_CERTIFICATE_REVOKED",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
)
_SENTENCES: dict[TlsFault, str] = {
    "not_tls": "{where} does not speak TLS; connect with valkey:// or tls=False.",
    "unknown_authority": "The certificate of {where} is signed by no trusted authority; pass its authority as"
    " tls_ca_file.",
    "wrong_host": "The certificate of {where} was issued for another host; connect by a name that is in it.",
    "expired": "The certificate of {where} is not valid now; check its dates and the clocks.",
    "client_certificate": "{where} wants a client certificate that it trusts; check tls_cert_file and tls_key_file.",
    "files": "A file of certificates or keys cannot be used; check that tls_ca_file, tls_cert_file and tls_key_file"
    " are PEM and belong together.",
}


def _tls_failed(error: ssl.SSLError, server: ValkeyConnection) -> TlsFailed:
    fault = _tls_fault(error)
    if fault is None:
        closed = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        failed = TlsFailed(
            f"{_address_of(server)} closed the connection in the TLS handshake; {_tls_hint(server)}."
            if closed
            else f"The TLS handshake with {_address_of(server)} failed; check the certificates and the host name."
        )
    else:
        failed = _with_fault(TlsFailed(_SENTENCES[fault].format(where=_address_of(server))), fault)
    return _with_cause(failed, error)


def _tls_fault(error: ssl.SSLError) -> TlsFault | None:
    reason, library = str(error.reason), str(error.library)
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY_FAULTS.get(error.verify_code)
    if reason in _NOT_TLS:
        return "not_tls"
    if reason in _CLIENT_CERTIFICATE:
        return "client_certificate"
    # OpenSSL has no reason code for a key that does not fit or is malformed.
    if library in ("X509", "PEM") or "PEM lib" in str(error):
        return "files"
    return None


def _with_fault(error: TlsFailed, fault: TlsFault) -> TlsFailed:
    error.fault = fault
    return error


# -- address and cause -----------------------------------------------------------------------------


def _address_of(server: ValkeyConnection) -> str:
    if server.unix_path is not None:
        return server.unix_path
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"{host}:{server.port}"


def _with_address(error: FFError, server: ValkeyConnection) -> FFError:
    if isinstance(
        error,
        Unavailable | DeadlineExceeded | TlsFailed | AuthenticationFailed | ClusterModeRequired,
    ):
        if server.unix_path is not None:
            error.unix_path = server.unix_path
        else:
            error.host, error.port = server.host, server.port
    return error


def _with_cause(error: _E, cause: BaseException) -> _E:
    """Give *error* the errno of *cause*, and as its cause a copy that holds only numbers and fixed texts."""
    if isinstance(cause, OSError):
        clean = _clean(cause)
        error.errno, error.strerror = clean.errno, clean.strerror
        error.__cause__ = clean
    return error


def _clean(cause: OSError) -> OSError:
    clean: OSError
    if isinstance(cause, ssl.SSLError):
        clean = type(cause)(cause.errno, f"[{cause.library}] {cause.reason}")
        clean.library, clean.reason = cause.library, cause.reason
        if isinstance(clean, ssl.SSLCertVerificationError):
            assert isinstance(cause, ssl.SSLCertVerificationError)
            clean.verify_code = cause.verify_code
            clean.verify_message = ""
    elif isinstance(cause, socket.gaierror):
        clean = socket.gaierror(cause.errno, cause.strerror)
    elif isinstance(cause, TimeoutError) and cause.errno is None:
        clean = TimeoutError(numbers.ETIMEDOUT, os.strerror(numbers.ETIMEDOUT))
    elif cause.errno is None:
        clean = OSError()
    else:
        clean = OSError(cause.errno, os.strerror(cause.errno))
    return clean
