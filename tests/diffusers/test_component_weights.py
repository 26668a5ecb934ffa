"""A checkpoint whose weights or configuration are not whole is refused by name."""

import json
import pathlib
from collections.abc import Callable

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from corrdit import load_backbone
from corrdit.integrations.components import loaded_models
from corrdit.integrations.embedded import load_embedded_pipeline
from corrdit.integrations.embedded.pipeline import build_pipeline, build_transformer
from corrdit.testing import TINY_MODELS, tiny_pipeline

Tensors = dict[str, torch.Tensor]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _lacks(tensors: Tensors) -> str:
    name = sorted(tensors)[-1]
    del tensors[name]
    return f"it lacks .*{name}"


def _unknown(tensors: Tensors) -> str:
    tensors["of_another_model.weight"] = torch.zeros(2)
    return "it holds unknown of_another_model.weight"


def _reshaped(tensors: Tensors) -> str:
    name = sorted(tensors)[-1]
    tensors[name] = torch.zeros(3, 5, 7)
    return rf"{name} is \[3, 5, 7\] and should be"


@pytest.fixture(params=["wan", "embedded"])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    pipe = tiny_pipeline("wan") if request.param == "wan" else build_pipeline(build_transformer(1, 2, 16))
    pipe.save_pretrained(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("component", ["transformer", "vae"])
@pytest.mark.parametrize("change", [_lacks, _unknown, _reshaped])
def test_weights_that_are_not_the_models_are_named(
    folder: pathlib.Path, component: str, change: Callable[[Tensors], str]
) -> None:
    file = folder / component / WEIGHTS
    tensors = load_file(file)
    message = change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message) as raised:
        load_backbone(folder)
    assert str(folder / component) in str(raised.value)


@pytest.mark.skipif("ltx2" not in TINY_MODELS, reason="this diffusers has no LTX-2")
@pytest.mark.parametrize("change", [_lacks, _unknown, _reshaped])
def test_so_are_those_of_a_part_that_only_its_pipeline_has(
    tmp_path: pathlib.Path, change: Callable[[Tensors], str]
) -> None:
    tiny_pipeline("ltx2").save_pretrained(tmp_path)
    file = tmp_path / "connectors" / WEIGHTS
    tensors = load_file(file)
    message = change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message) as raised:
        load_backbone(tmp_path)
    assert str(tmp_path / "connectors") in str(raised.value)


@pytest.mark.parametrize("change", [_lacks, _unknown, _reshaped])
def test_so_are_those_of_a_text_encoder_of_transformers(
    tmp_path: pathlib.Path, change: Callable[[Tensors], str]
) -> None:
    config = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
    index = {"_class_name": "WanPipeline", "text_encoder": ["transformers", "T5EncoderModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    models = loaded_models(tmp_path, dtype=torch.float32, low_cpu_mem_usage=True)
    assert list(models) == ["text_encoder"]
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.block.0.layer.1.layer_norm.weight"
    tensors = {key: value for key, value in tensors.items() if key != name} | {f"{name}": tensors[name]}
    message = change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        loaded_models(tmp_path, dtype=torch.float32, low_cpu_mem_usage=True)


def test_the_embedded_loader_refuses_them_too(tmp_path: pathlib.Path) -> None:
    build_pipeline(build_transformer(1, 2, 16)).save_pretrained(str(tmp_path))
    file = tmp_path / "text_encoder" / WEIGHTS
    tensors = load_file(file)
    message = _lacks(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        load_embedded_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("file", "entry", "value", "message"),
    [
        ("model_index.json", "_class_name", 5, "_class_name must be the name of a pipeline, got 5"),
        ("model_index.json", "_class_name", ["WanPipeline"], "_class_name must be the name of a pipeline"),
        ("model_index.json", "_class_name", "logging", "does not have as a pipeline"),
        ("model_index.json", "_class_name", "WanPipelin", r"did you mean WanPipeline\?"),
        ("model_index.json", "scheduler", "euler", r"scheduler must be \[library, class\], got 'euler'"),
        ("model_index.json", "scheduler", ["diffusers", 5], r"scheduler must be \[library, class\]"),
        ("model_index.json", "scheduler", ["diffusers", "NoScheduler"], "names diffusers.NoScheduler"),
        ("model_index.json", "transformer", [], r"transformer must be \[library, class\]"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**10, "num_train_timesteps is 10000000000"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "many", "holds no settings of a"),
        ("transformer/config.json", "num_layers", 10**9, "num_layers is 1000000000"),
        ("transformer/config.json", "num_layers", 10**6, "num_layers is 1000000, but the weights"),
        ("transformer/config.json", "num_layers", "two", "describes no WanTransformer3DModel that can be built"),
        ("transformer/config.json", "ffn_dim", 10**6, r"and should be \[1000000, "),
        ("transformer/config.json", "eps", float("nan"), "eps is nan, which is no sensible value"),
        ("vae/config.json", "base_dim", None, "vae"),
    ],
)
def test_configurations_of_no_sensible_values(
    tmp_path: pathlib.Path, file: str, entry: str, value: object, message: str
) -> None:
    tiny_pipeline("wan").save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**settings, entry: value}))
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path)
