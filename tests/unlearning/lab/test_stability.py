"""The stability map: what each adapter computes, a tiny grid end to end, and going on with it."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastbound import FusedBoundedLinear
from fastbound.cli import main, parse
from fastbound.errors import InputError
from fastbound.figures import adapter_colour, label_ends, new_figure
from fastbound.unlearning.data.rows import Row, authors, load_rows
from fastbound.unlearning.demo.small_model import SmallModelConfig
from fastbound.unlearning.lab import grid as grids
from fastbound.unlearning.lab import plots
from fastbound.unlearning.lab.adapters import ComparedLinear, adapt, delta_of
from fastbound.unlearning.lab.cell import CellConfig
from fastbound.unlearning.lab.command import _grid as grid_of
from fastbound.unlearning.lab.grid import CELLS, Grid, read_cells, run_grid
from fastbound.unlearning.lab.names import KINDS, parse_adapter
from fastbound.unlearning.lab.plots import PICTURES, draw
from fastbound.unlearning.lab.scoring import utility_of
from fastbound.unlearning.lab.summary import Standard, kept_of, lines_of, ranges_of, table_of

TINY = SmallModelConfig(
    hidden_size=32, intermediate_size=48, layers=1, heads=2, vocabulary=400, lr=1e-2,
    batch_size=5, most_epochs=40,
)  # fmt: skip
GRID = Grid(
    adapters=("lora", "sine@4"), rates=(1e-2,), seeds=1, model=TINY, cell=CellConfig(steps=12)
)


@pytest.fixture(scope="module")
def rows() -> tuple[list[Row], list[Row]]:
    return load_rows(authors("forget"))[:4], load_rows(authors("retain"))[:6]


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory):
    """A folder with a tiny grid that has run, and its cells."""
    output = tmp_path_factory.mktemp("lab") / "run"
    return output, run_grid(*rows, GRID, output, workers=1, progress=False)


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = 3 * torch.randn(4, 7, generator=generator, dtype=torch.float64)
    B = 3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return A, B


@pytest.mark.parametrize("kind", KINDS)
def test_delta_is_the_formula_entry_by_entry(kind):
    A, B = factors()
    alpha, bound, r = 8.0, 0.3, 4
    omega = math.sqrt(alpha / bound)

    def entry(n: int, k: int) -> float:
        pairs = [(float(B[n, i]), float(A[i, k])) for i in range(r)]
        if kind == "product":
            return bound * math.sin(alpha / (r * bound) * sum(b * a for b, a in pairs))
        if kind in ("sine", "tanh"):
            f = math.sin if kind == "sine" else math.tanh
            return bound / r * sum(f(omega * b) * f(omega * a) for b, a in pairs)
        return alpha / r * sum(b * a for b, a in pairs)

    wanted = torch.tensor([[entry(n, k) for k in range(7)] for n in range(5)], dtype=torch.float64)
    delta = delta_of(kind, A, B, alpha=alpha, bound=bound)
    torch.testing.assert_close(delta, wanted, rtol=1e-12, atol=1e-12)
    assert (delta.abs().max() <= bound) == (kind in ("sine", "tanh", "product"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_slope_of_lora_at_zero(kind):
    A, B = (1e-5 * each for each in factors())
    lora = delta_of("lora", A, B, alpha=8.0, bound=0.3)
    torch.testing.assert_close(delta_of(kind, A, B, alpha=8.0, bound=0.3), lora, rtol=1e-6, atol=0)


def test_the_compared_sine_is_the_fused_layer():
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    fused = FusedBoundedLinear.from_linear(layer, 4, alpha=8.0, bound=0.3)
    plain = ComparedLinear(layer, "sine", 4, alpha=8.0, bound=0.3)
    with torch.no_grad():
        for name, value in zip("AB", factors(), strict=True):
            getattr(fused.adapter, name).copy_(value)
            getattr(plain, name).copy_(value)
    torch.testing.assert_close(plain(x), fused(x))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dora", "unknown adapter 'dora'"),
        ("lora+ranks+ranks", r"names \+ranks twice"),
        ("sine+ranks", "sine@BOUND"),
        ("lora@4", "lora has no bound"),
        ("sine", "sine@BOUND"),
        ("tanh@-1", "tanh@BOUND"),
        ("product@nan", "product@BOUND"),
        ("product@omega=0", "product@omega=100"),
        ("product@omega=x", "product@omega=100"),
        ("sine@omega=3", "sine@BOUND"),
    ],
)
def test_an_adapter_that_does_not_exist_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_adapter(text)


def test_the_bound_is_in_units_of_the_weight():
    weight = torch.tensor([[3.0, -4.0]])
    assert parse_adapter("sine@2").bound_in(weight, 16.0) == pytest.approx(2 * math.sqrt(12.5))
    assert parse_adapter("tanh@0.5*spectral").bound_in(weight, 16.0) == pytest.approx(
        0.5 * float(torch.linalg.matrix_norm(weight.detach(), 2)) / weight.numel() ** 0.5
    )
    assert parse_adapter("sine@alpha").bound_in(weight, 16.0) == 16.0
    assert parse_adapter("lora").bound_in(weight, 16.0) == math.inf
    assert parse_adapter("sine@2+ranks").bound_in(weight, 16.0) == pytest.approx(
        2 * math.sqrt(12.5)
    )


def test_the_product_of_the_paper_is_the_sine_of_100_times_it():
    model = nn.Module()
    model.config = SimpleNamespace(model_type="llama")
    model.mlp = nn.Module()
    model.mlp.up_proj = nn.Linear(7, 5)
    (layer,) = adapt(
        model, parse_adapter("product@omega=100"), {"mlp.up_proj": 4}, alpha=8.0, seed=0
    ).values()
    with torch.no_grad():
        layer.adapter.B.normal_(0, 0.1)
    wanted = torch.sin(100 * (layer.adapter.B @ layer.adapter.A))
    torch.testing.assert_close(layer.delta_weight(), wanted)
    assert layer.bound == 1.0


def test_utility_is_zero_when_a_part_is():
    assert utility_of([1.0, 0.5]) == pytest.approx(2 / 3)
    assert utility_of([1.0, 0.0]) == 0.0
    assert utility_of([1.0, math.nan]) == 0.0


@pytest.mark.slow
def test_a_cell_forgets_stays_in_its_bound_and_is_written_down(finished):
    output, cells = finished
    assert [cell["adapter"] for cell in cells] == ["lora", "sine@4"]
    before = grids.read_models(output)["0"]
    for cell in cells:
        assert cell["forget_loss"] > before["forget_loss"] + 1
        assert cell["stopped"] is None
        assert [line["step"] for line in cell["history"]] == [1, 10, 12]
        parts = [cell[name] for name in ("probability", "accuracy", "truth_ratio")]
        assert cell["utility"] == pytest.approx(utility_of(parts))
    assert list(read_cells(output)) == [
        "lora|lr=0.01|rank=8|seed=0",
        "sine@4|lr=0.01|rank=8|seed=0",
    ]


@pytest.mark.slow
def test_a_cut_grid_goes_on_where_it_was_and_takes_more_adapters(rows, finished):
    output, cells = finished
    held = (output / CELLS).read_text()
    first, second = held.splitlines(keepends=True)
    (output / CELLS).write_text(first + second[:40])  # killed while writing
    assert len(read_cells(output)) == 1
    wider = Grid(
        adapters=("lora", "sine@4", "sine@4+ranks"), rates=GRID.rates, seeds=1,
        model=TINY, cell=GRID.cell,
    )  # fmt: skip
    again = run_grid(*rows, wider, output, workers=1, resume=True, progress=False)
    assert (output / CELLS).read_text().startswith(first)
    assert [cell["adapter"] for cell in again] == ["lora", "sine@4", "sine@4+ranks"]
    even, spread = (cell["ranks"] for cell in again[1:])
    assert set(even.values()) == {8} and len(set(spread.values())) > 1
    assert sum(even.values()) == sum(spread.values())  # N + K is the same in every layer
    drop = {"seconds"}
    for old, new in zip(cells, again, strict=False):
        assert {k: v for k, v in old.items() if k not in drop} == {
            k: v for k, v in new.items() if k not in drop
        }


@pytest.mark.slow
def test_a_folder_with_other_settings_or_without_resume_is_refused(rows, finished):
    output, _ = finished
    with pytest.raises(InputError, match="holds another run"):
        run_grid(*rows, GRID, output, progress=False)
    other = Grid(adapters=("lora",), model=TINY, cell=CellConfig(steps=13))
    with pytest.raises(InputError, match="other cell"):
        run_grid(*rows, other, output, resume=True, progress=False)


@pytest.mark.slow
def test_the_pictures_and_the_summary_come_from_the_cells(finished, tmp_path):
    _, cells = finished
    draw(cells, tmp_path)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    assert [line.seeds for line in lines_of(cells)] == [1, 1]


def finished_cell(lr, utility, forget_loss, seed=0):
    return {
        "adapter": "sine@4", "rank": 8, "seed": seed, "lr": lr, "utility": utility,
        "forget_loss": forget_loss, "forget_target": 6.0, "stopped": None, "history": [],
        **dict.fromkeys(
            ("probability", "accuracy", "truth_ratio", "retain_loss", "largest_delta",
             "delta_norm", "largest_gradient_norm"), 1.0,
        ),
    }  # fmt: skip


def test_a_table_of_unequal_seeds_says_how_many_each_mean_is_of():
    cells = [finished_cell(1e-2, 0.5, 9, seed) for seed in (0, 1)] + [finished_cell(1e-3, 0.4, 1)]
    assert table_of(lines_of(cells)).splitlines()[2] == (
        "| sine@4 | 0.400* (1) | 0.500 ± 0.000 (2) | 0.01 |"
    )
    same = table_of(lines_of(cells[:2]))
    assert "0.500 ± 0.000 |" in same


def test_a_run_that_broke_off_is_marked_and_does_not_hold():
    broken = {**finished_cell(1e-2, 0.0, math.nan, 1), "retain_loss": math.nan, "stopped": 7}
    cells = [finished_cell(1e-3, 0.5, 9, seed) for seed in (0, 1)]
    lines = lines_of([*cells, finished_cell(1e-2, 0.9, 9), broken])
    assert math.isnan(lines[1].spread["retain_loss"]) and lines[1].spread["accuracy"] == 0
    (found,) = ranges_of(lines, kept_of({"accuracy": 1.0}))  # every accuracy is 1
    assert (found["holds_from"], found["holds_to"]) == (1e-3, 1e-3)
    assert "*! |" in table_of(lines).splitlines()[2]


def test_a_range_ends_where_a_rate_of_the_map_was_not_run():
    other = [{**finished_cell(lr, 0.9, 9), "adapter": "lora"} for lr in (1e-3, 1e-2, 1e-1)]
    lines = lines_of([finished_cell(1e-3, 0.9, 9), finished_cell(1e-1, 0.9, 9), *other])
    found = {each["adapter"]: (each["holds_from"], each["holds_to"]) for each in ranges_of(lines)}
    assert found == {"sine@4": (1e-3, 1e-3), "lora": (1e-3, 1e-1)}


def test_marks_are_open_where_a_seed_did_not_forget(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path, dpi: drawn.update({path.name: figure})
    )
    draw([finished_cell(1e-3, 0.9, 0.5), finished_cell(1e-2, 0.6, 9)], tmp_path)
    kept, forgotten = drawn["utility.png"].axes
    for panel in (kept, forgotten):
        faces = [
            line.get_markerfacecolor() for line in panel.get_lines() if line.get_marker() == "o"
        ]
        assert faces == ["white", adapter_colour("sine@4")]
        assert "bounded, 4*rms" in [text.get_text() for text in panel.texts]


def test_what_all_adapters_share_stands_above_the_panels(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path, dpi: drawn.update({path.name: figure})
    )
    cell = finished_cell(1e-3, 0.9, 0.5)
    names = ("lora+flooding@level=2.7+stop", "sine@4+attention+flooding@level=2.7+stop")
    draw([{**cell, "adapter": name} for name in names], tmp_path)
    for figure in drawn.values():
        assert figure.get_suptitle() == "All adapters: flooding, stops when forgotten, level 2.7"
    labels = {text.get_text() for text in drawn["utility.png"].axes[0].texts}
    assert {"LoRA", "bounded, 4*rms, attention"} <= labels
    draw([{**cell, "adapter": names[0]}], tmp_path)
    (label, _) = (text.get_text() for text in drawn["utility.png"].axes[0].texts)
    assert label == "LoRA, flooding, stops when forgotten, level 2.7"


def test_a_label_stands_at_the_end_of_its_line():
    panel = new_figure(1, 1, (4, 3))[1][0, 0]
    panel.plot([0, 1], [0, 140], label="high")
    panel.plot([0, 1], [140, 20], label="low")
    label_ends(panel)
    low, high = panel.get_ylim()
    for text, value in zip(panel.texts, (140, 20), strict=True):
        assert text.get_position()[1] == pytest.approx((value - low) / (high - low))


def test_labels_of_lines_that_end_close_together_do_not_overlap():
    panel = new_figure(1, 1, (4, 3))[1][0, 0]
    for i in range(8):
        panel.plot([0, 1], [0, 1 + i / 1000], label=f"line {i}")
    label_ends(panel)
    heights = sorted(text.get_position()[1] for text in panel.texts)
    assert len(heights) == 8 and heights[-1] <= 1
    assert min(b - a for a, b in pairwise(heights)) > 0.05


def test_a_range_is_an_unbroken_run_of_rates_that_forget_and_hold():
    cell = finished_cell
    cells = [cell(1e-3, 0.9, 0.5), cell(3e-3, 0.5, 9), cell(1e-2, 0.6, 9), cell(3e-2, 0.1, 9)]
    lines = lines_of(cells)
    (found,) = ranges_of(lines)
    assert (found["holds_from"], found["holds_to"]) == (3e-3, 1e-2)
    assert found["fold"] == pytest.approx(10 / 3, rel=1e-5)
    assert found["collapsed"] == [3e-2]
    (kept,) = ranges_of(lines, kept_of({"accuracy": 1.0}))  # every accuracy above is 1
    assert (kept["holds_from"], kept["holds_to"], kept["collapsed"]) == (3e-3, 3e-2, [])
    (lost,) = ranges_of(lines, Standard("accuracy", least=1.1, collapsed=1.05))
    assert lost["holds_from"] is None and len(lost["collapsed"]) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapters", "dora"], "unknown adapter"),
        (["--lr", "fast"], "--lr must be numbers"),
        (["--lr", "0"], "lr must be positive"),
        (["--ranks", ","], "--ranks is empty"),
        (["--seeds", "0"], "seeds must be an integer >= 1, got 0"),
        (["--steps", "0"], "steps must be an integer >= 1, got 0"),
        (["--workers", "0"], "workers must be an integer >= 1, got 0"),
        (["--forget", "rows.jsonl"], "together"),
        (["--general", "rows.jsonl"], "--general is knowledge of a pretrained model"),
        (["--model", "somewhere"], "--model needs --forget and --retain"),
        (
            ["--quick", "--model", "m", "--forget", "f", "--retain", "r"],
            "--quick shortens the map of the tiny model",
        ),
        (["--batch-size", "0"], "batch_size must be an integer >= 1, got 0"),
        (["--eval-rows", "0"], "eval_rows must be an integer >= 1, got 0"),
        (["--dtype", "float16"], "dtype must be one of float32, bfloat16"),
        (["--adapters", "sine@0*spectral"], "BOUND with a positive multiple"),
    ],
)
def test_the_command_refuses_bad_flags_and_writes_nothing(flags, message, tmp_path, capsys):
    output = tmp_path / "lab"
    assert main(["lab", "--output", str(output), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_the_command_writes_summary_and_pictures(rows, tmp_path, capsys):
    for side, some in zip(("forget", "retain"), rows, strict=True):
        (tmp_path / f"{side}.jsonl").write_text(
            "".join(json.dumps({"question": r.question, "answer": r.answer}) + "\n" for r in some)
        )
    output = tmp_path / "lab"
    flags = ["--adapters", "lora,sine@1", "--lr", "0.01", "--seeds", "1", "--steps", "5"]
    files = [f"--{side}={tmp_path / side}.jsonl" for side in ("forget", "retain")]
    assert main(["lab", "--output", str(output), "--workers", "1", *flags, *files]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert [line["adapter"] for line in summary["lines"]] == ["lora", "sine@1"]
    assert summary["lines"][1]["mean"]["largest_delta"] > 0
    assert all((output / name).exists() for name in PICTURES)
    assert "| sine@1 |" in capsys.readouterr().out
    # The config of the map gives the same grid again, with what was not given.
    again = parse(["lab", "--config", str(output / "config.yaml"), "--output", "again"])
    held = json.loads(json.dumps(dataclasses.asdict(grid_of(again))))
    assert held == summary["grid"] and again.forget == str(tmp_path / "forget.jsonl")
