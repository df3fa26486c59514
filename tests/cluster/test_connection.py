"""The Ray of a run without a cluster starts and ends without a word on the terminal."""

import subprocess
import sys

RUN = """
import os, ray
from msif_ray.connection import connected
with connected():
    level = ray.remote(lambda: os.environ["RAY_BACKEND_LOG_LEVEL"])
    print(ray.get(level.options(num_cpus=0).remote()))
"""


def test_ray_says_nothing(no_shared_cluster: None) -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fatal\n", "")
