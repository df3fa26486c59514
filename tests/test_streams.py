"""A process that was started with a standard stream closed."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from msif_ray.streams import open_streams
open_streams()
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2, "the file would get what libraries write"
    os.dup(2)
    print("out", file=sys.stdout)
    print("err", file=sys.stderr)
    os.write(2, b"by number")
"""


@pytest.mark.parametrize("closed", ["", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(closed: str, tmp_path: object) -> None:
    command = f'exec "$0" -c "$1" "$2" {closed}'
    arguments = [sys.executable, PROGRAM, f"{tmp_path}/file"]
    done = subprocess.run(["sh", "-c", command, *arguments], capture_output=True, text=True, timeout=60)
    said = ("" if ">&- 2" in closed else "out\n", "" if closed else "err\nby number")
    assert (done.returncode, done.stdout, done.stderr) == (0, *said)
