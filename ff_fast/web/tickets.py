"""Signed permissions to read a stream, for applications whose clients cannot be known otherwise."""

from __future__ import annotations

import hmac
import re
import time
from base64 import urlsafe_b64encode
from hashlib import sha256
from typing import TYPE_CHECKING, NoReturn

from ff_fast import keys
from ff_fast.errors import InvalidInput, InvalidToken, InvalidType
from ff_fast.types import seconds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

_SCOPES = ("read", "stop")
_TOKEN = re.compile(r"([1-9][0-9]{0,11})\.([a-z]+(?:-[a-z]+)*)\.([A-Za-z0-9_-]{43})")
_SHORTEST_KEY = 16


def stream_token(
    key: bytes,
    execution_id: str,
    *,
    expires_in: float | timedelta = 3600.0,
    can: Sequence[str] = ("read",),
) -> str:
    """Return a token that lets its holder read one execution for a while, or stop it.

    Everybody who has it can use it, so it belongs into URLs and logs no longer than it is valid. It is made of
    ``A-Z a-z 0-9 . _ -``, and holds no secret: the time, what it permits, and an HMAC-SHA256 over these and the id.

    Args:
        key: A secret of at least 16 random bytes, the same in every process that checks.
        execution_id: Id of the execution.
        expires_in: How long it is valid, in seconds or as a ``timedelta``.
        can: What it permits: ``read``, ``stop``, or both.

    Raises:
        InvalidInput: An argument is not accepted.
    """
    lasts = seconds("expires_in", expires_in, zero=False)
    wanted = [can] if isinstance(can, str) else list(can)
    if not wanted or not set(wanted) <= set(_SCOPES):
        raise InvalidInput("can must name 'read', 'stop', or both.")
    scopes = "-".join(scope for scope in _SCOPES if scope in wanted)
    expires_at = int(time.time() + lasts) + 1
    return f"{expires_at}.{scopes}.{_sign(key, execution_id, expires_at, scopes)}"


def check_token(
    key: bytes | Sequence[bytes],
    token: str | None,
    execution_id: str,
    now: float | None = None,
    *,
    can: str = "read",
) -> None:
    """Raise an error unless *token* permits what its holder wants to do with the execution.

    Args:
        key: The secret that it was made with, or several of them: the one in use, and those that were before it.
        token: What :func:`stream_token` returned; None is no token.
        execution_id: Id of the execution.
        now: The time, in seconds since the epoch; None is now.
        can: What its holder wants: ``read`` or ``stop``.

    Raises:
        InvalidToken: It was made with another key or for another execution, it permits something else, or it has expired.
        InvalidInput: A key is not accepted, whatever the token.
    """
    several = [key] if isinstance(key, bytes) else list(key)
    for each in several:
        _check_key(each)
    found = _TOKEN.fullmatch(token) if isinstance(token, str) else None
    if found is None:
        _refuse()
    expires_at, scopes, signature = int(found[1]), found[2], found[3]
    # Every key is tried, so the time tells nothing.
    matches = [
        hmac.compare_digest(_sign(each, execution_id, expires_at, scopes), signature)
        for each in several
    ]
    if not any(matches):
        _refuse()
    if can not in scopes.split("-"):
        raise InvalidToken(f"The token does not permit to {can} this stream; ask for another one.")
    if expires_at <= (time.time() if now is None else now):
        raise InvalidToken("The token has expired; ask for a new one.")


def _refuse() -> NoReturn:
    raise InvalidToken("The token is not valid for this stream; ask for a new one.")


def _check_key(key: object) -> None:
    if not isinstance(key, bytes):
        raise InvalidType(f"key must be bytes, not {type(key).__name__}.")
    if len(key) < _SHORTEST_KEY:
        raise InvalidInput(f"key must be at least {_SHORTEST_KEY} random bytes.")


def _sign(key: bytes, execution_id: str, expires_at: int, scopes: str) -> str:
    _check_key(key)
    eid = keys.canonical_execution_id(execution_id)
    signed = f"ff_fast stream token 1\0{eid}\0{expires_at}\0{scopes}".encode()
    return urlsafe_b64encode(hmac.digest(key, signed, sha256)).rstrip(b"=").decode()
