"""What decides a run's result, as one short text that is the same in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def fingerprint(*facts: Any) -> str:
    """SHA-256 of facts: tensors, arrays and pictures by their values, functions by their names.

    Args:
        facts: what JSON can hold, tensors, arrays, pictures, functions, and lists, tuples and dictionaries of them.
    """
    digest = hashlib.sha256()
    for fact in facts:
        _take(digest, fact)
    return digest.hexdigest()


def _take(digest: Any, fact: Any) -> None:
    if isinstance(fact, torch.Tensor):
        digest.update(f"tensor {fact.dtype} {list(fact.shape)}".encode())
        digest.update(fact.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(fact, np.ndarray) or hasattr(fact, "__array_interface__"):
        array = np.asarray(fact)
        digest.update(f"array {array.dtype} {list(array.shape)}".encode())
        digest.update(array.tobytes())
    elif isinstance(fact, Mapping):
        _take(digest, [part for entry in sorted(fact.items(), key=lambda entry: str(entry[0])) for part in entry])
    elif isinstance(fact, (list, tuple)):
        digest.update(f"list {len(fact)}".encode())
        for entry in fact:
            _take(digest, entry)
    elif callable(fact):
        kind = fact if hasattr(fact, "__qualname__") else type(fact)
        # The address that stands in a function's text is another one in every process.
        digest.update(f"callable {kind.__module__}.{kind.__qualname__}".encode())
    else:
        digest.update(json.dumps(fact, default=repr).encode())
