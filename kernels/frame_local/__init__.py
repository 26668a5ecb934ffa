"""Frame-local attention: forward and backward kernels."""
