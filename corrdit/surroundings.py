"""What a caller may have changed for its whole process, and how a call keeps it out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ordinary_defaults() -> Iterator[None]:
    """Inside, tensors are float32 and on the CPU unless something says otherwise, as in a fresh process.

    Models and schedulers of diffusers make tables in the default dtype on the default device; under
    `torch.set_default_dtype(torch.float64)` or `torch.set_default_device("meta")` they would be others.
    """
    with contextlib.ExitStack() as stack:
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
