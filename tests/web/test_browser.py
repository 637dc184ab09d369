"""The browser client in headless Chromium: what a person sees is what the worker has sent, character for character."""

import contextlib
import random
import time

import pytest

import ff_fast
from ff_fast import web
from tests.faults.chaos import DOWN, ChaosProxy
from tests.waiting import wait_until
from tests.web import browser

pytestmark = [pytest.mark.web, pytest.mark.timeout(120)]

FRAMINGS = {
    # Every token is kept: who joins late reads all of them.
    "replayed": (None, lambda: web.EventFraming(data="json")),
    # Tokens are gone after a minute: who joins late begins with the summary.
    "summarized": (60_000, lambda: web.EventFraming(data="json", snapshot=True, types=True)),
}


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        yield backend


@pytest.fixture
def requests():
    return []


@pytest.fixture
def pages(driver, site, requests):
    """`pages(framing)`: a site behind a proxy, as `pages.proxy`, and the browser, in a tab of its own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(browser.closed_tabs(driver))

        def make(framing, **options):
            served = site(browser.routes(requests, framing=framing, **options))
            proxy = stack.enter_context(ChaosProxy(served.url))
            made = browser.Pages(driver, f"http://127.0.0.1:{proxy.address[1]}", proxy)
            made.site = served
            made.new_tab()
            return made

        yield make


def ended(page, answer):
    """The page has all, once and in order, and knows that this is all."""
    page.wait("stream.state === 'ended'")
    assert page.text == answer.text == answer.raw.decode()
    assert page.run("stream.text") == answer.text
    assert page.run("stream.complete")
    assert page.run("seen.gaps") == []
    assert page.run("seen.end")["outcome"] == "success"


@pytest.mark.parametrize("kind", FRAMINGS)
def test_a_reload_in_the_middle_of_an_answer(pages, backend, lane, requests, kind):
    window_ms, framing = FRAMINGS[kind]
    page = pages(framing)
    answer = browser.Answer(backend, lane, window_ms=window_ms)
    assert browser.split_in_characters(answer.tokens) > 300
    page.open(answer.execution_id)
    answer.write(700)
    page.wait_for_text(answer.text)
    page.driver.refresh()
    answer.write(600)
    page.wait_for_text(answer.text)
    page.driver.refresh()
    page.wait("window.stream")
    answer.finish()
    ended(page, answer)
    assert requests == [None, None, None]


def test_cuts_anywhere_lose_and_double_nothing(pages, backend, lane, requests):
    page = pages(FRAMINGS["replayed"][1])
    answer = browser.Answer(backend, lane)
    page.open(answer.execution_id)
    page.wait("window.stream && stream.attempt === 0")
    chosen = random.Random(5)
    page.proxy.cut_by(
        (DOWN, chosen.randint(500, 8_000), chosen.choice(["rst", "fin"])) for _ in range(12)
    )
    for _ in range(20):
        answer.write(100)
        time.sleep(0.05)
    answer.finish()
    ended(page, answer)
    assert len(requests) > 8
    assert None not in requests[1:]
    assert page.run("seen.shrunk") == 0


@pytest.mark.parametrize("how", ["in silence", "by a reset"])
def test_offline_for_five_seconds(pages, backend, lane, requests, how):
    page = pages(FRAMINGS["replayed"][1])
    answer = browser.Answer(backend, lane)
    page.open(answer.execution_id)
    answer.write(500)
    page.wait_for_text(answer.text)
    seen = answer.text
    page.network(on=False)
    if how == "by a reset":
        page.proxy.cut_all()
        page.wait("stream.state === 'offline'")
    until = time.monotonic() + 5
    while time.monotonic() < until:
        answer.write(15)
        time.sleep(0.1)
    assert page.text == seen
    page.network(on=True)
    # The first request may go over a connection that has died.
    page.wait_for_text(answer.text, deadline_s=10)
    answer.finish()
    ended(page, answer)
    assert None not in requests[1:]
    assert page.run("seen.shrunk") == 0


@pytest.mark.parametrize("kind", FRAMINGS)
def test_a_second_tab_joins_in_the_middle(pages, backend, lane, kind):
    window_ms, framing = FRAMINGS[kind]
    page = pages(framing)
    answer = browser.Answer(backend, lane, window_ms=window_ms)
    first = page.driver.current_window_handle
    page.open(answer.execution_id)
    answer.write(900)
    page.wait_for_text(answer.text)
    second = page.new_tab()
    page.open(answer.execution_id)
    page.wait_for_text(answer.text)
    answer.write(300)
    page.wait_for_text(answer.text)
    answer.finish()
    for tab in (second, first):
        page.driver.switch_to.window(tab)
        ended(page, answer)


def test_a_laptop_that_sleeps_past_the_window(pages, backend, lane, requests):
    page = pages(FRAMINGS["summarized"][1])
    # The window holds half a second, or 64 frames.
    answer = browser.Answer(backend, lane, window_ms=500)
    page.open(answer.execution_id)
    page.wait("window.stream && stream.attempt === 0")
    for _ in range(7):
        answer.write(100)
        time.sleep(0.1)
    page.wait_for_text(answer.text)
    page.protocol("Page.setWebLifecycleState", state="frozen")
    page.network(on=False)
    for _ in range(20):
        answer.write(30)
        time.sleep(0.15)
    page.network(on=True)
    page.protocol("Page.setWebLifecycleState", state="active")
    # A page that was frozen is hidden, and paints nothing until somebody looks at it.
    tab = page.driver.current_window_handle
    page.new_tab()
    page.driver.switch_to.window(tab)
    page.wait_for_text(answer.text)
    for _ in range(4):
        answer.write(50)
        time.sleep(0.1)
    answer.finish()
    ended(page, answer)
    # It asked for what it had missed, was told of the gap, and began again with the summary.
    assert requests[1] is not None
    assert requests[-1] is None
    assert page.run("seen.shrunk") == 0


def test_a_connection_that_dies_in_silence(pages, backend, lane, requests):
    page = pages(FRAMINGS["replayed"][1], heartbeat=0.2)
    answer = browser.Answer(backend, lane)
    page.open(answer.execution_id, silence=1500)
    answer.write(500)
    page.wait_for_text(answer.text)
    time.sleep(2)
    assert len(requests) == 1, "heartbeats keep a connection"
    page.proxy.swallow()
    answer.write(500)
    page.wait_for_text(answer.text)
    answer.finish()
    ended(page, answer)
    assert len(requests) == 2
    assert requests[1] is not None


def test_a_server_that_is_gone_for_a_while(pages, backend, lane, requests):
    page = pages(FRAMINGS["replayed"][1])
    answer = browser.Answer(backend, lane)
    page.open(answer.execution_id)
    answer.write(500)
    page.wait_for_text(answer.text)
    page.proxy.refuse()
    page.proxy.cut_all()
    answer.write(500)
    page.wait("stream.state === 'waiting'")
    page.proxy.listen()
    page.wait_for_text(answer.text)
    answer.finish()
    ended(page, answer)
    assert len(requests) == 2


def test_stop_ends_the_stream_for_all(pages, backend, lane):
    page = pages(FRAMINGS["replayed"][1])
    answer = browser.Answer(backend, lane)
    first = page.driver.current_window_handle
    page.open(answer.execution_id)
    answer.write(500)
    second = page.new_tab()
    page.open(answer.execution_id)
    page.wait_for_text(answer.text)
    page.run("stream.stop()")
    for tab in (second, first):
        page.driver.switch_to.window(tab)
        page.wait("stream.state === 'ended'")
        assert page.text == answer.text
        end = page.run("stream.end")
        assert (end["reason"], end["outcome"]) == ("attempt_cancelled", "cancelled")
    assert backend.describe(answer.execution_id).state == "cancelled"
    # The same again, by a page that comes too late.
    page.driver.refresh()
    page.wait("window.stream?.state === 'ended'")
    page.run("stream.stop()")
    assert page.text == answer.text


def test_another_attempt_takes_the_place_of_the_first(pages, backend, lane, server):
    page = pages(FRAMINGS["replayed"][1])
    answer = browser.Answer(backend, lane)
    page.open(answer.execution_id)
    answer.write(500)
    page.wait_for_text(answer.text)
    shown = page.text
    backend.fail(answer.handle, "gone", ff_fast.FailureClass.INFRA_CRASH)
    with contextlib.ExitStack() as stack:
        handles = []

        def claimed():
            stop = _Once()
            backend.supervise(interval=0, stop=stop)
            handle = backend.claim(
                lane=lane, worker_id="w", worker_instance_id="w-2", lease_ttl_ms=60_000
            )
            handles.extend([handle] if handle else [])
            return handle is not None

        wait_until(claimed, deadline_s=10)
        writer = stack.enter_context(backend.open_writer(handles[0]))
        page.wait("stream.attempt === 1")
        # What begins as before is not taken away while it is written again.
        for token in answer.tokens[:250]:
            writer.write(token)
        writer.flush()
        page.wait(f"stream.text.length > {browser.utf16(shown) // 3}")
        assert page.text == shown
        writer.write("\ufffdanother")
        writer.flush()
        text = b"".join(answer.tokens[:250]).decode("utf-8", "replace") + "\ufffdanother"
        page.wait(f"document.getElementById('text').textContent.length === {browser.utf16(text)}")
        assert page.text == text
    backend.complete(handles[0])
    page.wait("stream.state === 'ended'")
    assert page.text == text
    assert page.run("seen.attempts") == [0, 1]


class _Once:
    asked = False

    def is_set(self):
        asked, self.asked = self.asked, True
        return asked


def test_a_gap_that_nothing_fills_is_told_once(pages, backend, lane, requests):
    page = pages(FRAMINGS["replayed"][1])
    answer = browser.Answer(backend, lane, window_ms=100)
    answer.write(300)
    time.sleep(0.5)
    for _ in range(5):
        answer.write(100)
        time.sleep(0.1)
    # What left while it is read, or in a burst, could be another gap.
    wait_until(lambda: not backend.read_stream(answer.execution_id, 0, count=1))
    page.open(answer.execution_id)
    page.wait("window.stream && seen.gaps.length")
    answer.keep()
    answer.finish()
    page.wait("stream.state === 'ended'")
    assert len(page.run("seen.gaps")) == 1
    assert not page.run("stream.complete")
    assert len(requests) == 1


def test_a_refusal_is_final_and_names_its_cause(pages, backend, lane, requests):
    page = pages(FRAMINGS["replayed"][1])
    unknown = backend.execution_id_for("nobody")
    page.open(unknown)
    page.wait("window.seen?.error")
    assert page.run("stream.state") == "refused"
    name, status, message = page.run("seen.error")
    assert (name, status) == ("Refused", 404)
    assert message != "The server answered 404."
    # A page of another application is no stream either.
    page.open(unknown, url="/ff_fast.js")
    page.wait("window.seen?.error")
    assert page.run("seen.error[1]") == 200
    assert len(requests) == 1


def test_headers_go_with_every_request(pages, backend, lane, requests):
    key = b"0123456789abcdef"
    page = pages(FRAMINGS["replayed"][1], token_key=key)
    answer = browser.Answer(backend, lane, tokens=100)
    answer.write(50)
    page.open(answer.execution_id)
    page.wait("window.seen?.error")
    assert page.run("seen.error[1]") == 403
    token = web.stream_token(key, answer.execution_id)
    page.open(answer.execution_id, headers={"authorization": f"Bearer {token}"})
    page.wait_for_text(answer.text)
    page.proxy.cut_all()
    answer.finish()
    ended(page, answer)
    assert len(requests) == 3


def test_the_page_changes_once_a_frame(pages, backend, lane):
    page = pages(FRAMINGS["replayed"][1], pace=0)
    answer = browser.Answer(backend, lane)
    page.open(answer.execution_id)
    page.wait("window.stream && stream.attempt === 0")
    for _ in range(40):
        for _ in range(5):
            answer.write(10)
    page.wait_for_text(answer.text)
    changes, frames = page.run("[seen.changes, seen.frames]")
    assert 1 <= changes <= frames + 1
    assert page.run("document.getElementById('text').childNodes.length") == 1
    answer.finish()
    ended(page, answer)


def test_a_page_that_has_the_end_asks_for_nothing(pages, backend, lane, requests):
    page = pages(FRAMINGS["replayed"][1])
    answer = browser.Answer(backend, lane, tokens=50)
    answer.finish()
    page.open(answer.execution_id)
    ended(page, answer)
    page.proxy.cut_all()
    page.run("window.dispatchEvent(new Event('online'))")
    last, text = page.run("[stream.id, stream.text]")
    assert requests == [None]
    # One that kept its place asks once, and is told that nothing follows.
    page.open(answer.execution_id, after=last, text=text)
    page.wait("window.seen?.end")
    assert page.text == answer.text
    assert requests == [None, last]


def test_a_closed_stream_reads_no_more(pages, backend, lane):
    page = pages(FRAMINGS["replayed"][1])
    answer = browser.Answer(backend, lane, tokens=100)
    answer.write(50)
    page.open(answer.execution_id)
    page.wait_for_text(answer.text)
    seen = answer.text
    page.run("stream.close()")
    page.wait("seen.end === null")
    answer.finish()
    assert page.run("stream.state") == "closed"
    assert page.text == seen
    wait_until(lambda: page.site.call(_followers(page.site)) == 0)


async def _followers(site):
    return len(web.reading._Watch.of_loop(site.loop)._open)


def test_errors_of_the_page_do_not_stop_the_stream(pages, backend, lane):
    page = pages(FRAMINGS["replayed"][1])
    answer = browser.Answer(backend, lane, tokens=100)
    page.open(answer.execution_id)
    page.run("(() => { seen.attempts = seen.states = null })()")
    answer.write(50)
    page.proxy.cut_all()
    answer.finish()
    page.wait("stream.state === 'ended'")
    assert page.text == answer.text
