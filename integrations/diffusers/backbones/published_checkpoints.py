"""What is known of the published checkpoints, by family; `checkpoints` says how, and finds one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corrdit.integrations.diffusers.backbones.checkpoints import (
    CLIP,
    LLAMA,
    OWN_DEFAULTS,
    T5_11B,
    T5_XXL,
    UMT5_XXL,
    Checkpoint,
    Part,
    part,
)

_WAN = "diffusers, scripts/convert_wan_to_diffusers.py"
_WAN_22_CODEC: dict[str, Any] = {
    "base_dim": 160, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 256,
    "scale_factor_temporal": 4, "scale_factor_spatial": 16, "patch_size": 2, "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}  # fmt: skip
"""Of its statistics only how many there are, which is all that a plan asks."""


def _steps(kind: str, source: str, **config: Any) -> dict[str, Part]:
    return {"scheduler": part(kind, source, **config)}


def _unipc(shift: float, source: str) -> dict[str, Part]:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return _steps("UniPCMultistepScheduler", source, **flow, flow_shift=shift)


_COGVIDEO = "diffusers, scripts/convert_cogvideox_to_diffusers.py"
_COGVIDEO_STEPS = _steps(
    "CogVideoXDDIMScheduler", _COGVIDEO, snr_shift_scale=3.0, beta_end=0.012, beta_schedule="scaled_linear",
    beta_start=0.00085, clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
)  # fmt: skip
_FIVE_B: dict[str, Any] = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
_ONE_FIVE: dict[str, Any] = {
    **_FIVE_B, "patch_size_t": 2, "patch_bias": False, "sample_frames": 81, "sample_height": 300, "sample_width": 300,
    "max_text_seq_length": 224,
}  # fmt: skip
_GIVEN_IMAGE: dict[str, Any] = {"in_channels": 32}


def _cogvideox(
    hub_id: str, size: tuple[int, int, int], codec: Mapping[str, Any], dtype: str = "bfloat16", **config: Any
) -> Checkpoint:
    parts = {
        "text_encoder": T5_XXL,
        "transformer": part("CogVideoXTransformer3DModel", _COGVIDEO, **config),
        "vae": part("AutoencoderKLCogVideoX", _COGVIDEO, **codec),
        **_COGVIDEO_STEPS,
    }
    image = "ImageToVideo" if "I2V" in hub_id else ""
    return Checkpoint(hub_id, f"CogVideoX{image}Pipeline", parts, dtype, size)


_COGVIDEO_CODEC: dict[str, Any] = {"scaling_factor": 0.7}
_COGVIDEO_15_CODEC: dict[str, Any] = {"scaling_factor": 0.7, "invert_scale_latents": True}

_SMALL_WAN: dict[str, Any] = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_LARGE_WAN: dict[str, Any] = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_WAN_IMAGE: dict[str, Any] = {"in_channels": 36}
_WAN_CLIP: dict[str, Any] = {"image_dim": 1280, "added_kv_proj_dim": 5120}


def _wan(
    hub_id: str,
    size: tuple[int, int, int] = (81, 480, 832),
    pipeline: str = "WanPipeline",
    *,
    kind: str = "WanTransformer3DModel",
    source: str = _WAN,
    shift: float = 3.0,
    codec: Mapping[str, Any] | None = None,
    second: bool = False,
    options: Mapping[str, Any] | None = None,
    **config: Any,
) -> Checkpoint:
    transformer = part(kind, source, **config)
    parts = {
        "text_encoder": UMT5_XXL,
        "transformer": transformer,
        **({"transformer_2": transformer} if second else {}),
        "vae": part("AutoencoderKLWan", _WAN, **(codec or {})),
        **_unipc(shift, source),
    }
    # Vision encoders are CLIP's, loaded by the script from its repository.
    unknown = ("image_encoder",) if "image_dim" in config else ()
    return Checkpoint(hub_id, pipeline, parts, "bfloat16", size, unknown, options or {})


_SKYREELS = "diffusers, scripts/convert_skyreelsv2_to_diffusers.py"
_ANYFLOW = "diffusers, scripts/convert_anyflow_to_diffusers.py (the options of Wan 2.1's)"
_IMAGE = "WanImageToVideoPipeline"
_VACE: dict[str, Any] = {"kind": "WanVACETransformer3DModel", "pipeline": "WanVACEPipeline", "vace_in_channels": 96}


def _skyreels(name: str, size: tuple[int, int, int], image: bool = False, **config: Any) -> Checkpoint:
    kind, given = "SkyReelsV2Transformer3DModel", {**_LARGE_WAN, **({**_WAN_IMAGE, **_WAN_CLIP} if image else {})}
    return _wan(
        f"Skywork/SkyReels-V2-{name}-Diffusers",
        size,
        "SkyReelsV2ImageToVideoPipeline" if image else "SkyReelsV2Pipeline",
        kind=kind,
        source=_SKYREELS,
        shift=1.0,
        **{**given, **config},
    )


def _flow_matching(
    hub_id: str,
    pipeline: str,
    size: tuple[int, int, int],
    parts: Mapping[str, Part],
    steps: Mapping[str, Any],
    source: str,
    *,
    unknown: tuple[str, ...] = (),
    dtype: str = "bfloat16",
) -> Checkpoint:
    scheduler = _steps("FlowMatchEulerDiscreteScheduler", source, **steps)
    return Checkpoint(hub_id, pipeline, {**parts, **scheduler}, dtype, size, unknown)


_HUNYUAN = "diffusers, scripts/convert_hunyuan_video_to_diffusers.py"
_HUNYUAN_15 = "diffusers, scripts/convert_hunyuan_video1_5_to_diffusers.py"


def _hunyuan(
    name: str, size: tuple[int, int, int], pipeline: str = "HunyuanVideoPipeline", **config: Any
) -> Checkpoint:
    parts = {
        "text_encoder": LLAMA,
        "text_encoder_2": CLIP,
        "transformer": part("HunyuanVideoTransformer3DModel", _HUNYUAN, **config),
        "vae": part("AutoencoderKLHunyuanVideo", _HUNYUAN),
    }
    return _flow_matching(f"hunyuanvideo-community/{name}", pipeline, size, parts, {"shift": 7.0}, _HUNYUAN)


def _hunyuan15(name: str, size: tuple[int, int, int], target: int, task: str, shift: float) -> Checkpoint:
    parts = {
        "transformer": part("HunyuanVideo15Transformer3DModel", _HUNYUAN_15, target_size=target, task_type=task),
        "vae": part("AutoencoderKLHunyuanVideo15", _HUNYUAN_15),
    }
    image = "ImageToVideo" if task == "i2v" else ""
    return _flow_matching(
        f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{name}",
        f"HunyuanVideo15{image}Pipeline",
        size,
        parts,
        {"shift": shift},
        _HUNYUAN_15,
        unknown=("text_encoder", "text_encoder_2", *(("image_encoder",) if image else ())),
    )


_LTX = "diffusers, scripts/convert_ltx_to_diffusers.py"
_LTX2 = "diffusers, scripts/convert_ltx2_to_diffusers.py"
_LTX_STEPS: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "shift_terminal": 0.1,
}
_COSMOS = "diffusers, scripts/convert_cosmos_to_diffusers.py"
_COSMOS_2B: dict[str, Any] = {"num_attention_heads": 16, "num_layers": 28}
_COSMOS_7B: dict[str, Any] = {"num_attention_heads": 32, "num_layers": 28}
_COSMOS_14B: dict[str, Any] = {"num_attention_heads": 40, "num_layers": 36}
_COSMOS_2: dict[str, Any] = {"in_channels": 17, "extra_pos_embed_type": None}


def _cosmos1(name: str, image: bool, **config: Any) -> Checkpoint:
    parts = {
        "text_encoder": T5_11B,
        "transformer": part("CosmosTransformer3DModel", _COSMOS, in_channels=17 if image else 16, **config),
        "vae": part("AutoencoderKLCosmos", _COSMOS, latents_mean=None, latents_std=None),
        **_steps(
            "EDMEulerScheduler", _COSMOS, sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras",
            num_train_timesteps=1000, prediction_type="epsilon", rho=7.0, final_sigmas_type="sigma_min",
        ),
    }  # fmt: skip
    pipeline = "CosmosVideoToWorldPipeline" if image else "CosmosTextToWorldPipeline"
    return Checkpoint(f"nvidia/Cosmos-1.0-Diffusion-{name}", pipeline, parts, "bfloat16", (121, 704, 1280))


def _cosmos2(name: str, **config: Any) -> Checkpoint:
    parts = {
        "text_encoder": T5_11B,
        "transformer": part("CosmosTransformer3DModel", _COSMOS, **_COSMOS_2, **config),
        "vae": part("AutoencoderKLWan", _COSMOS),
    }
    hub_id, size = f"nvidia/Cosmos-Predict2-{name}-Video2World", (93, 704, 1280)
    return _flow_matching(hub_id, "Cosmos2VideoToWorldPipeline", size, parts, {"use_karras_sigmas": True}, _COSMOS)


def _cosmos25(name: str, **config: Any) -> Checkpoint:
    projected = {
        "rope_scale": (1.0, 3.0, 3.0), "use_crossattn_projection": True, "crossattn_proj_in_channels": 100352,
        "encoder_hidden_states_channels": 1024,
    }  # fmt: skip
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "sigma_max": 200.0, "sigma_min": 0.01}
    parts = {
        "transformer": part("CosmosTransformer3DModel", _COSMOS, **_COSMOS_2, **projected, **config),
        "vae": part("AutoencoderKLWan", _COSMOS),
        **_steps("UniPCMultistepScheduler", _COSMOS, use_karras_sigmas=True, **flow),
    }
    pipeline, size = "Cosmos2_5_PredictBasePipeline", (93, 704, 1280)
    return Checkpoint(f"nvidia/Cosmos-Predict2.5-{name}", pipeline, parts, "bfloat16", size, ("text_encoder",))


_LITE: dict[str, Any] = {"model_dim": 1792, "ff_dim": 7168, "axes_dims": (16, 24, 24), "time_dim": 512}
_PRO: dict[str, Any] = {
    "model_dim": 4096, "ff_dim": 16384, "axes_dims": (32, 48, 48), "time_dim": 1024, "num_text_blocks": 4,
    "num_visual_blocks": 60,
}  # fmt: skip


def _kandinsky5(name: str, file: str, config: Mapping[str, Any]) -> Checkpoint:
    source = f"kandinskylab/kandinsky-5, configs/{file}"
    channels = {"in_visual_dim": 16, "out_visual_dim": 16, "visual_cond": True}
    parts = {
        "text_encoder_2": CLIP,
        "transformer": part("Kandinsky5Transformer3DModel", source, **channels, **config),
        "vae": part("AutoencoderKLHunyuanVideo", source),
    }
    kind = "I2V" if "I2V" in name else "T2V"
    return _flow_matching(
        f"kandinskylab/Kandinsky-5.0-{name}-sft-5s-Diffusers",
        f"Kandinsky5{kind}Pipeline",
        (121, 512, 768),
        parts,
        {"shift": 5.0},
        "unknown; the step between timesteps is in no figure",
        unknown=("text_encoder", "scheduler"),
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    "cogvideox-2b": _cogvideox("THUDM/CogVideoX-2b", (49, 480, 720), {}, "float16"),
    "cogvideox-5b": _cogvideox("THUDM/CogVideoX-5b", (49, 480, 720), _COGVIDEO_CODEC, **_FIVE_B),
    "cogvideox-5b-i2v": _cogvideox(
        "THUDM/CogVideoX-5b-I2V", (49, 480, 720), _COGVIDEO_CODEC, **_FIVE_B, **_GIVEN_IMAGE,
        use_learned_positional_embeddings=True,
    ),
    "cogvideox-1.5-5b": _cogvideox("THUDM/CogVideoX1.5-5B", (81, 768, 1360), _COGVIDEO_15_CODEC, **_ONE_FIVE),
    "cogvideox-1.5-5b-i2v": _cogvideox(
        "THUDM/CogVideoX1.5-5B-I2V", (81, 768, 1360), _COGVIDEO_15_CODEC, **_ONE_FIVE, **_GIVEN_IMAGE, ofs_embed_dim=512
    ),
    "hunyuanvideo": _hunyuan("HunyuanVideo", (61, 544, 960)),
    "hunyuanvideo-i2v": _hunyuan(
        "HunyuanVideo-I2V", (129, 720, 1280), "HunyuanVideoImageToVideoPipeline", image_condition_type="token_replace"
    ),
    "hunyuanvideo-i2v-33ch": _hunyuan(
        "HunyuanVideo-I2V-33ch", (129, 720, 1280), "HunyuanVideoImageToVideoPipeline", in_channels=33,
        guidance_embeds=False, image_condition_type="latent_concat",
    ),
    "hunyuanvideo-1.5-480p": _hunyuan15("480p_t2v", (121, 480, 848), 640, "t2v", 5.0),
    "hunyuanvideo-1.5-480p-i2v": _hunyuan15("480p_i2v", (121, 480, 848), 640, "i2v", 5.0),
    "hunyuanvideo-1.5-720p": _hunyuan15("720p_t2v", (121, 720, 1280), 960, "t2v", 9.0),
    "hunyuanvideo-1.5-720p-i2v": _hunyuan15("720p_i2v", (121, 720, 1280), 960, "i2v", 7.0),
    "wan-2.1-1.3b": _wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", **_SMALL_WAN),
    "wan-2.1-14b": _wan("Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    "wan-2.1-i2v-480p": _wan("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", pipeline=_IMAGE, **_WAN_IMAGE, **_WAN_CLIP),
    "wan-2.1-i2v-720p": _wan(
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", (81, 720, 1280), _IMAGE, **_WAN_IMAGE, **_WAN_CLIP
    ),
    "wan-2.1-flf2v-720p": _wan(
        "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", (81, 720, 1280), _IMAGE, shift=16.0, **_WAN_IMAGE, **_WAN_CLIP,
        pos_embed_seq_len=514,
    ),
    "wan-2.1-vace-1.3b": _wan(
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers", **_VACE, **_SMALL_WAN, vace_layers=[*range(0, 30, 2)]
    ),
    "wan-2.1-vace-14b": _wan("Wan-AI/Wan2.1-VACE-14B-diffusers", **_VACE, vace_layers=[*range(0, 40, 5)]),
    "wan-2.2-t2v-a14b": _wan("Wan-AI/Wan2.2-T2V-A14B-Diffusers", second=True, options={"boundary_ratio": 0.875}),
    "wan-2.2-i2v-a14b": _wan(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers", pipeline=_IMAGE, second=True, options={"boundary_ratio": 0.9}, **_WAN_IMAGE
    ),
    "wan-2.2-ti2v-5b": _wan(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers", (121, 704, 1280), shift=5.0, codec=_WAN_22_CODEC,
        options={"expand_timesteps": True}, ffn_dim=14336, in_channels=48, out_channels=48, num_attention_heads=24,
        num_layers=30,
    ),
    "wan-2.2-animate-14b": _wan(
        "Wan-AI/Wan2.2-Animate-14B-Diffusers", (77, 720, 1280), "WanAnimatePipeline",
        kind="WanAnimateTransformer3DModel", shift=5.0, **_WAN_IMAGE, **_WAN_CLIP,
    ),
    "anyflow-1.3b": _wan(
        "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", pipeline="AnyFlowPipeline", kind="AnyFlowTransformer3DModel",
        source=_ANYFLOW, **_SMALL_WAN,
    ),
    "anyflow-14b": _wan(
        "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers", pipeline="AnyFlowPipeline", kind="AnyFlowTransformer3DModel",
        source=_ANYFLOW,
    ),
    "skyreels-v2-t2v-540p": _skyreels("T2V-14B-540P", (97, 544, 960)),
    "skyreels-v2-t2v-720p": _skyreels("T2V-14B-720P", (121, 720, 1280)),
    "skyreels-v2-i2v-1.3b": _skyreels("I2V-1.3B-540P", (97, 544, 960), True, **_SMALL_WAN, added_kv_proj_dim=1536),
    "skyreels-v2-i2v-540p": _skyreels("I2V-14B-540P", (97, 544, 960), True),
    "ltx-video": _flow_matching(
        "Lightricks/LTX-Video", "LTXPipeline", (161, 512, 704),
        {
            "text_encoder": T5_XXL,
            "transformer": part("LTXVideoTransformer3DModel", _LTX),
            "vae": part("AutoencoderKLLTXVideo", _LTX),
        },
        _LTX_STEPS, _LTX,
    ),
    "ltx-2": _flow_matching(
        "Lightricks/LTX-2", "LTX2Pipeline", (121, 512, 768),
        {
            "transformer": part("LTX2VideoTransformer3DModel", _LTX2, rope_type="split"),
            "vae": part("AutoencoderKLLTX2Video", _LTX2, decoder_causal=False),
        },
        {"use_dynamic_shifting": True, "shift_terminal": 0.1}, _LTX2,
        unknown=("text_encoder", "connectors", "audio_vae", "vocoder"),
    ),
    "mochi": _flow_matching(
        "genmo/mochi-1-preview", "MochiPipeline", (85, 480, 848),
        {
            "text_encoder": T5_XXL,
            "transformer": part("MochiTransformer3DModel", OWN_DEFAULTS),
            "vae": part("AutoencoderKLMochi", OWN_DEFAULTS),
        },
        {"invert_sigmas": True}, "diffusers, scripts/convert_mochi_to_diffusers.py",
    ),
    "allegro": Checkpoint(
        "rhymes-ai/Allegro", "AllegroPipeline",
        {
            "text_encoder": T5_XXL,
            "transformer": part("AllegroTransformer3DModel", OWN_DEFAULTS),
            "vae": part("AutoencoderKLAllegro", OWN_DEFAULTS),
            **_steps("DDIMScheduler", "unknown; the step between timesteps is in no figure"),
        },
        "bfloat16", (88, 720, 1280), ("scheduler",),
    ),
    "cosmos-1-7b": _cosmos1("7B-Text2World", False, **_COSMOS_7B),
    "cosmos-1-7b-v2w": _cosmos1("7B-Video2World", True, **_COSMOS_7B),
    "cosmos-1-14b": _cosmos1("14B-Text2World", False, **_COSMOS_14B, rope_scale=(2.0, 2.0, 2.0)),
    "cosmos-1-14b-v2w": _cosmos1("14B-Video2World", True, **_COSMOS_14B, rope_scale=(2.0, 2.0, 2.0)),
    "cosmos-predict2-2b": _cosmos2("2B", **_COSMOS_2B, rope_scale=(1.0, 3.0, 3.0)),
    "cosmos-predict2-14b": _cosmos2("14B", **_COSMOS_14B, rope_scale=(20 / 24, 2.0, 2.0)),
    "cosmos-predict2.5-2b": _cosmos25("2B", **_COSMOS_2B),
    "cosmos-predict2.5-14b": _cosmos25("14B", **_COSMOS_14B),
    "kandinsky-5-lite-i2v": _kandinsky5("I2V-Lite", "k5_lite_i2v_5s_sft_sd.yaml", _LITE),
    "kandinsky-5-pro": _kandinsky5("T2V-Pro", "k5_pro_t2v_5s_sft_sd.yaml", _PRO),
}  # fmt: skip
"""By short name."""

UNKNOWN_CHECKPOINTS = {
    "BestWishYsh/ConsisID-preview": "layers, heads and the sizes of its face encoder",
    "alibaba-pai/EasyAnimateV5.1-12b-zh": "channels and patch size",
    "Motif-Technologies/Motif-Video-2B": "layers and heads",
    "nvidia/ChronoEdit-14B-Diffusers": "channels and the image encoder's width",
    "nvidia/Cosmos3-Nano": "layers and heads",
    "nvidia/Cosmos3-Super": "layers and heads",
}
"""What of the transformer of a checkpoint no public file states; such a one is planned for from its own folder."""


def checkpoint_of(name: str) -> Checkpoint | None:
    """A checkpoint by its short name or hub id, whatever the case; None for one that is not known."""
    for short, checkpoint in CHECKPOINTS.items():
        if name.lower() in (short, checkpoint.hub_id.lower()):
            return checkpoint
    return None
