"""Families of video diffusion transformers: how each is laid out, encoded for and called."""
