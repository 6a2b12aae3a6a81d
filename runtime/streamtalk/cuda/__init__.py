"""CUDA: a thin driver protocol, and the one-launch frame built on it."""
