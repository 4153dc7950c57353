"""A whole injected model under torch.compile, export, checkpointing, generation and CUDA graphs."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastbound
from tests.support.models import Gated, assert_same, example, fused, gradients, pair, stir


@pytest.fixture(params=[True, False], ids=["fused", "by-layers"])
def injected(request, tiny_model):
    """Builds an injected model of a type, whole blocks fused or not."""

    def build(model_type: str = "llama") -> nn.Module:
        model = tiny_model(model_type)
        fastbound.inject(model, 4, bound=0.5, fuse_mlp=request.param)
        stir(model)
        return model

    return build


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))


def adapted(tiny_model, how: str) -> nn.Module:
    """A Llama with adapters, injected or under PEFT."""
    model = tiny_model("llama")
    if how == "peft":
        model = get_peft_model(model, fastbound.BoundedConfig(r=4, bound=0.5))
    else:
        fastbound.inject(model, 4, bound=0.5)
    stir(model)
    return model


class TestCompile:
    @pytest.mark.parametrize(
        ("how", "mode"),
        [
            ("peft", "no_grad"),
            ("inject", "frozen"),
            pytest.param("peft", "inference_mode", marks=pytest.mark.slow),
            pytest.param("inject", "no_grad", marks=pytest.mark.slow),
        ],
    )
    def test_in_one_graph_without_gradients(self, tiny_model, how, mode):
        model = adapted(tiny_model, how)
        if mode == "frozen":
            model.requires_grad_(False)
        context = torch.enable_grad if mode == "frozen" else getattr(torch, mode)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with context():
            inputs = {"input_ids": tokens(5), "use_cache": False}
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        torch.compiler.reset()

    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["inject", "peft"])
    def test_generates_with_a_static_cache(self, tiny_model, how):
        model = adapted(tiny_model, how)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(input_ids=tokens(5), **settings)
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        got = model.generate(input_ids=tokens(5), cache_implementation="static", **settings)
        assert torch.equal(got, expected)
        torch.compiler.reset()

    @pytest.mark.slow
    @pytest.mark.parametrize("injected", [True], ids=["fused"], indirect=True)
    def test_any_length_takes_two_graphs_and_no_break(self, injected):
        from torch._dynamo.backends.debugging import aot_eager

        torch.compiler.reset()
        graphs = []

        def counting(graph, inputs, **options):
            graphs.append(graph)
            return aot_eager(graph, inputs, **options)

        model = injected()
        compiled = torch.compile(model, fullgraph=True, backend=counting)
        for length in (5, 9, 13):
            inputs = {"input_ids": tokens(length), "use_cache": False}
            output, grads = gradients(compiled, **inputs)
            expected, wanted = gradients(model, **inputs)
            torch.testing.assert_close(output, expected)
            for name, gradient in wanted.items():
                torch.testing.assert_close(grads[f"_orig_mod.{name}"], gradient)
        assert len(graphs) == 2  # the first length, then any

    @pytest.mark.slow
    def test_layers_compiled_one_by_one_share_graphs_whatever_their_bounds(self, tiny_model):
        torch.compiler.reset()
        for fuse_mlp in (True, False):
            models = [tiny_model("llama"), tiny_model("llama")]
            for model in models:
                fastbound.inject(model, 4, bound="auto", fuse_mlp=fuse_mlp)
                stir(model)
            for layer in models[0].model.layers:  # each with a bound of its own
                layer.compile(fullgraph=True, backend="aot_eager")
            assert_same(*models, **example(models[0]), use_cache=False)

    @pytest.mark.slow
    def test_inductor_takes_a_block(self):
        torch.compiler.reset()
        block = fused(Gated)
        x = torch.randn(5, 6)
        expected, wanted = gradients(block, x)
        output, grads = gradients(torch.compile(block, fullgraph=True), x)
        torch.testing.assert_close(output, expected)
        for name, gradient in wanted.items():
            torch.testing.assert_close(grads[f"_orig_mod.{name}"], gradient)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def test_export_holds_the_operators_and_takes_any_length(injected):
    model = _Logits(injected()).eval()
    length = torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(
        model, (tokens(5),), dynamic_shapes={"input_ids": {1: length}}, strict=False
    )
    assert "torch.ops.fastbound." in program.graph_module.code
    with torch.no_grad():
        for each in (5, 9):
            torch.testing.assert_close(program.module()(tokens(each)), model(tokens(each)))


class _Calls(TorchDispatchMode):
    """Counts the forward operators of fastbound that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in FORWARD
        return func(*args, **(kwargs or {}))


assert fastbound.FusedBoundedMLP is not None  # registers the operators
FORWARD = (torch.ops.fastbound.forward.default, torch.ops.fastbound.mlp_forward.default)


def _keep(_, operator, *args, **kwargs):
    kept = operator in FORWARD
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [True, False])
def test_selective_checkpointing_keeps_the_operators_it_names(injected, selective):
    model = injected().train()
    _, wanted = gradients(model, **example(model))
    settings = {"use_reentrant": False}
    if selective:
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
    model.gradient_checkpointing_enable(settings)
    with _Calls() as calls:
        _, grads = gradients(model, **example(model))
    once = 2 if any(isinstance(m, fastbound.FusedBoundedMLP) for m in model.modules()) else 6
    assert calls.count == (once if selective else 2 * once)
    for name, gradient in wanted.items():
        torch.testing.assert_close(grads[name], gradient)


class TestReentrantCheckpointing:
    """Behind frozen embeddings it finds nothing to keep a gradient for."""

    def test_a_vision_model_fails_aloud_and_trains_with_input_gradients(self, injected):
        model, plain = injected("vit").train(), injected("vit").train()
        _, wanted = gradients(plain, **example(plain))
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with (
            pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
            pytest.raises(RuntimeError, match="does not require grad"),
        ):
            gradients(model, **example(model))
        model.enable_input_require_grads()
        _, grads = gradients(model, **example(model))
        assert grads.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(grads[name], gradient)

    def test_a_layer_called_by_hand_warns(self):
        layer = fastbound.FusedBoundedLinear(6, 10, 2)
        x = torch.randn(3, 6)
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            y = checkpoint(layer, x, use_reentrant=True)
        assert not y.requires_grad
        checkpoint(layer, x.requires_grad_(), use_reentrant=True).sum().backward()
        assert layer.adapter.B.grad.abs().max() > 0


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_generation_with_a_cache_is_that_of_the_merged_model(injected, model_type):
    model = injected(model_type).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "eos_token_id": None}
    made = model.generate(tokens(4), **settings)
    torch.testing.assert_close(made, model.generate(tokens(4), **{**settings, "use_cache": False}))
    torch.testing.assert_close(made, fastbound.merge(model).generate(tokens(4), **settings))
    assert made.shape == (2, 12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capture needs a CUDA device")
def test_a_training_step_replays_from_a_cuda_graph(tiny_model):
    model, other = (m.cuda().train() for m in pair(lambda: tiny_model("llama")))
    inputs = {"input_ids": tokens(8).cuda(), "use_cache": False}

    def step() -> torch.Tensor:
        loss = model(**inputs).logits.float().square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()  # the kernels are compiled, and memory is found, before the capture
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    fresh = tokens(9)[:, :8].cuda()
    inputs["input_ids"].copy_(fresh)
    held = torch.cuda.memory_allocated()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held
    _, wanted = gradients(other, input_ids=fresh, use_cache=False)
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5)
