"""DiTFlow's evaluation: what its table 1 and its ablations vary, and what was published for it.

Source: "Video Motion Transfer with Diffusion Transformers" (arXiv 2412.07776), table 1 and the ablations on
CogVideoX-5B. Motion fidelity is that of the released script, with CoTracker's tracks of 55 x 55 points; image quality
the raw cosine of CLIP ViT-B/32. Both are means over 50 DAVIS videos and three prompts each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Args:
        name: of its folder.
        changes: of `TransferSettings`, by name.
        published: (motion fidelity, image quality or None) by the layers of the model: 30 is CogVideoX-2B, 42 is 5B.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[int, tuple[float, float | None]] = field(default_factory=dict)


def _five(fidelity: float) -> dict[int, tuple[float, float | None]]:
    return {42: (fidelity, None)}


COMPARISONS: dict[str, tuple[Variant, ...]] = {
    "table1": (
        Variant("backbone", {"method": "backbone"}, {30: (0.513, 0.313), 42: (0.523, 0.318)}),
        Variant(
            "injection", {"method": "injection", "injection_blocks": (0,)}, {30: (0.544, 0.318), 42: (0.608, 0.319)}
        ),
        Variant("motionclone", {"method": "motionclone"}, {30: (0.565, 0.303), 42: (0.634, 0.318)}),
        Variant("smm", {"method": "smm", "loss": "released"}, {30: (0.688, 0.312), 42: (0.766, 0.315)}),
        Variant("moft", {"method": "moft"}, {30: (0.504, 0.312), 42: (0.726, 0.318)}),
        Variant("ditflow", {"method": "ditflow"}, {30: (0.726, 0.317), 42: (0.785, 0.319)}),
    ),
    "blocks": tuple(
        Variant(f"blocks-{name}", {"blocks": blocks}, _five(fidelity))
        for name, blocks, fidelity in (
            ("0", (0,), 0.620),
            ("10", (10,), 0.670),
            ("20", (20,), 0.797),
            ("30", (30,), 0.558),
            ("10-15-20", (10, 15, 20), 0.804),
        )
    ),
    "guided-share": tuple(
        Variant(f"guided-{round(100 * share)}", {"guided_share": share}, _five(fidelity))
        for share, fidelity in ((0.0, 0.623), (0.2, 0.797), (0.4, 0.813), (0.8, 0.803), (1.0, 0.799))
    ),
    "optimisation-steps": tuple(
        Variant(f"optimised-{steps}", {"optimisation_steps": steps}, _five(fidelity))
        for steps, fidelity in ((1, 0.769), (5, 0.797), (10, 0.803))
    ),
    "temperature": tuple(
        Variant(f"temperature-{value:g}", {"temperature": value}, _five(fidelity))
        for value, fidelity in ((1.0, 0.763), (2.0, 0.797), (5.0, 0.799), (10.0, 0.777))
    ),
    "optimizer": tuple(
        Variant(name, {"optimizer": name}, _five(fidelity))
        for name, fidelity in (("adam", 0.797), ("adamw", 0.803), ("sgd", 0.623))
    ),
}
"""By the name that `corrdit transfer TABLE --compare` takes."""
