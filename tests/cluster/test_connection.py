"""The Ray of a run without a cluster starts and ends without a word on the terminal, by a signal, too."""

import subprocess
import sys

import pytest

RUN = """
import os, ray, signal, sys, time
from msif_ray.connection import connected
class Restarted:
    def __init__(self, given): ...
with connected():
    actor = ray.remote(Restarted).options(num_cpus=0, max_restarts=1).remote(ray.put(1))  # as Ray Data's are
    level = ray.remote(lambda: os.environ["RAY_BACKEND_LOG_LEVEL"])
    print(ray.get(level.options(num_cpus=0).remote()))
    sys.stdout.flush()
    if sys.argv[1] == "group":
        os.killpg(os.getpgrp(), signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)
"""
ENDED = "msif: ended by SIGTERM; run the same command again to go on"


@pytest.mark.parametrize("sent_to", ["process", "group"])
def test_ray_says_nothing(no_shared_cluster: None, sent_to: str) -> None:
    command = [sys.executable, "-c", RUN, sent_to]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, start_new_session=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "fatal\n", f"{ENDED}\n")
