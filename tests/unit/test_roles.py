"""The roles: their lines in the guide, and those that the command prints."""

import re
from pathlib import Path

import pytest

from ff_fast import cli
from ff_fast._core.roles import FROM_NOTHING, IN_A_CLUSTER, ROLES

GUIDE = (Path(__file__).parents[2] / "docs/guides/deployment.md").read_text("utf-8")


def printed(capsys, *argv):
    assert cli.main(["acl", *argv]) == 0
    return capsys.readouterr().out


def test_the_guide_has_what_the_command_prints(capsys):
    section = GUIDE[GUIDE.index("\n## Access rights") :]
    assert section.split("```\n")[1] == printed(capsys)


def test_each_role_is_printed_as_it_is(capsys):
    for name, role in ROLES.items():
        comment, line = printed(capsys, name).splitlines()
        assert comment == f"# {role.does}"
        found = re.fullmatch(r"ACL SETUSER (\S+) (.*)", line)
        assert found[1] == f"ff_{name}"
        assert found[2].startswith(f"{FROM_NOTHING} ")
        assert set(found[2].removeprefix(FROM_NOTHING).split()) == set(role.rules.split())


def test_a_user_of_two_roles_has_the_rights_of_both_and_no_rule_twice(capsys):
    *_, line = printed(capsys, "producer", "reader", "--user", "gateway", "--cluster").splitlines()
    user, *rules = line.removeprefix("ACL SETUSER ").split()
    assert user == "gateway"
    nothing = FROM_NOTHING.split()
    assert rules[: len(nothing)] == nothing
    assert len(set(rules)) == len(rules)
    both = {rule for name in ("producer", "reader") for rule in ROLES[name].rules.split()}
    covered = {rule for rule in both if rule.startswith("%") and rule[2:] in rules}
    assert set(rules) == both - covered | {*nothing, *IN_A_CLUSTER.split()}


@pytest.mark.parametrize("user", ["", "x on nopass +@all", "x\n", "\x1b[31m", "é"])
def test_a_name_that_brings_rules_of_its_own_is_wrong_usage(user, capsys):
    assert cli.main(["acl", "reader", "--user", user]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "name of a user" in told.err


@pytest.mark.parametrize("argv", [("root",), ("--user", "x")])
def test_what_is_no_role_is_wrong_usage(argv, capsys):
    assert cli.main(["acl", *argv]) == 2
    assert "role" in capsys.readouterr().err
