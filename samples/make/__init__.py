"""How the sample family was made: on the CPU, with one thread a process, from fixed seeds."""

import os

# Set before NumPy and PyTorch are loaded: sums that are split over threads depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
