"""What the stages of tools.gpu_run time on a GPU; each runs alone too, and on the CPU to try it."""
