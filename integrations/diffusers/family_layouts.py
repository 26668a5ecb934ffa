"""The layouts of the families in diffusers, one a family, and the transformers that have no plain attention map.

They stand here without anything else of a model, so that a capture of a pipeline loads no backbone.
`backbones/table.py` has the models that can be read by themselves.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.block_layouts import (
    Arguments,
    BlockLayout,
    ForwardCall,
    TransformerLayout,
    config_of,
)

REFUSED_TRANSFORMERS = {
    "AnyFlowFARTransformer3DModel": "its attention is causal over chunks of frames",
    "HeliosTransformer3DModel": "it prepends a history whose tokens are not frames of the video",
    "HunyuanVideoFramepackTransformer3DModel": "it prepends a packed history whose tokens are not frames of the video",
    "Kandinsky6SRTransformer3DModel": "its sparse attention (NABLA) reorders the tokens",
    "LatteTransformer3DModel": "it attends within frames and across time in separate layers (factored attention)",
    "SanaVideoTransformer3DModel": "its attention is linear, without a softmax over tokens",
    "SanaWMTransformer3DModel": "its attention is linear, without a softmax over tokens",
    "WanAnimate2Transformer3DModel": "each of its frames attends to a reference video's tokens of that frame beside "
    "all frames, by a mask of FlexAttention that differs from frame to frame",
}
"""Reason by class name for video transformers none of whose models has a plain softmax map from frame to frame."""


class CogVideoXLayout(BlockLayout):
    """CogVideoX: text, then frames."""

    family = "cogvideox"
    transformers = ("CogVideoXTransformer3DModel",)
    guidance = "batched"
    text = "first"
    axes = "BFCHW"


class ConsisIDLayout(CogVideoXLayout):
    """ConsisID: CogVideoX with the features of a face between its blocks."""

    family = "consisid"
    transformers = ("ConsisIDTransformer3DModel",)


class EasyAnimateLayout(BlockLayout):
    """EasyAnimate: text (of one or two encoders), then frames."""

    family = "easyanimate"
    transformers = ("EasyAnimateTransformer3DModel",)
    guidance = "batched"
    text = "first"

    def text_tokens(self, arguments: Arguments) -> int:
        both = (arguments["encoder_hidden_states"], arguments.get("encoder_hidden_states_t5"))
        return sum(text.shape[1] for text in both if text is not None)


class HunyuanVideoLayout(BlockLayout):
    """HunyuanVideo: frames, then text; two streams of weights in the first blocks, one in the others."""

    family = "hunyuanvideo"
    transformers = ("HunyuanVideoTransformer3DModel",)
    guidance = "separate"
    lists = ("transformer_blocks", "single_transformer_blocks")
    attention = "attn"
    text = "last"


class HunyuanVideo15Layout(BlockLayout):
    """HunyuanVideo 1.5: frames, then image, glyphs and text, in each sample those that take part first."""

    family = "hunyuanvideo15"
    transformers = ("HunyuanVideo15Transformer3DModel",)
    guidance = "separate"
    attention = "attn"
    text = "last"

    def text_tokens(self, arguments: Arguments) -> int:
        names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        return sum(arguments[name].shape[1] for name in names)

    def text_mask(self, arguments: Arguments) -> torch.Tensor:
        image = arguments["image_embeds"]
        valid = sum(arguments[f"encoder_attention_mask{which}"].bool().sum(1) for which in ("", "_2"))
        if bool((image != 0).any()):
            valid = valid + image.shape[1]
        return torch.arange(self.text_tokens(arguments), device=image.device) < torch.as_tensor(valid)[:, None]


class MiniMaxH3Layout(BlockLayout):
    """MiniMax-H3: text, sound and frames packed into one sequence; text and sound stand for its text."""

    family = "minimaxh3"
    transformers = ("MiniMaxH3Transformer3DModel",)
    guidance = "separate"
    attention = "attn"
    text = "first"
    axes = "BNC"

    def text_tokens(self, arguments: Arguments) -> int:
        return len(arguments["position_ids"]) - len(arguments["video_indices"])

    def read_call(self, transformer: nn.Module, arguments: Arguments) -> ForwardCall:
        rows, before = arguments["video_indices"], self.text_tokens(arguments)
        frames, height, width = (len(axis.unique()) for axis in arguments["position_ids"][rows].unbind(1))
        behind = bool((rows == torch.arange(before, before + len(rows), device=rows.device)).all())
        if not behind or frames * height * width != len(rows):
            raise ValueError(
                "this forward of MiniMax-H3 packs pictures or other videos beside the frames, so its tokens are not a "
                "grid of frames; use text to video"
            )
        grid = self.with_text(TokenGrid(frames, height, width), before)
        return ForwardCall(batch=len(arguments["hidden_states"]), grid=grid, timestep=arguments["timestep"])


class MotifVideoLayout(HunyuanVideoLayout):
    """Motif-Video: as HunyuanVideo; its last blocks decode, and attend to the encoded video instead of the text."""

    family = "motifvideo"
    transformers = ("MotifVideoTransformer3DModel",)

    def text_tokens(self, arguments: Arguments) -> int:
        image = arguments.get("image_embeds")
        return super().text_tokens(arguments) + (0 if image is None else int(image.shape[1]))

    def text_mask(self, arguments: Arguments) -> torch.Tensor | None:
        mask, image = super().text_mask(arguments), arguments.get("image_embeds")
        if mask is None or image is None:
            return mask
        return torch.cat([mask.new_ones(image.shape[:2]), mask], dim=1)

    def attention_modules(self, transformer: nn.Module) -> list[nn.Module]:
        modules = super().attention_modules(transformer)
        return modules[: len(modules) - config_of(transformer).num_decoder_layers]


class LTXLayout(BlockLayout):
    """LTX-Video: frames alone. It is given tokens `[B, F * h * w, C]`."""

    family = "ltx"
    transformers = ("LTXVideoTransformer3DModel",)
    guidance = "batched"
    axes = "BNC"

    def latent_size(self, arguments: Arguments) -> tuple[int, int, int]:
        frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
        if frames is None or height is None or width is None:
            raise ValueError(
                "this forward of LTX gives coordinates instead of num_frames, height and width (conditioning on images "
                "or videos adds tokens), so its tokens are not a grid of frames; use the text-to-video pipeline"
            )
        return frames, height, width


class LTX2Layout(LTXLayout):
    """LTX-2: as LTX-Video, with a stream of audio beside it.

    Its pipelines call it again in a step, with skipped attention (STG) and with the streams apart, and add multiples of
    what these differ by from the conditional prediction.
    """

    family = "ltx2"
    compared_calls = True
    transformers = ("LTX2VideoTransformer3DModel",)


class AllegroLayout(BlockLayout):
    """Allegro: frames alone."""

    family = "allegro"
    transformers = ("AllegroTransformer3DModel",)
    guidance = "batched"
    rotary_halves = 3


class CosmosLayout(BlockLayout):
    """Cosmos 1, Predict2 and Predict2.5: frames alone."""

    family = "cosmos"
    transformers = ("CosmosTransformer3DModel",)
    guidance = "separate"
    rotary_halves = 1


class Cosmos3Layout(BlockLayout):
    """Cosmos 3: text, which attends to itself alone, then frames, packed into one sequence without a batch."""

    family = "cosmos3"
    transformers = ("Cosmos3OmniTransformer",)
    guidance = "separate"
    lists = ("layers",)
    attention = "self_attn"
    text = "first"
    rotary_halves = 1

    def patch_size(self, transformer: nn.Module) -> tuple[int, int, int]:
        patch = int(config_of(transformer).latent_patch_size)
        return (1, patch, patch)

    def head_width(self, transformer: nn.Module) -> int:
        return int(config_of(transformer).head_dim)

    def text_tokens(self, arguments: Arguments) -> int:
        return int(arguments["input_ids"].shape[-1])

    def read_call(self, transformer: nn.Module, arguments: Arguments) -> ForwardCall:
        shapes = arguments["vision_token_shapes"]
        if len(shapes) > 1 or any(arguments.get(f"{other}_tokens") is not None for other in ("sound", "action")):
            raise ValueError(
                "this forward of Cosmos 3 packs sound, actions or several videos beside the frames, so its tokens are "
                "not a grid of frames; leave enable_sound and action out, and give one video"
            )
        grid = self.with_text(TokenGrid(*shapes[0]), self.text_tokens(arguments))
        return ForwardCall(batch=1, grid=grid, timestep=arguments["vision_timesteps"])


class MochiLayout(BlockLayout):
    """Mochi: frames, then text."""

    family = "mochi"
    transformers = ("MochiTransformer3DModel",)
    guidance = "batched"
    text = "last"


class WanLayout(BlockLayout):
    """Wan: frames alone."""

    family = "wan"
    transformers = ("WanTransformer3DModel",)
    guidance: ClassVar[Literal["batched", "separate"]] = "separate"
    lists = ("blocks",)


class WanVACELayout(WanLayout):
    """Wan with VACE's control; the layers are those of the video, the blocks of the control have none."""

    family = "wanvace"
    transformers = ("WanVACETransformer3DModel",)


class WanAnimateLayout(WanLayout):
    """Wan Animate: the latent of the character stands before those of the video, as its first frame."""

    family = "wananimate"
    transformers = ("WanAnimateTransformer3DModel",)


class ChronoEditLayout(WanLayout):
    """ChronoEdit: Wan's image-to-video model."""

    family = "chronoedit"
    transformers = ("ChronoEditTransformer3DModel",)


class AnyFlowLayout(WanLayout):
    """AnyFlow: Wan with a second timestep."""

    family = "anyflow"
    transformers = ("AnyFlowTransformer3DModel",)
    guidance = "batched"
    axes = "BFCHW"


class SkyReelsV2Layout(WanLayout):
    """SkyReels-V2: frames alone."""

    family = "skyreelsv2"
    transformers = ("SkyReelsV2Transformer3DModel",)

    def refusal(self, transformer: nn.Module) -> str | None:
        frames = config_of(transformer).num_frame_per_block
        if frames > 1:
            return f"its attention is causal over blocks of {frames} frames, so a frame does not attend to later ones"
        return None


class Kandinsky5Layout(BlockLayout):
    """Kandinsky 5: frames alone."""

    family = "kandinsky5"
    transformers = ("Kandinsky5Transformer3DModel",)
    guidance = "separate"
    lists = ("visual_transformer_blocks",)
    attention = "self_attention"
    cross = "cross_attention"
    axes = "BFHWC"

    def refusal(self, transformer: nn.Module) -> str | None:
        if config_of(transformer).attention_type == "nabla":
            return "its attention_type is nabla, which is sparse and reorders the tokens"
        return None

    def heads(self, transformer: nn.Module) -> int:
        return int(config_of(transformer).model_dim) // self.head_width(transformer)

    def head_width(self, transformer: nn.Module) -> int:
        return int(sum(config_of(transformer).axes_dims))


class Kandinsky6Layout(Kandinsky5Layout):
    """Kandinsky 6: as Kandinsky 5, with a stream of audio beside it; an image stands behind the frames of the video."""

    family = "kandinsky6"
    transformers = ("Kandinsky6Transformer3DModel",)
    attention = "video_dec_block.self_attention"
    cross = "video_dec_block.cross_attention"

    def refusal(self, transformer: nn.Module) -> str | None:
        return None


FAMILY_LAYOUTS: dict[str, type[TransformerLayout]] = {
    name: layout
    for layout in (
        AllegroLayout,
        AnyFlowLayout,
        ChronoEditLayout,
        CogVideoXLayout,
        ConsisIDLayout,
        CosmosLayout,
        Cosmos3Layout,
        EasyAnimateLayout,
        HunyuanVideo15Layout,
        HunyuanVideoLayout,
        Kandinsky5Layout,
        Kandinsky6Layout,
        LTX2Layout,
        LTXLayout,
        MiniMaxH3Layout,
        MochiLayout,
        MotifVideoLayout,
        SkyReelsV2Layout,
        WanAnimateLayout,
        WanLayout,
        WanVACELayout,
    )
    for name in layout.transformers
}
"""Layout by the transformer's class name."""
