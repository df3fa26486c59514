"""What `ray job submit` runs: `python jobs/attribute.py run.yaml` does what `msif run run.yaml` does."""

import sys

from msif_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
