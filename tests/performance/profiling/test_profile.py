"""Profiles run whole on a CPU, mark what does not fit, and say plainly what cannot be done."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastbound.cli import main
from fastbound.layers.mlp import FusedBoundedMLP
from fastbound.models.adapted import injected_layers
from fastbound.performance.profiling import profile as profiling
from fastbound.performance.profiling.profile import (
    FLOOR,
    MODES,
    ProfilePoint,
    Subject,
    profile,
    subjects,
    variants,
)
from fastbound.performance.profiling.report import Profile, draw, flatness, length, table
from fastbound.performance.shapes import (
    MODEL_BLOCKS,
    Block,
    known_models,
    linear_shapes,
    parse_tokens,
)

CPU = torch.device("cpu")
GATED = Block("tiny", 64, 96, "silu", gated=True, bias=False)
PLAIN = Block("tiny", 64, 96, "gelu_tanh", gated=False, bias=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", [4096]),
        ("4k", [4096]),
        ("1k, 8k,512", [512, 1024, 8192]),
        ("1k:8k", [1024, 2048, 4096, 8192]),
        ("1000:5000", [1000, 2000, 4000]),
        ("64,32:128", [32, 64, 128]),
    ],
)
def test_tokens(text: str, expected: list[int]) -> None:
    assert parse_tokens(text) == expected


@pytest.mark.parametrize(
    "text", ["", "k", "0", "-4", "1.5k", "1k:", ":8k", "8k:1k", "1k:2k:4k", "1m", "1e3", "9" * 12]
)
def test_no_tokens(text: str) -> None:
    with pytest.raises(ValueError, match="tokens"):
        parse_tokens(text)


def test_every_known_model_has_layers_and_a_block() -> None:
    for model in known_models():
        assert [len(subjects(mode, model)) for mode in MODES] == [len(linear_shapes(model)), 1, 1]


def tiny(mode: str, block: Block, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr(profiling, "block_of", lambda model: block)
    return subjects(mode, block.model)[0]


@pytest.mark.parametrize("mode", ["mlp", "step"])
@pytest.mark.parametrize("block", [GATED, PLAIN], ids=["gated", "plain"])
def test_adapted_forms_share_the_weights_and_adapt_the_whole_mlp(
    mode: str, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = tiny(mode, block, monkeypatch)
    forms = variants(subject, 4, torch.bfloat16, CPU)
    assert list(forms) == [FLOOR, "fused", "peft_fp32", "peft_bf16"]
    own = {p.data_ptr() for p in forms[FLOOR].parameters()}
    layers = 1 if mode == "mlp" else profiling.STACK
    for name, form in forms.items():
        frozen = [p for p in form.parameters() if not p.requires_grad]
        trained = [p for p in form.parameters() if p.requires_grad]
        assert {p.data_ptr() for p in frozen} == own
        expected = 0 if name == FLOOR else 2 * layers * len(subject.targets)
        assert len(trained) == expected
        assert all(p.detach().any() for p in trained)
        wanted = torch.bfloat16 if name == "peft_bf16" else torch.float32
        assert {p.dtype for p in trained} <= {wanted}
    blocks = [m for m in forms["fused"].modules() if isinstance(m, FusedBoundedMLP)]
    assert len(blocks) == layers
    assert len(injected_layers(forms["fused"])) == layers * len(subject.targets)
    points = profile(subject, forms, [8, 16], CPU, rounds=2)
    assert not any(point.failure for point in points)
    kept = {(p.variant, p.tokens): p.saved_bytes for p in points}
    assert 0 < kept["fused", 16] < kept["peft_fp32", 16]


def test_bytes_kept_grow_with_the_tokens_and_ratios_are_over_the_frozen_layer() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 48, bias=False))

    subject = Subject("layer", 32, 48, ("0",), build)
    forms = variants(subject, 4, torch.float32, CPU)
    told: list[str] = []
    points = profile(subject, forms, [16, 32], CPU, rounds=3, step=told.append)
    assert told == ["layer at 16 tokens", "layer at 32 tokens"]
    by_key = {(p.variant, p.tokens): p for p in points}
    assert by_key["fused", 16].saved_bytes == 4 * 16 * (32 + 16)  # x and S
    assert by_key["fused", 32].saved_bytes == 4 * 32 * (32 + 16)
    for point in points:
        floor = by_key[FLOOR, point.tokens].median
        assert point.median is not None and floor is not None
        assert point.over_floor == point.median / floor
        assert point.peak_bytes is None


class Hungry(nn.Module):
    """Runs out of memory beyond ten rows."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(4, 4)), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 10:
            raise self.error()
        return x @ self.weight


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory"),
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_marks_its_point_and_the_sweep_goes_on(error: Any) -> None:
    plain = nn.Sequential(nn.Linear(4, 4, bias=False)).requires_grad_(False)
    subject = Subject("layer", 4, 4, (), lambda: plain)
    points = profile(subject, {FLOOR: plain, "fused": Hungry(error)}, [8, 16], CPU, rounds=2)
    found = {(p.variant, p.tokens): p.failure for p in points}
    assert found.pop(("fused", 16)) == "out of memory"
    assert set(found.values()) == {None}
    with_floor = profile(subject, {FLOOR: Hungry(error), "fused": plain}, [16], CPU, rounds=2)
    assert with_floor[1].median is not None and with_floor[1].over_floor is None


def test_memory_is_released_when_nothing_holds_it_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    class Full(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            own = torch.ones(1000)
            held.append(weakref.ref(own))
            raise torch.OutOfMemoryError(f"CUDA out of memory beside {len(own)}")

    monkeypatch.setattr(profiling, "_release", lambda device: alive.append(held[0]() is not None))
    plain = nn.Sequential(nn.Linear(4, 4, bias=False)).requires_grad_(False)
    subject = Subject("layer", 4, 4, (), lambda: plain)
    profile(subject, {FLOOR: plain, "fused": Full(4, 4)}, [8], CPU, rounds=2)
    assert alive and not any(alive)


def test_another_error_is_kept_in_its_own_words_and_the_others_go_on() -> None:
    plain = nn.Sequential(nn.Linear(4, 4, bias=False)).requires_grad_(False)
    subject = Subject("layer", 4, 4, (), lambda: plain)
    broken = Hungry(lambda: ValueError("shapes differ\nat length"))
    points = profile(subject, {FLOOR: plain, "fused": broken}, [8, 16], CPU, rounds=2)
    failures = {(p.variant, p.tokens): p.failure for p in points if p.failure is not None}
    assert failures == {("fused", 16): "ValueError: shapes differ"}


def point(tokens: int, variant: str, ratio: float | None) -> ProfilePoint:
    if ratio is None:
        return ProfilePoint("up", tokens, variant, failure="out of memory")
    return ProfilePoint("up", tokens, variant, ratio, ratio, ratio, ratio, 2**20, None)


PROFILE = Profile(
    model="tiny",
    mode="linear",
    what="One layer.",
    device="a device",
    dtype="float32",
    rank=4,
    rounds=3,
    versions={},
    points=[
        *(point(M, FLOOR, 1.0) for M in (1024, 4096, 8192, 131072)),
        *(point(M, "fused", r) for M, r in ((1024, 1.5), (4096, 1.0), (8192, 1.1), (131072, 1.05))),
        *(point(M, "peft_fp32", r) for M, r in ((1024, 2.0), (4096, 2.0), (8192, None))),
        point(131072, "peft_fp32", None),
    ],
)


def test_the_table_has_a_line_for_each_length_and_marks_what_did_not_fit() -> None:
    lines = [line.split("  ") for line in table(PROFILE).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[1][:4] == ["tokens", "frozen ms", "fused x", "peft_fp32 x"]
    assert cells[2][:4] == ["1k", "1000.000", "1.500", "2.000"]
    assert cells[5][:4] == ["128k", "1000.000", "1.050", "out of memory"]
    assert cells[5][-1] == "-"


def test_flatness_is_of_the_long_lengths() -> None:
    assert flatness(PROFILE).splitlines() == [
        "up, fused: 1.000 to 1.100 x the frozen one, ±4.8% from 4k to 128k tokens",
        "up, peft_fp32: 2.000 to 2.000 x the frozen one, ±0.0% from 1k to 4k tokens",
    ]
    assert flatness(replace(PROFILE, points=[point(64, FLOOR, 1.0)])) == ""


def test_a_picture_is_drawn_where_points_are_missing(tmp_path: Path) -> None:
    draw(PROFILE, tmp_path / "some.png")
    nothing = [replace(p, median=None, over_floor=None, failure="out of memory", saved_bytes=None)
               for p in PROFILE.points]  # fmt: skip
    draw(replace(PROFILE, points=nothing), tmp_path / "none.png")
    for name in ("some.png", "none.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_lengths_are_short() -> None:
    assert [length(n) for n in (64, 1000, 1024, 1536, 131072)] == [
        "64",
        "1000",
        "1k",
        "1536",
        "128k",
    ]


def test_the_command_leaves_table_json_picture_and_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "out"
    arguments = ["--device=cpu", "--tokens=8,16", "--rounds=2", "--model-shape=gpt-neo-125m"]
    assert main(["profile", *arguments, f"--output={output}", "--trace"]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((output / "profile.json").read_text())
    assert saved["format"] == "fastbound profile 1" and saved["mode"] == "linear"
    found = {(p["place"], p["tokens"], p["variant"]) for p in saved["points"]}
    names = (FLOOR, "fused", "peft_fp32")
    assert found == {(p, M, v) for p in ("c_fc", "c_proj") for M in (8, 16) for v in names}
    for saved_point in saved["points"]:
        if saved_point["variant"] != FLOOR:
            assert f"{saved_point['over_floor']:.3f}" in printed
    assert (output / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tokens", "many"],
            "tokens 'many': 'many' is not a number of tokens; give a number",
        ),
        (["--model-shape", "llama-9"], "unknown model shape 'llama-9'; choose from "),
        (["--mode", "stp"], "unknown mode 'stp'; choose one of linear, mlp, step"),
        (["--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32; got 'int8'"),
        (["--rank", "0"], "--rank must be >= 1, got 0"),
        (["--rounds", "1"], "--rounds must be >= 2, got 1"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda; got 'tpu'"),
        (["--device", "cuda"], "torch sees no GPU here"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    if "unknown model" in message:
        assert all(block.model in error for block in MODEL_BLOCKS)
