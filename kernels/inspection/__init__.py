"""Compiling kernels without a GPU and reading their machine code."""
