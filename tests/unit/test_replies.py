"""The replies of one step, as the asyncio connection passes them on."""

import asyncio

import pytest

from ff_fast._aio.connection import LOST, Connection, Replies
from ff_fast.errors import DeadlineExceeded, Outcome, OutcomeUnknown


def test_replies_are_taken_in_order():
    replies = Replies(Connection(), 2, 60)
    replies(b"1")
    replies(b"2")
    assert asyncio.run(replies.wait())
    assert replies.take() == [b"1", b"2"]


@pytest.mark.parametrize("left_s, error", [(60, OutcomeUnknown), (0, DeadlineExceeded)])
def test_a_connection_lost_after_the_deadline_is_a_missed_deadline(left_s, error):
    replies = Replies(Connection(), 2, left_s)
    replies(b"1")
    replies(LOST)
    assert asyncio.run(replies.wait())
    with pytest.raises(error) as caught:
        replies.take()
    assert caught.value.outcome is Outcome.UNKNOWN
