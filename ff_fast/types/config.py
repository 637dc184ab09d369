"""Connection settings: addresses, credentials, timeouts, and URLs of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import unquote_to_bytes

from ff_fast import keys
from ff_fast.errors import InvalidInput, InvalidType, check_int

from ._value import (
    DEFAULT_PAYLOAD_LIMIT,
    LARGEST_PAYLOAD_LIMIT,
    MAX_U32,
    Value,
    check_flag,
    check_optional_int,
    check_type,
    milliseconds,
    seconds,
    set_field,
    utf8,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable
    from dataclasses import KW_ONLY
    from datetime import timedelta
    from typing import Protocol

    class CredentialProvider(Protocol):
        """What a provider of credentials has; those of redis-py, and of the packages of cloud services, have it."""

        def get_credentials(self) -> tuple[str] | tuple[str, str]: ...

    Credentials = CredentialProvider | Callable[[], Any | Awaitable[Any]]


# -- connections -----------------------------------------------------------------------------------


class BackendTimeouts(Value):
    """Time limits of calls.

    Attributes:
        request: Longest time of one call in seconds, above 0; None takes the default, 5 s.  Also takes a ``timedelta``.
    """

    request: float | None = None

    if TYPE_CHECKING:

        def __init__(self, request: float | timedelta | None = None) -> None: ...

    def __post_init__(self) -> None:
        if self.request is not None:
            set_field(self, "request", seconds("request", self.request, zero=False))


class BackendRetry(Value):
    """Retries of calls and of reconnecting: the pause before retry n is ``factor * exponent_base^n``, at most 1 s.

    Attributes:
        exponent_base: Base of the exponential growth, from 1; None takes the default, 2.
        factor: Length of the first pause in ms; None takes the default, 10.  Also takes a ``timedelta``.
        number_of_retries: Attempts after the first one; None takes the default, 16.
        jitter_percent: Random share by which each pause is shortened, 0 to 100; None takes the default, 50.
    """

    exponent_base: int | None = None
    factor: int | None = None
    number_of_retries: int | None = None
    jitter_percent: int | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            exponent_base: int | None = None,
            factor: int | timedelta | None = None,
            number_of_retries: int | None = None,
            jitter_percent: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_optional_int("exponent_base", self.exponent_base, 1, MAX_U32)
        if self.factor is not None:
            set_field(self, "factor", milliseconds("factor", self.factor, 0, MAX_U32))
        check_optional_int("number_of_retries", self.number_of_retries, 0, MAX_U32)
        check_optional_int("jitter_percent", self.jitter_percent, 0, 100)


class ValkeyConnection(Value):
    """Where a server is and how to log in.

    With TLS the certificate and the host name are always verified, unless an ``ssl_context`` of your own decides
    otherwise.

    ``credential_provider`` and ``ssl_context`` are objects of this process: they are neither compared nor pickled. A copy
    that was pickled has neither; give them to it by ``replace()``.

    Attributes:
        host: Name or address; an IPv6 address without brackets.  Empty with ``unix_path``.
        port: 1 to 65535.
        tls: Whether to use TLS.
        cluster: Whether the server is part of a Valkey Cluster.
        username: ACL user; None is the default user.
        password: Its password; never shown by ``repr``.
        db: Database number; a cluster has only 0.
        unix_path: Path of a Unix socket, in place of host and port.
        tls_ca_file: PEM file of authorities to trust in place of the system's.
        tls_cert_file: PEM file of the client certificate.
        tls_key_file: PEM file of its private key; None if it is in the same file.
        seeds: Further nodes of the cluster, or further sentinels, as pairs of host and port.
        sentinel_service: Name of the service that sentinels watch; host, port and seeds are those of the sentinels.
        sentinel_username: ACL user on the sentinels; None is the default user.
        sentinel_password: Its password; never shown by ``repr``.
        credential_provider: In place of user name and password: an object with ``get_credentials()``, as redis-py's
            ``CredentialProvider``, or a callable that returns user name and password. It is asked at every connect.
        ssl_context: In place of the files of certificates, with ``tls``; it decides what is verified.
        client_name: Name of the connections, which ``CLIENT LIST`` shows; None is ``ff_fast:`` and their role.
    """

    _secret: ClassVar[tuple[str, ...]] = (
        "password",
        "sentinel_password",
        "credential_provider",
        "ssl_context",
    )
    _uncompared: ClassVar[tuple[str, ...]] = ("credential_provider", "ssl_context")

    host: str = "127.0.0.1"
    port: int = 6379
    _: KW_ONLY
    tls: bool = False
    cluster: bool = False
    username: str | None = None
    password: str | None = None
    db: int = 0
    unix_path: str | None = None
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    seeds: tuple[tuple[str, int], ...] = ()
    sentinel_service: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    credential_provider: Credentials | None = None
    ssl_context: ssl.SSLContext | None = None
    client_name: str | None = None

    def __post_init__(self) -> None:
        check_flag("tls", self.tls)
        check_flag("cluster", self.cluster)
        check_int("port", self.port, 1, 65_535)
        check_int("db", self.db, 0, 65_535)
        check_type("host", self.host, str)
        for name in ("unix_path", "tls_ca_file", "tls_cert_file", "tls_key_file"):
            if getattr(self, name) is not None:
                keys.free_text(name, getattr(self, name), 4096, error=InvalidInput)
        for name in ("username", "password", "sentinel_username", "sentinel_password"):
            text = getattr(self, name)
            if text is not None and utf8(check_type(name, text, str)) is None:
                raise InvalidInput(f"{name} contains a lone surrogate.")
        if self.username == "" or self.sentinel_username == "":
            raise InvalidInput("username must not be empty; use None for the default user.")
        if self.unix_path is None:
            _check_host(self.host)
        else:
            set_field(self, "host", "")
            if self.tls or self.cluster or self.sentinel_service:
                raise InvalidInput("A Unix socket has neither TLS nor a cluster nor sentinels.")
        self._check_places()
        self._check_access()
        if self.cluster and self.db != 0:
            raise InvalidInput("A cluster has no database but 0.")
        if not self.tls and (self.tls_ca_file or self.tls_cert_file or self.tls_key_file):
            raise InvalidInput("TLS files are given but tls is off; use valkeys:// or tls=True.")
        if self.tls_key_file is not None and self.tls_cert_file is None:
            raise InvalidInput("tls_key_file needs tls_cert_file.")

    def _check_places(self) -> None:
        """Check seeds and sentinels."""
        if not isinstance(self.seeds, (tuple, list)):
            raise InvalidType(
                f"seeds must be a tuple of pairs of host and port, not {type(self.seeds).__name__}."
            )
        seeds: list[tuple[str, int]] = []
        given: tuple[object, ...] = tuple(self.seeds)
        for seed in given:
            if not isinstance(seed, (tuple, list)) or len(seed) != 2:
                raise InvalidType("A seed must be a pair of host and port.")
            _check_host(check_type("the host of a seed", seed[0], str))
            seeds.append((seed[0], check_int("the port of a seed", seed[1], 1, 65_535)))
        set_field(self, "seeds", tuple(seeds))
        if self.sentinel_service is not None:
            check_type("sentinel_service", self.sentinel_service, str)
            if re.fullmatch(r"[A-Za-z0-9._-]{1,255}", self.sentinel_service) is None:
                raise InvalidInput("sentinel_service has letters, digits, '.', '-' and '_' only.")
            if self.cluster:
                raise InvalidInput("Sentinels watch no cluster; leave one of the two out.")
        elif self.sentinel_username is not None or self.sentinel_password is not None:
            raise InvalidInput("Credentials of sentinels are given but no sentinel_service.")
        elif seeds and not self.cluster:
            raise InvalidInput(
                "Several servers are given; use cluster=true, or name the service of sentinels."
            )

    def _check_access(self) -> None:
        """Check the objects, and the name of the connections."""
        provider = self.credential_provider
        if provider is not None:
            if not callable(provider) and not callable(getattr(provider, "get_credentials", None)):
                raise InvalidType(
                    "credential_provider must have get_credentials(), or be a callable that returns user name and"
                    f" password; {type(provider).__name__} is neither."
                )
            if self.username is not None or self.password is not None:
                raise InvalidInput(
                    "credential_provider takes the place of username and password; give one of them."
                )
        if self.ssl_context is not None:
            import ssl  # noqa: PLC0415 - takes milliseconds to import

            check_type("ssl_context", self.ssl_context, ssl.SSLContext)
            if not self.tls:
                raise InvalidInput(
                    "ssl_context is given but tls is off; use valkeys:// or tls=True."
                )
            if self.tls_ca_file or self.tls_cert_file or self.tls_key_file:
                raise InvalidInput("ssl_context takes the place of TLS files; give one of them.")
        if self.client_name is not None:
            check_type("client_name", self.client_name, str)
            if re.fullmatch(r"[!-~]{1,255}", self.client_name) is None:
                raise InvalidInput("client_name has visible ASCII characters only, no blank.")

    def __reduce__(self) -> tuple[Any, ...]:
        make, (kind, _) = super().__reduce__()
        fields = self._fields().items()
        return make, (kind, {name: value for name, value in fields if name not in self._uncompared})


def _check_host(host: str) -> None:
    if re.fullmatch(_IPV6 if ":" in host else _HOST, host) is None:
        raise InvalidInput("host must be a host name, an IPv4 address, or an IPv6 address.")


# The system resolves names, also non-ASCII ones. The pattern refuses lists of hosts, and characters that
# change the meaning of a URL or a log line.  255 is the limit of a DNS name (RFC 1035 §2.3.4).
_HOST = r"(?:[A-Za-z0-9._-]|[^\x00-\x9f\u2028\u2029\ud800-\udfff]){1,255}"

_IPV6 = r"(?=.*:.*:)[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,64})?"

BackendConnection = ValkeyConnection
"""How to reach a backend.  Valkey is the only kind so far."""


class BackendConfig(Value):
    """Settings of a backend.

    Attributes:
        connection: Address of the server, and credentials.
        timeouts: Time limits of calls.
        retry: Pauses between retries.
        partitions: Number of partitions of the deployment, 1 to 65535. The first backend of a deployment stores it on
            the server (256 for None). A later one gets ``DeploymentMismatch`` for another number; None takes the stored
            one.
        max_payload_bytes: Largest payload of a frame or patch, 1 to 1,048,576 bytes. It binds the writers of this
            backend; readers take frames of any size.
        linger_ms: How long a frame waits for frames of other writers of this backend, 0 to 1000 ms. They go to the
            server in one call, which costs it less. With 0 nothing waits while few writers have frames. Also takes a
            ``timedelta``.
        read_from: Where calls that write nothing go: ``"primary"``, or ``"replica"`` for a replica where there is one,
            which may lack what was written last.
        replay_ms: How long a writer keeps what was acknowledged, 0 to 60,000 ms, to store it again if a failover has lost
            it. Also takes a ``timedelta``.
        replay_bytes: Most bytes that a writer keeps for that, 0 to 1 GiB: the frames as they are sent, and 56 bytes a
            batch. With 0 in either nothing is kept.
        load_library: Whether a connection loads the function library where the server has none or another one, and stores
            the partition count of a new deployment. Without it a connection changes nothing: it takes any library of the
            same contract, and is refused with ``FunctionMissing`` or ``LibraryMismatch`` where there is none.
    """

    connection: BackendConnection
    _: KW_ONLY
    timeouts: BackendTimeouts = BackendTimeouts()
    retry: BackendRetry = BackendRetry()
    partitions: int | None = None
    max_payload_bytes: int = DEFAULT_PAYLOAD_LIMIT
    linger_ms: int = 0
    read_from: Literal["primary", "replica"] = "primary"
    replay_ms: int = 1000
    replay_bytes: int = 4 << 20
    load_library: bool = True

    def __post_init__(self) -> None:
        check_type("connection", self.connection, ValkeyConnection)
        check_type("timeouts", self.timeouts, BackendTimeouts)
        check_type("retry", self.retry, BackendRetry)
        check_optional_int("partitions", self.partitions, 1, keys.MAX_PARTITIONS)
        check_int("max_payload_bytes", self.max_payload_bytes, 1, LARGEST_PAYLOAD_LIMIT)
        set_field(self, "linger_ms", milliseconds("linger_ms", self.linger_ms, 0, 1000))
        if self.read_from not in ("primary", "replica"):
            raise InvalidInput("read_from must be 'primary' or 'replica'.")
        set_field(self, "replay_ms", milliseconds("replay_ms", self.replay_ms, 0, 60_000))
        check_int("replay_bytes", self.replay_bytes, 0, 1 << 30)
        check_type("load_library", self.load_library, bool)

    @classmethod
    def valkey(cls, host: str, port: int = 6379) -> BackendConfig:
        """Return the defaults for a standalone server without TLS."""
        return cls(ValkeyConnection(host, port))

    @classmethod
    def from_url(cls, url: str) -> BackendConfig:
        """Return the configuration that a URL describes.

        ``valkey://[user[:password]@]host[:port][/db]`` (also ``redis://``), the same with TLS as
        ``valkeys://`` (``rediss://``), and ``unix://[user[:password]@]/path``.  User, password and
        path are percent-decoded.

        A cluster: ``valkey://host[:port][,host[:port]...][/]?cluster=true``; any of its nodes will do, several are asked in
        turn.  A service that sentinels watch: ``valkey+sentinel://[user[:password]@]host[:26379][,host...]/service[/db]``
        (also ``redis+sentinel://``); user and password are those on the server.  ``valkeys+sentinel://``
        (``rediss+sentinel://``) is TLS to the sentinels and to the server.

        Query parameters, each at most once: ``cluster=true``,
        ``partitions=<count>``, ``max_payload_bytes=<bytes>``, ``linger_ms=<ms>``, ``read_from=primary|replica``,
        ``replay_ms=<ms>``, ``replay_bytes=<bytes>``, ``load_library=true|false``, ``timeout=<seconds>``,
        ``tls_ca_file=``, ``tls_cert_file=``, ``tls_key_file=``, ``client_name=``, ``sentinel_username=``, ``sentinel_password=``, and for a Unix socket ``db=``.

        Raises:
            InvalidInput: Any other scheme or parameter, a missing host, a bad port, database or
                percent-escape, a blank or a fragment.  The message never quotes the URL, which may
                hold a password.
        """
        return _from_url(check_type("url", url, str))


# -- URLs ------------------------------------------------------------------------------------------


_URL_PARAMETERS = (
    "cluster",
    "partitions",
    "max_payload_bytes",
    "linger_ms",
    "read_from",
    "replay_ms",
    "replay_bytes",
    "load_library",
    "timeout",
    "tls_ca_file",
    "tls_cert_file",
    "tls_key_file",
    "client_name",
    "sentinel_username",
    "sentinel_password",
    "db",
)

_SCHEMES = {
    "valkey": (False, False),
    "redis": (False, False),
    "valkeys": (True, False),
    "rediss": (True, False),
    "valkey+sentinel": (False, True),
    "redis+sentinel": (False, True),
    "valkeys+sentinel": (True, True),
    "rediss+sentinel": (True, True),
    "unix": (False, False),
}
"""Schemes of URLs: whether TLS is used, and whether the hosts are sentinels."""

_AUTHORITY = r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::([0-9]{1,5}))?"


def _from_url(url: str) -> BackendConfig:
    # Parsed by hand: urllib drops blanks silently, and quotes parts of the URL in its errors.
    if re.search(r"[\x00-\x20\x7f-\x9f#\u2028\u2029\ud800-\udfff]", url):
        raise InvalidInput(
            "The URL contains a blank, a control character or '#'; percent-encode it."
        )
    if re.search(r"%(?![0-9A-Fa-f]{2})", url):
        raise InvalidInput("The URL contains a '%' that starts no escape; write it as %25.")
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _SCHEMES:
        raise InvalidInput(
            "The URL must start with valkey://, valkeys://, redis://, rediss://, valkey+sentinel://,"
            " valkeys+sentinel:// or unix://."
        )
    tls, sentinels = _SCHEMES[scheme]
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    login, _, places = authority.rpartition("@")
    username, _, password = login.partition(":")
    given = _url_parameters(query)

    addresses, service, unix_path = [("", 6379)], None, None
    if scheme == "unix":
        if places or not path:
            raise InvalidInput("A unix:// URL must hold an absolute path and no host.")
        unix_path = _unquote(slash + path)
        db = given.pop("db", "0")
    else:
        addresses = [_place(place, "26379" if sentinels else "6379") for place in places.split(",")]
        if sentinels:
            service, _, path = path.partition("/")
            if not service:
                raise InvalidInput(
                    "The URL of sentinels must name the service, as in valkey+sentinel://host/service."
                )
            service = _unquote(service)
        if "db" in given:
            raise InvalidInput("The database of a URL goes in its path, as in valkey://host/1.")
        db = path or "0"
    if re.fullmatch(r"[0-9]{1,5}", db) is None:
        raise InvalidInput("The database in a URL must be a number.")
    timeout = given.pop("timeout", None)
    if timeout is not None and re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,9})?", timeout) is None:
        raise InvalidInput("timeout must be a number of seconds.")
    partitions = _number("partitions", given)
    max_payload_bytes = _number("max_payload_bytes", given)
    linger_ms = _number("linger_ms", given)
    replay_ms = _number("replay_ms", given)
    replay_bytes = _number("replay_bytes", given)
    read_from = given.pop("read_from", "primary")
    cluster = _flag("cluster", given, default=False)
    load_library = _flag("load_library", given, default=True)
    (host, port), *seeds = addresses
    texts: dict[str, Any] = {name: _unquote(text) for name, text in given.items()}
    connection = ValkeyConnection(
        host,
        port,
        tls=tls,
        cluster=cluster,
        username=_unquote(username) or None,
        password=_unquote(password) or None,
        db=int(db),
        unix_path=unix_path,
        seeds=tuple(seeds),
        sentinel_service=service,
        **texts,
    )
    return BackendConfig(
        connection,
        timeouts=BackendTimeouts(None if timeout is None else float(timeout)),
        partitions=partitions,
        max_payload_bytes=DEFAULT_PAYLOAD_LIMIT if max_payload_bytes is None else max_payload_bytes,
        linger_ms=linger_ms or 0,
        read_from=read_from,  # type: ignore[arg-type]
        replay_ms=1000 if replay_ms is None else replay_ms,
        replay_bytes=4 << 20 if replay_bytes is None else replay_bytes,
        load_library=load_library,
    )


def _place(text: str, port: str) -> tuple[str, int]:
    """Return host and port of one place in a URL; *port* is the default."""
    found = re.fullmatch(_AUTHORITY, text)
    if found is None:
        raise InvalidInput("The URL must hold a host, and a port must be a number up to 65535.")
    host = found[1] or found[2]
    if not host or (found[1] and ":" not in host):
        raise InvalidInput("The URL must hold a host; an IPv6 address goes in brackets.")
    return host, int(found[3] or port)


def _flag(name: str, given: dict[str, str], *, default: bool) -> bool:
    """Take a parameter that is true or false out of *given*."""
    text = given.pop(name, None)
    if text not in (None, "true", "false"):
        raise InvalidInput(f"{name} must be true or false.")
    return default if text is None else text == "true"


def _number(name: str, given: dict[str, str]) -> int | None:
    """Take a parameter that is a whole number out of *given*; None where it is absent."""
    text = given.pop(name, None)
    if text is not None and re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise InvalidInput(f"{name} must be a number.")
    return None if text is None else int(text)


def _url_parameters(query: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, _, text = item.partition("=")
        # The message does not quote the name: it may be a piece of a password with a '?'.
        if name not in _URL_PARAMETERS:
            raise InvalidInput(f"A URL's parameters are {', '.join(_URL_PARAMETERS)}.")
        if name in given or not text:
            raise InvalidInput(f"{name} must be given once, with a value.")
        given[name] = text
    return given


def _unquote(text: str) -> str:
    try:
        return unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError:
        pass
    raise InvalidInput("The URL's escapes are not UTF-8.")
