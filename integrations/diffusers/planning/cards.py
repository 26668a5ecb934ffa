"""Cards a plan is held against: memory, and the rate that the data sheet names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card.

    Args:
        name: of the model.
        gigabytes: of memory, 10^9 bytes. Most cards have 2^30 bytes for each; the difference, 7 %, is left for CUDA's
            context, libraries and fragments.
        teraflops: 10^12 floating-point operations a second of dense 16-bit products with 32-bit sums.
        source: of the rate.
    """

    name: str
    gigabytes: int
    teraflops: float
    source: str

    @property
    def bytes(self) -> int:
        """Memory that a plan may take."""
        return self.gigabytes * 10**9


CARDS = (
    Card("RTX 4080", 16, 97.5, "NVIDIA Ada GPU architecture, appendix A"),
    Card("RTX 4090", 24, 165.2, "NVIDIA Ada GPU architecture, appendix A"),
    Card("L40S", 48, 362.05, "NVIDIA L40S data sheet"),
    Card("H100 SXM", 80, 989.4, "NVIDIA H100 data sheet, without sparsity"),
    Card("H200 SXM", 141, 989.4, "NVIDIA H200 data sheet, without sparsity"),
)
"""One for each size."""
