"""A video transformer of another package, made known to corrdit: `load_backbone("frames-first")`.

It is Wan with frames before channels in what it is given and gives back.
"""

from __future__ import annotations

import diffusers
import torch

from corrdit.integrations.diffusers import register_layout
from corrdit.integrations.diffusers.backbones.wan import WanBackbone
from corrdit.integrations.diffusers.family_layouts import WanLayout

SIZE = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}


class FramesFirstTransformer3DModel(diffusers.WanTransformer3DModel):
    """The model itself, latents `[B, F, C, h, w]`."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True):
        output = super().forward(hidden_states.transpose(1, 2), timestep, encoder_hidden_states, return_dict=False)[0]
        return (output.transpose(1, 2),)


class FramesFirstLayout(WanLayout):
    """Where its attention is and how it lays out tokens: as Wan, but for the axes of the latents."""

    family = "frames-first"
    axes = "BFCHW"


class FramesFirstBackbone(WanBackbone):
    """What is encoded for it and how it is called."""

    layout = FramesFirstLayout


register_layout("FramesFirstTransformer3DModel", FramesFirstLayout)


def load(*, device: torch.device, dtype: torch.dtype | None) -> FramesFirstBackbone:
    """What the entry point names; a real package would read weights here."""
    torch.manual_seed(0)
    text = {"text_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    transformer = FramesFirstTransformer3DModel(patch_size=(1, 2, 2), **SIZE, **text).eval()
    codec = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.WanPipeline(None, None, codec, scheduler, transformer).to(device, dtype or torch.float32)
    return FramesFirstBackbone(pipe, name="frames-first")
