"""Configurations and URLs."""

import pickle
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast.errors import (
    InvalidInput,
    InvalidType,
)
from ff_fast.types import (
    BackendConfig,
    BackendRetry,
    BackendTimeouts,
    ValkeyConnection,
)

from .samples import CANARY


def test_configuration_defaults():
    config = BackendConfig.valkey("host.local", 6379)
    connection = config.connection
    assert (connection.host, connection.port) == ("host.local", 6379)
    assert (connection.tls, connection.cluster) == (False, False)
    assert (connection.username, connection.password, connection.db) == (None, None, 0)
    assert (config.timeouts, config.retry) == (BackendTimeouts(), BackendRetry())


def test_urls(subtests):
    for url, fields in (
        ("valkey://h", {"host": "h", "port": 6379, "tls": False, "db": 0}),
        ("REDIS://h:7000", {"host": "h", "port": 7000, "tls": False}),
        ("valkeys://h", {"tls": True}),
        ("rediss://h/", {"tls": True, "db": 0}),
        ("valkey://h/15", {"db": 15}),
        ("valkey://10.0.0.1:1", {"host": "10.0.0.1", "port": 1}),
        ("valkey://my_host.svc:65535", {"host": "my_host.svc", "port": 65_535}),
        ("valkey://[::1]", {"host": "::1", "port": 6379}),
        ("valkey://u:p@[fe80::1]:7000/2", {"host": "fe80::1", "port": 7000, "db": 2}),
        ("valkey://u:p@h", {"username": "u", "password": "p"}),
        ("valkey://:p@h", {"username": None, "password": "p"}),
        ("valkey://u@h", {"username": "u", "password": None}),
        ("valkey://u:a%40b%3A%2F%25%3F%C3%A9@h", {"password": "a@b:/%?é"}),
        ("valkey://u:a@b:c@h", {"password": "a@b:c"}),
        ("valkey://h?cluster=true", {"cluster": True}),
        ("valkey://h?cluster=false", {"cluster": False}),
        (
            "valkeys://h?tls_ca_file=%2Fca+1.pem&tls_cert_file=/c&tls_key_file=/k",
            {"tls_ca_file": "/ca+1.pem", "tls_cert_file": "/c", "tls_key_file": "/k"},
        ),
        ("unix:///run/v.sock", {"unix_path": "/run/v.sock", "host": "", "db": 0}),
        (
            "unix://u:p@/run/my%20v.sock?db=3",
            {"unix_path": "/run/my v.sock", "db": 3, "username": "u", "password": "p"},
        ),
        (
            "valkey://h1:7000,h2,[::1]:7001/?cluster=true",
            {"host": "h1", "port": 7000, "seeds": (("h2", 6379), ("::1", 7001)), "cluster": True},
        ),
        (
            "valkey+sentinel://u:p@h1,h2:26380/my.service/3?sentinel_username=s&sentinel_password=%25",
            {
                "host": "h1", "port": 26_379, "seeds": (("h2", 26_380),), "db": 3, "tls": False,
                "username": "u", "password": "p", "sentinel_service": "my.service",
                "sentinel_username": "s", "sentinel_password": "%",
            },
        ),
        ("redis+sentinel://h/s", {"sentinel_service": "s", "tls": False, "db": 0, "seeds": ()}),
        ("valkeys+sentinel://h/s/", {"sentinel_service": "s", "tls": True}),
        ("rediss+sentinel://h/s", {"sentinel_service": "s", "tls": True}),
        ("valkey://h?client_name=me", {"client_name": "me"}),
    ):  # fmt: skip
        with subtests.test(f"{url!r:.60}"):
            connection = BackendConfig.from_url(url).connection
            assert {name: getattr(connection, name) for name in fields} == fields


def test_the_payload_limit():
    assert BackendConfig.valkey("h").max_payload_bytes == 65_536
    for limit in (1, 65_537, 1 << 20):
        config = BackendConfig.from_url(f"valkey://h?max_payload_bytes={limit}")
        assert config.max_payload_bytes == limit
        assert config == BackendConfig(ValkeyConnection("h"), max_payload_bytes=limit)
    for bad in (0, -1, (1 << 20) + 1, True, "65536", 65_536.0, None):
        with pytest.raises(InvalidInput, match="max_payload_bytes"):
            BackendConfig(ValkeyConnection("h"), max_payload_bytes=bad)
    for bad in ("0", "-1", "1048577", "1e3", "64k", "9" * 30):
        with pytest.raises(InvalidInput, match="max_payload_bytes"):
            BackendConfig.from_url(f"valkey://h?max_payload_bytes={bad}")


def test_frames_wait_for_those_of_others_as_long_as_configured():
    assert BackendConfig.valkey("h").linger_ms == 0
    for linger_ms in (0, 5, 1000):
        config = BackendConfig.from_url(f"valkey://h?linger_ms={linger_ms}")
        assert config.linger_ms == linger_ms
        assert config == BackendConfig(ValkeyConnection("h"), linger_ms=linger_ms)
    for bad in (-1, 1001, 1.5, True):
        with pytest.raises(InvalidInput, match="linger_ms"):
            BackendConfig(ValkeyConnection("h"), linger_ms=bad)
    for bad in ("-1", "1001", "1.5", "", "x"):
        with pytest.raises(InvalidInput, match="linger_ms"):
            BackendConfig.from_url(f"valkey://h?linger_ms={bad}")


def test_where_reads_go_and_what_writers_keep():
    config = BackendConfig.from_url("valkey://h")
    assert (config.read_from, config.replay_ms, config.replay_bytes) == ("primary", 1000, 4 << 20)
    config = BackendConfig.from_url("valkey://h?read_from=replica&replay_ms=0&replay_bytes=1024")
    assert (config.read_from, config.replay_ms, config.replay_bytes) == ("replica", 0, 1024)
    for bad in (
        {"read_from": "any"}, {"read_from": None}, {"replay_ms": 60_001}, {"replay_ms": -1},
        {"replay_bytes": -1}, {"replay_bytes": 1 << 31}, {"replay_bytes": 1.5}, {"load_library": 0},
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            BackendConfig(ValkeyConnection("h"), **bad)
    for bad in ("read_from=any", "replay_ms=x", "replay_bytes=-1", "load_library=0", "cluster=yes"):
        with pytest.raises(InvalidInput, match=bad.split("=", maxsplit=1)[0]):
            BackendConfig.from_url(f"valkey://h?{bad}")


class Provider:
    def get_credentials(self):
        return "u", CANARY

    def __repr__(self):
        return CANARY


def test_objects_of_the_process_are_neither_compared_nor_shown_nor_pickled():
    context = ssl.create_default_context()
    plain = ValkeyConnection("h", tls=True, sentinel_service="s", sentinel_password=CANARY)
    full = plain.replace(credential_provider=Provider(), ssl_context=context)
    assert full == plain
    assert hash(full) == hash(plain)
    assert CANARY not in repr(BackendConfig(full))
    assert "SSLContext" not in repr(full)
    copied = pickle.loads(pickle.dumps(BackendConfig(full))).connection
    assert copied == full
    assert (copied.credential_provider, copied.ssl_context) == (None, None)
    assert BackendConfig(full).replace(linger_ms=1).connection.credential_provider is not None
    assert ValkeyConnection("h", credential_provider=lambda: ("u", "p")).credential_provider


def test_url_timeout():
    assert BackendConfig.from_url("valkey://h?timeout=2.5").timeouts == BackendTimeouts(2.5)


def test_bad_urls_never_show_the_password(subtests):
    for url in (
        "",
        "h",
        "h:6379",
        "http://@h",
        "valkey:/@h",
        "valkey://",
        "valkey://@",
        "valkey:///0",
        "valkey://:6379",
        "valkey://@h:",
        "valkey://@h:0",
        "valkey://@h:65536",
        "valkey://@h:abc",
        "valkey://@h:-1",
        "valkey://@h:+1",
        "valkey://@h:\u0665",
        "valkey://@h:1:2",
        "valkey://@::1",
        "valkey://@[::1",
        "valkey://@[::1]x",
        "valkey://@[h]",
        "valkey://@[]",
        "valkey://@h,h2",
        "valkey://@h/x",
        "valkey://@h/-1",
        "valkey://@h/0/1",
        "valkey://@h/99999",
        "valkey://@h/0#f",
        "valkey://@h /0",
        "valkey://@h\n",
        "valkey://@h%41",
        "valkey://%zz@h",
        "valkey://%@h",
        "valkey://%ff@h",
        "valkey://@h?db=1",
        "valkey://@h?cluster=yes",
        "valkey://@h/1?cluster=true",
        "valkey://@h?cluster=true&cluster=true",
        "valkey://@h?cluster",
        "valkey://@h?timeout=0",
        "valkey://@h?timeout=-1",
        "valkey://@h?timeout=nan",
        "valkey://@h?timeout=1e3",
        "valkey://@h?timeout=999999999",
        "valkey://@h?tls_ca_file=/ca",
        "valkeys://@h?tls_key_file=/k",
        "valkeys://@h?tls_ca_file=%0A",
        "valkeys://@h?ssl_cert_reqs=none",
        "valkeys://@h?ssl_check_hostname=false",
        "valkey://@h?&",
        "unix://@",
        "unix://@/",
        "unix://@h/path",
        "unix://@/path?db=x",
        "unix://@/path?cluster=true",
        "valkey://@h,?cluster=true",
        "valkey://@h,,h2?cluster=true",
        "valkey://@h,h2:x?cluster=true",
        "valkey+sentinel://@h",
        "valkey+sentinel://@h/",
        "valkey+sentinel://@h//0",
        "valkey+sentinel://@h/s/x",
        "valkey+sentinel://@h/a%20b",
        "valkey+sentinel://@h/s?cluster=true",
        "valkey://@h?sentinel_password=x",
        "valkey://@h?client_name=a%20b",
    ):
        with subtests.test(f"{url!r:.60}"):
            for bad in {url, url.replace("@", f"u:{CANARY}@"), url.replace("@", f":{CANARY}@")}:
                with pytest.raises(InvalidInput) as caught:
                    BackendConfig.from_url(bad)
                chain, error = [], caught.value
                while error is not None:
                    chain.append(repr(error))
                    error = error.__context__
                assert CANARY not in " ".join(chain)


@pytest.mark.parametrize(
    "url",
    [f"valkey://u:{CANARY}/x@h", f"valkey://u:{CANARY}?{CANARY}@h", f"valkey://u:{CANARY}#@h"],
)
def test_a_password_that_was_not_escaped_is_not_shown(url):
    with pytest.raises(InvalidInput) as caught:
        BackendConfig.from_url(url)
    assert CANARY not in repr(caught.value)


@pytest.mark.parametrize("url", [None, b"valkey://h", 5, ValkeyConnection("h")])
def test_urls_of_another_type(url):
    with pytest.raises(InvalidType):
        BackendConfig.from_url(url)


@given(st.text(max_size=40).map("valkey://".__add__) | st.text(max_size=40))
def test_any_url_is_understood_or_refused(url):
    try:
        config = BackendConfig.from_url(url)
    except InvalidInput:
        return
    assert config.connection.host or config.connection.unix_path


def test_bad_connections(subtests):
    for fields in (
        *({"host": bad} for bad in ("", "a b", "a/b", "a@b", "[::1]", "a\n", "::zz", "x:1", None)),
        *({"port": bad} for bad in (0, 65_536, True, "6379", 6379.0, None)),
        *({"db": bad} for bad in (-1, True, "0", None)),
        *({name: bad} for name in ("tls", "cluster") for bad in (1, "true", None)),
        {"cluster": True, "db": 1},
        {"unix_path": "/s", "tls": True},
        {"unix_path": "/s", "cluster": True},
        {"unix_path": ""},
        {"tls_ca_file": "/ca"},
        {"tls": True, "tls_key_file": "/k"},
        {"username": ""},
        {"password": CANARY + "\ud800"},
        {"password": CANARY.encode()},
        *({"seeds": bad} for bad in ("h2", None, ("h2",), (("h2", 0),), (("a b", 1),), ((1, 2),))),
        {"seeds": (("h2", 6379),)},
        {"sentinel_service": "s", "cluster": True},
        {"sentinel_service": ""},
        {"sentinel_service": "s", "unix_path": "/s"},
        {"sentinel_password": CANARY},
        {"sentinel_service": "s", "sentinel_password": CANARY.encode()},
        {"credential_provider": CANARY},
        {"credential_provider": Provider(), "username": "u"},
        {"credential_provider": Provider(), "password": CANARY},
        {"ssl_context": ssl.create_default_context()},
        {"tls": True, "ssl_context": CANARY},
        {"tls": True, "ssl_context": ssl.create_default_context(), "tls_ca_file": "/ca"},
        *({"client_name": bad} for bad in ("", "a b", "a\n", "é", 5)),
    ):
        with subtests.test(f"{fields!r:.60}"):
            with pytest.raises(InvalidInput) as caught:
                ValkeyConnection(**{"host": "h", **fields})
            assert CANARY not in repr(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"exponent_base": 0}, {"factor": -1}, {"number_of_retries": True}, {"jitter_percent": 101}],
    ids=str,
)
def test_bad_retries(fields):
    assert BackendRetry(2, 100, 5, 20).jitter_percent == 20
    with pytest.raises(InvalidInput):
        BackendRetry(**fields)


def test_bad_configurations():
    for bad in ({"connection": "valkey://h"}, {"timeouts": 5}, {"retry": None}):
        with pytest.raises(InvalidType):
            BackendConfig(**{"connection": ValkeyConnection("h"), **bad})
