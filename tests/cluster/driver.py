"""A driver process of its own, to be killed: `python driver.py run.yaml` on the cluster of RAY_ADDRESS."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import ray
    from cluster import spy

    from msif_ray.cli import main

    passed = {name: os.environ[name] for name in (spy.EVENTS, spy.SECONDS)}
    environment = {"worker_process_setup_hook": spy.install, "env_vars": passed}
    ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    sys.argv = ["msif", "run", sys.argv[1]]
    main()
