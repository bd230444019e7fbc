"""CPU kernels compiled by Numba at first use: loops only, contracts in fastembed/ops.

Every kernel is single-threaded and releases the GIL; the pipeline's pool is the
parallelism. No kernel is cached on disk: compiling takes a second, and Numba's cache
races between processes (numba issue 4807).
"""
