"""CUDA kernels compiled by Triton at first use: loops only, contracts in fastembed/ops."""
