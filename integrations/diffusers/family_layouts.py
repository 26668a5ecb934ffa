"""The layouts of the families in diffusers, one a family, and the transformers that have no plain attention map.

They stand here without anything else of a model, so that a capture of a pipeline loads no backbone.
`backbones/table.py` has the models that can be read by themselves.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from corrdit.integrations.diffusers.block_layouts import Arguments, BlockLayout, TransformerLayout, config_of

REFUSED_TRANSFORMERS = {
    "AnyFlowFARTransformer3DModel": "its attention is causal over chunks of frames",
    "HeliosTransformer3DModel": "it prepends a history whose tokens are not frames of the video",
    "HunyuanVideoFramepackTransformer3DModel": "it prepends a packed history whose tokens are not frames of the video",
    "Kandinsky6SRTransformer3DModel": "its sparse attention (NABLA) reorders the tokens",
    "LatteTransformer3DModel": "it attends within frames and across time in separate layers (factored attention)",
    "SanaVideoTransformer3DModel": "its attention is linear, without a softmax over tokens",
    "SanaWMTransformer3DModel": "its attention is linear, without a softmax over tokens",
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


FAMILY_LAYOUTS: dict[str, type[TransformerLayout]] = {
    name: layout
    for layout in (
        AllegroLayout,
        AnyFlowLayout,
        ChronoEditLayout,
        CogVideoXLayout,
        ConsisIDLayout,
        CosmosLayout,
        EasyAnimateLayout,
        HunyuanVideo15Layout,
        HunyuanVideoLayout,
        Kandinsky5Layout,
        LTX2Layout,
        LTXLayout,
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
