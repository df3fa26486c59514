"""Settings that all tests share: one thread each, no network, quiet libraries."""

import os
import sys
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
sys.path.insert(0, str(Path(__file__).parent))
