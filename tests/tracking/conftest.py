"""Makes `pixel_backbone.py` beside this file known to the tests of this folder."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

_FILE = pathlib.Path(__file__).with_name("pixel_backbone.py")
_SPEC = importlib.util.spec_from_file_location("pixel_backbone", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
sys.modules["pixel_backbone"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sys.modules["pixel_backbone"])
