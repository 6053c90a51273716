"""The GPU: a check of every kernel and of the engine (`check`), then benchmarks (`kernels`, `engine`, both at once)."""
