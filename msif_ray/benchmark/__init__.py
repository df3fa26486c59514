"""The cost of every step beside a plain training pass of the same model over the same tokens (jobs/benchmark.py).

Only `through_ray` and `peers` need more than PyTorch and transformers, and import it when they are asked for.
"""
