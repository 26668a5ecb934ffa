"""Configurations of published checkpoints, for what is to be said of them before they are here.

Each entry says where its values are from. What it leaves out is the default of the class in diffusers or transformers,
which diffusers made those of the model that the class was written for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    hub_id: str
    pipeline: str
    parts: Mapping[str, Part]
    dtype: str
    size: tuple[int, int, int]


_T5_XXL = Part(
    "transformers",
    "T5EncoderModel",
    {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
    "google/t5-v1_1-xxl, config.json (Raffel et al., arXiv 1910.10683)",
)  # fmt: skip
_UMT5_XXL = Part(
    "transformers",
    "UMT5EncoderModel",
    {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 256384,
        "feed_forward_proj": "gated-gelu",
    },
    "google/umt5-xxl, config.json",
)  # fmt: skip
_LLAMA = Part(
    "transformers",
    "LlamaModel",
    {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128320, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "hunyuanvideo-community/HunyuanVideo, text_encoder/config.json (Llama 3 8B of LLaVA)",
)  # fmt: skip
_CLIP = Part(
    "transformers",
    "CLIPTextModel",
    {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "openai/clip-vit-large-patch14, config.json",
)  # fmt: skip


def _part(kind: str, source: str, **config: Any) -> Part:
    return Part("diffusers", kind, config, source)


_COGVIDEO = "diffusers, scripts/convert_cogvideox_to_diffusers.py"
_WAN = "diffusers, scripts/convert_wan_to_diffusers.py"
_OWN_DEFAULTS = "diffusers, defaults of the class"


def _cogvideox(
    hub_id: str, dtype: str, size: tuple[int, int, int], codec: Mapping[str, Any], **config: Any
) -> Checkpoint:
    source = _COGVIDEO if "patch_size_t" not in config else f"{hub_id}, transformer/config.json"
    ddim = {
        "snr_shift_scale": 3.0, "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }  # fmt: skip
    parts = {
        "text_encoder": _T5_XXL,
        "transformer": _part("CogVideoXTransformer3DModel", source, **config),
        "vae": _part("AutoencoderKLCogVideoX", _COGVIDEO, **codec),
        "scheduler": _part("CogVideoXDDIMScheduler", _COGVIDEO, **ddim),
    }
    return Checkpoint(hub_id, "CogVideoXPipeline", parts, dtype, size)


_FIVE_B = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}


def _wan(hub_id: str, size: tuple[int, int, int], **config: Any) -> Checkpoint:
    parts = {
        "text_encoder": _UMT5_XXL,
        "transformer": _part("WanTransformer3DModel", _WAN, **config),
        "vae": _part("AutoencoderKLWan", _WAN),
        "scheduler": _part("FlowMatchEulerDiscreteScheduler", _WAN, shift=3.0),
    }
    return Checkpoint(hub_id, "WanPipeline", parts, "bfloat16", size)


def _flow_matching(
    hub_id: str, pipeline: str, transformer: str, codec: str, size: tuple[int, int, int], encoders: Mapping[str, Part],
    **scheduler: Any,
) -> Checkpoint:  # fmt: skip
    parts = {
        **encoders,
        "transformer": _part(transformer, _OWN_DEFAULTS),
        "vae": _part(codec, _OWN_DEFAULTS),
        "scheduler": _part("FlowMatchEulerDiscreteScheduler", f"{hub_id}, scheduler_config.json", **scheduler),
    }
    return Checkpoint(hub_id, pipeline, parts, "bfloat16", size)


CHECKPOINTS: dict[str, Checkpoint] = {
    "cogvideox-2b": _cogvideox("THUDM/CogVideoX-2b", "float16", (49, 480, 720), {}),
    "cogvideox-5b": _cogvideox("THUDM/CogVideoX-5b", "bfloat16", (49, 480, 720), {"scaling_factor": 0.7}, **_FIVE_B),
    "cogvideox-1.5-5b": _cogvideox(
        "THUDM/CogVideoX1.5-5B",
        "bfloat16",
        (81, 768, 1360),
        {"scaling_factor": 0.7, "invert_scale_latents": True},
        **_FIVE_B,
        patch_size_t=2,
        patch_bias=False,
        sample_frames=81,
        sample_height=300,
        sample_width=300,
        max_text_seq_length=224,
    ),
    "hunyuanvideo": _flow_matching(
        "hunyuanvideo-community/HunyuanVideo",
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        "AutoencoderKLHunyuanVideo",
        (61, 544, 960),
        {"text_encoder": _LLAMA, "text_encoder_2": _CLIP},
        shift=7.0,
    ),
    "wan-2.1-1.3b": _wan(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (81, 480, 832), num_attention_heads=12, num_layers=30, ffn_dim=8960
    ),
    "wan-2.1-14b": _wan("Wan-AI/Wan2.1-T2V-14B-Diffusers", (81, 480, 832)),
    "ltx-video": _flow_matching(
        "Lightricks/LTX-Video",
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        "AutoencoderKLLTXVideo",
        (161, 512, 704),
        {"text_encoder": _T5_XXL},
        use_dynamic_shifting=True,
        shift_terminal=0.1,
    ),
    "mochi": _flow_matching(
        "genmo/mochi-1-preview",
        "MochiPipeline",
        "MochiTransformer3DModel",
        "AutoencoderKLMochi",
        (85, 480, 848),
        {"text_encoder": _T5_XXL},
        invert_sigmas=True,
    ),
}
"""By short name."""


def checkpoint_of(name: str) -> Checkpoint | None:
    """A checkpoint by its short name or hub id, whatever the case; None for one that is not known."""
    for short, checkpoint in CHECKPOINTS.items():
        if name.lower() in (short, checkpoint.hub_id.lower()):
            return checkpoint
    return None
