"""Influence mathematics in pure PyTorch: no Ray, no DeepSpeed; it runs alone on one device."""
