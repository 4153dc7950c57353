"""What stands behind the + of an adapter's name: where it is put, its loss, and when it ends."""

from __future__ import annotations

import copy
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastbound.cli import main
from fastbound.errors import InputError, NonFiniteError
from fastbound.figures import adapter_colour
from fastbound.unlearning.data.encoding import collate, encode_all, padding
from fastbound.unlearning.lab import run as runs
from fastbound.unlearning.lab.adapters import adapt, targets
from fastbound.unlearning.lab.cell import Cell, CellConfig, Rows, with_wrong_answers
from fastbound.unlearning.lab.grid import Grid, run_grid
from fastbound.unlearning.lab.names import FORGET_LOSSES, OPTIONS, parse_adapter
from fastbound.unlearning.lab.run import run_cell
from fastbound.unlearning.lab.subject import Pretrained
from fastbound.unlearning.lab.summary import lines_of
from fastbound.unlearning.losses import ihl
from fastbound.unlearning.metrics.answers import Score
from fastbound.unlearning.training.ending import forget_ceiling
from fastbound.unlearning.training.fila import fila_factors, fila_importance


@pytest.fixture
def rows(tokenizer, forget_rows, retain_rows) -> Rows:
    forget, retain = (
        encode_all(each, tokenizer, max_length=256) for each in (forget_rows, retain_rows)
    )
    return Rows(forget, retain, with_wrong_answers(retain))


@pytest.fixture
def run(new_model, tokenizer, rows):
    """Runs a cell of three pairs a step on a model made anew."""

    def cell(name: str, steps: int = 4, lr: float = 1e-2) -> dict:
        config = CellConfig(steps=steps, batch_size=3, log_every=100)
        return run_cell(new_model(), rows, Cell(0, 2, lr, name), config, pad=padding(tokenizer))

    return cell


def test_options_in_any_order_have_one_name():
    options = ("mlp", "attention", "ihl", "stop", "ranks")
    names = {
        parse_adapter("+".join(["sine@4", *order])).name
        for order in itertools.permutations(options)
    }
    assert names == {"sine@4+mlp+attention+ihl+stop+ranks"}
    assert parse_adapter("lora+mlp").name == "lora"
    assert parse_adapter("sine@1e+2").name == "sine@1e+2"


@pytest.mark.parametrize("name", ["lora", "sine@0.5*spectral", "product@omega=100", "tanh@4+ranks"])
def test_a_name_of_an_earlier_map_stays_as_it_is(name):
    assert parse_adapter(name).name == name
    assert parse_adapter(name).modules == ("mlp",)
    assert parse_adapter(name).losses == {"gradient_ascent": 1.0, "retain": 1.0}


def test_numbers_of_a_loss_are_part_of_the_name():
    adapter = parse_adapter("sine@0.5*spectral+stop+satimp@beta2=1@beta1=3.0")
    assert adapter.name == "sine@0.5*spectral+satimp@beta1=3@beta2=1+stop"
    assert parse_adapter(adapter.name) == adapter
    assert adapter.losses == {"satimp": {"weight": 1.0, "beta1": 3.0, "beta2": 1.0}, "retain": 1.0}
    assert adapter.label == "bounded, 0.5*spectral"
    assert adapter.remarks == ("satimp", "stops when forgotten", "beta1 3", "beta2 1")
    assert parse_adapter("lora+flooding@weight=2").losses["flooding"] == 2.0


def test_a_grid_holds_one_name_and_refuses_the_same_adapter_twice():
    assert Grid(adapters=("lora+stop+ihl",)).adapters == ("lora+ihl+stop",)
    with pytest.raises(InputError, match=r"lora\+ihl\+stop\|lr=.* appears twice"):
        Grid(adapters=("lora+stop+ihl", "lora+ihl+stop"))


def test_a_ceiling_ends_the_ascent(run, new_model, monkeypatch):
    """The ceiling is twice that of a uniform guess; where every token is beyond it, none ascends.

    How far momentum carries a run beyond its ceiling depends on the rounding of the machine.
    """
    ceilings = []

    def lowered(*arguments):
        ceilings.append(forget_ceiling(*arguments))
        return 0.0

    monkeypatch.setattr(runs, "forget_ceiling", lowered)
    endless, capped = (run(name, steps=30) for name in ("lora", "lora+ceiling"))
    uniform = math.log(new_model().config.vocab_size)
    assert ceilings == [2 * uniform]
    assert endless["forget_loss"] > uniform + 1 > uniform > capped["forget_loss"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora+flooding@2.7", r"as @NAME=NUMBER, such as flooding@level=2.7"),
        ("lora+flooding@level=low", r"as @NAME=NUMBER, such as flooding@level=2.7"),
        ("lora+flooding@level=-1", r"option level of the loss flooding must be finite and > 0"),
        ("lora+flooding@level=nan", r"option level of the loss flooding must be finite and > 0"),
        ("lora+flooding@beta=1", r"the loss flooding has no option 'beta': it has level"),
        ("lora+flooding@level=1@level=2", "sets level twice"),
        ("lora+stop@level=1", r"\+stop has no numbers, drop @level=1"),
        ("lora+pdu@step=1", "give limit as well"),
        ("lora+atention", r"unknown option 'atention'; .*did you mean attention\?"),
        ("lora+", "unknown option ''"),
        ("lora+stop+stop", r"names \+stop twice"),
        ("lora+ihl+wga", "ihl and wga exclude one another"),
        ("lora+ihl+ceiling", "the ceiling is one of gradient ascent, which ihl replaces"),
        ("lora+npo", "npo needs the answers of the model before unlearning"),
        ("lora+dpo", "dpo needs the answers of the model before unlearning and rows of"),
        ("lora+idk", 'idk needs rows of "I don\'t know"'),
        ("lora+rmu", "rmu needs hidden states"),
        (
            "sine@4+fila",
            r"\+fila starts with a part of W in the factors, which sine would not hold",
        ),
        ("lora-clamp+fila", "lora-clamp would not hold"),
        ("lora+retain", "retain is part of gradient difference"),
        ("loraa+stop", r"unknown adapter .*did you mean lora\?"),
        ("sine+attention", "sine@BOUND"),
    ],
)
def test_an_option_that_cannot_be_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        parse_adapter(name)


def test_labels_and_colours_of_options():
    both = parse_adapter("lora+mlp+attention+ihl")
    assert both.label == parse_adapter("lora+attention").label == "LoRA"
    assert parse_adapter("lora+attention").remarks == ("attention",)
    assert both.remarks == ("mlp and attention", "ihl")
    spread = parse_adapter("sine@4+stop+ranks")
    assert (spread.label, *spread.remarks) == (
        "bounded, 4*rms", "stops when forgotten", "ranks spread",
    )  # fmt: skip
    assert adapter_colour("lora+attention") == adapter_colour("lora")


def _small(kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
    if kind == "opt":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 8}  # which adds project_in and project_out
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("gpt_neox", {"query_key_value", "dense"}),
        ("phi", {"q_proj", "k_proj", "v_proj", "dense"}),
        ("qwen2", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_attention_is_every_linear_layer_of_a_block_beside_its_mlp(kind, wanted):
    model = _small(kind)
    attention, mlp = targets(model, ("attention",)), targets(model, ("mlp",))
    assert {name.rpartition(".")[2] for name in attention} == wanted
    assert len(attention) == 2 * len(wanted)  # two blocks
    both = targets(model, ("mlp", "attention"))
    assert both.keys() == mlp.keys() | attention.keys() and not mlp.keys() & attention.keys()


def test_a_model_without_told_projections_is_refused():
    plain = nn.Module()
    plain.config = SimpleNamespace(model_type="llama")
    plain.mlp = nn.ModuleDict({"up_proj": nn.Linear(3, 2)})
    assert list(targets(plain)) == ["mlp.up_proj"]
    with pytest.raises(InputError, match="no attention projections that can be told"):
        targets(plain, ("attention",))
    with pytest.raises(InputError, match="no plain linear layer among its projections"):
        targets(_small("gpt2"))  # Conv1D
    with pytest.raises(InputError, match="MLP projections are known for"):
        targets(_small("bloom"), ("attention",))


def test_a_pretrained_model_without_the_layers_is_refused_before_anything_is_written(
    tmp_path, forget_rows, retain_rows
):
    from transformers import AutoConfig

    settings = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=30)
    settings.save_pretrained(tmp_path / "model")
    grid = Grid(adapters=("lora+attention",), model=Pretrained(str(tmp_path / "model")))
    with pytest.raises(InputError, match="no plain linear layer"):
        run_grid(forget_rows, retain_rows, grid, tmp_path / "map", progress=False)
    assert not (tmp_path / "map").exists()


def test_a_cell_adapts_what_its_name_says(run):
    mlp, attention, both = (run(f"lora{more}", 1) for more in ("", "+attention", "+mlp+attention"))
    assert all(".mlp." in name for name in mlp["ranks"])
    assert all(".self_attn." in name for name in attention["ranks"])
    assert both["ranks"].keys() == mlp["ranks"].keys() | attention["ranks"].keys()


@pytest.mark.parametrize("loss", FORGET_LOSSES)
def test_a_forget_loss_is_what_the_cell_minimises(run, monkeypatch, loss):
    seen = []
    objective = runs.Objective

    def watched(losses, ceiling=None):
        seen.append(losses)
        return objective(losses, ceiling=ceiling)

    monkeypatch.setattr(runs, "Objective", watched)
    found = run(f"lora+{loss}", 2)
    assert seen == [{loss: 1.0, "retain": 1.0}]
    assert found["delta_norm"] > 0 and found["stopped"] is None and "ended" not in found


def test_a_step_of_ihl_has_the_gradient_of_its_formula(new_model, rows, tokenizer, monkeypatch):
    """B starts at zero, so that the gradient is that of B alone: slope · G Aᵀ in each layer."""
    model = new_model()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    drawn = []
    collate = runs.collate
    monkeypatch.setattr(runs, "collate", lambda *a: drawn.append(collate(*a)) or drawn[-1])
    weights = [layer.weight for layer in targets(model).values()]
    config = CellConfig(steps=1, batch_size=3)
    cell = Cell(0, 2, 1e-2, "lora+ihl")
    found = run_cell(copy.deepcopy(model), rows, cell, config, pad=padding(tokenizer))
    logits = model(drawn[0].input_ids, attention_mask=drawn[0].attention_mask).logits
    labels = drawn[0].labels
    kept = nn.functional.cross_entropy(logits[3:, :-1].flatten(0, 1), labels[3:, 1:].flatten())
    gradients = torch.autograd.grad(ihl(logits[:3], labels[:3]) + kept, weights)
    torch.manual_seed(0)
    squares = 0.0
    for G in gradients:
        A = torch.empty(2, G.shape[1])
        nn.init.kaiming_uniform_(A, a=5**0.5)  # as `adapt` draws it
        squares += float((config.slope * G @ A.T).square().sum())
    assert found["largest_gradient_norm"] == pytest.approx(squares**0.5, rel=1e-4)


def test_from_fila_a_cell_starts_as_a_run_does(new_model, rows, tokenizer):
    """The factors of `fastbound unlearn`'s start, and an output that has not changed."""
    model, pad = new_model().eval(), padding(tokenizer)
    shapes = {name: tuple(layer.weight.shape) for name, layer in targets(model).items()}
    found = fila_importance(model, shapes, rows.forget, rows.retain, pad)
    weights = {name: layer.weight.clone() for name, layer in targets(model).items()}
    ids = collate(rows.forget, pad).input_ids
    with torch.no_grad():
        before = model(ids).logits
        adapter, ranks = parse_adapter("lora+fila"), dict.fromkeys(shapes, 2)
        adapted = adapt(model, adapter, ranks, alpha=3.0, seed=0, importance=found)
        # W + ΔW is W up to the rounding of fp32 in each of two layers.
        torch.testing.assert_close(model(ids).logits, before, rtol=2e-5, atol=2e-5)
        for name, layer in adapted.items():
            A, B = fila_factors(weights[name], found[name], 2, 1.5)
            torch.testing.assert_close(layer.A, A)
            torch.testing.assert_close(layer.B, B)
            assert layer.delta_weight().abs().max() == 0
            layer.A.add_(0.1)  # then y = x (W + ΔW)ᵀ
            x = torch.randn(3, A.shape[1])
            wanted = x @ (weights[name] + 1.5 * (B @ (A + 0.1) - B @ A)).T
            # The layer adds two fp32 products whose difference `wanted` takes at once.
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_cell_from_fila_runs_with_other_options(run):
    found = run("lora-clip+stop+ranks+fila", 2)
    assert found["delta_norm"] > 0 and found["stopped"] is None
    assert found["adapter"] == "lora-clip+stop+ranks+fila"  # as the cell was named


def scores(*losses: tuple[float, float]):
    """Stands in for `evaluate`: these forget and retain losses, one pair per evaluation."""
    each = iter([loss for pair in losses for loss in pair])
    return lambda *args, **kwargs: Score(next(each), 0.0, 0.0, 1)


def test_a_run_with_stop_ends_once_forgotten_and_kept(run, monkeypatch):
    # Six forget rows of three per step: an evaluation every two steps.
    trough, back = (99.0, 5.0), (99.0, 0.15)
    monkeypatch.setattr(runs, "evaluate", scores((0.1, 0.1), (1.0, 0.1), trough, back))
    found = run("lora+stop", steps=20)
    assert (found["ended"], found["end_step"], found["kept_step"]) == ("forget_target", 6, 6)
    assert [line["step"] for line in found["history"]] == [1, 6]
    (line,) = lines_of([found])
    assert line.mean["end_step"] == 6 and 0 <= line.mean["forget_accuracy"] <= 1
    assert found["stopped"] is None


def test_with_flooding_rows_count_as_forgotten_at_its_level(run, monkeypatch):
    """As in `fastbound unlearn`, and not at the loss of a uniform guess."""
    monkeypatch.setattr(runs, "evaluate", scores((0.1, 0.1), (1.4, 0.1), (1.6, 0.1)))
    found = run("lora+flooding@level=2+stop", steps=20)
    assert (found["ended"], found["end_step"], found["forget_target"]) == ("forget_target", 4, 1.5)
    reached, short = {**found, "forget_loss": 1.6}, {**found, "forget_loss": 1.4}
    assert lines_of([reached, short])[0].forgotten == 1
    assert run("lora", steps=1)["forget_target"] == math.log(400)


def test_the_limit_of_pdu_moves_the_weight_of_the_rows_to_keep(run, monkeypatch):
    made = []
    objective = runs.Objective
    monkeypatch.setattr(
        runs, "Objective", lambda *a, **k: made.append(objective(*a, **k)) or made[-1]
    )
    found = run("lora+pdu@limit=1000@step=1e-3", steps=1)
    retain = found["history"][0]["retain_loss"]
    assert made[0].state()["retain_weight"] == pytest.approx(1 + 1e-3 * (retain - 1000))


def test_a_run_that_never_comes_back_takes_all_steps_and_keeps_the_best(
    run, monkeypatch, new_model, rows, tokenizer
):
    monkeypatch.setattr(runs, "evaluate", scores((0.1, 0.1), (99.0, 2.0), (99.0, 5.0)))
    found = run("lora+stop", steps=4)
    assert (found["ended"], found["end_step"], found["kept_step"]) == ("all steps", 4, 2)
    # What is scored are the factors of step 2, which a run ended there has.
    monkeypatch.setattr(runs, "evaluate", scores((0.1, 0.1), (99.0, 0.1)))
    ended = run("lora+stop", steps=4)
    assert (ended["ended"], ended["end_step"]) == ("forget_target", 2)
    for name in ("forget_loss", "retain_loss", "delta_norm"):
        assert found[name] == ended[name]


def test_a_run_with_stop_that_is_not_finite_says_so(run, monkeypatch):
    def broken(*args, **kwargs):
        raise NonFiniteError("row 1")

    first = scores((0.1, 0.1))
    calls = itertools.count()
    monkeypatch.setattr(runs, "evaluate", lambda *a, **k: first() if next(calls) < 2 else broken())
    found = run("lora+stop", steps=4)
    assert (found["stopped"], found["ended"], found["end_step"]) == (2, "not finite", 2)
    assert (found["utility"], found["kept_step"]) == (0.0, 0)


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["lab", "--help"])
    told = set(re.findall(r"\+(\w+)", capsys.readouterr().out))
    assert set(OPTIONS) <= told
