"""What a training step costs: measures of one call, and the whole step in several variants (`petl-kernels profile`)."""

from petl_kernels.profiling.measures import ModuleTime, count_launches, module_time, saved_by_module, saved_bytes

__all__ = ["ModuleTime", "count_launches", "module_time", "saved_by_module", "saved_bytes"]
