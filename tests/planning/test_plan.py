"""`corrdit plan`: planned peaks beside those of real runs, from configurations alone, and what is refused."""

from __future__ import annotations

import contextlib
import importlib
import json
import pathlib
import resource
import subprocess
import sys
import time

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from corrdit import load_backbone
from corrdit.cli import main
from corrdit.integrations.diffusers.backbones.loading import backbone_of
from corrdit.integrations.diffusers.backbones.published_checkpoints import CHECKPOINTS, checkpoint_of
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.diffusers.planning.cards import CARDS
from corrdit.integrations.diffusers.planning.configured_model import configured_model
from corrdit.integrations.diffusers.planning.memory_trace import MemoryTrace
from corrdit.integrations.diffusers.planning.plan import plan
from corrdit.integrations.diffusers.planning.repeats import Repeats
from corrdit.integrations.diffusers.planning.residence import bytes_of, resident
from corrdit.integrations.diffusers.planning.tasks import PlannedTask, Request
from corrdit.integrations.diffusers.testing.tiny_models import TINY_MODELS, tiny_generation, tiny_pipeline

SCRIPTS = pathlib.Path(__file__).parents[2] / "benchmarks"
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield importlib.import_module("plan_memory")
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def embedded():
    return load_backbone("embedded")


@pytest.fixture(scope="module")
def configurations(script, tmp_path_factory):
    """A folder with configurations and no weights."""
    return script.configured(tiny_pipeline("wan"), tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize(
    "task, settings",
    [
        ("transfer", {}),
        pytest.param("transfer", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        ("track", {}),
        ("cag", {}),
        pytest.param("transfer", {"method": "smm"}, marks=pytest.mark.slow),
        pytest.param("transfer", {"optimise": "embedding"}, marks=pytest.mark.slow),
        pytest.param("capture", {}, marks=pytest.mark.slow),
    ],
)
def test_planned_peaks_are_those_of_runs(task, settings, script, embedded):
    call = {"prompt": "a red disc", "output_type": "np", "guidance_scale": 5.0}
    size = (3, 48, 64)
    taken = script.measured(embedded, task, size, 4, settings, call)
    expected = script.planned("embedded", task, size, 4, settings)
    assert expected.peak == pytest.approx(taken, rel=script.BAR)
    weights = sum(expected.largest.weights.values())
    # Without what is the same anyway.
    assert expected.peak - weights == pytest.approx(taken - weights, rel=script.BAR)


def test_decoding_is_planned_with_a_real_codec(script, configurations):
    generation = tiny_generation("wan")
    call = {key: value for key, value in generation.items() if "prompt" in key}
    backbone = backbone_of(tiny_pipeline("wan"))
    taken = script.measured(backbone, "generate", (9, 64, 64), 1, {}, {**call, "guidance_scale": 5.0})
    found = script.planned(configurations, "generate", (9, 64, 64), 1, {})
    assert found.largest.name == "decoding"
    assert found.largest.parts["codec"] > 0.9 * sum(found.largest.parts.values())
    assert found.peak == pytest.approx(taken, rel=script.BAR)


def test_a_plan_reads_configurations_alone(configurations):
    assert not list(configurations.rglob("*.safetensors"))
    found = plan(configurations, "transfer", frames=9, height=64, width=64, steps=4)
    assert (found.tokens, found.text_tokens, found.dtype) == (3 * 4 * 4, 0, "bfloat16")
    weights = sum(weight.numel() for weight in tiny_pipeline("wan").transformer.parameters())
    assert found.parameters["transformer"] == weights
    assert all(fit is not None and fit[0] == found.way for fit in found.fits.values())
    described = json.loads(json.dumps(found.described()))
    assert described["peak_bytes"] == found.peak == max(phase["peak_bytes"] for phase in described["phases"])
    assert described["measured_seconds"] is None
    assert described["bound_seconds"]["H200 SXM"] == found.flop / 989.4e12
    assert set(described["sources"]) == {"transformer", "vae", "scheduler"}


def ways_to_do(configurations):
    size = {"frames": 9, "height": 64, "width": 64, "steps": 2, "search": False}
    return {
        "wan": lambda: plan(configurations, "transfer", **size, settings={"gradient_checkpointing": True}),
        "embedded": lambda: plan("embedded", "track", frames=3, height=48, width=64, device="cpu", search=False),
        "tiles": lambda: plan(configurations, "generate", **size, cag=True, placement=Placement(codec_tiling=True)),
        "groups": lambda: plan(configurations, "transfer", **size, placement=Placement("offload_groups")),
        "layers": lambda: plan(configurations, "capture", **size, placement=Placement("offload_layers")),
        "float8": lambda: plan(configurations, "generate", **size, placement=Placement(weights="float8")),
    }


@pytest.mark.parametrize(
    "name",
    [
        "layers",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan", "embedded", "tiles", "groups", "float8")),
    ],
)
def test_what_repeats_takes_what_it_takes_when_it_runs(configurations, monkeypatch, name):
    """To the byte and the operation, with repeats counted and with every forward run."""
    make = ways_to_do(configurations)[name]
    make()  # tables of pairs of frames are made once
    repeated, replays = make(), []
    own = MemoryTrace.repeat
    monkeypatch.setattr(MemoryTrace, "repeat", lambda trace, taken: (replays.append(taken), own(trace, taken)))
    assert make().phases == repeated.phases
    assert replays
    monkeypatch.setattr(Repeats, "counted", lambda self, parts, trace: contextlib.nullcontext())
    assert make().phases == repeated.phases


@pytest.mark.slow
def test_options_take_less(configurations):
    """Each option against none, at a size where the guided step and the codec weigh."""
    asked = {"frames": 9, "height": 128, "width": 128, "steps": 4, "search": False}
    guided = {}
    for name, more in {
        "none": {},
        "checkpointing": {"settings": {"gradient_checkpointing": True}},
        "offload": {"placement": Placement("offload")},
        "groups": {"placement": Placement("offload_groups"), "settings": {"gradient_checkpointing": True}},
        "float8": {"placement": Placement(weights="float8")},
    }.items():
        phases = plan(configurations, "transfer", **asked, **more).phases
        guided[name] = {phase.name: phase for phase in phases}
    none = guided["none"]
    assert guided["checkpointing"]["guided step"].peak < 0.9 * none["guided step"].peak
    assert guided["checkpointing"]["decoding"].parts["codec"] == none["decoding"].parts["codec"]
    assert guided["checkpointing"]["guided step"].flop > none["guided step"].flop
    assert set(guided["offload"]["decoding"].weights) == {"vae"}
    assert "transformer" not in guided["groups"]["guided step"].weights
    brought = guided["groups"]["guided step"].parts["weights"]
    assert 0 < brought < none["guided step"].weights["transformer"]
    stored = guided["float8"]["denoising step"].weights["transformer"]
    assert stored < 0.75 * none["denoising step"].weights["transformer"]


def test_offloaded_parts_stay_until_the_next_in_the_chain_runs():
    parts = {"text_encoder": 9, "transformer": 10, "vae": 1}
    order = ["text_encoder", "vae", "transformer", "", "text_encoder", "transformer", "vae"]
    found = resident(order, parts, Placement("offload"))
    expected = [{"text_encoder"}, {"text_encoder", "vae"}, {"vae", "transformer"}, set(), {"text_encoder"}]
    assert [set(there) for there in found] == [*expected, {"transformer"}, {"vae"}]
    assert resident(order, parts, Placement()) == [parts] * len(order)


def kinds(parts):
    """Type and size of every tensor of some components."""
    return {
        f"{part} {name}": (tensor.dtype, tensor.shape)
        for part, module in parts.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted({"cogvideox", "wan", "ltx2", "kandinsky5"} & set(TINY_MODELS)))
def test_weights_have_the_types_they_are_loaded_in(name, dtype, tmp_path):
    """The libraries keep some in float32: transformers T5's widest for float16, diffusers Wan's norms for both."""
    pipe = tiny_pipeline(name)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    pipe.register_modules(text_encoder=transformers.T5EncoderModel(transformers.T5Config(vocab_size=32, **sizes)))
    pipe.save_pretrained(tmp_path)
    loaded = kinds(load_backbone(tmp_path, dtype=dtype).pipe.components)
    assert kinds(configured_model(tmp_path, device=GPU, dtype=dtype).parts) == loaded
    drawn = kinds(configured_model(tmp_path, device=CPU, dtype=dtype, random=True).parts)
    assert drawn == {key: kind for key, kind in loaded.items() if not key.startswith("text_encoder")}
    wide = {kind for key, (kind, _) in loaded.items() if ".wo." in key}
    assert wide == {torch.float32 if dtype == torch.float16 else dtype}


def test_a_size_that_is_left_out_is_the_models_own(tmp_path):
    found = plan("embedded", "generate", steps=1, search=False)
    assert (found.frames, found.height, found.width) == (8, 32, 32)
    pipe = tiny_pipeline("cogvideox")
    pipe.save_pretrained(tmp_path)
    config, pixels = pipe.transformer.config, pipe.vae_scale_factor_spatial
    found = plan(tmp_path, "generate", steps=1, height=64, search=False)
    assert (found.frames, found.height, found.width) == (config.sample_frames, 64, config.sample_width * pixels)


def test_a_random_model_runs_without_its_encoders():
    model = configured_model("embedded", device=CPU, random=True)
    assert sorted(model.parts) == ["transformer", "vae"]
    assert model.mode is None
    step = PlannedTask(model, Request("generate", 8, 32, 32)).step
    (first,), (second,) = step(), step()
    assert first.shape == (2, 8, 12, 16, 16)
    assert first.std() > 0
    assert not torch.equal(first, second)


def test_packed_weights_take_a_byte():
    model = configured_model("embedded", device=CPU)
    own, packed = (bytes_of(model.parts, Placement(weights=kind)) for kind in ("own", "float8"))
    linear = [module for module in model.parts["transformer"].modules() if isinstance(module, torch.nn.Linear)]
    smallest = sum(weight.numel() for module in linear for weight in module.parameters())
    assert packed["vae"] == own["vae"]
    assert 0 < own["transformer"] - packed["transformer"] <= 3 * smallest


def test_a_trace_counts_storages_until_they_are_gone():
    weight = torch.randn(64, 64)
    trace = MemoryTrace(weights=[weight])
    with trace.phase() as phase:
        first = torch.randn(64, 64, requires_grad=True)
        saved = (first @ weight).exp()
        view = saved.t()
        del saved
        view.sum().backward()
    size = 64 * 64 * 4
    # The leaf and what exp saves are there when their gradients come, the product's output was not kept.
    assert phase.peak["saved for backward"] == pytest.approx(2 * size, abs=64)
    assert phase.total == pytest.approx(4 * size, abs=2 * size)
    assert phase.flop == 2 * 2 * 64**3
    del first, view
    with trace.phase() as after:
        torch.empty(10)
    assert after.total == 40


def test_fake_tensors_leave_nothing_in_the_kernels_caches(configurations):
    tables = pytest.importorskip("corrdit.kernels.shared.tables", exc_type=ImportError)
    plan(configurations, "capture", frames=9, height=64, width=64, steps=2, search=False)
    pairs = [(i, j) for i in range(3) for j in range(3)]
    places = tables.whole_frames(3, 4)
    table = tables.frame_pairs([frame for pair in pairs for frame in pair], places, places, 2, 2, CPU)
    assert all(type(tensor) is torch.Tensor for tensor in table[:7])
    assert table.pairs[:, [0, 3]].tolist() == [[4 * i, 4 * j] for i, j in pairs]
    with FakeTensorMode():
        made = tables.coordinate_table(3, 5, torch.float16, CPU)
    assert type(made) is torch.Tensor
    assert made[7, :7].tolist() == [1, 2, 1, 1, 2, 1, 0]


def test_a_plan_in_one_thread_leaves_the_kernels_of_another_at_work(monkeypatch):
    pytest.importorskip("triton")
    script = (
        "import threading, torch\n"
        "from corrdit import TokenGrid, ops\n"
        "from corrdit.integrations.diffusers.planning.kernel_calls import kernels_planned\n"
        "grid, q = TokenGrid(2, 4, 5), torch.randn(1, 2, 40, 16)\n"
        "found = []\n"
        "def work(): found.append(ops.soft_displacement(q, q, grid, heads='none', backend='triton'))\n"
        "with kernels_planned():\n"
        "    thread = threading.Thread(target=work)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "expected = ops.soft_displacement(q, q, grid, heads='none', backend='reference')\n"
        "torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)\n"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_published_checkpoints_have_their_published_sizes():
    """Billions of parameters as their pages have them."""
    billions = {"cogvideox-5b": 5.57, "wan-2.1-1.3b": 1.42, "wan-2.1-14b": 14.3, "hunyuanvideo": 12.8, "mochi": 10.0}
    for name, expected in billions.items():
        transformer = configured_model(name, device=GPU).parts["transformer"]
        assert sum(weight.numel() for weight in transformer.parameters()) / 1e9 == pytest.approx(expected, rel=0.01)
    assert checkpoint_of("THUDM/CogVideoX-5b") is checkpoint_of("CogVideoX-5B") is CHECKPOINTS["cogvideox-5b"]
    assert all(part.source for checkpoint in CHECKPOINTS.values() for part in checkpoint.parts.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_every_checkpoint_is_planned_in_a_minute_or_two(name):
    """Processor time, with the search for ways that fit each card."""
    began = time.process_time()
    found = plan(name)
    assert time.process_time() - began < 240
    assert found.fits["141 GB"] is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 4e9


@pytest.mark.slow
def test_a_published_transfer_fits_a_24_gigabyte_card_as_released():
    found = plan("cogvideox-5b", "transfer", placement=Placement("offload", codec_tiling=True), search=False)
    assert found.way.checkpointing
    assert (found.tokens, found.text_tokens) == (13 * 30 * 45, 226)
    assert 14 * 2**30 < found.peak < 17 * 2**30 < CARDS[1].bytes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["cogvideox-9b"], "unknown model 'cogvideox-9b'"),
        (["embedded", "--size", "50x64"], "height 50 is not a multiple of 4"),
        (["embedded", "--placement", "shards"], "spreads a model over several cards"),
        (["embedded", "--placement", "offload_layers", "--weights", "float8"], "does not go with placement"),
        (["embedded", "--task", "track", "--cag"], "cag goes with task=\"generate\""),
        (["embedded", "--task", "track", "--method", "smm"], "method are settings of task=\"transfer\""),
        (["embedded", "--num-frames", "0"], "frames must be a whole number of at least 1"),
        (["embedded", "--steps", "0"], "steps must be a whole number of at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("corrdit plan: ")
    assert message in error


def test_a_folder_without_a_transformer_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(ValueError, match="has no configuration of a transformer"):
        plan(tmp_path)


def test_the_command_shows_phases_and_cards(configurations, capsys):
    arguments = ["plan", str(configurations), "--num-frames", "9", "--size", "64x64", "--steps", "4"]
    assert main([*arguments, "--task", "generate", "--cag"]) == 0
    shown = capsys.readouterr().out
    for words in ("denoising step", "decoding", "16 GB", "lower bound", "no time was measured"):
        assert words in shown
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "transfer"
