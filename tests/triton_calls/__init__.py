"""Per op, the calls that reach every launch setting of its Triton kernels; for `triton_compile`."""
