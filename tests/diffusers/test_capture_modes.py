"""A capture under the modes people run models in: precisions, compilation, offloading, adapters, casting."""

from __future__ import annotations

import warnings

import pytest
import torch

from corrdit import capture
from corrdit.integrations.diffusers.testing.subject import Subject, small_scalar
from corrdit.testing import tiny_backbone

FAMILIES = ("cogvideox-rotary", "hunyuanvideo", "wan", "ltx", "mochi")


def output(transformer, arguments):
    return transformer(**arguments, return_dict=False)[0]


def assert_reads_the_same(transformer, arguments, scores, *, layers=(0, 1), tolerance=0.0, reference=None):
    """A captured forward gives the same output as a plain one, and the reference's results if one is given."""
    with torch.no_grad():
        plain = output(transformer, arguments)
        with capture(transformer, layers=layers, operation=scores) as captured:
            during = output(transformer, arguments)
    assert torch.equal(plain, during)
    for layer in layers:
        assert captured[0, layer].isfinite().all()
        if reference is not None:
            error = (captured[0, layer] - reference[0, layer]).abs().max() / reference[0, layer].abs().max()
            assert error <= tolerance
    return captured


def diffusers_version() -> tuple[int, int]:
    import diffusers

    major, minor = diffusers.__version__.split(".")[:2]
    return int(major), int(minor)


def test_inference_mode_gives_what_no_grad_gives(transformer_call, scores):
    transformer, arguments = transformer_call()
    reference = assert_reads_the_same(transformer, arguments, scores)
    with torch.inference_mode(), capture(transformer, layers=[0, 1], operation=scores) as captured:
        output(transformer, arguments)
    assert all(torch.equal(captured[key], reference[key]) for key in reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name, dtype, scores):
    backbone = tiny_backbone(name)
    # Rounded weights are the same model in both precisions; Mochi's rotary frequencies would differ by whole turns.
    backbone.transformer.to(dtype).to(torch.float32)
    reference = Subject.random(backbone, frames=2, batch=2, seed=0)
    exact = assert_reads_the_same(backbone.transformer, reference.arguments(), scores, layers=(0,))
    backbone.transformer.to(dtype)
    half = Subject.random(backbone, frames=2, batch=2, seed=0)
    seen = []
    assert_reads_the_same(backbone.transformer, half.arguments(), scores, layers=(0,), tolerance=0.15, reference=exact)
    with torch.no_grad(), capture(backbone.transformer, layers=[0], operation=lambda q, *_: seen.append(q.dtype)):
        output(backbone.transformer, half.arguments())
    assert seen == [dtype]


def test_operation_runs_outside_autocast(transformer_call):
    transformer, arguments = transformer_call()
    seen = []

    def product(q, k, grid, key_mask):
        seen.append((q.float() @ k.float().transpose(-1, -2)).dtype)

    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        capture(transformer, layers=[0], operation=product),
    ):
        output(transformer, arguments)
    assert seen == [torch.float32]


def test_results_are_detached_unless_the_graph_is_kept(transformer_call):
    transformer, arguments = transformer_call()
    arguments["hidden_states"].requires_grad_()
    for keep_graph in (False, True):
        with capture(transformer, layers=[1], operation=small_scalar, keep_graph=keep_graph) as captured:
            prediction = output(transformer, arguments)
        assert captured[0, 1].requires_grad == keep_graph
        assert prediction.requires_grad


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["cogvideox-rotary", "wan", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hunyuanvideo", "ltx"))]
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_without_graph_breaks(name, scores, transformer_call):
    transformer, arguments = transformer_call(name)
    reference = assert_reads_the_same(transformer, arguments, scores)
    for module_list in ("blocks", "transformer_blocks", "single_transformer_blocks"):
        for block in getattr(transformer, module_list, []):
            block.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = output(transformer, arguments)
        with capture(transformer, layers=[0, 1], operation=scores) as captured:
            during = output(transformer, arguments)
        with capture(transformer, layers=[0, 1], operation=scores, early_exit=True) as early:
            transformer(**arguments)
        after = output(transformer, arguments)
    assert torch.equal(plain, during)
    assert torch.equal(plain, after)
    for key in reference:
        assert torch.equal(captured[key], reference[key])
        assert torch.equal(early[key], reference[key])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_compiled_to_machine_code(scores, transformer_call):
    transformer, arguments = transformer_call("wan")
    reference = assert_reads_the_same(transformer, arguments, scores)
    transformer.compile_repeated_blocks(fullgraph=True)
    with torch.no_grad():
        plain = output(transformer, arguments)
        with capture(transformer, layers=[0, 1], operation=scores) as captured:
            during = output(transformer, arguments)
    assert torch.allclose(plain, during, rtol=0, atol=1e-5)
    for key in reference:
        assert torch.allclose(captured[key], reference[key], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_are_not_compiled_anew_for_every_capture(scores, transformer_call):
    transformer, arguments = transformer_call("wan")
    for block in transformer.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        output(transformer, arguments)
        # More captures than the limit of recompilations, behind which a whole graph is an error.
        for _ in range(torch._dynamo.config.recompile_limit + 2):
            with capture(transformer, layers=[0, 1], operation=scores) as captured:
                output(transformer, arguments)
    assert len(captured) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_processor_by_hand(transformer_call, scores):
    from corrdit import CorrespondenceProcessor

    transformer, arguments = transformer_call("wan")
    with torch.no_grad(), capture(transformer, layers=[0], operation=scores) as reference:
        output(transformer, arguments)
    module = transformer.blocks[0].attn1
    grid = tiny_grid(transformer, arguments)
    module.processor = CorrespondenceProcessor(module.processor, grid, scores)
    transformer.blocks[0].compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        output(transformer, arguments)
    assert torch.equal(module.processor.result, reference[0, 0])


def tiny_grid(transformer, arguments):
    from corrdit.integrations.diffusers.layouts import layout_of

    return layout_of(transformer).read_call(transformer, arguments).grid


def test_whole_model_compilation_is_refused(pipeline, scores):
    pipe = pipeline("wan")
    pipe.transformer.compile(backend="eager")
    with pytest.raises(ValueError, match="compile its blocks instead"), capture(pipe, layers=0, operation=scores):
        pass
    with pytest.raises(ValueError, match="compile its blocks instead"):
        capture(torch.compile(pipeline("wan").transformer), layers=0, operation=scores)


@pytest.mark.parametrize("early_exit", [False, True])
@pytest.mark.parametrize("granularity", ["block_level", "leaf_level"])
def test_group_offloading(granularity, early_exit, transformer_call, scores):
    if diffusers_version() < (0, 42) and not torch.accelerator.is_available():
        pytest.skip("this diffusers offloads groups only where there is an accelerator")
    transformer, arguments = transformer_call()
    reference = assert_reads_the_same(transformer, arguments, scores)
    more = {"num_blocks_per_group": 1} if granularity == "block_level" else {}
    transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=granularity, **more)
    with torch.no_grad(), capture(transformer, layers=[0, 1], operation=scores, early_exit=early_exit) as captured:
        during = output(transformer, arguments)
    assert all(torch.equal(captured[key], reference[key]) for key in reference)
    with torch.no_grad():
        after = output(transformer, arguments)
    assert torch.equal(during, after) or early_exit
    assert len(transformer.transformer_blocks) == 3


def test_offloading_module_by_module(transformer_call, scores):
    from accelerate import cpu_offload

    transformer, arguments = transformer_call()
    reference = assert_reads_the_same(transformer, arguments, scores)
    cpu_offload(transformer, torch.device("cpu"))
    for early_exit in (False, True):
        with torch.no_grad(), capture(transformer, layers=[0, 1], operation=scores, early_exit=early_exit) as captured:
            output(transformer, arguments)
        assert all(torch.equal(captured[key], reference[key]) for key in reference)
        assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}


def test_lora(transformer_call, scores):
    peft = pytest.importorskip("peft")
    transformer, arguments = transformer_call()
    reference = assert_reads_the_same(transformer, arguments, scores)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    torch.manual_seed(0)
    transformer.add_adapter(config)
    transformer.eval()
    captured = assert_reads_the_same(transformer, arguments, scores)
    assert not torch.allclose(captured[0, 0], reference[0, 0])


@pytest.mark.parametrize("early_exit", [False, True])
def test_layers_placed_by_a_device_map(early_exit, transformer_call, scores, tmp_path):
    from accelerate import dispatch_model

    transformer, arguments = transformer_call("wan")
    reference = assert_reads_the_same(transformer, arguments, scores)
    places = {name: "cpu" for name, _ in transformer.named_children() if name != "blocks"}
    places |= {"scale_shift_table": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk"}
    dispatch_model(transformer, device_map=places, main_device="cpu", offload_dir=tmp_path)
    with torch.no_grad(), capture(transformer, layers=[0, 1], operation=scores, early_exit=early_exit) as captured:
        during = output(transformer, arguments)
    assert all(torch.equal(captured[key], reference[key]) for key in reference)
    assert torch.equal(during, output(transformer, arguments)) or early_exit


@pytest.mark.parametrize("name", ["cogvideox-rotary", "hunyuanvideo", "wan", "ltx"])
def test_fused_projections(name, transformer_call, scores):
    transformer, arguments = transformer_call(name)
    reference = assert_reads_the_same(transformer, arguments, scores)
    transformer.fuse_qkv_projections()
    assert_reads_the_same(transformer, arguments, scores, tolerance=1e-5, reference=reference)


def test_fusing_inside_a_capture_is_reported_and_kept(transformer_call, scores):
    transformer, arguments = transformer_call()

    @torch.no_grad()
    def fuse_and_run():
        with capture(transformer, layers=[0], operation=scores):
            transformer.fuse_qkv_projections()
            output(transformer, arguments)

    with pytest.raises(ValueError, match="replaced the attention processors"):
        fuse_and_run()
    assert "Fused" in type(transformer.transformer_blocks[0].attn1.processor).__name__


def test_layerwise_casting(transformer_call, scores):
    transformer, arguments = transformer_call()
    reference = assert_reads_the_same(transformer, arguments, scores)
    transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    captured = assert_reads_the_same(transformer, arguments, scores, tolerance=0.01, reference=reference)
    before = transformer.transformer_blocks[0].attn1.to_q.weight.dtype
    with torch.no_grad(), capture(transformer, layers=[0], operation=scores, early_exit=True) as early:
        transformer(**arguments)
    assert torch.equal(early[0, 0], captured[0, 0])
    assert transformer.transformer_blocks[0].attn1.to_q.weight.dtype == before == torch.float16


def feature_caches():
    import diffusers

    return {
        "FirstBlockCache": lambda step: diffusers.FirstBlockCacheConfig(threshold=0.1),
        "FasterCache": lambda step: diffusers.FasterCacheConfig(current_timestep_callback=step),
        "PyramidAttentionBroadcast": lambda step: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=step
        ),
    }


@pytest.mark.parametrize("kind", ["FirstBlockCache", "FasterCache", "PyramidAttentionBroadcast"])
def test_caches_that_skip_blocks_are_refused(kind, pipeline, scores):
    pipe = pipeline("cogvideox-rotary")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.transformer.enable_cache(feature_caches()[kind](lambda: 500))
    with pytest.raises(ValueError, match=f"{kind} is enabled"), capture(pipe, layers=0, operation=scores):
        pass
    pipe.transformer.disable_cache()
    with pytest.raises(ValueError, match="never fired"), capture(pipe, layers=0, operation=scores):
        pass


@pytest.mark.parametrize("kind", ["context", "tensor"])
def test_parallelism_is_refused(kind, pipeline, scores):
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    pipe = pipeline("wan")
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    if kind == "tensor":
        if diffusers_version() < (0, 42):
            pytest.skip("this diffusers has no tensor parallelism")
        from diffusers import TensorParallelConfig

        config = ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2))
    pipe.transformer._parallel_config = config
    with pytest.raises(ValueError, match=f"{kind} parallelism"), capture(pipe, layers=0, operation=scores):
        pass


def test_context_parallel_processor_is_refused(pipeline, scores):
    pipe = pipeline("wan")
    pipe.transformer.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"), capture(pipe, layers=0, operation=scores):
        pass
