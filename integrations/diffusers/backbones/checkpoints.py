"""Configurations of published checkpoints, for what is to be said of them before they are here.

Each part says where its values are from: a public repository and the file in it. What it leaves out is the default of
the class in diffusers or transformers, which diffusers made those of the model that the class was written for. Sizes
are the defaults of the pipelines' calls in diffusers unless a checkpoint is named after another. What no public file
states is unknown: a part that is, is in `unknown` and in no figure, and checkpoints whose transformer is are in
`UNKNOWN_CHECKPOINTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """A component of a pipeline.

    Args:
        library: "diffusers" or "transformers".
        kind: name of the class.
        config: what differs from the class's defaults.
        source: where the values are from.
    """

    library: str
    kind: str
    config: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Args:
        hub_id: repository of the weights.
        pipeline: name of the class in diffusers.
        parts: by component.
        dtype: precision it was published in.
        size: frames, height and width it was made for.
        unknown: components whose configuration no public file states.
        options: of the pipeline.
    """

    hub_id: str
    pipeline: str
    parts: Mapping[str, Part]
    dtype: str
    size: tuple[int, int, int]
    unknown: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def part(kind: str, source: str, **config: Any) -> Part:
    """A component of diffusers."""
    return Part("diffusers", kind, config, source)


OWN_DEFAULTS = "diffusers, defaults of the class"
T5_XXL = Part(
    "transformers",
    "T5EncoderModel",
    {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
    "google/t5-v1_1-xxl, config.json (Raffel et al., arXiv 1910.10683)",
)  # fmt: skip
UMT5_XXL = Part(
    "transformers",
    "UMT5EncoderModel",
    {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 256384,
        "feed_forward_proj": "gated-gelu",
    },
    "google/umt5-xxl, config.json",
)  # fmt: skip
LLAMA = Part(
    "transformers",
    "LlamaModel",
    {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128320, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "hunyuanvideo-community/HunyuanVideo, text_encoder/config.json (Llama 3 8B of LLaVA)",
)  # fmt: skip
CLIP = Part(
    "transformers",
    "CLIPTextModel",
    {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "openai/clip-vit-large-patch14, config.json",
)  # fmt: skip


T5_11B = Part(
    "transformers",
    "T5EncoderModel",
    {"d_model": 1024, "d_ff": 65536, "d_kv": 128, "num_layers": 24, "num_heads": 128, "vocab_size": 32128},
    "Raffel et al., arXiv 1910.10683, section 3.7 (diffusers' Cosmos pipelines name google-t5/t5-11b)",
)
