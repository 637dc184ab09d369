"""Every function is called with a key, and uses no key of another slot than those that it is called with."""

import re
from collections import defaultdict

from ff_fast import _library, keys
from ff_fast._core import hub as hub_core
from ff_fast.embedded import EmbeddedServer

from ..conftest import PROMPT, connect_raw
from ..shells import Opener
from .rights import ACL, Life, Monitor, _unquoted, allow, as_user, kind_of

# All others use keys of the same slot that are no keys of the call; a service that refuses this cannot run them.
DECLARED_ONLY = {
    "ff_cancel_flow",
    "ff_charge_budget",
    "ff_create_budget",
    "ff_delete_task",
    "ff_describe_flow",
    "ff_forget_hints",
    "ff_list_tasks",
    "ff_note_task",
    "ff_read_payload",
    "ff_read_summary",
    "ff_read_tags",
    "ff_read_task",
    "ff_release_charge",
    "ff_save_task",
    "ff_set_tags",
    "ff_version",
}


class Calls(Monitor):
    """What each function was called with, and what it used."""

    def undeclared(self):
        """Function -> kinds of the keys that it used and that no key of the call was; slots are checked on the way."""
        self._raw.echo("the end")
        found, slots = defaultdict(set), set()
        function, declared = "", set()
        for line in self._lines:
            heard = re.match(rb"\+\S+ \[\d+ (\S+)\] (.*)", line)
            arguments = [_unquoted(text) for text in re.findall(rb'"((?:[^"\\]|\\.)*)"', heard[2])]
            command = arguments[0].decode().lower()
            if arguments == [b"ECHO", b"the end"] or arguments == [b"echo", b"the end"]:
                return dict(found)
            if command in ("fcall", "fcall_ro"):
                function = arguments[1].decode()
                count = int(arguments[2])
                assert count, f"{function} is called without a key"
                declared = set(arguments[3 : 3 + count])
                slots = {keys.key_slot(key) for key in declared}
                found[function] |= set()
            elif heard[1] == b"lua" and command != "spublish":
                for key in self._keys(arguments):
                    if key not in declared:
                        assert keys.key_slot(key) in slots, f"{function} uses {key} of another slot"
                        found[function].add(kind_of(key))
        raise AssertionError("the server has closed MONITOR")

    def _keys(self, arguments):
        if not any(each.startswith(b"ff:") for each in arguments[1:]):
            return []
        found = self._raw.execute_command("COMMAND GETKEYS", *arguments)
        return [key.encode() if isinstance(key, str) else key for key in found]


def test_every_call_has_a_key_and_no_function_leaves_its_slot(monkeypatch):
    monkeypatch.setattr(hub_core, "LINGER_S", 0.1)
    with EmbeddedServer(**PROMPT) as server, connect_raw(server.url) as raw:
        raw.function_load(_library.source())
        raw.set(keys.PARTITIONS_CONFIG, 4)
        for name, rules in ACL.items():
            allow(raw, name, rules)
        monitor = Calls(raw, server.url.removeprefix("unix://"))
        opener = Opener("sync")
        try:
            Life(lambda user: opener(as_user(server, user)), raw, monitor).run()
            found = monitor.undeclared()
            (library,) = raw.function_list("ff_fast")
        finally:
            opener.close()
            monitor.close()
    names = {_field(each, b"name").decode() for each in _field(library, b"functions")}
    assert found.keys() == names
    assert {name for name, kinds in found.items() if not kinds} == DECLARED_ONLY


def _field(reply, name):
    return dict(zip(reply[::2], reply[1::2], strict=True))[name]
