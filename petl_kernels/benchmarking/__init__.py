"""Measuring the ops: `petl-kernels bench`, and what the programs in benchmarks/ share with it."""
