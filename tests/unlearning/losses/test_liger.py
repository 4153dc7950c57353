"""liger-kernel gives the chunked losses, in Triton's interpreter; where it is left out, why."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from fastbound.errors import InputError
from fastbound.unlearning import UnlearnConfig
from fastbound.unlearning.data.encoding import IGNORED, Batch
from fastbound.unlearning.losses import cross_entropy
from fastbound.unlearning.losses.chunked import chunked_answer_tokens
from fastbound.unlearning.losses.liger import OLDEST, liger_answer_tokens, liger_chunk, missing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
installed = pytest.mark.skipif(
    missing(torch.device("cuda")) is not None, reason=str(missing(torch.device("cuda")))
)


@pytest.fixture
def held_version(monkeypatch):
    """Makes liger-kernel's version what it is told, None for not installed."""

    def hold(version: str | None) -> None:
        def read(name: str) -> str:
            assert name == "liger-kernel"
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", read)

    return hold


class TestMissing:
    @pytest.mark.parametrize(
        ("version", "device", "reason"),
        [
            (None, "cuda", "liger-kernel is not installed"),
            ("0.8.1", "cuda", f"liger-kernel 0.8.1 is older than {OLDEST}"),
            ("0.10.0", "cpu", "liger-kernel needs a GPU, the model is on cpu"),
            ("0.8.2", "cuda", None),
            ("0.10.0.dev1", "cuda", None),
        ],
    )
    def test_reason(self, held_version, version, device, reason):
        held_version(version)
        assert missing(torch.device(device)) == reason

    def test_asking_for_it_is_refused(self, held_version, new_model):
        held_version(None)
        tokens = torch.tensor([[3, 4, 5]])
        example = Batch(tokens, torch.ones_like(tokens), tokens)
        with pytest.raises(InputError, match='"liger": liger-kernel is not installed; use "auto"'):
            cross_entropy.choose_cross_entropy("liger", new_model(), example, positions=3)


def test_auto_takes_it_where_it_can(monkeypatch, new_model):
    monkeypatch.setattr(cross_entropy, "WHOLE_BYTES", 1000)
    model, tokens = new_model(), torch.tensor([[3, 4, 5]])
    example = Batch(tokens, torch.ones_like(tokens), tokens)

    def choose(reason):
        monkeypatch.setattr(cross_entropy, "missing", lambda device: reason)
        return cross_entropy.choose_cross_entropy("auto", model, example, positions=1000)

    vocabulary, width = model.lm_head.weight.shape
    found = choose(None)
    assert found.form == "liger" and found.reason.startswith("auto, whole logits would take")
    assert found.logits_bytes == liger_chunk(1000, vocabulary, width) * vocabulary * 4
    found = choose("none here")
    assert found.form == "chunked" and found.reason.endswith("; none here")


@installed
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_the_chunked_ones(biased):
    generator = torch.Generator().manual_seed(0)
    rows, length, width, vocabulary = 4, 33, 24, 500
    hidden = torch.randn(rows, length, width, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(DEVICE)
    bias = torch.randn(vocabulary, generator=generator).to(DEVICE) if biased else None
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[:, :9] = IGNORED
    labels = labels.to(DEVICE)
    found, expected = (
        compute(hidden, weight, labels, bias)
        for compute in (liger_answer_tokens, chunked_answer_tokens)
    )
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.correct, expected.correct) and torch.equal(found.row, expected.row)
    # Tokens weigh differently, as the rows of a preference loss do.
    rates = torch.linspace(-1, 2, len(found.loss), device=DEVICE)
    (gradient,), (other,) = (
        torch.autograd.grad((rates * each.loss).sum(), hidden) for each in (found, expected)
    )
    assert (gradient - other).norm() <= 1e-5 * other.norm()


@installed
def test_a_run_goes_where_a_whole_one_goes(unlearn_rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "missing", lambda device: None)  # the interpreter has it

    def run(form):
        settings = UnlearnConfig(
            lr=1e-2,
            epochs=0.6,
            batch_size=2,
            rank=2,
            eval_rows=2,
            losses={"npo": 1.0, "retain": 1.0},
            cross_entropy=form,
        )
        return unlearn_rows(settings)

    found, whole = run("liger"), run("whole")
    assert found.cross_entropy.form == "liger" and found.after.step == 2
    assert found.largest_delta == pytest.approx(whole.largest_delta, rel=1e-3)
    for side in ("forget", "retain"):
        one, other = getattr(found.after, side), getattr(whole.after, side)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert (one.accuracy, one.exact) == (other.accuracy, other.exact)
