"""Soft displacement: forward and backward kernels, for each head and for averaged logits."""
