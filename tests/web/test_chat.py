"""`ff-fast demo --web` in Chromium; with FF_FAST_SCREENSHOTS, the pictures of it for the documents."""

import base64
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ff_fast._demo import plan
from tests.conftest import ROOT
from tests.waiting import wait_until
from tests.web import browser

pytestmark = [pytest.mark.web, pytest.mark.timeout(120)]

PICTURES = os.environ.get("FF_FAST_SCREENSHOTS")
LARGEST_PICTURE = 150_000
RATE, SECONDS = 150, 10

BOTH = """
document.body.innerHTML = `<style>body { margin: 0; display: flex; gap: 8px; background: gray }
  iframe { border: 0; flex: 1; height: 100vh }</style><iframe src="${arguments[0]}"></iframe><iframe src="${arguments[0]}"></iframe>`
"""


@pytest.fixture
def chat(driver):
    """The demo as a user starts it: the address that it prints."""
    command = [sys.executable, "-m", "ff_fast", "demo", "--web", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--rate", str(RATE), "--seconds", str(SECONDS)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process, browser.closed_tabs(driver):
        line = process.stdout.readline()
        assert line.startswith("Open http://127.0.0.1:"), process.stderr.read()
        yield line.split()[1]
        # Ctrl-C, while a page still reads, ends all processes.
        started = descendants(process.pid)
        assert len(started) >= 2, "a worker and a server"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (130, "")
        wait_until(lambda: not any(map(runs, started)))


def descendants(pid):
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [child, *descendants(child)]
    return found


def runs(pid):
    return Path(f"/proc/{pid}").exists()


def picture(driver, name):
    if PICTURES is None:
        return
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    content = base64.b64decode(taken["data"])
    assert len(content) < LARGEST_PICTURE
    Path(PICTURES, f"{name}.png").write_bytes(content)


def test_a_chat_survives_reloads_a_second_tab_and_a_killed_worker(driver, chat):
    text = b"".join(plan.tokens(RATE * SECONDS)).decode()

    def run(expression):
        return driver.execute_script(f"return ({expression})")

    def shown():
        return run("document.getElementById('answer').textContent")

    def wait(expression, deadline_s=20):
        wait_until(lambda: run(f"Boolean({expression})"), deadline_s=deadline_s)

    def click(name):
        driver.execute_script(f"document.getElementById('{name}').click()")

    driver.switch_to.new_window("tab")
    driver.get(chat)
    click("ask")
    wait("window.stream?.text.length > 500")
    driver.refresh()
    wait("window.stream?.text.length > 1000")
    assert text.startswith(shown())
    assert "Alice" in run("document.getElementById('asked').textContent")

    first = driver.current_window_handle
    before = set(driver.window_handles)
    click("tab")
    wait_until(lambda: set(driver.window_handles) - before)
    (second,) = set(driver.window_handles) - before
    driver.switch_to.window(second)
    wait("window.stream?.text.length > 1500")
    click("kill")
    wait("stream.attempt === 1")
    picture(driver, "chat-successor")
    for tab in (first, second):
        driver.switch_to.window(tab)
        wait("document.getElementById('verdict').textContent")
        assert shown() == text
        assert (
            run("document.getElementById('verdict').textContent")
            == "✓ equal to what the worker sent"
        )
        assert run("stream.complete")
    picture(driver, "chat-end")

    click("ask")
    wait("stream.end === null && stream.text.length > 100")
    if PICTURES is not None:
        _of_two_readers(driver, run("location.href"))
        driver.switch_to.window(second)
    click("stop")
    wait("stream.state === 'ended'")
    wait("document.getElementById('verdict').textContent === 'cancelled'")
    stopped = shown()
    assert text.startswith(stopped)
    assert len(stopped) < len(text)
    # And one that is read when the demo is ended.
    click("ask")
    wait("stream.end === null && stream.text.length > 100")


def _of_two_readers(driver, address):
    """A picture of two pages that read the same answer."""
    driver.switch_to.new_window("tab")
    driver.get(address.partition("#")[0] + "ff_fast.js")
    size = driver.get_window_size().values()
    driver.set_window_size(1240, 620)
    driver.execute_script(BOTH, address)
    wait_until(
        lambda: driver.execute_script(
            "return [...document.querySelectorAll('iframe')].every((f) => f.contentWindow.stream?.text.length > 600)"
        )
    )
    picture(driver, "chat-two-tabs")
    driver.set_window_size(*size)
    driver.close()
