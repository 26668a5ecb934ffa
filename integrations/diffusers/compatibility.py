"""What cannot be read, and why: refusals with the reason and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from corrdit.integrations.diffusers.host.attention import DelegatingProcessor, calls_dispatcher
from corrdit.integrations.diffusers.host.parallel import token_group

SDPA_BACKENDS = frozenset({"native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"})
"""Attention backends of diffusers that call `scaled_dot_product_attention`."""

SKIPPING_HOOKS = {
    "faster_cache": "FasterCache",
    "first_block_cache": "FirstBlockCache",
    "layer_skip": "layer skipping",
    "mag_cache": "MagCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "sea_cache": "SeaCache",
    "taylorseer_cache": "TaylorSeerCache",
}
"""Modules of `diffusers.hooks` whose hooks leave out blocks or attention, by the name users know."""

CACHING_PACKAGES = {"cache_dit": "cache-dit", "para_attn": "ParaAttention"}
"""Packages that replace forwards by ones that leave blocks out, by the name users know."""

_HOSTS = ("accelerate", "corrdit", "diffusers", "peft", "torch")
"""Packages whose functions round a forward run it."""

PARALLEL_HOOKS = {"context_parallel": "context parallelism", "tensor_parallel": "tensor parallelism"}

FOREIGN_PARALLELISM = {"_cp_config": "cache-dit", "_is_parallelized": "ParaAttention"}
"""Packages that spread the tokens of a model over processes by themselves, by the attribute they leave in it."""


def check_transformer(transformer: torch.nn.Module, *, caches: bool = False, spread: bool = False) -> None:
    """Refuses a transformer whose queries and keys cannot be read whole.

    Args:
        transformer: of a model.
        caches: whether a feature cache that skips blocks may be enabled.
        spread: whether its tokens may be spread over processes by diffusers' context parallelism.

    Raises:
        ValueError: whole-model compilation, context or tensor parallelism, or a feature cache that skips blocks.
    """
    if getattr(transformer, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "the whole transformer is compiled, so its forwards cannot be told apart; compile its blocks instead "
            "(transformer.compile_repeated_blocks(), or block.compile() for each block)"
        )
    for holder in (transformer, *(getattr(module, "processor", None) for module in transformer.modules())):
        for attribute, package in FOREIGN_PARALLELISM.items():
            if getattr(holder, attribute, None):
                _refuse_parallelism(f"{package}'s own parallelism")
    config = getattr(transformer, "_parallel_config", None)
    spread = spread and token_group(transformer) is not None
    if config is not None and not spread:
        tensor_parallel = getattr(config, "tensor_parallel_config", None) is not None
        _refuse_parallelism("tensor parallelism" if tensor_parallel else "context parallelism")
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            _check_hooks(registry.hooks.values(), caches, spread)


def embeds_given(arguments: Mapping[str, object], prompt: str = "prompt") -> bool:
    """Whether a call of a pipeline has embeddings of a prompt; some have several kinds (`prompt_embeds_qwen`)."""
    return any(name.startswith(f"{prompt}_embeds") and value is not None for name, value in arguments.items())


def check_takes_prompt(pipe: object, arguments: Mapping[str, object]) -> None:
    """Refuses a pipeline that was saved or loaded without what reads a prompt, unless embeddings of it are given.

    Args:
        pipe: that is called.
        arguments: of the call.

    Raises:
        ValueError: no text encoder, or no tokenizer.
    """
    for name in () if embeds_given(arguments) else ("text_encoder", "tokenizer"):
        if hasattr(pipe, name) and getattr(pipe, name) is None:
            raise ValueError(
                f"this {type(pipe).__name__} has no {name}, so it cannot generate from a prompt; load the model with "
                "it, or in Python call the pipeline with prompt_embeds"
            )


def check_processor(processor: object, *, spread: bool = False) -> None:
    """Refuses an attention processor whose backend or parallelism hides queries and keys.

    Args:
        processor: of an attention module.
        spread: as for `check_transformer`.

    Raises:
        ValueError: context parallelism, or an attention backend that does not call scaled_dot_product_attention.
    """
    if getattr(processor, "_parallel_config", None) is not None and not (spread and token_group(processor)):
        _refuse_parallelism("context parallelism")
    check_attention_backend(processor)


def check_attention_backend(processor: object) -> None:
    """Refuses by name an attention backend behind which a processor's attention cannot be seen.

    That is one which does not call scaled_dot_product_attention, for a processor that does not call diffusers'
    dispatcher itself (a subclass which goes through its base class's `__call__`, for instance). Families whose
    processors call scaled_dot_product_attention directly (CogVideoX, Mochi) have no backend and pass.

    Raises:
        ValueError: such a backend.
    """
    while isinstance(processor, DelegatingProcessor):
        processor = processor.inner
    if calls_dispatcher(type(processor)) or not hasattr(processor, "_attention_backend"):
        return
    backend: object = processor._attention_backend
    if backend is None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend = _AttentionBackendRegistry.get_active_backend()[0]
    name = getattr(backend, "value", backend)
    if name not in SDPA_BACKENDS:
        raise ValueError(
            f"the attention backend {name!r} does not go through scaled_dot_product_attention, and "
            f"{type(processor).__name__} does not call dispatch_attention_fn itself, so its queries and keys cannot be "
            f"read; set one of {', '.join(sorted(SDPA_BACKENDS))} "
            '(transformer.set_attention_backend("native")) for the capture'
        )


def is_offloaded(transformer: torch.nn.Module) -> bool:
    """Whether modules move their weights in and out around their forward (diffusers' or accelerate's hooks)."""
    for module in transformer.modules():
        if hasattr(module, "_hf_hook"):
            return True
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and any("offload" in name for name in registry.hooks):
            return True
    return False


def has_compiled_blocks(transformer: torch.nn.Module) -> bool:
    """Whether some block was compiled in place."""
    return any(module._compiled_call_impl is not None for module in transformer.modules())


def what_skips(transformer: torch.nn.Module, attention: torch.nn.Module) -> str | None:
    """What can have kept an attention module of a transformer from running: a cache or a replaced forward, by name."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            origin = type(hook).__module__.rpartition(".")[2]
            if origin in SKIPPING_HOOKS:
                return SKIPPING_HOOKS[origin]
    holders = (module for module in transformer.modules() if module is transformer or attention in module.modules())
    return next((cause for cause in map(replacement_of, holders) if cause is not None), None)


def replacement_of(module: torch.nn.Module) -> str | None:
    """What replaced the forward of a module or of its class, by name; None where it is its own.

    Where it is from its globals say, because `functools.wraps` rewrites its `__module__`.
    """
    own = {kind.__module__ for kind in type(module).__mro__}
    forward: object = module.forward
    while forward is not None:
        inner: object = getattr(forward, "__func__", None) or getattr(forward, "func", None)
        if inner is not None:
            forward = inner
            continue
        # A callable object has no globals, but a class.
        origin = str(getattr(forward, "__globals__", {}).get("__name__") or type(forward).__module__)
        package = origin.partition(".")[0]
        if origin in own:
            return None
        if package not in _HOSTS:
            name = CACHING_PACKAGES.get(package) or f"{origin}.{getattr(forward, '__name__', forward)}"
            return f"{name}, which replaced the forward of {type(module).__name__},"
        forward = getattr(forward, "__wrapped__", None)
    return None


def is_skipping(hook: object) -> bool:
    """Whether a hook of diffusers may leave out its module."""
    return type(hook).__module__.rpartition(".")[2] in SKIPPING_HOOKS


def _check_hooks(hooks: Iterable[object], caches: bool, spread: bool) -> None:
    for hook in hooks:
        origin = type(hook).__module__.rpartition(".")[2]
        if origin in PARALLEL_HOOKS and not (spread and origin == "context_parallel"):
            _refuse_parallelism(PARALLEL_HOOKS[origin])
        if origin in SKIPPING_HOOKS and not caches:
            raise ValueError(
                f"{SKIPPING_HOOKS[origin]} is enabled on the transformer: it skips blocks at some steps, whose queries "
                "and keys then do not exist; call transformer.disable_cache() for the capture, or have them computed "
                'beside the run (on_skip="compute")'
            )


def _refuse_parallelism(kind: str) -> None:
    raise ValueError(
        f"the transformer runs under {kind}: each process holds only a part of the queries and keys, so correspondence "
        "cannot be read or changed; load it on one device (a capture without gradients reads families whose text is "
        "not among the tokens, such as Wan and LTX, under diffusers' own context parallelism)"
    )
