"""Which tests run beside which: a run of its own, in two processes, with the conftest.py of these tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PLAIN = """
import time

import pytest
import ray


@pytest.mark.parametrize("number", range(3))
def test_it(number):
    with pytest.raises(RuntimeError, match="who starts a Ray cluster asks for"):
        ray.init("127.0.0.1:1")
    time.sleep(0.1)
"""
# Put together here: a module with the whole name in it is of the group of those that ask for the machine.
CLUSTER = "cluster"
ALONE = f"""
import time

import pytest


@pytest.mark.parametrize("number", range(3))
def test_it(number, no_shared_{CLUSTER}):
    time.sleep(0.1)
"""
SHARING = ALONE.replace("no_shared_", "ray_")
# In place of the cluster that there would be.
OWN = f"""

@pytest.fixture
def ray_{CLUSTER}():
    pass
"""


def test_what_needs_the_machine_comes_first_and_in_one_process(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    contents = {"a": PLAIN, "b": ALONE, "c": PLAIN, "d": SHARING + OWN, "e": PLAIN}
    for name, content in contents.items():
        (tmp_path / f"test_{name}.py").write_text(content)
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    found = re.findall(r"\[(gw\d)\].*PASSED test_(.)\.py", done.stdout)
    assert len(found) == 3 * len(contents), done.stdout + done.stderr
    processes = {name: {process for process, other in found if other == name} for name in contents}
    assert all(len(each) == 1 for each in processes.values())
    assert processes["b"] == processes["d"] != processes["a"] == processes["c"]
    (process,) = processes["d"]
    assert [name for where, name in found if where == process][:6] == [*"dddbbb"]
