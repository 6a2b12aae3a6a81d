"""CUDA: rows of a hop graph on an NVIDIA GPU, one captured launch a hop."""
