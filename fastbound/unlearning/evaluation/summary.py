"""What an evaluation says: the figures of a log, a table for the terminal, and a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastbound.figures import new_figure, save_figure
from fastbound.unlearning import metrics
from fastbound.unlearning.evaluation import score_validation, tdec_validation
from fastbound.unlearning.metrics.conventions import MUSE
from fastbound.unlearning.metrics.logs import FORGET, SECTIONS, column, losses
from fastbound.unlearning.metrics.truth import warn_same_model

Summary = dict[str, Any]
_BLUE, _RED, _GREY = "#0b6e99", "#c4511d", "0.45"


def summarise_tofu(log: Mapping[str, Any], retain: Any, convention: str) -> Summary:
    """Section scores, model utility, and forget quality where a retain log is given."""
    sections = {}
    for section, name in SECTIONS.items():
        scores: dict[str, float] = asdict(
            metrics.section_score(log, section, convention=convention)
        )
        for extra in ("exact_memorisation", "extraction_strength"):
            known = [value for value in log[section][extra] if value is not None]
            scores[extra] = float(np.mean(known)) if known else float("nan")
        sections[name] = scores
    quality = None
    if retain is not None:
        quality = asdict(metrics.forget_quality(log, retain, convention=convention))
    return {
        "convention": convention,
        "sections": sections,
        "model_utility": asdict(metrics.model_utility(log, convention=convention)),
        "forget_quality": quality,
    }


def table_tofu(summary: Summary) -> list[str]:
    head = f"{'':14}{'probability':>12}{'ROUGE-L':>9}{'truth ratio':>13}{'EM':>7}{'ES':>7}"
    lines = [head, "─" * len(head)]
    for name, each in summary["sections"].items():
        lines.append(
            f"{name:14}{each['probability']:12.4f}{each['rouge']:9.4f}{each['truth_ratio']:13.4f}"
            f"{each['exact_memorisation']:7.3f}{each['extraction_strength']:7.3f}"
        )
    utility = summary["model_utility"]
    zero = [name for name, value in utility["components"].items() if value == 0]
    because = f" (0: {', '.join(zero)})" if zero else ""
    lines.append(f"model utility   {utility['value']:.5f}{because}")
    quality = summary["forget_quality"]
    if quality is None:
        lines.append("forget quality  not known: it needs --retain-log")
    else:
        lines.append(
            f"forget quality  {quality['pvalue']:.4g} (log10 {quality['log10']:.2f}, "
            f"floor for {quality['n']} rows {quality['floor']:.2g}; KS {quality['statistic']:.4f})"
        )
    lines.append("EM, ES          exact memorisation, extraction strength")
    return [*lines, f"convention      {summary['convention']}"]


def draw_tofu(path: Path, log: Mapping[str, Any], retain: Any, summary: Summary) -> None:
    """The scores of each section, and the distribution of the forget rows' truth ratio."""
    figure, ((bars, curve),) = new_figure(1, 2, (10, 4))
    names = list(summary["sections"])
    for place, part in enumerate(("probability", "rouge", "truth_ratio")):
        heights = [summary["sections"][name][part] for name in names]
        bars.bar(
            np.arange(len(names)) + (place - 1) * 0.26,
            heights,
            0.24,
            color=(_BLUE, _RED, _GREY)[place],
            label=part.replace("_", " ").replace("rouge", "ROUGE-L"),
        )
    bars.set_xticks(range(len(names)), names)
    bars.set_ylim(0, 1)
    bars.set_title("Scores")
    bars.legend(fontsize="small")
    for each, label, colour in ((log, "this model", _BLUE), (retain, "retain model", _GREY)):
        if each is not None:
            right, wrong = losses(each, FORGET)
            ratio = metrics.truth_ratio(right, wrong, convention=summary["convention"])
            curve.ecdf(ratio, color=colour, label=label)
    curve.set_title("Truth ratio of forget rows")
    curve.set_xlabel("truth ratio")
    curve.set_ylabel("share of rows up to it")
    curve.legend(loc="lower right", fontsize="small")
    save_figure(figure, path)


def summarise_muse(
    log: Mapping[str, Any], retain: Mapping[str, Any] | None, convention: str, corpus: str
) -> Summary:
    """Means of the memorisation scores, AUC and PrivLeak."""
    auc = metrics.membership_auc(**membership_scores(log, "log"), convention=convention)
    if retain is not None:
        reference = metrics.membership_auc(
            **membership_scores(retain, "retain log"), convention=convention
        )
        source = "retain log"
        if membership_scores(retain, "retain log") == membership_scores(log, "log"):
            warn_same_model("PrivLeak")
    elif convention == MUSE:
        reference, source = metrics.AUC_RETRAIN[corpus], "MUSE's constant"
    else:
        reference, source = 0.5, "chance, for want of --retain-log"
    return {
        "convention": convention,
        **{
            name: float(np.mean(log[name]["rougeL_f1"]))
            for name in ("forget_verbmem", "forget_knowmem", "retain_knowmem")
        },
        "auc": auc,
        "reference_auc": reference,
        "reference": source,
        "privleak": metrics.privleak(auc, reference, convention=convention),
    }


def table_muse(summary: Summary) -> list[str]:
    return [
        f"VerbMem on forget   {summary['forget_verbmem']:.4f}   ROUGE-L F1",
        f"KnowMem on forget   {summary['forget_knowmem']:.4f}   ROUGE-L F1",
        f"KnowMem on retain   {summary['retain_knowmem']:.4f}   ROUGE-L F1",
        f"PrivLeak           {summary['privleak']:7.2f}   AUC {summary['auc']:.4f}, reference "
        f"{summary['reference_auc']:.4f} ({summary['reference']})",
        f"convention          {summary['convention']} (AUC is "
        + (
            "low where the forget set is known)"
            if summary["convention"] == MUSE
            else "high where the forget set is known)"
        ),
    ]


def draw_muse(path: Path, log: Mapping[str, Any], summary: Summary) -> None:
    """The memorisation scores, and Min-40 % of forget and holdout texts."""
    figure, ((bars, curve),) = new_figure(1, 2, (10, 4))
    names = ("forget_verbmem", "forget_knowmem", "retain_knowmem")
    labels = ("VerbMem, forget", "KnowMem, forget", "KnowMem, retain")
    bars.bar(labels, [summary[name] for name in names], 0.5, color=(_RED, _RED, _BLUE))
    bars.set_ylim(0, 1)
    bars.set_title("ROUGE-L F1")
    for side, colour in (("forget", _RED), ("holdout", _GREY)):
        curve.ecdf(log["privleak"][side], color=colour, label=side)
    curve.set_title(f"Min-40 %, PrivLeak {summary['privleak']:.1f}")
    curve.set_xlabel("score, nats a token (low: known)")
    curve.set_ylabel("share of texts up to it")
    curve.legend(loc="lower right", fontsize="small")
    save_figure(figure, path)


def summarise_tdec(log: Mapping[str, Any]) -> Summary:
    """Means over the sequences, and whether both are below the published thresholds."""
    el = float(np.mean(log["extraction_likelihood"]))
    ma = float(np.mean(log["memorisation_accuracy"]))
    thresholds = {"el": metrics.EL10_THRESHOLD, "ma": metrics.MA_THRESHOLD}
    forgotten = el < thresholds["el"] and ma < thresholds["ma"] if log["n"] == 10 else None
    return {
        "convention": "knowledge-unlearning",
        "n": log["n"],
        "extraction_likelihood": el,
        "memorisation_accuracy": ma,
        "thresholds": thresholds,
        "forgotten": forgotten,
        "validation": score_validation.summarise(log["validation"]),
        "absent": [name for name in tdec_validation.SETS if name not in log["validation"]],
    }


def table_tdec(summary: Summary) -> list[str]:
    thresholds = summary["thresholds"]
    lines = [
        f"EL_{summary['n']:<4} {summary['extraction_likelihood']:.4f}"
        + (f"   threshold {thresholds['el']}" if summary["n"] == 10 else ""),
        f"MA      {summary['memorisation_accuracy']:.4f}   threshold {thresholds['ma']}",
    ]
    if summary["forgotten"] is not None:
        verdict = "both below" if summary["forgotten"] else "not both below"
        lines.append(f"{verdict} the thresholds published for GPT-Neo 125M")
    lines += _table_validation(summary["validation"])
    if summary["absent"]:
        lines += textwrap.wrap(f"not in the folder: {', '.join(summary['absent'])}", 90)
    return [*lines, f"convention {summary['convention']}"]


def _table_validation(sets: Mapping[str, Mapping[str, float]]) -> list[str]:
    columns = {"accuracy": ".4f", "f1": ".4f", "loss": ".4f", "perplexity": ".2f"}
    if not sets:
        return []
    head = f"{'validation set':24}{'rows':>6}" + "".join(f"{name:>12}" for name in columns)
    lines = [head, "─" * len(head)]
    for name, each in sets.items():
        cells = (f"{each[c]:{form}}" if c in each else "" for c, form in columns.items())
        lines.append(f"{name:24}{each['rows']:6}" + "".join(f"{cell:>12}" for cell in cells))
    return [line.rstrip() for line in lines]


def draw_tdec(path: Path, log: Mapping[str, Any], summary: Summary) -> None:
    """How both values are spread over the sequences, thresholds dashed."""
    figure, (axes,) = new_figure(1, 2, (10, 4))
    parts = (
        ("extraction_likelihood", "el", f"EL_{log['n']}"),
        ("memorisation_accuracy", "ma", "MA"),
    )
    for axis, (name, short, title) in zip(axes, parts, strict=True):
        axis.ecdf(log[name], color=_BLUE)
        if short == "ma" or log["n"] == 10:
            axis.axvline(
                summary["thresholds"][short], color=_GREY, linestyle="--", label="threshold"
            )
            axis.legend(loc="lower right", fontsize="small")
        axis.set_xlim(-0.02, 1.02)  # a curve at 0 is beside the axis, not under it
        axis.set_title(title)
        axis.set_xlabel("value (low: forgotten)")
        axis.set_ylabel("share of sequences up to it")
    save_figure(figure, path)


def membership_scores(log: Mapping[str, Any], name: str) -> dict[str, list[float]]:
    """Min-40 % of the forget and the holdout texts of MUSE's log.

    Raises:
        InputError: one is missing, empty, or holds what is no finite number.
    """
    return {side: column(log, "privleak", side, name).tolist() for side in ("forget", "holdout")}
