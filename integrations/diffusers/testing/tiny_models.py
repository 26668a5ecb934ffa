"""Tiny models of the supported families, small enough for a CPU test.

They have a real video codec of their family and no text encoder, so prompts are given as embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.chronoedit import ChronoEditBackbone
from corrdit.integrations.diffusers.backbones.loading import backbone_of
from corrdit.integrations.diffusers.testing import tiny_cosmos, tiny_kandinsky
from corrdit.integrations.diffusers.testing import tiny_families as families
from corrdit.integrations.diffusers.testing import tiny_pipelines as pipelines
from corrdit.integrations.diffusers.testing.tiny_pipelines import (
    LATENT_CHANNELS,
    ROTARY,
    TEXT_TOKENS,
    masked_prompts,
    prompts,
)


@dataclass(frozen=True)
class TinyModel:
    """One tiny model.

    Args:
        pipeline: class of its pipeline in diffusers.
        build: makes it; weights come from torch's global random numbers.
        generation: keyword arguments its call needs beyond those all families share, or in their place; None takes
            one of those away.
        height: of the smallest video that makes a grid of 4 x 4 tokens.
        frames: of a video for it.
        guidance: name of its guidance scale; None where the pipeline holds a guider.
        variant: whether it differs little from another one.
        packed: whether a forward packs one sample with the words of its prompt, so that `check_backbone`, which makes a
            batch and a prompt by itself, does not fit it.
    """

    pipeline: str
    build: Callable[..., diffusers.DiffusionPipeline]
    generation: Callable[[torch.Generator], dict[str, Any]]
    height: int = 64
    frames: int = 9
    guidance: str | None = "guidance_scale"
    variant: bool = False
    packed: bool = False


def tiny_pipeline(name: str, *, seed: int = 0) -> diffusers.DiffusionPipeline:
    """A pipeline of the family, in evaluation mode, with weights that follow from the seed.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _model(name).build()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_backbone(name: str, *, seed: int = 0) -> Backbone:
    """`tiny_pipeline` as a backbone."""
    return backbone_of(tiny_pipeline(name, seed=seed), name=f"tiny {name}")


def tiny_generation(name: str, *, steps: int = 3, guided: bool = True, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for a call of `tiny_pipeline(name)`: random prompts, nine frames, latents as output.

    Args:
        name: of the model.
        steps: denoising steps.
        guided: with classifier-free guidance.
        seed: of prompts and noise; every call makes a new generator.
    """
    model = _model(name)
    source = torch.Generator().manual_seed(seed)
    arguments = model.generation(source)
    if model.guidance is not None:
        arguments[model.guidance] = 5.0 if guided else 1.0
    elif not guided:
        raise ValueError(
            f"whether tiny {name} is guided is said by its pipeline's guider, not by arguments of the call"
        )
    if not guided:
        arguments = {key: value for key, value in arguments.items() if not key.startswith("negative")}
    shared = {
        "num_inference_steps": steps,
        "num_frames": model.frames,
        "height": model.height,
        "width": model.height,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed + 1),
    }
    taken_away = {key for key, value in arguments.items() if key in shared and value is None}
    return {key: value for key, value in {**shared, **arguments}.items() if key not in taken_away}


def _model(name: str) -> TinyModel:
    if name in TINY_MODELS:
        return TINY_MODELS[name]
    if name in _MODELS:
        raise ValueError(
            f"tiny model {name!r} needs a diffusers with {_MODELS[name].pipeline}, which {diffusers.__version__} lacks"
        )
    raise ValueError(f"unknown tiny model {name!r}; known are {', '.join(TINY_MODELS)}")


_short_prompts = partial(prompts, max_sequence_length=TEXT_TOKENS)
_LARGE = {"patch_size_t": 2, "patch_bias": False, "sample_height": 32, "sample_width": 32}
_cond = partial(prompts, image=True)

_IMAGE_CHANNELS = {"in_channels": 2 * LATENT_CHANNELS}

_MODELS = {
    "cogvideox": TinyModel("CogVideoXPipeline", pipelines.cogvideox, _short_prompts),
    "cogvideox-rotary": TinyModel("CogVideoXPipeline", partial(pipelines.cogvideox, **ROTARY), _short_prompts),
    "cogvideox-1.5": TinyModel("CogVideoXPipeline", partial(pipelines.cogvideox, **ROTARY, **_LARGE), _short_prompts),
    "cogvideox-image": TinyModel(
        "CogVideoXImageToVideoPipeline", pipelines.cogvideox_image, partial(_short_prompts, image=True)
    ),
    "consisid": TinyModel("ConsisIDPipeline", families.consisid, partial(_short_prompts, image=True)),
    "consisid-face": TinyModel(
        "ConsisIDPipeline", partial(families.consisid, **families.FACE), families.face_prompts, variant=True
    ),
    "hunyuanvideo": TinyModel(
        "HunyuanVideoPipeline",
        pipelines.hunyuanvideo,
        partial(masked_prompts, pooled=True),
        guidance="true_cfg_scale",
    ),
    "hunyuanvideo-image": TinyModel(
        "HunyuanSkyreelsImageToVideoPipeline",
        partial(pipelines.hunyuanvideo, "HunyuanSkyreelsImageToVideoPipeline", **_IMAGE_CHANNELS),
        partial(masked_prompts, pooled=True, image=True),
        guidance="true_cfg_scale",
        variant=True,
    ),
    "hunyuanvideo-i2v": TinyModel(
        "HunyuanVideoImageToVideoPipeline",
        partial(
            pipelines.hunyuanvideo,
            "HunyuanVideoImageToVideoPipeline",
            in_channels=2 * LATENT_CHANNELS + 1,
            image_condition_type="latent_concat",
        ),
        partial(masked_prompts, pooled=True, image=True),
        guidance="true_cfg_scale",
        variant=True,
    ),
    "hunyuanvideo-i2v-replace": TinyModel(
        "HunyuanVideoImageToVideoPipeline",
        partial(pipelines.hunyuanvideo, "HunyuanVideoImageToVideoPipeline", image_condition_type="token_replace"),
        partial(masked_prompts, pooled=True, image=True),
        guidance="true_cfg_scale",
        variant=True,
    ),
    "hunyuanvideo15": TinyModel(
        "HunyuanVideo15Pipeline", families.hunyuanvideo15, families.glyph_prompts, guidance=None
    ),
    "hunyuanvideo15-image": TinyModel(
        "HunyuanVideo15ImageToVideoPipeline",
        partial(families.hunyuanvideo15, "HunyuanVideo15ImageToVideoPipeline"),
        partial(families.glyph_prompts, image=True),
        guidance=None,
        variant=True,
    ),
    "motifvideo": TinyModel("MotifVideoPipeline", families.motifvideo, masked_prompts, guidance=None),
    "motifvideo-image": TinyModel(
        "MotifVideoImage2VideoPipeline",
        partial(families.motifvideo, "MotifVideoImage2VideoPipeline"),
        partial(masked_prompts, image=True, prompt=None),
        guidance=None,
        variant=True,
    ),
    "motifvideo-decoder": TinyModel(
        "MotifVideoPipeline",
        partial(families.motifvideo, num_single_layers=3, num_decoder_layers=1),
        masked_prompts,
        guidance=None,
        variant=True,
    ),
    "wan": TinyModel("WanPipeline", pipelines.wan, prompts),
    "wan-2.2": TinyModel("WanPipeline", partial(pipelines.wan, boundary_ratio=0.875), prompts),
    "wan-2.2-ti2v": TinyModel("WanPipeline", partial(pipelines.wan, expand_timesteps=True), prompts, variant=True),
    "wan-image": TinyModel("WanImageToVideoPipeline", pipelines.wan_image, _cond),
    "wan-2.1-image": TinyModel(
        "WanImageToVideoPipeline",
        partial(pipelines.wan_image, **pipelines.IMAGE_ENCODER),
        partial(_cond, tokens=512),
        variant=True,
    ),
    "wanvace": TinyModel("WanVACEPipeline", families.wanvace, prompts),
    "wananimate": TinyModel("WanAnimatePipeline", families.wananimate, families.animated_prompts),
    "chronoedit": TinyModel(
        "ChronoEditPipeline", families.chronoedit, partial(_cond, tokens=512, **ChronoEditBackbone.call_options)
    ),
    "anyflow": TinyModel("AnyFlowPipeline", families.anyflow, prompts),
    "skyreelsv2": TinyModel("SkyReelsV2Pipeline", families.skyreelsv2, prompts),
    "skyreelsv2-image": TinyModel(
        "SkyReelsV2ImageToVideoPipeline", families.skyreelsv2_image, partial(_cond, tokens=512), variant=True
    ),
    "ltx": TinyModel("LTXPipeline", pipelines.ltx, masked_prompts, height=128),
    "ltx-image": TinyModel(
        "LTXImageToVideoPipeline",
        partial(pipelines.ltx, "LTXImageToVideoPipeline"),
        partial(masked_prompts, image=True),
        height=128,
        variant=True,
    ),
    "ltx2": TinyModel("LTX2Pipeline", families.ltx2, partial(masked_prompts, **families.PLAIN_GUIDANCE), height=128),
    "ltx2-image": TinyModel(
        "LTX2ImageToVideoPipeline",
        partial(families.ltx2, "LTX2ImageToVideoPipeline"),
        partial(masked_prompts, image=True, image_crf=0, **families.PLAIN_GUIDANCE),
        height=128,
        variant=True,
    ),
    "mochi": TinyModel("MochiPipeline", pipelines.mochi, masked_prompts, frames=13),
    "allegro": TinyModel(
        "AllegroPipeline",
        families.allegro,
        partial(masked_prompts, clean_caption=False, negative_prompt=None),
        frames=24,
    ),
    "easyanimate": TinyModel("EasyAnimatePipeline", families.easyanimate, masked_prompts),
    "easyanimate-inpaint": TinyModel(
        "EasyAnimateInpaintPipeline",
        partial(families.easyanimate, "EasyAnimateInpaintPipeline", in_channels=2 * LATENT_CHANNELS + 1),
        families.inpainting_prompts,
        variant=True,
    ),
    "kandinsky5": TinyModel("Kandinsky5T2VPipeline", tiny_kandinsky.kandinsky5, tiny_kandinsky.kandinsky5_prompts),
    "kandinsky5-image": TinyModel(
        "Kandinsky5I2VPipeline",
        partial(tiny_kandinsky.kandinsky5, "Kandinsky5I2VPipeline", visual_cond=True),
        partial(tiny_kandinsky.kandinsky5_prompts, image=True),
        # Its first frame is brought to the statistics of the five behind it.
        frames=25,
        variant=True,
    ),
    "kandinsky6": TinyModel("Kandinsky6TI2VAPipeline", tiny_kandinsky.kandinsky6, tiny_kandinsky.kandinsky6_prompts),
    "cosmos": TinyModel("CosmosTextToWorldPipeline", tiny_cosmos.cosmos, prompts, frames=17),
    "cosmos-image": TinyModel(
        "CosmosVideoToWorldPipeline",
        partial(tiny_cosmos.cosmos, "CosmosVideoToWorldPipeline", in_channels=LATENT_CHANNELS + 1),
        _cond,
        frames=17,
        variant=True,
    ),
    "cosmos-2": TinyModel("Cosmos2VideoToWorldPipeline", tiny_cosmos.cosmos2, _cond, variant=True),
    "cosmos-2.5": TinyModel("Cosmos2_5_PredictBasePipeline", tiny_cosmos.cosmos25, prompts),
    "cosmos3": TinyModel("Cosmos3OmniPipeline", tiny_cosmos.cosmos3, tiny_cosmos.worded_prompts, packed=True),
}
TINY_MODELS = {name: model for name, model in _MODELS.items() if model.pipeline in dir(diffusers)}
"""Tiny models by name: the families and the variants that differ for a capture, as far as diffusers has them."""
