"""A wrong result never gets a time, one that cannot run has a row that says so, and floors count what must be done."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import pytest
import torch

from corrdit import ops
from corrdit.benchmark import checking, comparisons, floors, measure, plots, report, runner
from corrdit.benchmark.comparisons import BASELINES, COMPARISONS, Baseline
from corrdit.benchmark.floors import H200, Ceilings, floor_of
from corrdit.benchmark.measure import measure_ceilings
from corrdit.benchmark.plan import estimate
from corrdit.benchmark.plots import write_plots
from corrdit.benchmark.runner import BOTH, FORWARD, Piece, Settings, pieces, run_piece, surroundings
from corrdit.benchmark.shapes import DEFAULT_SHAPES, SHAPES, Shape
from corrdit.cli import bench_run, main
from corrdit.memory import leaves_device_unusable
from corrdit.reference.frame_local_attention import local_keys
from corrdit.reference.scores import window_mask

CEILINGS = Ceilings(0.1, 10.0, 2.0)
SMALL = Shape("small", 2, 8, 3, 4, 5, 3)
SETTINGS = Settings(torch.device("cpu"), torch.float32, rounds=1, checked_frames=2)
COMPILED = ("flex", "flex-flash", "compiled", "folded-compiled", "folded-autotuned")
OF_GPUS = ("sdpa-cudnn", "flash-3", "flex-flash")
WITH_BASELINES = dataclasses.replace(
    SETTINGS, baselines=tuple(name for name in BASELINES if name not in (*COMPILED, *OF_GPUS))
)


def measured(piece, settings=SETTINGS):
    return {row["competitor"]: row for row in run_piece(piece, settings, CEILINGS, surroundings(settings))}


@pytest.fixture
def baseline_of_hard_displacement(monkeypatch):
    """Puts another way into the comparison of hard displacement and runs it."""

    def run(baseline, **settings):
        name = "hard_displacement:logits"
        comparison = dataclasses.replace(COMPARISONS[name], baselines={"windows": baseline})
        monkeypatch.setitem(comparisons.COMPARISONS, name, comparison)
        given = dataclasses.replace(WITH_BASELINES, **settings)
        return list(run_piece(Piece(name, SMALL, False), given, CEILINGS, surroundings(given)))

    return run


@pytest.mark.slow
def test_ceilings_of_this_machine():
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e-4 < ceilings.matmul_tflops < 100
    assert 0.1 < ceilings.copy_gigabytes < 10_000
    assert 0.01 < ceilings.exponentials < 10_000


def test_every_operation_has_rows_with_times_memory_and_versions(tmp_path):
    names = ["soft_displacement:window", "match:bidirectional", "frame_local_attention:masked"]
    todo = pieces(names, [SMALL])
    assert [(piece.operation, piece.passes) for piece in todo] == [
        (names[0], FORWARD), (names[0], BOTH), (names[1], FORWARD), (names[2], FORWARD), (names[2], BOTH)
    ]  # fmt: skip
    rows = [row for piece in todo for row in measured(piece, WITH_BASELINES).values()]
    assert {row["competitor"] for row in rows} == {"corrdit auto", "windows", "materialized", "sdpa", "sdpa-flash"}
    for row in rows:
        assert row["shape"]["heads"] == 2
        assert row["commit"] is None or len(row["commit"]) >= 12
        assert (row["torch"], row["dtype"]) == (torch.__version__, "float32")
        assert row["within_tolerance"]
        assert row["checked_against"] == "reference in float64, 2 frames"
        assert 0 < row["milliseconds"]["least"] <= row["milliseconds"]["median"] <= row["milliseconds"]["most"]
        assert row["extra_bytes"] >= 0
        assert row["share_of_limit"] == row["floor_milliseconds"] / row["milliseconds"]["median"]
    assert rows[0]["about"] == "streaming"
    assert json.loads(json.dumps(rows)) == rows
    larger = {**rows[0], "shape": dataclasses.asdict(dataclasses.replace(SMALL, name="larger", frames=4))}
    assert report.largest_shape([*rows, larger]).name == "small"
    assert report.largest_shape([rows[0], larger]).name == "larger"
    table = report.write_table(rows, tmp_path).read_text()
    assert "| frame_local_attention:masked | corrdit auto (streaming) |" in table
    assert {path.name for path in write_plots(rows, tmp_path)} == {
        "time-forward.png", "time-forward-backward.png", "memory-forward.png", "memory-forward-backward.png",
        "limit.png",
    }  # fmt: skip
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece", pieces(list(COMPARISONS), [SMALL]), ids=lambda piece: f"{piece.operation} {piece.passes}"
)
def test_every_way_is_right_and_timed(piece):
    rows = measured(piece, dataclasses.replace(SETTINGS, baselines=tuple(BASELINES)))
    assert set(rows) == {"corrdit auto", *COMPARISONS[piece.operation].baselines}
    for name, row in rows.items():
        if (name == "flex" and piece.operation == "frame_local_attention:zeroed") or name in (
            "sdpa-cudnn",
            "flash-3",
            "flex-flash",
        ):
            assert row["left_out"] == "does not run on cpu"
        elif name == "flex" and piece.backward:
            assert row["left_out"] == "has no backward pass on cpu"
        else:
            assert row["within_tolerance"]
            assert row["milliseconds"]["median"] > 0


@pytest.mark.parametrize("add", [1, torch.tensor([0, 1])], ids=["everywhere", "downwards"])
def test_a_wrong_result_gets_no_time(baseline_of_hard_displacement, tmp_path, add):
    wrong = Baseline(lambda s: (ops.hard_displacement(s.q, s.k, s.grid) + add,))
    own, other = baseline_of_hard_displacement(wrong)
    assert own["milliseconds"]["median"] > 0
    assert "milliseconds" not in other
    assert (other["status"], other["mismatches"]) == ("wrong", 1.0)
    assert "| windows | wrong |" in report.write_table([own, other], tmp_path).read_text()


def test_a_wrong_gradient_and_nan_get_no_time(monkeypatch):
    name = "soft_displacement:logits"

    def scaled(factor):
        return lambda s: (ops.soft_displacement(factor(s.q), s.k, s.grid),)

    ways = {
        "sdpa": Baseline(scaled(lambda q: q.detach() * 0.5 + q * 0.5)),  # the value is right, its gradient is half
        "windows": Baseline(scaled(lambda q: q * torch.nan)),
    }
    monkeypatch.setitem(comparisons.COMPARISONS, name, dataclasses.replace(COMPARISONS[name], baselines=ways))
    rows = measured(Piece(name, SMALL, True), WITH_BASELINES)
    assert "milliseconds" in rows["corrdit auto"]
    assert rows["sdpa"]["status"] == rows["windows"]["status"] == "wrong"
    assert json.loads(json.dumps(rows["windows"]))["error"] > 1
    assert "milliseconds" in measured(Piece(name, SMALL, False), WITH_BASELINES)["sdpa"]


def test_no_memory_and_failures_are_rows(baseline_of_hard_displacement):
    def no_memory(scene):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 677.00 GiB. GPU 0 has a total of")

    def broken(scene):
        raise KeyError("no such thing")

    _, row = baseline_of_hard_displacement(Baseline(no_memory))
    assert (row["status"], row["left_out"]) == ("out of memory", "out of memory: wanted 677.00 GiB more")
    own, row = baseline_of_hard_displacement(Baseline(broken))
    assert (row["status"], row["left_out"]) == ("failed", "KeyError: 'no such thing'")
    assert "milliseconds" in own


def test_memory_of_the_machine_is_out_of_memory_too(baseline_of_hard_displacement):
    _, row = baseline_of_hard_displacement(Baseline(lambda s: (torch.empty(2**60, dtype=torch.int8),)))
    assert row["status"] == "out of memory"


def test_a_baseline_whose_maps_do_not_fit_is_not_tried(baseline_of_hard_displacement):
    def never(scene):
        raise AssertionError("tried")

    _, row = baseline_of_hard_displacement(
        Baseline(never, map_bytes=lambda shape, size: 3.0 * 2**30), baseline_bytes=2.0**30
    )
    assert row["left_out"] == "needs 3.0 GiB for its score maps, more than 1.0 GiB"


def test_a_broken_device_ends_the_run_after_its_rows(monkeypatch):
    def broken(scene):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    name = "hard_displacement:logits"
    ways = {"sdpa": Baseline(broken), "windows": Baseline(lambda s: (ops.hard_displacement(s.q, s.k, s.grid),))}
    monkeypatch.setitem(comparisons.COMPARISONS, name, dataclasses.replace(COMPARISONS[name], baselines=ways))
    rows = run_piece(Piece(name, SMALL, False), WITH_BASELINES, CEILINGS, {})
    row = next(rows)
    assert (row["competitor"], row["status"]) == ("sdpa", "failed")
    # The others have none, so that another process measures them.
    with pytest.raises(runner.DeviceLost, match="the device is unusable after hard_displacement:logits, small, sdpa"):
        next(rows)


@pytest.mark.parametrize(
    "text, unusable",
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: out of memory", False),
        ("CUDA error: operation not permitted when stream is capturing", False),
        ("no such instruction", False),
    ],
)
def test_errors_after_which_a_device_is_of_no_use(text, unusable):
    assert leaves_device_unusable(RuntimeError(text)) is unusable


def test_a_lost_device_leaves_the_rest_to_another_process(monkeypatch, tmp_path, capsys):
    def lost(*arguments):
        yield {"operation": "match", "shape": {"name": "tiny"}, "pass": "forward", "competitor": "sdpa"}
        raise runner.DeviceLost("the device is unusable after match")

    monkeypatch.setattr(runner, "run_piece", lost)
    monkeypatch.setattr(bench_run, "_line", str)
    monkeypatch.setattr(bench_run, "_write_report", lambda rows, output: None)
    status = main(["bench", "--output", str(tmp_path / "out"), "--device", "cpu", "--shapes", "tiny"])
    assert status == bench_run.UNFINISHED
    said = capsys.readouterr()
    assert "the device is unusable after match" in said.err
    assert "measurements are left: the same command with --resume goes on" in said.out


def captured(monkeypatch, replay):
    """One measured row whose backend stands for the kernels', with another way to capture its call."""
    monkeypatch.setattr(runner, "backend_name", lambda backend, q: "triton")
    monkeypatch.setattr(runner, "replay", replay)
    return measured(Piece("attention_mass", SMALL, False))["corrdit auto"]


def test_the_replay_of_a_graph_stands_beside_the_time(monkeypatch):
    row = captured(monkeypatch, lambda work, device: work)
    assert row["replay_milliseconds"] > 0
    assert row["milliseconds"]["median"] > 0
    assert "replay_milliseconds" not in captured(monkeypatch, measure.replay)


def test_a_call_that_cannot_be_captured_or_replayed_keeps_its_time(monkeypatch):
    def refuses(work, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    def breaks(work, device):
        return lambda: 1 / 0

    for replay, reason in ((refuses, "RuntimeError: operation not permitted"), (breaks, "ZeroDivisionError")):
        row = captured(monkeypatch, replay)
        assert row["replay_left_out"].startswith(reason)
        assert row["milliseconds"]["median"] > 0
        assert "left_out" not in row


def test_ways_that_compile_are_timed_at_one_shape():
    other = dataclasses.replace(SMALL, name="other")
    everywhere = dataclasses.replace(SETTINGS, baselines=tuple(BASELINES))
    once = dataclasses.replace(everywhere, compiled_at="small")
    for name, comparison in COMPARISONS.items():
        assert Piece(name, SMALL, False).baselines(once) == list(comparison.baselines)
        assert not set(Piece(name, other, False).baselines(once)) & set(COMPILED)
        assert Piece(name, other, False).baselines(everywhere) == list(comparison.baselines)


def test_the_plan_counts_compilers_and_what_is_not_tried():
    settings = dataclasses.replace(SETTINGS, baselines=("compiled", "folded-autotuned", "flash-3"))
    one = [Piece("soft_displacement:logits", SMALL, False)]
    both = estimate(one, settings, CEILINGS)
    assert both.compilations == 2
    none = estimate(one, dataclasses.replace(settings, baselines=()), CEILINGS)
    assert none.compilations == 0
    assert 150 <= both.seconds - none.seconds <= 160
    assert estimate(one * 2, settings, CEILINGS).seconds == pytest.approx(2 * both.seconds)
    assert estimate([Piece("soft_displacement:probabilities", SMALL, False)], settings, CEILINGS).compilations == 1


def test_the_default_plan_of_a_gpu_fits_45_minutes(monkeypatch):
    shapes = [SHAPES[name] for name in DEFAULT_SHAPES["cuda"]]
    monkeypatch.setattr(comparisons.compiled, "flash_missing", lambda: None)
    monkeypatch.setattr(comparisons.compiled, "installed", lambda module: True)
    settings = Settings(
        torch.device("cuda"), torch.bfloat16, baselines=tuple(BASELINES), compiled_at=shapes[0].name, seconds=5.0
    )
    found = estimate(pieces(list(COMPARISONS), shapes), settings, H200)
    assert found.seconds < 45 * 60
    assert found.compilations > 20


def test_rounds_end_when_time_is_up(monkeypatch):
    monkeypatch.setattr(runner, "peak_extra_bytes", lambda work, device: 0)
    quick = dataclasses.replace(SETTINGS, rounds=6, seconds=1e9)
    slow = dataclasses.replace(SETTINGS, rounds=6, seconds=1e-9)
    piece = Piece("attention_mass", SMALL, False)
    assert measured(piece, quick)["corrdit auto"]["milliseconds"]["count"] == 6
    assert measured(piece, slow)["corrdit auto"]["milliseconds"]["count"] == runner.LEAST_ROUNDS


def test_the_shapes_of_published_models():
    assert SHAPES["cogvideox-5b"].grid.tokens == 226 + 13 * 30 * 45
    assert SHAPES["hunyuanvideo-720p"].grid.video_tokens == 33 * 45 * 80
    assert all(name in SHAPES for names in DEFAULT_SHAPES.values() for name in names)


@pytest.mark.parametrize(
    ("operation", "backward", "expected", "bound"),
    [
        ("soft_displacement:logits", False, 2.4, "matrix product"),
        ("soft_displacement:logits", True, 2.4 + 7.2, "matrix product"),
        ("soft_displacement:probabilities", False, 3.8, "exponentials"),
        ("frame_local_attention:masked", False, 0.5, "matrix product"),
    ],
)
def test_floors_of_cogvideox_on_an_h200(operation, backward, expected, bound):
    floor = Piece(operation, SHAPES["cogvideox-5b"], backward).floor(H200, torch.bfloat16)
    assert floor.milliseconds == pytest.approx(expected, rel=0.03)
    assert floor.bound == bound


def test_work_counts_the_pairs_that_are_seen():
    shape = Shape("odd", 2, 8, 3, 11, 13, 5)
    inside = window_mask(shape.grid.without_text(), floors.WINDOW, None, torch.device("cpu")).sum().item()
    assert floors.window_pairs(shape) == 9 * inside
    every = torch.ones(shape.grid.tokens, shape.grid.tokens)
    near = sum(every[rows, part].sum().item() for rows, seen in local_keys(shape.grid, 0) for part in seen)
    assert floors.frame_local(zeroed=False)(shape).exponentials == 2 * near
    assert floors.frame_local(zeroed=False)(shape).products == 4 * 16 * near
    assert floors.frame_local(zeroed=True)(shape).exponentials == 2 * shape.grid.tokens**2


def test_the_pattern_that_is_followed_has_a_best_match_in_half_precision():
    shape = Shape("moving", 8, 32, 3, 6, 7, 4)
    inputs = checking.scene(shape, shape.grid, torch.device("cpu"), torch.bfloat16, False)
    moved = ops.hard_displacement(inputs.q, inputs.k, inputs.grid)[0, 0, 2]
    assert moved[..., 1].eq(0).all()
    assert moved[:, :5, 0].eq(2).all()
    assert moved[:, 5:, 0].eq(-5).all()


def test_a_small_call_is_bound_by_what_it_copies():
    work = floors.Work(products=1e6, exponentials=1e3, elements=1e6, results=1e3)
    floor = floor_of(work, Ceilings(matmul_tflops=1.0, copy_gigabytes=1.0, exponentials=1.0), element_bytes=2)
    assert floor.bound == "copy"
    assert floor.milliseconds == pytest.approx(2.004)


def test_exponentials_of_a_gpu_are_not_optimised_away(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "corrdit.benchmark.exponentials", raising=False)
    module = importlib.import_module("corrdit.benchmark.exponentials")
    found = module.exponentials(torch.device("cpu"), programs=1, rounds=3)
    expected = torch.arange(module.BLOCK, dtype=torch.float32) * 1e-9
    for _ in range(3):
        expected = torch.exp2(-expected)
    torch.testing.assert_close(found, expected)
    monkeypatch.delitem(sys.modules, "corrdit.benchmark.exponentials")


def test_no_two_ways_look_alike():
    names = {name for comparison in COMPARISONS.values() for name in comparison.baselines}
    names |= {"corrdit auto", *(f"corrdit {backend}" for backend in ("triton", "streaming", "reference"))}
    assert len({plots._style(name) for name in names}) == len(names)
    assert plots._UNKNOWN not in {plots._style(name) for name in names}
