"""The suite of `benchmarks/run.py --suite gpu`: every op, and training steps, on one GPU."""
