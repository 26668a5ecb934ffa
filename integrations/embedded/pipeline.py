"""CogVideoX's pipeline with the embedded components: short prompts and rotary positions in tokens at every size."""

import functools
import inspect
import os
import pathlib
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from corrdit.arguments import finite_number, whole_number
from corrdit.files import written_beside
from corrdit.integrations.embedded.codec import HaarVideoCodec
from corrdit.integrations.embedded.preset import PRESET_FILE
from corrdit.integrations.embedded.text import WordEncoder, WordTokenizer

TEXT_TOKENS = 24
TEXT_DIM = 64
LONGEST_SIDE = 13
"""Tokens of the longest side seen in training."""


def rotary_positions(
    head_dim: int, frames: int, height: int, width: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [frames * height * width, head_dim] of CogVideoX's three-axis rotary embedding.

    A token's position is its (frame, row, column) index. Frames longer than LONGEST_SIDE tokens are shrunk to that
    length in both axes, so that no distance is larger than in training (Chen et al., "Extending context window of large
    language models via positional interpolation", 2023).
    """
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    # An axis of the head's dimensions for each of frame, row and column, in the shares of `get_3d_rotary_pos_embed`.
    time_dim, side_dim = head_dim // 4, head_dim // 8 * 3
    axes = (
        get_1d_rotary_pos_embed(time_dim, torch.arange(frames, device=device), use_real=True),
        get_1d_rotary_pos_embed(side_dim, torch.arange(height, device=device) * scale, use_real=True),
        get_1d_rotary_pos_embed(side_dim, torch.arange(width, device=device) * scale, use_real=True),
    )

    def joined(over_time: Tensor, down: Tensor, across: Tensor) -> Tensor:
        parts = (over_time[:, None, None], down[None, :, None], across[None, None])
        return torch.cat([part.expand(frames, height, width, -1) for part in parts], dim=-1).flatten(0, 2).float()

    cosines, sines = zip(*axes, strict=True)
    return joined(*cosines), joined(*sines)


class EmbeddedVideoPipeline(CogVideoXPipeline):
    """CogVideoXPipeline for the embedded model. `pipe("a striped disc moves left over grass").frames`.

    Three things differ from its parent. Prompts are padded to the transformer's own text length. Rotary positions are
    token indices; the parent stretches every frame to the size of training, which would change what a distance of
    one token means. And sizes, numbers and prompts that the parent would replace by others or fail on with words about
    tensors raise ValueError.
    """

    def __init__(
        self,
        tokenizer: WordTokenizer,
        text_encoder: WordEncoder,
        vae: HaarVideoCodec,
        transformer: CogVideoXTransformer3DModel,
        scheduler: CogVideoXDDIMScheduler,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *arguments: object, **keywords: object) -> None:
        """As the parent, and with the preset of the folder that this pipeline was read from, if that has one: without
        it `load_backbone` would not know where in these weights correspondence is."""
        super().save_pretrained(save_directory, *arguments, **keywords)
        source = self.config.get("_name_or_path")
        if source and (preset := pathlib.Path(source) / PRESET_FILE).is_file():
            contents = preset.read_bytes()
            with written_beside(pathlib.Path(save_directory) / PRESET_FILE) as file:
                file.write(contents)

    @functools.wraps(CogVideoXPipeline.__call__)
    def __call__(self, *arguments: object, **keywords: object) -> Any:
        given = inspect.signature(CogVideoXPipeline.__call__).bind(self, *arguments, **keywords).arguments
        for name in ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length"):
            if given.get(name) is not None:
                whole_number(name, given[name], 1)
        if given.get("guidance_scale") is not None:
            finite_number("guidance_scale", given["guidance_scale"])
        if given.get("num_videos_per_prompt", 1) != 1:
            raise ValueError(
                f"num_videos_per_prompt must be 1, got {given['num_videos_per_prompt']!r}; give a list of prompts for "
                "several videos"
            )
        for name in ("prompt", "negative_prompt"):
            texts = given.get(name)
            if isinstance(texts, list) and not (texts and all(isinstance(text, str) for text in texts)):
                raise ValueError(f"{name} must be a text or a list of at least one text, got {texts!r}")
        config = self.transformer.config
        rotary = config.use_rotary_positional_embeddings
        if given.get("max_sequence_length", TEXT_TOKENS) < config.max_text_seq_length and not rotary:
            raise ValueError(
                f"max_sequence_length must be at least {config.max_text_seq_length} for absolute positions, got "
                f"{given['max_sequence_length']}"
            )
        return super().__call__(*arguments, **keywords)

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = TEXT_TOKENS,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        longest = self.transformer.config.max_text_seq_length
        return super()._get_t5_prompt_embeds(
            prompt, num_videos_per_prompt, min(max_sequence_length, longest), device, dtype
        )

    def _prepare_rotary_positional_embeddings(
        self, height: int, width: int, num_frames: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        stride = self.vae_scale_factor_spatial * self.transformer.config.patch_size
        head_dim = self.transformer.config.attention_head_dim
        return rotary_positions(head_dim, num_frames, height // stride, width // stride, device)


def check_transformer(layers: int, heads: int, head_dim: int, positions: str) -> None:
    """Raises ValueError for a size or a kind of positions that no embedded transformer can have."""
    if positions not in ("rotary", "absolute"):
        raise ValueError(f"positions must be 'rotary' or 'absolute', got {positions!r}")
    for name, value in (("layers", layers), ("heads", heads), ("head_dim", head_dim)):
        whole_number(name, value, 1)
    # A quarter for the frames and three eighths for each side, all in pairs of sine and cosine.
    name, split = ("head_dim", head_dim) if positions == "rotary" else ("heads * head_dim", heads * head_dim)
    if split % 16:
        raise ValueError(f"{name} must be divisible by 16 for {positions} positions, got {split}")


def build_transformer(
    layers: int = 6, heads: int = 4, head_dim: int = 32, positions: str = "rotary", frames: int = 8, size: int = 32
) -> CogVideoXTransformer3DModel:
    """A fresh transformer for the embedded codec and text encoder.

    positions: "rotary" (runs at any size) or "absolute" (a fixed table, made for `frames` of `size` x `size` pixels).
    Raises ValueError for other positions and for sizes that cannot be built.
    """
    check_transformer(layers, heads, head_dim, positions)
    whole_number("frames", frames, 1)
    if whole_number("size", size, 4) % 4:
        raise ValueError(f"size must be divisible by 4, the pixels of a token, got {size}")
    return CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=12,
        out_channels=12,
        time_embed_dim=4 * heads * head_dim // 2,
        text_embed_dim=TEXT_DIM,
        num_layers=layers,
        sample_width=size // 2,
        sample_height=size // 2,
        sample_frames=frames,
        patch_size=2,
        temporal_compression_ratio=1,
        max_text_seq_length=TEXT_TOKENS,
        spatial_interpolation_scale=1.0,
        use_rotary_positional_embeddings=positions == "rotary",
    )


def build_scheduler() -> CogVideoXDDIMScheduler:
    """The noise schedule of training: CogVideoX's without its shift towards noise, which is made for large frames."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )


def build_pipeline(transformer: CogVideoXTransformer3DModel) -> EmbeddedVideoPipeline:
    """A whole pipeline round a transformer."""
    tokenizer = WordTokenizer()
    encoder = WordEncoder(vocab_size=tokenizer.vocab_size, embed_dim=TEXT_DIM, max_length=TEXT_TOKENS + 8)
    return EmbeddedVideoPipeline(tokenizer, encoder, HaarVideoCodec(), transformer, build_scheduler())
