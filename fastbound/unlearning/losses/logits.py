"""The losses that need whole logits: of the rows to forget, and KL over those to retain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbound.unlearning.data.encoding import IGNORED
from fastbound.unlearning.losses.formulas import answer_positions


def ihl(logits: Tensor, labels: Tensor) -> Tensor:
    """Inverted hinge: `mean(max(0, 1 + p(label) − max over the others p))`, in [0, 2].

    Cha et al. 2024, "Towards robust and parameter-efficient knowledge unlearning" (LoKU): lowers
    the label only down to the next most likely token, and has a bounded gradient.

    Args:
        logits: `[rows, length, vocabulary]` of the rows to forget.
        labels: int64 `[rows, length]`.
    """
    chosen, label = _answers(logits, labels)
    p = torch.softmax(chosen, -1)
    others = p.scatter(1, label, 0.0).amax(1)  # zero is never the largest
    return (1 + p.gather(1, label).squeeze(1) - others).clamp_min(0).mean()


def retain_kl(logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """`mean KL(reference ‖ model)` over positions, including question tokens.

    This is open-unlearning's form, except that its mean also counts padding; here `mask`
    `[rows, length]` excludes it.

    Args:
        logits, reference: `[rows, length, vocabulary]` of the rows to retain.
    """
    if mask is not None:
        logits, reference = logits[mask.bool()], reference[mask.bool()]
    if logits.dtype != torch.float64:
        logits, reference = logits.float(), reference.float()
    current = torch.log_softmax(logits, -1).flatten(0, -2)
    before = torch.log_softmax(reference, -1).flatten(0, -2)
    return F.kl_div(current, before, reduction="batchmean", log_target=True)


def undial(logits: Tensor, reference: Tensor, labels: Tensor, *, beta: float = 10.0) -> Tensor:
    """Distillation with the label's logit lowered: `mean CE(softmax(z₀ − β·1_label) ‖ softmax(z))`.

    Dong et al. 2024, "UNDIAL: self-distillation with adjusted logits", arXiv 2402.10052. z₀ are the
    logits of the model before unlearning: a fixed target, so that the loss has a minimum. The mean
    is over answer tokens; open-unlearning's is over all positions, questions and padding included.

    Args:
        logits, reference: `[rows, length, vocabulary]` of the rows to forget, now and before.
        labels: int64 `[rows, length]`.
    """
    now, label = _answers(logits, labels)
    before, _ = _answers(reference, labels)
    lowered = before.scatter_add(1, label, torch.full_like(before[:, :1], -beta))
    return F.cross_entropy(now, torch.softmax(lowered, -1))


def ceu(logits: Tensor, labels: Tensor, *, skip: int = 1) -> Tensor:
    """`mean CE(q ‖ softmax(z))`, q the softmax of z with the label's logit at −∞, held fixed.

    Yang 2025, "CE-U: cross entropy unlearning", arXiv 2503.01224. The first `skip` answer tokens of
    each row are skipped, as in its training settings; the loss is 0 if that leaves none.

    Args:
        logits: `[rows, length, vocabulary]` of the rows to forget.
        labels: int64 `[rows, length]`.
    """
    first = (labels != IGNORED).cumsum(1) <= skip
    chosen, label = _answers(logits, labels.masked_fill(first, IGNORED))
    if not len(chosen):
        return chosen.sum()
    wanted = torch.softmax(chosen.detach().scatter(1, label, -torch.inf), -1)
    return F.cross_entropy(chosen, wanted)


def pdu(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit-margin flattening: `mean((max z − mean z)²)` over answer tokens.

    Entesari et al. 2025, "Constrained entropic unlearning: a primal-dual framework", arXiv
    2506.05314: 0 if all tokens are equally likely, without a softmax, whose gradient vanishes.
    open-unlearning's mean is over all positions, questions and padding included.

    Args:
        logits: `[rows, length, vocabulary]` of the rows to forget.
        labels: int64 `[rows, length]`.
    """
    chosen, _ = _answers(logits, labels)
    return (chosen.amax(-1) - chosen.mean(-1)).square().mean()


def _answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits `[tokens, vocabulary]` of labelled tokens, fp32 or fp64; labels `[tokens, 1]`."""
    chosen, targets, _ = answer_positions(logits, labels)
    return chosen if chosen.dtype == torch.float64 else chosen.float(), targets.unsqueeze(1)
