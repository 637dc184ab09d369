"""What publishes and installs: workflows, hooks, and what pyproject.toml claims. None of them runs here, so their steps are tasks that do."""

import re
import runpy
import shlex
import sys
import sysconfig
import tomllib

import pytest
import yaml

from tools import test_pythons as pythons

from ..conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOWS = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in FILES}
JOBS = [(file, name, job) for file, flow in WORKFLOWS.items() for name, job in flow["jobs"].items()]
STEPS = [(file, step) for file, _, job in JOBS for step in job.get("steps", ())]
CLAIMED = [
    line.rpartition(" ")[2]
    for line in PROJECT["project"]["classifiers"]
    if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
]


def exists(command: str) -> bool:
    program, *arguments = shlex.split(command)
    if program == "make":
        return arguments[0] in TARGETS
    return (ROOT / program).is_file()


def test_every_step_is_a_task_or_a_script_of_the_repository():
    commands = [step["run"] for _, step in STEPS if "run" in step]
    assert len(commands) >= 5
    assert not [command for command in commands if "\n" in command or not exists(command)]


def test_ci_has_every_task_of_the_workflows():
    ci = (ROOT / ".ci/run").read_text("utf-8")
    tasks = {step["run"].split()[1] for _, step in STEPS if step.get("run", "").startswith("make ")}
    assert {"docs", "sdist", "test-pythons", "wheels"} <= tasks
    assert not [task for task in tasks if not re.search(rf"^make {task}\b", ci, re.MULTILINE)]


def test_every_hook_is_a_task():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    assert all(exists(hook["entry"]) for hook in hooks[0]["hooks"])


def test_every_action_is_pinned_by_a_commit_and_names_its_version():
    lines = [line for path in FILES for line in path.read_text("utf-8").splitlines()]
    used = [line.split("uses:", 1)[1].strip() for line in lines if "uses:" in line]
    assert len(used) >= 10
    for action in used:
        if action.startswith("./"):
            assert (ROOT / action).is_file()
        else:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    # One version of each in all of them.
    pins = {action for action in used if not action.startswith("./")}
    assert len(pins) == len({action.partition("@")[0] for action in pins})


def test_a_workflow_starts_without_rights_and_a_job_asks_for_its_own():
    assert all(flow["permissions"] == {} for flow in WORKFLOWS.values())
    assert all("permissions" in job for _, _, job in JOBS)
    writes = {
        (file, name): sorted(right for right, kind in job["permissions"].items() if kind == "write")
        for file, name, job in JOBS
    }
    assert {job: rights for job, rights in writes.items() if rights} == {
        ("docs.yml", "deploy"): ["id-token", "pages"],
        ("publish.yml", "publish"): ["id-token"],
    }
    checkouts = [step for _, step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_a_release_is_published_from_an_environment_with_attestations_and_no_secret():
    job = WORKFLOWS["publish.yml"]["jobs"]["publish"]
    assert job["environment"]["name"] == "pypi"
    # What builds and what publishes are apart: nothing of the repository runs where the token is.
    assert not [step for step in job["steps"] if "run" in step or "checkout" in step["uses"]]
    assert job["steps"][-1]["with"]["attestations"] is True
    assert not [path for path in FILES if "secrets." in path.read_text("utf-8")]


def test_every_python_that_is_claimed_is_tested_and_built():
    assert CLAIMED == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["project"]["requires-python"] == f">={CLAIMED[0]}"
    assert WORKFLOWS["test.yml"]["jobs"]["suite"]["strategy"]["matrix"]["python"] == CLAIMED
    make = (ROOT / "Makefile").read_text("utf-8")
    (tested,) = re.findall(r"^PYTHONS := (.*)$", make, re.MULTILINE)
    assert tested.split() == [f"python{version}" for version in CLAIMED]
    wheels = PROJECT["tool"]["cibuildwheel"]["build"]
    assert {f"cp{version.replace('.', '')}-*" for version in CLAIMED} <= set(wheels)
    # A free-threaded build would be cp314t-*.
    assert all(re.fullmatch(r"cp3\d\d-\*", pattern) for pattern in wheels)


def test_the_project_has_one_home():
    home = PROJECT["project"]["urls"]["Homepage"]
    owner, name = re.fullmatch(r"https://github\.com/([\w-]+)/(\w+)", home).groups()
    for url in PROJECT["project"]["urls"].values():
        assert url.startswith((home, f"https://{owner}.github.io/{name}/"))
    assert f"{home}/security/advisories/new" in (ROOT / "SECURITY.md").read_text("utf-8")


def test_setup_refuses_a_free_threaded_python(monkeypatch):
    monkeypatch.setitem(sysconfig.get_config_vars(), "Py_GIL_DISABLED", 1)
    with pytest.raises(SystemExit, match=r"does not support free-threaded Python: install it with"):
        runpy.run_path(str(ROOT / "setup.py"))


def a_python(folder, name, text):
    folder.mkdir(parents=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name


def test_a_python_is_found_where_the_first_on_path_does_not_run(tmp_path, monkeypatch):
    a_python(tmp_path / "shims", "python3.99", "exit 127")
    real = a_python(tmp_path / "versions/3.99.1/bin", "python3.99", "echo 3.99.1")
    monkeypatch.setenv("PATH", str(tmp_path / "shims"), prepend=":")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert pythons.find("python3.99") == (real, "3.99.1")
    assert pythons.find("python3.98") is None


def test_a_run_without_any_python_fails_and_names_those_that_it_missed(capsys):
    assert pythons.main(["python3.98", "--", "-q"]) == 1
    said = capsys.readouterr()
    assert said.out == "python3.98 is not on this machine\n"
    assert "none of these Pythons is on this machine: python3.98" in said.err


def test_a_failure_on_one_python_is_that_of_the_run(monkeypatch, capsys):
    codes = {"3.97.0": 0, "3.98.0": 1}
    monkeypatch.setattr(pythons, "find", lambda name: (sys.executable, f"{name[6:]}.0"))
    monkeypatch.setattr(pythons, "suite", lambda python, version, rest: codes[version])
    assert pythons.main(["python3.97"]) == 0
    assert pythons.main(["python3.98", "python3.97"]) == 1
    assert "python3.98 3.98.0: failed (pytest: 1)" in capsys.readouterr().out
