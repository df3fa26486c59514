"""What Ray Data's processes import."""

import subprocess
import sys


def test_who_hands_blocks_to_replicas_takes_no_pytorch() -> None:
    code = "import sys; import msif_ray.cluster.workers; assert 'torch' not in sys.modules, 'it imports PyTorch'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
