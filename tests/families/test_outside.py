"""Transformers of others: an installed package with an entry point, and models whose user names the grid."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from corrdit import capture, testing
from corrdit.integrations.diffusers import layouts, register_layout, register_named_grid
from corrdit.integrations.diffusers.family_layouts import SkyReelsV2Layout, WanLayout
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.testing.subject import Subject
from corrdit.integrations.diffusers.testing.tiny_pipelines import wan_transformer

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-backbone"
CHECKED = """
from corrdit import load_backbone
from corrdit.integrations.diffusers import available_backbones
from corrdit.testing import check_backbone
backbone = load_backbone("frames-first")
print(len(check_backbone(backbone)), [row["source"] for row in available_backbones() if row["name"] == "frames-first"])
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test registers is forgotten behind it."""
    monkeypatch.setattr(layouts, "_registered", dict(layouts._registered))


@pytest.mark.filterwarnings("ignore:.*no text encoder")
def test_the_example_is_short_and_passes_every_check() -> None:
    source = EXAMPLE / "frames_first.py"
    assert len(source.read_text(encoding="utf-8").splitlines()) < 60
    spec = importlib.util.spec_from_file_location("frames_first", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    testing.check_backbone(
        module.load(device=torch.device("cpu"), dtype=None), only=("token order", "early exit", "grid")
    )


@pytest.mark.slow
def test_the_example_is_found_once_it_is_installed(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "--target", str(tmp_path), str(EXAMPLE)], check=True, cwd=tmp_path)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", CHECKED],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split("\n")[0] == "23 ['frames_first:load (entry point)']"


def unknown(**config: object) -> tuple[torch.nn.Module, dict[str, object]]:
    """A transformer that no layout names, and the arguments of a forward."""
    from corrdit.integrations.diffusers.layouts import has_layout

    class Unheard(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = wan_transformer(**config)
            self.layers, self.config, self.dtype = inner.blocks, inner.config, inner.dtype
            object.__setattr__(self, "inner", inner)

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            return self.inner(hidden_states.transpose(1, 2), timestep, encoder_hidden_states, return_dict=False)

    model = Unheard().eval()
    assert not has_layout(model)
    subject = Subject.random(testing.tiny_backbone("wan"), frames=3, batch=2, seed=0)
    arguments = subject.arguments()
    return model, {**arguments, "hidden_states": arguments["hidden_states"].transpose(1, 2)}


CHECKS = ("grid", "output unchanged", "attention reproduced", "token order", "masks", "early exit")


def test_a_named_grid_is_warned_of_and_can_be_checked() -> None:
    model, arguments = unknown()
    with pytest.raises(ValueError, match="Unheard is not a known video transformer"):
        layout_of(model)
    with pytest.warns(UserWarning, match="the token grid of Unheard is taken as it was named; check it"):
        register_named_grid("Unheard", blocks="layers", axes="BFCHW")
    testing.check_backbone(testing.given_backbone(model, arguments), only=CHECKS)
    with torch.no_grad(), capture(model, layers=[-1], operation=lambda q, k, grid, mask: grid) as captured:
        model(**arguments)
    assert (captured[0, 2].frames, captured[0, 2].height, captured[0, 2].width) == (3, 4, 5)


@pytest.mark.filterwarnings("ignore:the token grid of")
def test_a_wrongly_named_grid_fails_the_checks() -> None:
    model, arguments = unknown()
    register_named_grid("Unheard", blocks="layers", axes="BFCWH")
    with pytest.raises(AssertionError, match="token order"):
        testing.check_backbone(testing.given_backbone(model, arguments), only=("token order",))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"axes": "BCHW"}, "axes must hold each of B, C, F, H and W once, got 'BCHW'"),
        ({"text": "middle"}, "text must be one of"),
        ({"guidance": "both"}, "guidance must be one of"),
    ],
)
def test_wrong_words_about_a_grid(said: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_named_grid("Unheard", **said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "skyreelsv2",
            {"num_frame_per_block": 2},
            "SkyReelsV2Transformer3DModel is not supported: .* blocks of 2 frames",
        ),
        ("kandinsky5", {"attention_type": "nabla"}, "Kandinsky5Transformer3DModel is not supported: .* is nabla"),
    ],
)
def test_refusals_are_of_the_model_and_not_of_its_class(name: str, change: dict[str, object], message: str) -> None:
    transformer = testing.tiny_pipeline(name).transformer
    layout_of(transformer)
    transformer.register_to_config(**change)
    with pytest.raises(ValueError, match=message):
        layout_of(transformer)


def test_a_registered_layout_overrides_a_refusal() -> None:
    transformer = testing.tiny_pipeline("skyreelsv2").transformer
    transformer.register_to_config(num_frame_per_block=2)
    with pytest.raises(ValueError, match="register a layout with"):
        layout_of(transformer)

    class Mine(SkyReelsV2Layout):
        def refusal(self, transformer: torch.nn.Module) -> None:
            return None

    register_layout("SkyReelsV2Transformer3DModel", Mine)
    assert isinstance(layout_of(transformer), Mine)

    class LatteTransformer3DModel(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="factored attention"):
        layout_of(LatteTransformer3DModel())
    register_layout("LatteTransformer3DModel", WanLayout)
    assert isinstance(layout_of(LatteTransformer3DModel()), WanLayout)


def test_families_that_this_diffusers_lacks_are_named() -> None:
    from corrdit.integrations.diffusers.backbones.coverage import coverage
    from corrdit.integrations.diffusers.testing.tiny_models import _MODELS

    present = set(dir(diffusers))
    rows = {row["family"]: row for row in coverage() if row["family"]}
    for row in rows.values():
        assert set(row["missing"]) == {*row["transformers"], *row["pipelines"]} - present
    for name in set(_MODELS) - set(testing.TINY_MODELS):
        with pytest.raises(ValueError, match=f"needs a diffusers with {_MODELS[name].pipeline}"):
            testing.tiny_pipeline(name)
