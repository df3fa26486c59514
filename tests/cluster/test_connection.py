"""The Ray of a run without a cluster starts and ends without a word on the terminal, by a signal, too."""

import subprocess
import sys

RUN = """
import os, ray, signal, time
from msif_ray.connection import connected
class Restarted:
    def __init__(self, given): ...
with connected():
    actor = ray.remote(Restarted).options(num_cpus=0, max_restarts=1).remote(ray.put(1))  # as Ray Data's are
    level = ray.remote(lambda: os.environ["RAY_BACKEND_LOG_LEVEL"])
    print(ray.get(level.options(num_cpus=0).remote()))
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)
    except SystemExit as ended:
        print(ended)
"""
ENDED = "msif: ended by SIGTERM; run the same command again to go on"


def test_ray_says_nothing(no_shared_cluster: None) -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fatal\n{ENDED}\n", "")
