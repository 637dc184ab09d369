"""Headless Chromium, a page that follows a stream, and a worker whose words are known."""

import contextlib
import itertools
import json
import random
import shutil
import urllib.parse

from starlette.responses import HTMLResponse
from starlette.routing import Route

from ff_fast import PatchKind, StreamMode, keys, web
from tests.waiting import wait_until
from tests.web.sites import WORKER

PROGRAMS = ("chromium", "chromedriver")
ABSENT = "There is no {}: install Chromium and its driver (Debian: apt install chromium chromium-driver)."

FLAGS = (
    "--headless=new",
    # A container runs it as root, and has little shared memory.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--window-size=760,760",
)


def start():
    """Return a driver of a new browser. Selenium is installed by ``make test-web`` alone."""
    from selenium import webdriver

    found = {program: shutil.which(program) for program in PROGRAMS}
    for program, path in found.items():
        assert path is not None, ABSENT.format(program)
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(found["chromedriver"]))


@contextlib.contextmanager
def closed_tabs(driver):
    """Close the tabs that are opened meanwhile, and with them their connections."""
    first = driver.current_window_handle
    try:
        yield
    finally:
        for tab in driver.window_handles:
            if tab != first:
                driver.switch_to.window(tab)
                driver.close()
        driver.switch_to.window(first)


# -- the page --------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<meta charset="utf-8"><link rel="icon" href="data:,"><pre id="text"></pre>
<script type="module">
  import { follow } from "/ff_fast.js";
  const { url, ...options } = %s;
  const text = document.getElementById("text");
  window.seen = { states: [], attempts: [], gaps: [], events: [], changes: 0, frames: 0, longest: 0, shrunk: 0 };
  const frame = () => { seen.frames += 1; requestAnimationFrame(frame); };
  requestAnimationFrame(frame);
  window.stream = follow(url, {
    element: text,
    onState: (state) => seen.states.push(state),
    onAttempt: (attempt) => seen.attempts.push(attempt.attempt_index),
    onGap: (gap) => seen.gaps.push(gap),
    onEvent: (event) => seen.events.push(event.type),
    onText() {
      seen.changes += 1;
      seen.shrunk += text.textContent.length < seen.longest;
      seen.longest = Math.max(seen.longest, text.textContent.length);
    },
    ...options,
  });
  stream.done.then((end) => (seen.end = end), (error) => (seen.error = [error.name, error.status, error.message]));
</script>
"""


def routes(requests, *, stream=web.StreamResponse, **options):
    """Routes of a site whose page at ``/page`` follows the stream ``/s/{id}``.

    Args:
        requests: Gets the place that each request for a stream has named; None for the beginning.
    """

    def make(backend):
        async def read(request):
            requests.append(request.headers.get("last-event-id"))
            return stream(backend, request.path_params["id"], request, **options)

        async def stop(request):
            return await web.stop_response(backend, request.path_params["id"], request)

        async def page(request):
            return HTMLResponse(PAGE % request.query_params["options"].replace("<", "\\u003c"))

        return [
            Route("/ff_fast.js", web.client_script),
            Route("/page", page),
            Route("/s/{id}", read),
            Route("/s/{id}/stop", stop, methods=["POST"]),
        ]

    return make


class Pages:
    """What the tests do with the browser."""

    def __init__(self, driver, origin, proxy):
        self.driver = driver
        self.origin = origin
        self.proxy = proxy

    def open(self, execution_id, **options):
        options = {"url": f"/s/{keys.url_id(execution_id)}", "json": True, **options}
        query = urllib.parse.urlencode({"options": json.dumps(options)})
        self.driver.get(f"{self.origin}/page?{query}")

    def new_tab(self):
        self.driver.switch_to.new_window("tab")
        return self.driver.current_window_handle

    def run(self, expression):
        return self.driver.execute_script(f"return ({expression})")

    @property
    def text(self):
        """What a person sees."""
        return self.run("document.getElementById('text').textContent")

    def wait(self, expression, deadline_s=20.0):
        wait_until(lambda: self.run(f"Boolean({expression})"), deadline_s=deadline_s)

    def wait_for_text(self, text, deadline_s=20.0):
        """Wait until the page has as many characters; then they are these."""
        self.wait(
            f"document.getElementById('text').textContent.length >= {utf16(text)}", deadline_s
        )
        assert self.text == text

    def protocol(self, method, **params):
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(method, params)

    def network(self, *, on):
        """Without a network, connections die in silence, and no new ones are made."""
        if not on:
            self.proxy.swallow()
        self.protocol("Network.enable")
        self.protocol(
            "Network.emulateNetworkConditions",
            offline=not on,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )


def utf16(text):
    """The length of *text* in JavaScript."""
    return len(text.encode("utf-16-le")) // 2


# -- the worker ------------------------------------------------------------------------------------

WORDS = (
    *("Alice ", "was ", "naïve", " – ", "“why?” ", "größer ", "日本語", "한국어 ", "العربية ", "हिन्दी ", "𝕯𝖔𝖉𝖔 "),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈 ", "e\u0301", "\n", "\r\n", "\r", "\t", "\0", "<b>&amp;</b>", "data: x\n\n", "id: 7\n", "\u2028", "\ufeff"),
)  # fmt: skip


def words(seed, size):
    """A text of many scripts of *size* bytes or a few more."""
    chosen = random.Random(seed)
    text = ""
    while len(text.encode()) < size:
        text += chosen.choice(WORDS)
    return text


class Answer:
    """An execution whose worker writes *tokens* tokens of 1 to 8 bytes, which mostly end in the middle of a character.

    Args:
        window_ms: Tokens are best-effort frames, and a patch of the summary follows where a character ends; None
            makes them durable frames.
    """

    def __init__(self, backend, lane, *, tokens=2_000, seed=11, window_ms=None):
        self._backend = backend
        chosen = random.Random(seed)
        raw = words(seed, 10 * tokens).encode()
        self.tokens = []
        at = 0
        for _ in range(tokens):
            size = chosen.randint(1, 8)
            self.tokens.append(raw[at : at + size])
            at += size
        # The last one completes its character.
        while raw[at] & 0xC0 == 0x80:
            self.tokens[-1] += raw[at : at + 1]
            at += 1
        self.execution_id = backend.create_execution(lane=lane)
        self.handle = backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)
        self._writer = backend.open_writer(self.handle, retention_maxlen=100_000)
        self._window_ms = window_ms
        self._sent = 0
        self._folded = b""

    @property
    def raw(self):
        return b"".join(self.tokens[: self._sent])

    @property
    def text(self):
        """What was sent so far, as far as its characters are whole."""
        return self.raw.decode("utf-8", "ignore")

    def write(self, count=None):
        """Send the next *count* tokens, or all that are left.

        Best-effort tokens go on to the end of a character, and are in the summary then: they do not stay.
        """
        until = len(self.tokens) if count is None else self._sent + count
        while self._sent < until or (self._window_ms is not None and not self._fold(1)):
            token = self.tokens[self._sent]
            self._sent += 1
            if self._window_ms is None:
                self._writer.write(token, "token")
            else:
                self._writer.write(
                    token, "token", mode=StreamMode.best_effort_live(self._window_ms)
                )
                self._fold(60)
        self._writer.flush()

    def _fold(self, size):
        """Append at least *size* bytes to the summary; return whether it has everything."""
        new = self.raw[len(self._folded) :]
        if len(new) >= size and whole(new):
            self._folded += new
            self._writer.write(
                new, "patch", mode=StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
            )
            return True
        return not new

    def keep(self):
        """Write durable frames from here on."""
        self._window_ms = None

    def finish(self):
        self.write()
        self._writer.close()
        self._backend.complete(self.handle)


def whole(raw):
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def split_in_characters(tokens):
    """How many tokens end in the middle of a character."""
    raw = b"".join(tokens)
    ends = list(itertools.accumulate(map(len, tokens)))[:-1]
    return sum(raw[end] & 0xC0 == 0x80 for end in ends)
