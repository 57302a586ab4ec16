"""``python -m tools.gpu_run``: all that needs a GPU, in minutes, by stages; see docs/gpu.md."""
