"""What all kernels share: tile primitives, tile tables, device tables, the launch."""
