"""What Ray Data's processes import."""

import subprocess
import sys


def test_who_hands_blocks_to_replicas_takes_no_pytorch() -> None:
    """Nor with a replica's handle, for which Ray imports the module that its class is in."""
    code = (
        "import sys; import msif_ray.cluster.workers, msif_ray.cluster.replica; "
        "late = {'torch', 'transformers', 'huggingface_hub.hf_api'} & sys.modules.keys(); "
        "assert not late, f'it imports {late}'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
