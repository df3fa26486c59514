"""Rank against agreement, time and memory on the demo's pair: `python jobs/rank_table.py --folder runs/ranks`."""

import argparse

from msif_ray.demo.ranks import rank_table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs/ranks", help="where the fit and the directions are kept")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--memory", type=float, default=2.0, help="GiB for directions; the rest is read from disk")
    given = parser.parse_args()
    rank_table(given.folder, given.queries, given.documents, int(given.memory * 2**30))
