"""Checks for backbones, and tiny random models to run them on; offered as `corrdit.testing`."""
