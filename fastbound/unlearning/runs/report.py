"""Runs side by side: a table for the terminal, `report.json`, and a picture of the curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.figures import new_figure, save_figure
from fastbound.models.ranks import RankAllocation
from fastbound.unlearning.runs.environment import environment
from fastbound.unlearning.runs.folder import LOG, RESULT, read_json, write_json

REPORT = "report.json"
PICTURE = "curves.png"
_COLOURS = {"bounded": "#0b6e99", "lora": "#c4511d"}


@dataclass(frozen=True)
class StepCost:
    """One step: forward, backward and update of A and B.

    Attributes:
        seconds: median.
        saved_bytes: kept from forward for backward by the whole model, each storage once,
            parameters left out. Exact on any device.
        peak_bytes: most CUDA memory allocated during a step, weights included; None elsewhere.
    """

    seconds: float
    saved_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """The bounded adapter fused and unfused, on the same batch; steps were interleaved."""

    fused: StepCost
    unfused: StepCost
    steps: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Run:
    """One finished run as its folder holds it: the lines of its log and its result."""

    folder: Path
    result: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises InputError where a file is damaged."""
        try:
            lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
            steps = [line for line in map(json.loads, lines) if line["event"] == "step"]
        except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder / LOG} is damaged: --resume of its run cuts it back to what is sound"
            ) from error
        return cls(folder, read_json(folder / RESULT), steps)

    @property
    def adapter(self) -> str:
        return str(self.result["config"]["adapter"])

    @property
    def lr(self) -> float:
        return float(self.result["config"]["lr"])


def write_report(
    folder: Path,
    runs: Sequence[Run],
    *,
    about: Mapping[str, Any],
    cost: Comparison | None = None,
) -> str:
    """Write `report.json` and `curves.png` to `folder`; the table to print is returned.

    Args:
        about: what the runs have in common (model, rows), kept as it is.
        cost: a step fused and unfused, where it was measured.
    """
    write_json(
        folder / REPORT,
        {
            "about": about,
            "runs": [{"name": run.folder.name, **run.result} for run in runs],
            "step": None if cost is None else asdict(cost),
            "environment": environment(),
        },
    )
    draw(folder / PICTURE, runs)
    return "\n".join([*table(runs), *cost_lines(cost)])


def table(runs: Sequence[Run]) -> list[str]:
    """Loss in nats a token and share of answer tokens right, before and after each run."""
    lines = [
        f"{'':16} {'forget rows':>17}  {'retain rows':>17}",
        f"{'adapter':8} {'lr':>7} "
        + "  ".join([f"{'loss':>8} {'accuracy':>8}"] * 2)
        + f"  {'max|ΔW|':>8} {'bound':>6} {'steps':>6} {'s/step':>7}",
    ]
    lines.append("─" * len(lines[-1]))
    start: Mapping[str, Any] = {}
    for run in runs:
        result = run.result
        if result["history"][0] != start:  # runs from the same model share one line
            start = result["history"][0]
            lines.append(f"{'before':16} {_scores(start)}")
        bound = "none" if result["bound"] is None else f"{result['bound']:.3g}"
        seconds = result["seconds_per_step"]
        line = f"{run.adapter:8} {run.lr:7g} {_scores(result['history'][-1])}"
        line += f"  {result['largest_delta']:8.3g} {bound:>6} {result['history'][-1]['step']:6}"
        line += " " + (f"{'-':>7}" if seconds is None else f"{seconds:7.3f}")
        if result["stopped"] != "all steps":
            line += f"  stopped by {result['stopped']}"
        lines.append(line)
    seed = runs[0].result["config"]["seed"]
    lines.append(
        f"Mean over the answer tokens of {start['forget']['rows']} forget and "
        f"{start['retain']['rows']} retain rows; loss in nats a token; one seed ({seed})."
    )
    lines += _cross_entropies(runs)
    lines += [f"{run.adapter}: {each}" for run, each in _allocations(runs)]
    minimised = runs[0].result["config"].get("losses")
    if minimised:
        lines.append("Minimised: " + " + ".join(f"{w:g} {name}" for name, w in minimised.items()))
    return lines


def _cross_entropies(runs: Sequence[Run]) -> list[str]:
    """Form, reason and size of the logits; runs that agree share a line."""
    lines = []
    for run in runs:
        held = run.result["cross_entropy"]
        size = held["logits_bytes"]
        most = "" if size is None else f"; at most {size / 1e6:.4g} MB of logits at once"
        lines.append(f"Cross-entropy {held['form']} ({held['reason']}){most}.")
    return list(dict.fromkeys(lines))


def _allocations(runs: Sequence[Run]) -> list[tuple[Run, RankAllocation]]:
    """What `rank="auto"` chose; runs that agree share it."""
    found: dict[str, tuple[Run, RankAllocation]] = {}
    for run in runs:
        if run.result["ranks"] is not None:
            each = RankAllocation(**run.result["ranks"])
            found.setdefault(str(each), (run, each))
    return list(found.values())


def _scores(evaluation: Mapping[str, Any]) -> str:
    sides = (evaluation["forget"], evaluation["retain"])
    return "  ".join(f"{side['loss']:8.3f} {side['accuracy']:8.1%}" for side in sides)


def cost_lines(cost: Comparison | None) -> list[str]:
    """A step of the bounded adapter, fused and unfused."""
    if cost is None:
        return []
    lines = [
        "",
        f"One training step, bounded adapter, {cost.rows} rows, {cost.tokens} tokens with padding "
        f"(medians of {cost.steps}, interleaved):",
    ]
    for name, step in (("fused", cost.fused), ("PEFT, unfused", cost.unfused)):
        line = f"  {name:14} {step.seconds:7.4f} s"
        line += f"   {step.saved_bytes / 1e6:7.2f} MB saved for backward"
        if step.peak_bytes is not None:
            line += f"   {step.peak_bytes / 1e6:8.1f} MB peak on the device"
        lines.append(line)
    return lines


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Three panels over steps: forget loss, retain loss, largest |ΔW| with each bound dashed."""
    figure, (axes,) = new_figure(1, 3, (13.5, 4.4))
    slowest = min((run.lr for run in runs), default=0.0)
    for run in runs:
        style = {
            "color": _COLOURS.get(run.adapter, "0.3"),
            "linestyle": "-" if run.lr == slowest else (0, (4, 1.5)),
            "linewidth": 1.8,
            "label": f"{run.adapter}, lr {run.lr:g}",
        }
        history = run.result["history"]
        at = [each["step"] for each in history]
        for axis, side in zip(axes, ("forget", "retain"), strict=False):
            axis.plot(at, [each[side]["loss"] for each in history], **style)
        moved = [(line["step"], line["largest_delta"]) for line in run.steps]
        axes[2].plot([step for step, _ in moved], [delta for _, delta in moved], **style)
    bounds = {run.result["bound"] for run in runs} - {None}
    for bound in sorted(bounds):
        axes[2].axhline(bound, color="0.45", linestyle=":", linewidth=1.2)
    if bounds:
        axes[2].plot([], [], color="0.45", linestyle=":", label="bound")
    titles = (
        ("Forget rows", "loss, nats a token (higher: forgotten)"),
        ("Retain rows", "loss, nats a token (lower: kept)"),
        ("How far the weights moved", "largest |ΔW| of any entry"),
    )
    for axis, (title, label) in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[2].set_yscale("log")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save_figure(figure, path)
