"""Ray and DeepSpeed: replicas, the fit, the carry and the score drivers, the reduce. No arithmetic
beyond adding partial sums."""
