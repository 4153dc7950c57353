"""A whole MLP block against the formula in fp64: every activation, form, rank and dtype."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbound.operator.block_function import bounded_mlp
from fastbound.performance.memory import saved_bytes
from fastbound.truth.exactness import assert_block_as_exact
from fastbound.truth.formula import ACTIVATIONS
from fastbound.truth.operands import BlockOperands, block_operands, run

pytestmark = pytest.mark.usefixtures("poisoned_empty", "interpreted_bf16")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "fused"]
FORMS = {"gated": True, "plain": False}
RANKS = [1, 4, 8, 16, 32, 48, 64]
Block = partial(block_operands, device=DEVICE)


def check(block: BlockOperands, activation: str, **settings: object) -> None:
    assert_block_as_exact(replace(block, activation=activation), bounded_mlp, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_fp64(backend: str, gated: bool, activation: str, dtype: torch.dtype) -> None:
    check(Block((3, 15, 37), 70, (4, 8, 16), dtype, gated=gated), activation, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", FORMS.values(), ids=FORMS)
def test_relu_matches_fp64(backend: str, gated: bool) -> None:
    """fp32 only: where g is rounded across 0, two right answers differ by a whole gradient."""
    block = Block((3, 15, 37), 70, (4, 8, 16), torch.float32, gated=gated)
    check(block, "relu", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [(0, 3, 0), (5, 0, 5), (0, 0, 2), (2, 2, 0), (0, 0, 0)])
def test_any_subset_of_the_projections(backend: str, ranks: tuple[int, int, int]) -> None:
    check(Block((41, 37), 70, ranks, torch.float32), "silu", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank(backend: str, rank: int) -> None:
    check(Block((41, 37), 70, (rank, rank, rank), torch.float32), "silu", backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_matches_fp64_on_any_shape(backend: str, data: st.DataObject) -> None:
    block = Block(
        (data.draw(st.integers(8, 150), "M"), data.draw(st.integers(8, 150), "K")),
        data.draw(st.integers(8, 200), "N"),
        tuple(data.draw(st.sampled_from([0, *RANKS]), "rank") for _ in range(3)),  # type: ignore[arg-type]
        data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype"),
        gated=data.draw(st.booleans(), "gated"),
        bias=data.draw(st.booleans(), "bias"),
        magnitude=data.draw(st.sampled_from([0.02, 1.0, 10.0]), "magnitude"),
        seed=data.draw(st.integers(0, 2**31), "seed"),
    )
    check(block, data.draw(st.sampled_from(["silu", "gelu_tanh"]), "activation"), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", FORMS.values(), ids=FORMS)
def test_recomputing_gives_the_same_bits(backend: str, gated: bool) -> None:
    block = Block((41, 37), 70, (4, 8, 16), torch.float32, gated=gated)
    kept = run(block, bounded_mlp, backend=backend)
    recomputed = run(block, bounded_mlp, backend=backend, recompute="gate_up")
    again = run(block, bounded_mlp, backend=backend)
    for name in kept:
        assert torch.equal(kept[name], again[name]), name
        assert torch.equal(kept[name], recomputed[name]), name


@pytest.mark.parametrize("layout", ["x", "dy", "weights"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands(layout: str, backend: str) -> None:
    block = Block((33, 40), 56, (4, 4, 4), torch.float32)
    if layout == "weights":
        block = block.changed(lambda name, t: t.t().contiguous().t() if name == "weight" else t)
    elif layout == "x":
        block = replace(block, x=torch.stack([block.x] * 2, dim=-1).flatten(-2)[..., ::2])
    else:
        block = replace(block, dy=block.dy.t().contiguous().t())
    check(block, "silu", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row(backend: str) -> None:
    check(Block((1, 37), 70, (16, 16, 16), torch.float32), "silu", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_x(backend: str) -> None:
    results = run(Block((0, 12), 20, (2, 2, 2), torch.float32), bounded_mlp, backend=backend)
    assert results["y"].shape == results["dx"].shape == (0, 12)
    assert not any(results[name].any() for name in results if name.startswith("d"))


@pytest.mark.parametrize(("recompute", "tall"), [(None, 2), ("gate_up", 0)])
def test_saved_bytes(recompute: str | None, tall: int) -> None:
    """bf16: x, g and u and three thin products; with recompute x and the thin products."""
    M, K, N = 64, 96, 256
    block = Block((M, K), N, (16, 16, 16), torch.bfloat16, bias=False).leaves()
    kept = [t for p in (block.gate, block.up, block.down) for t in p[:4] if t is not None]
    counted = saved_bytes(
        lambda: bounded_mlp(block.x, block.up, block.down, block.gate, recompute=recompute), kept
    )
    assert counted == 2 * M * (K + tall * N + 3 * 16)


def test_autocast_casts_x_and_weights_and_never_the_masters() -> None:
    block = Block((33, 40), 56, (4, 4, 4), torch.float32, magnitude=8.0)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results = run(block, bounded_mlp)
    assert results["y"].dtype is torch.bfloat16
    assert results["dx"].dtype is results["dA up"].dtype is torch.float32
    half = Block((33, 40), 56, (4, 4, 4), torch.bfloat16, magnitude=8.0)
    torch.testing.assert_close(results["y"], run(half, bounded_mlp)["y"])


class TestCompile:
    @pytest.fixture
    def poisoned_empty(self) -> None:
        """Not here: the compiler would trace the patch."""

    @pytest.mark.parametrize("gated", FORMS.values(), ids=FORMS)
    def test_fullgraph_with_gradients(self, gated: bool) -> None:
        block = Block((2, 7, 12), 20, (4, 0, 2), torch.float32, gated=gated)
        compiled = torch.compile(bounded_mlp, fullgraph=True, dynamic=True, backend="aot_eager")
        graph, eager = run(block, compiled), run(block, bounded_mlp)
        for name in eager:
            torch.testing.assert_close(graph[name], eager[name])

    def test_checkpointing(self) -> None:
        from torch.utils.checkpoint import checkpoint

        block = Block((9, 12), 20, (4, 4, 2), torch.float32)

        def checkpointed(*arguments: object, **settings: object) -> torch.Tensor:
            return checkpoint(bounded_mlp, *arguments, use_reentrant=False, **settings)

        plain, again = run(block, bounded_mlp), run(block, checkpointed)
        assert all(torch.equal(plain[name], again[name]) for name in plain)

    def test_registered_operators_pass_opcheck(self) -> None:
        block = Block((2, 7, 12), 20, (4, 0, 2), torch.float32)
        tensors = [t for p in block.projections.values() for t in p[:4]]
        x = block.x
        settings = ([0.1, 1.0, 0.05], [1.3, 1.0, 1.3], "silu", "torch", "factors")
        utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        forward = torch.ops.fastbound.mlp_forward.default
        torch.library.opcheck(forward, (x, *tensors, *settings), test_utils=utilities)
        _, G, U, S, S_down = forward(x, *tensors, *settings)
        backward = (block.dy, x, G, U, S, S_down, True, *tensors, *settings)
        torch.library.opcheck(
            torch.ops.fastbound.mlp_backward.default, backward, test_utils=utilities
        )


class TestBadInput:
    def call(self, *, activation: str = "silu", recompute: str | None = None, **changes) -> None:
        block = Block((5, 12), 20, (2, 2, 2), torch.float32)
        changed = {
            name: getattr(block, name)._replace(**change) for name, change in changes.items()
        }
        block = replace(block, **changed)
        bounded_mlp(
            block.x, block.up, block.down, block.gate, activation=activation, recompute=recompute
        )

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match=f"unknown activation 'swish'.*{ACTIVATIONS[0]}"):
            self.call(activation="swish")
        with pytest.raises(ValueError, match="unknown recompute 'all'"):
            self.call(recompute="all")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"gate": {"weight": torch.randn(18, 12)}}, r"gate's weight \[18, 12\] and up's"),
            ({"down": {"weight": torch.randn(12, 18)}}, r"down's weight \[12, 18\] does not match"),
            ({"up": {"A": None}}, "up has only one of A and B"),
            ({"up": {"B": torch.randn(19, 2)}}, r"up: B \[19, 2\] does not match weight"),
            ({"down": {"bias": torch.randn(12, requires_grad=True)}}, "down's bias requires grad"),
            (
                {"gate": {"weight": torch.randn(20, 12, requires_grad=True)}},
                "gate: weight req",
            ),
        ],
    )
    def test_projections(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.call(**changes)

    def test_dtypes(self) -> None:
        with pytest.raises(TypeError, match=r"x is torch.float32 and down's weight is"):
            self.call(down={"weight": torch.randn(12, 20, dtype=torch.float64)})


def test_launches_of_a_gated_block_with_every_projection_adapted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """18 beside the six GEMMs, of which the second of dx is PyTorch's, onto the first.

    One more adds the parts of S_down where the columns of the activation are cut.
    """
    pytest.importorskip("triton", reason="the launches are Triton's")
    from collections import Counter

    from fastbound.kernels.launch import Launch

    launched: Counter[str] = Counter()
    launch = Launch.run

    def counted(self: Launch) -> None:
        launched[self.kernel.__name__] += 1
        launch(self)

    monkeypatch.setattr(Launch, "run", counted)
    run(Block((40, 48), 64, (8, 8, 8), torch.float32), bounded_mlp, backend="fused")
    gemms = launched.pop("_pointer_kernel") + launched.pop("_descriptor_kernel", 0)
    assert (gemms, launched.total()) == (5, 18), launched
