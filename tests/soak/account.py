"""What was said while the soak ran: calls with their outcomes, acknowledged frames, completions, violations.

Processes tell it through files of JSON lines, one a process: what a killed process had written stays.
"""

import collections
import json
import time
from typing import NamedTuple

from ff_fast.errors import FFError, Outcome

from .job import CHILD

DONE, NOT_APPLIED, UNKNOWN = "done", "not applied", "unknown"


def outcome_of(error):
    """What a call's error says about the call; a cancelled call says nothing."""
    if isinstance(error, FFError) and error.outcome is Outcome.NOT_APPLIED:
        return NOT_APPLIED
    return UNKNOWN


class Said(NamedTuple):
    """One call that leaves a mark: ``what`` it did to an execution, the mark, and its outcome."""

    what: str
    mark: str
    outcome: str
    code: str


class Execution:
    """What is known of one execution."""

    def __init__(self, eid, job=None, created=DONE):
        self.eid = eid
        self.job = job
        self.created = created
        self.may_be_cancelled = False
        self.acknowledged = collections.Counter()
        """Attempt to the last sequence that a writer was told is stored."""
        self.said = []
        self.reads = []
        """What its readers brought: `tests.soak.load.Read`."""
        self.busy = 0
        """Number of calls and readers of it that are under way."""
        self.told = set()
        """Pairs of outcome and result that subscribers got; empty before the first one."""
        self.verified = False


class Account:
    """All that was said. Its log is the event log of the soak."""

    def __init__(self, folder):
        self.folder = folder
        self.executions = {}
        self.completions = {}
        """Subscriber to how often it was told of each execution."""
        self.refused_claims = {}
        """Worker instance of a claim that got nothing to what was said."""
        self.violations = []
        self.counts = collections.Counter()
        self.injected = collections.Counter()
        self.waitpoints = collections.deque()
        self.began = set()
        """Names of the processes that work."""
        self._began = time.monotonic()
        self._log = (folder / "events.log").open("w", buffering=1)
        self._read = {}

    def close(self):
        self._log.close()

    def event(self, text):
        self._log.write(f"{time.monotonic() - self._began:9.3f} {text}\n")

    def violation(self, text):
        self.violations.append(text)
        self.event(f"VIOLATION {text}")

    def inject(self, kind, detail=""):
        self.injected[kind] += 1
        self.event(f"fault {kind} {detail}")

    def warned(self, process, text):
        """A process was warned, for instance that frames are lost whose error nobody has seen."""
        self.counts["warnings"] += 1
        self.event(f"{process} was warned: {text}")

    # -- executions -----------------------------------------------------------------------------------------

    def created(self, eid, job, outcome=DONE):
        self.executions[eid] = Execution(eid, job, outcome)

    def said(self, eid, what, mark, error=None):
        """A call about *eid* that leaves *mark* has ended, with *error* unless it is done."""
        outcome = DONE if error is None else outcome_of(error)
        code = "" if error is None else getattr(error, "code", type(error).__name__)
        self.executions[eid].said.append(Said(what, mark, outcome, code))
        self.counts[f"{what} {outcome}"] += 1
        if error is not None:
            self.event(f"{what} of {eid[-36:]} {outcome}: {code}")

    def completed(self, subscriber, completion):
        eid = completion.execution_id
        self.completions[subscriber][eid] += 1
        if eid in self.executions:
            self.executions[eid].told.add((completion.outcome, completion.payload_bytes or b""))

    # -- files of the processes -------------------------------------------------------------------------------

    def read_files(self):
        """Take in what the processes have written since the last time."""
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                self._take(path.stem, json.loads(line))

    def _take(self, process, line):
        what, eid = line["what"], line.get("eid")
        if eid is not None and eid not in self.executions:
            # A worker has created it.
            self.executions[eid] = Execution(eid, CHILD, UNKNOWN)
        if what == "stored":
            known = self.executions[eid].acknowledged
            known[line["attempt"]] = max(known[line["attempt"]], line["sequence"])
        elif what == "began":
            self.began.add(process)
        elif what == "waitpoint":
            self.waitpoints.append(line)
        elif what == "warned":
            self.warned(process, line["text"])
        elif what == "complaint":
            self.violation(f"{process}: {line['text']}")


class Teller:
    """One process's file of JSON lines."""

    def __init__(self, path):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, PTH123 - it is open as long as the process lives

    def say(self, what, **more):
        self._file.write(json.dumps({"what": what, **more}).encode() + b"\n")
