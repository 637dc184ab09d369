"""The command ``ff-fast``: its demo, and its look at executions, with exit codes and texts."""

import base64
import contextlib
import io
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

import ff_fast
from ff_fast import Frame, FrameKind, PatchKind, StreamMode, cli, data, keys
from ff_fast._cli import read
from ff_fast._demo import check, plan
from ff_fast._demo import run as demo_run

from ..conftest import ROOT
from ..waiting import wait_until

UNKNOWN = "{fp:7}:00000000-0000-4000-8000-000000000000"


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def claimed(backend, lane):
    """An execution of the test's own lane and the handle of its first attempt."""
    eid = backend.create_execution(lane=lane)
    return eid, backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")


@pytest.fixture
def finished(backend, claimed):
    """The id of an execution that has streamed in every mode and has ended."""
    eid, handle = claimed
    with backend.open_writer(handle, mode=StreamMode.best_effort_live(15_000)) as writer:
        writer.write("Alice ")
        writer.write("was ")
        writer.write(b"\xff\x00", "image", mode=StreamMode.durable(), encoding="binary")
        writer.write(b'{"n":12345678901234567890.10}', mode=StreamMode.durable_summary())
        writer.write("beginning", mode=StreamMode.durable_summary(PatchKind.STRING_APPEND("/a")))
    backend.complete(handle)
    return eid


@pytest.fixture
def run(server, backend, monkeypatch, capfdbinary):
    """Run the command in this process on the test's server: exit code, stdout, stderr.

    The server has the library, which commands that look do not load.
    """
    monkeypatch.setenv(cli.URL_VARIABLE, server.url)

    def run(*argv: str) -> tuple[int, bytes, str]:
        code = cli.main(argv)
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return run


class Once:
    """A stop event that lets a loop run one round."""

    asked = False

    def is_set(self):
        asked, self.asked = self.asked, True
        return asked


def start(*argv: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, "-m", "ff_fast", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


# -- demo ------------------------------------------------------------------------------------------


def test_demo_compares_everything_and_says_so():
    with start("demo", "--rate", "2000", "--seconds", "1.5", "--plain") as process:
        out, err = process.communicate(timeout=40)
    assert (process.returncode, err) == (0, "")
    assert "\x1b" not in out
    assert "Everything that was sent arrived, byte for byte." in out
    rows = re.findall(r"^(\w[\w, ]*?)  +(\S.*?)  +(\S.*?)  +equal$", out, re.MULTILINE)
    assert [row[0] for row in rows] == [
        "tokens",
        "tool events",
        "summary patches",
        "summary, folded",
        "summary, stored",
        "order",
        "gaps",
        "ends",
    ]
    assert all(sent == arrived for _, sent, arrived in rows)
    assert rows[0][1].startswith("3000 frames, ")
    assert re.search(r"^write to reader: p50 [0-9.]+ ms, p99 [0-9.]+ ms", out, re.MULTILINE)


def test_demo_on_the_server_of_the_environment_leaves_an_execution_to_look_at(run):
    code, out, err = run("demo", "--seconds", "0.1", "--modes", "durable,summary", "--plain")
    assert (code, err) == (0, "")
    eid = re.search(rb"^execution (\S+)$", out, re.MULTILINE)[1].decode()
    assert b"tokens           0 frames" in out
    code, out, err = run("summary", eid)
    assert (code, err) == (0, "")
    assert orjson.loads(out)["tokens"] == 100


@pytest.mark.long
def test_nothing_of_the_demo_is_left_after_sigterm(tmp_path):
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    with subprocess.Popen(
        [sys.executable, "-m", "ff_fast", "demo", "--seconds", "60", "--plain"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().startswith("execution")
        assert process.stdout.readline().startswith("  1.")
        assert _named(tmp_path)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 143
    wait_until(lambda: not _named(tmp_path))
    wait_until(lambda: not list(tmp_path.iterdir()))


def _named(folder):
    """The processes whose command line or environment names a folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (each / "cmdline").read_bytes() + (each / "environ").read_bytes()
            if str(folder).encode() in told:
                found.append(each.name)
    return found


def test_demo_interrupted_hands_its_execution_back(server, run):
    with start("demo", "--seconds", "60", "--plain", "--url", server.url) as process:
        eid = process.stdout.readline().split()[1]
        assert process.stdout.readline().startswith("  1.")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    assert "Traceback" not in out
    _, out, _ = run("info", "--json", eid)
    assert orjson.loads(out)["state"] == "failed"


def test_the_processes_of_the_demo_import_what_the_command_imports(server, tmp_path):
    (tmp_path / "ff_fast").mkdir()
    (tmp_path / "ff_fast" / "__init__.py").write_text("raise ImportError('not this one')")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ff_fast", "demo", "--seconds", "0.1", "--url", server.url],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=40,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_demo_on_a_server_that_is_not_there(run):
    code, out, err = run("demo", "--plain", "--url", "unix:///nowhere/valkey.sock")
    assert (code, out) == (1, b"")
    assert err.startswith("ff-fast: There is no socket at /nowhere/valkey.sock; ")


def test_the_chat_names_a_port_that_is_taken(server, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("demo", "--web", "--port", str(port), "--url", server.url)
    assert (code, out) == (1, b"")
    assert err == f"ff-fast: Port {port} cannot be used: Address already in use. Try --port 0.\n"


def test_the_chat_refuses_a_port_that_is_none(run):
    code, _, err = run("demo", "--web", "--port", "65536", "--url", "unix:///unused")
    assert (code, err) == (2, "ff-fast: --port is a number up to 65535.\n")


def test_the_chat_says_what_it_needs(server, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "ff_fast._demo.chat", raising=False)
    monkeypatch.delattr("ff_fast._demo.chat", raising=False)
    code, _, err = run("demo", "--web", "--url", server.url)
    assert code == 1
    assert "pip install 'ff_fast[web]' uvicorn" in err


def test_demo_exit_code_follows_the_comparison(run, monkeypatch):
    monkeypatch.setattr(
        demo_run, "run", lambda url, plan, view: ["1 tokens were sent and 0 arrived."]
    )
    code, _, err = run("demo", "--plain", "--url", "unix:///unused")
    assert (code, err) == (1, "ff-fast: 1 tokens were sent and 0 arrived.\n")


PLAN = plan.Plan(1000.0, 700)
WANT = check.expected(PLAN)
STORED = (WANT.document, WANT.version)


def differences(got: check.Transcript, stored: tuple[bytes, int] = STORED) -> dict[str, str]:
    checks = check.compare(WANT, got, stored)
    return {one.name: one.difference for one in checks if one.difference}


def test_compare_finds_nothing_where_nothing_differs():
    assert differences(WANT) == {}


@pytest.mark.parametrize(
    "name, changes, sentence",
    [
        ("tokens", {"tokens": WANT.tokens[:-1]}, "700 tokens were sent and 699 arrived"),
        ("tokens", {"tokens": [*WANT.tokens[:9], b"?", *WANT.tokens[10:]]}, "at number 10"),
        # The same bytes cut elsewhere are other frames.
        ("tokens", {"tokens": [b"".join(WANT.tokens[:2]), b"", *WANT.tokens[2:]]}, "at number 1"),
        ("tool events", {"events": WANT.events[::-1]}, "at number 1"),
        ("summary patches", {"patches": [*WANT.patches, WANT.patches[-1]]}, "and 19 arrived"),
        ("summary, folded", {"version": 3}, "must be at version 18 and is at 3"),
        ("summary, folded", {"document": WANT.document + b" "}, "first difference is at byte"),
        ("order", {"sequences": WANT.sequences[1:]}, "reader's frame 1 has sequence 2"),
        ("order", {"sequences": [1, *WANT.sequences]}, "reader's frame 2 has sequence 1"),
        ("order", {"sequences": WANT.sequences[:-1]}, "is missing"),
        ("gaps", {"gaps": ["3 frames from 5, trimmed"]}, "3 frames from 5, trimmed"),
        ("ends", {"ends": []}, "it ended not at all"),
        ("ends", {"ends": WANT.ends * 2}, "it ended 2 times"),
        ("ends", {"ends": ["producer_lost"]}, "it ended 1 times (producer_lost)"),
    ],
)
def test_compare_names_what_differs(name, changes, sentence):
    found = differences(WANT._replace(**changes))
    assert found.keys() == {name}
    assert sentence in found[name]


@pytest.mark.parametrize("stored", [(b"", 0), (WANT.document[:-1], WANT.version)])
def test_compare_looks_at_the_stored_summary_too(stored):
    assert differences(WANT, stored).keys() == {"summary, stored"}


def test_the_tokens_of_the_demo_are_its_text():
    text = data.text().encode()
    once = plan.tokens(10_000)
    assert b"".join(once).startswith(text + text[:100])


def test_the_window_of_the_demo_holds_what_its_ttl_promises():
    for rate in (1, 1000, 100_000):
        config = plan.Plan(rate, 1).live_mode.config
        # Without the ceiling only age trims a frame.
        assert config.maxlen_ceiling >= 2 * rate * config.ttl_ms / 1000


# -- tail ------------------------------------------------------------------------------------------


def test_tail_writes_payloads_as_they_are(run, finished):
    code, out, err = run("tail", finished)
    assert code == 0
    assert out == b'Alice was \xff\x00{"n":12345678901234567890.10}beginning'
    assert err == "ff-fast: end: attempt_success\n"


def test_tail_chooses(run, finished):
    assert run("tail", finished, "--type", "token", "--exclude-best-effort")[1] == (
        b'{"n":12345678901234567890.10}beginning'
    )
    assert run("tail", finished, "--type", "image", "--type", "none")[1] == b"\xff\x00"


def test_tail_names_the_types_of_frames_where_it_is_asked_to(run, finished):
    code, out, err = run("tail", finished, "--types")
    assert (code, out) == (0, b'Alice was \xff\x00{"n":12345678901234567890.10}beginning')
    assert re.findall("type: (.*)", err) == ["token", "image", "token"]


def test_tail_shows_types_on_a_terminal_at_the_begin_of_a_line(run, finished, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, err = run("tail", finished)
    assert code == 0
    assert out == b'Alice was \n\xff\x00\n{"n":12345678901234567890.10}beginning\n'
    assert re.findall("type: (.*)", err) == ["token", "image", "token"]


def test_tail_as_json_and_from_a_cursor(run, finished):
    code, out, err = run("tail", "--json", "--attempt", "0", finished)
    assert (code, err) == (0, "")
    lines = [orjson.loads(line) for line in out.splitlines()]
    assert [line.get("sequence") for line in lines] == [1, 2, 3, 4, 5, None]
    assert lines[0]["payload"] == "Alice "
    assert base64.b64decode(lines[2]["payload_base64"]) == b"\xff\x00"
    assert lines[2]["encoding"] == "binary"
    assert lines[4]["patch_kind"] == "string-append"
    assert (lines[4]["pointer"], lines[4]["summary_version"]) == ("/a", 2)
    assert lines[5] == {"end": "attempt_success", "cursor": lines[5]["cursor"]}
    _, out, _ = run("tail", "--json", "--after", lines[3]["cursor"], finished)
    assert [orjson.loads(line) for line in out.splitlines()] == lines[4:]


def test_tail_reports_a_gap(run, finished, raw):
    eid = finished
    raw.delete(keys.live(eid, 0))
    code, out, err = run("tail", eid)
    assert (code, out) == (0, b"\xff\x00")
    assert re.match(r"ff-fast: gap: 1 to 2 are missing \(\w+\)\nff-fast: gap: 4 to 5 are", err)
    _, out, _ = run("tail", "--json", eid)
    assert orjson.loads(out.splitlines()[0])["first_missing"] == 1


def test_follow_writes_what_every_attempt_streams(run, backend, lane):
    policy = ff_fast.RetryPolicy(1, delay=0)
    eid = backend.create_execution(lane=lane, namespace=lane, retry=policy)
    claim = {"lane": lane, "worker_id": "w", "policy": ff_fast.ClaimPolicy.with_max_wait(5)}
    handle = backend.claim(**claim)
    backend.append_frame(handle, Frame("one", FrameKind.STDOUT))
    backend.fail(handle, "no luck", ff_fast.FailureClass.TRANSIENT)
    backend.supervise(ff_fast.ScannerFilter(namespace=lane), stop=Once())
    handle = backend.claim(**claim)
    patch = StreamMode.durable_summary()
    backend.append_frame(handle, Frame('{"a":1}', FrameKind.STDOUT, mode=patch))
    backend.fail(handle, "no luck")

    code, out, err = run("follow", eid)
    assert (code, out) == (0, b'one{"a":1}')
    assert err == (
        "ff-fast: attempt: 0\nff-fast: attempt: 1\nff-fast: end: attempt_failure (no luck)\n"
    )
    code, out, err = run("follow", eid, "--json")
    lines = [orjson.loads(line) for line in out.splitlines()]
    assert [line.get("attempt", line.get("payload")) for line in lines[:4]] == [
        0,
        "one",
        1,
        '{"a":1}',
    ]
    end = {"end": "attempt_failure", "outcome": "failed", "error": "no luck"}
    assert lines[4].items() > end.items()
    _, out, _ = run("follow", eid, "--json", "--after", lines[2]["cursor"])
    assert [orjson.loads(line) for line in out.splitlines()] == lines[3:]
    _, out, _ = run("follow", eid, "--json", "--snapshot")
    assert orjson.loads(out.splitlines()[0])["snapshot"] == {"a": 1}


def test_tail_ends_on_ctrl_c_with_where_to_go_on_and_on_a_closed_pipe_in_silence(
    backend, claimed, server, run
):
    eid, handle = claimed
    for how in ("interrupt", "close"):
        backend.append_frame(handle, Frame(b"x", FrameKind.STDOUT))
        with start("tail", "--url", server.url, eid) as process:
            assert process.stdout.read(1) == "x"
            if how == "interrupt":
                process.send_signal(signal.SIGINT)
            else:
                process.stdout.close()
                process.stdout = None
                backend.append_frame(handle, Frame(b"y", FrameKind.STDOUT))
            _, err = process.communicate(timeout=40)
        if how == "close":
            assert (process.returncode, err) == (141, "")
            continue
        assert process.returncode == 130
        said = re.fullmatch(r"ff-fast: go on with: ff-fast (.*)\n", err)[1]
        # Another attempt may have begun until then, whose frames have other ids.
        assert said.endswith(f"--attempt 0 --url {shlex.quote(server.url)}")
    backend.complete(handle)
    code, out, _ = run(*shlex.split(said), "--types")
    # A frame may be shown again, where the interrupt came as it was shown.
    assert (code, out) in ((0, b"xy"), (0, b"xxy"))


def test_a_tail_that_an_error_breaks_off_says_where_to_go_on(run, finished, monkeypatch):
    def broken(self, *_, **__):
        yield from itertools.islice(tail(self, finished, 0), 2)
        raise ff_fast.DeadlineExceeded

    tail = ff_fast.ValkeyBackend.tail
    _, out, _ = run("tail", finished, "--json")
    cursor = orjson.loads(out.splitlines()[1])["cursor"]
    monkeypatch.setattr(ff_fast.ValkeyBackend, "tail", broken)
    code, out, err = run("tail", finished)
    assert (code, out) == (1, b"Alice was ")
    again, error = err.splitlines()
    assert (
        again
        == f"ff-fast: go on with: {shlex.join(['ff-fast', 'tail', finished, '--after', cursor, '--attempt', '0'])}"
    )
    assert error == f"ff-fast: {ff_fast.DeadlineExceeded()}"


def test_the_command_that_goes_on_has_no_password():
    argv = ["follow", UNKNOWN, "--url", "valkey://user:s3cret@127.0.0.1:1", "--json"]
    again = read._again(cli._parser().parse_args(argv), "1-0", None)
    assert again == f"ff-fast follow '{UNKNOWN}' --after 1-0 --json"


# -- summary and info ------------------------------------------------------------------------------


def test_summary(run, finished):
    code, out, err = run("summary", finished)
    assert (code, err) == (0, "")
    assert out == b'{"n":12345678901234567890.10,"a":"beginning"}\n'
    code, out, err = run("summary", "--json", finished)
    assert b'"document":{"n":12345678901234567890.10,"a":"beginning"}' in out
    fields = orjson.loads(out)
    assert fields["version"] == 2
    assert fields["cursor"].endswith("-5")


def test_summary_of_an_execution_without_one(run, claimed):
    code, out, err = run("summary", claimed[0])
    assert (code, out, err) == (1, b"", "ff-fast: Attempt 0 has no summary.\n")


def test_info_of_a_finished_execution(run, finished):
    code, out, err = run("info", "--json", finished)
    assert (code, err) == (0, "")
    fields = orjson.loads(out)
    assert (fields["state"], fields["attempts"], fields["attempt"]) == ("completed", 1, 0)
    assert fields["frames"] == 5
    # The log holds the durable frame and the end.
    assert fields["log_entries"] == 2
    assert 2 <= fields["live_entries"] <= 4
    assert (fields["summary_version"], fields["summary_bytes"]) == (2, 45)
    assert fields["closed_reason"] == "attempt_success"
    assert fields["last_id"].endswith("-5")
    code, out, err = run("info", finished)
    assert (code, err) == (0, "")
    assert re.search(rb"^state +completed$", out, re.MULTILINE)


def test_info_of_one_that_runs_shows_its_lease_and_no_secret(run, claimed, raw):
    eid, handle = claimed
    code, out, err = run("info", eid)
    assert (code, err) == (0, "")
    assert re.search(rb"^lease left s +(2\d|30)\.\d$", out, re.MULTILINE)
    assert re.search(rb"^worker +w-1$", out, re.MULTILINE)
    assert handle.fields().lease_id.encode() not in out


def test_info_of_one_that_waits(run, backend, lane):
    eid = backend.create_execution(lane=lane)
    code, out, err = run("info", "--json", eid)
    assert (code, err) == (0, "")
    assert orjson.loads(out)["state"] == "waiting"
    assert b"frames" not in out
    assert b"_entries" not in out


def test_info_of_one_whose_worker_was_lost(run, backend, lane, wait_until):
    eid = backend.create_execution(lane=lane)
    backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1", lease_ttl_ms=1)
    wait_until(lambda: backend.describe_stream(eid).lease_left == 0)
    fields = orjson.loads(run("info", "--json", eid)[1])
    assert (fields["state"], fields["lease_left_s"]) == ("active", 0.0)
    # As a reader is told.
    assert fields["closed_reason"] == "producer_lost" == backend.read_stream(eid).end_reason


@pytest.mark.parametrize("attempt", ["1", "7"])
def test_info_of_an_attempt_that_is_not_there(run, finished, attempt):
    code, out, err = run("info", finished, "--attempt", attempt)
    assert (code, out, err) == (1, b"", f"ff-fast: {ff_fast.AttemptNotFound()}\n")


def test_info_prints_no_control_codes(run, backend, lane):
    eid = backend.create_execution(lane=lane)
    handle = backend.claim(lane=lane, worker_id="w", worker_instance_id="w")
    backend.fail(handle, "\x1b[2Jgone")
    _, out, _ = run("info", eid)
    assert rb"\x1b[2Jgone" in out
    assert b"\x1b" not in out


# -- supervise -------------------------------------------------------------------------------------


def test_supervise_brings_back_what_a_lost_worker_held(backend, server, lane, wait_until):
    mine, other = [
        backend.create_execution(lane=lane, namespace=namespace)
        for namespace in (f"n-{lane}", f"other-{lane}")
    ]
    for _ in range(2):
        backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1", lease_ttl_ms=1)
    with start("supervise", "--url", server.url, "--namespace", f"n-{lane}") as process:
        wait_until(lambda: backend.describe(mine).state == "waiting")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=40)
    assert (process.returncode, out, err) == (130, "", "")
    assert backend.describe(other).state == "active"
    handle = backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
    assert (handle.fields().execution_id, handle.fields().attempt_index) == (mine, 1)


# -- executions ------------------------------------------------------------------------------------


def test_submit_inspect_signal_cancel(run, backend, lane, monkeypatch):
    code, out, err = run(
        "submit", "a prompt", "--lane", lane, "--tag", "team.name=core", "--retries", "2"
    )
    assert (code, err) == (0, "")
    eid = out.decode().strip()
    handle = backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
    assert handle.fields().execution_id == eid
    assert backend.read_payload(handle) == b"a prompt"

    waitpoint = backend.create_waitpoint(handle)
    token = waitpoint.hmac_token
    spec = ff_fast.WaitpointSpec(ff_fast.WaitpointKind.SIGNAL_NAME, b"go", token)
    backend.append_frame(handle, ff_fast.Frame(b"x", ff_fast.FrameKind.EVENT))
    backend.suspend(handle, spec)
    monkeypatch.delenv("FF_FAST_TOKEN", raising=False)
    assert run("signal", eid, waitpoint.waitpoint_id, "go")[0] == 2
    monkeypatch.setenv("FF_FAST_TOKEN", token.reveal())
    code, out, err = run("signal", eid, waitpoint.waitpoint_id, "stop")
    assert (code, out.decode().split()[1]) == (1, "signal_ignored_matcher_failed")
    assert err.startswith("ff-fast: Nothing at this waitpoint waits for a signal of this name")
    code, out, err = run("signal", eid, waitpoint.waitpoint_id, "go", "--payload", "yes")
    assert (code, err) == (0, "")
    assert out.decode().split()[1] == "resume_condition_satisfied"

    code, out, err = run("inspect", eid)
    assert (code, err) == (0, "")
    seen = orjson.loads(out)
    assert (seen["state"], seen["tags"]) == ("waiting", {"team.name": "core"})
    assert [step["to_state"] for step in seen["history"]] == ["active", "suspended", "waiting"]
    assert (seen["attempts"][0]["frames"], seen["retry"]["max_retries"]) == (1, 2)
    for secret in (token.reveal(), handle.fields().lease_id):
        assert secret.encode() not in out

    assert run("cancel", eid, "--reason", "enough")[:2] == (0, b"cancelled\n")
    assert backend.describe(eid).cancellation_reason == "enough"
    assert run("cancel", eid)[:2] == (0, b"cancelled\n")


def test_submit_takes_the_payload_from_stdin(server, backend, lane):
    command = ("submit", "--url", server.url, "--lane", lane)
    with start(*command, stdin=subprocess.PIPE) as process:
        out, err = process.communicate("from a pipe", timeout=40)
    assert (process.returncode, err) == (0, "")
    handle = backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
    assert handle.fields().execution_id == out.strip()
    assert backend.read_payload(handle) == b"from a pipe"


def test_submit_says_that_it_reads_from_a_terminal(run, backend, lane, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"typed"))
    typed.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", typed)
    code, out, err = run("submit", "--lane", lane, "--handler", "h")
    assert code == 0
    assert "read from here" in err
    assert backend.describe(out.decode().strip()).handler == "h"
    capabilities = ff_fast.CapabilitySet(["handler:h"])
    assert backend.read_payload(backend.claim(lane=lane, capabilities=capabilities)) == b"typed"


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["follow", "tail", "summary", "info"])
def test_unknown_and_malformed_executions(run, command):
    code, out, err = run(command, UNKNOWN)
    assert (code, out, err) == (1, b"", f"ff-fast: {ff_fast.ExecutionNotFound()}\n")
    code, out, err = run(command, "no-id")
    assert (code, out) == (2, b"")
    assert re.fullmatch(r"ff-fast: .+\.\n", err)


@pytest.mark.parametrize(
    "argv",
    [
        ["info", UNKNOWN, "--url", "http://127.0.0.1"],
        ["info", UNKNOWN, "--attempt", "-1"],
        ["tail", UNKNOWN, "--after", "now"],
        ["follow", UNKNOWN, "--after", "now"],
        ["demo", "--rate", "0"],
        ["demo", "--rate", "nan"],
        ["demo", "--rate", "100000", "--seconds", "3600"],
        ["demo", "--modes", "some"],
        ["dance"],
    ],
)
def test_wrong_usage(run, argv):
    # --attempt 0: without it the execution is looked up first.
    more = ["--attempt", "0"] if argv[0] == "tail" else []
    code, out, err = run(*argv, *more)
    assert (code, out) == (2, b"")
    assert re.fullmatch(r"ff-fast: [^\n]+\n", err)


def test_without_a_command_it_prints_its_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out == run("--help")[1]
    assert b"\n    inspect " in out


WAYS = {
    # As the shell writes it: what is said on stderr, and the exit code.
    "submit x >&-": ("", 0),
    "submit x 2>&-": ("", 0),
    "submit <&-": ("", 0),
    "submit x > /dev/full": (
        "ff-fast: The output cannot be written: No space left on device.\n",
        1,
    ),
    "ls --json > /dev/full": (
        "ff-fast: The output cannot be written: No space left on device.\n",
        1,
    ),
    "--help > /dev/full": ("ff-fast: The output cannot be written: No space left on device.\n", 1),
    "--help | true; exit ${PIPESTATUS[0]}": ("", 141),
    "ls | true; exit ${PIPESTATUS[0]}": ("", 141),
    r"submit $'\xff'": ("", 0),
}


@pytest.mark.parametrize("way", WAYS)
def test_streams_that_are_closed_or_full(server, backend, way):
    backend.create_execution()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), cli.URL_VARIABLE: server.url}
    environment.pop("PYTHONUNBUFFERED", None)
    ended = subprocess.run(
        ["/bin/bash", "-c", f'"$0" -Werror -m ff_fast {way}', sys.executable],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.stderr, ended.returncode) == WAYS[way]


def test_a_payload_of_the_command_line_need_not_be_text(run, backend, lane):
    run("submit", "--lane", lane, os.fsdecode(b"\xff\xe2\x82\xac"))
    assert backend.read_payload(backend.claim(lane=lane)) == b"\xff\xe2\x82\xac"


def test_what_the_terminal_has_no_letter_for_is_escaped(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(cli, "_run", lambda argv: print("\u20ac") or 0)
    assert cli.main(()) == 0
    assert sys.stdout.buffer.getvalue() == b"\\u20ac\n"


def test_no_server_named(run, monkeypatch):
    monkeypatch.delenv(cli.URL_VARIABLE)
    code, _, err = run("info", UNKNOWN)
    assert (code, err) == (2, "ff-fast: Name the server with --url, or in FF_FAST_URL.\n")


def test_a_server_that_is_not_there_is_not_waited_for(run):
    began = time.monotonic()
    code, _, err = run("info", UNKNOWN, "--url", "valkey://:s3cret@127.0.0.1:1")
    assert code == 1
    assert err.startswith("ff-fast: Connecting to 127.0.0.1:1 was refused; ")
    assert "s3cret" not in err
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    "command",
    [
        *("", "demo", "follow", "tail", "summary", "info", "inspect"),
        *("submit", "signal", "cancel", "supervise"),
    ],
)
def test_help(run, command):
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(b"usage: ff-fast")


def test_version(run):
    assert run("--version")[1] == f"ff-fast {ff_fast.__version__}\n".encode()
