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
from fastbound.unlearning.losses.objective import described
from fastbound.unlearning.runs.environment import environment
from fastbound.unlearning.runs.folder import LOG, RESULT, read_json, write_json

REPORT = "report.json"
EXAMPLES = "examples.json"  # of a run: questions, with the model's answers before and after
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
    """One finished run as its folder holds it: its result, the lines of its log, its examples."""

    folder: Path
    result: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    examples: Sequence[Mapping[str, str]] = ()

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
        examples = folder / EXAMPLES
        held = read_json(examples)["examples"] if examples.exists() else ()
        return cls(folder, read_json(folder / RESULT), steps, held)

    @property
    def adapter(self) -> str:
        return str(self.result["config"]["adapter"])

    @property
    def lr(self) -> float:
        """The highest of any layer."""
        return float(self.result["lr"])

    @property
    def kept(self) -> Mapping[str, Any]:
        """The evaluation whose adapter is kept."""
        history: Sequence[Mapping[str, Any]] = self.result["history"]
        return next(each for each in history if each["step"] == self.result["kept"])


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
            "runs": [
                {"name": run.folder.name, **run.result, "examples": list(run.examples)}
                for run in runs
            ],
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
        + f"  {'max|ΔW|':>8} {'bound':>6} {'in use':>6} {'steps':>6} {'s/step':>7}",
    ]
    lines.append("─" * len(lines[-1]))
    start: Mapping[str, Any] = {}
    for run in runs:
        result = run.result
        if result["history"][0] != start:  # runs from the same model share one line
            start = result["history"][0]
            lines.append(f"{'before':16} {_scores(start)}")
        share = result["bound_in_use"]
        used = "-" if share is None else f"{share:.0%}"
        bound = "none" if result["bound"] is None else f"{result['bound']:.3g}"
        seconds = result["seconds_per_step"]
        line = f"{run.adapter:8} {run.lr:7g} {_scores(run.kept)}"
        line += f"  {result['largest_delta']:8.3g} {bound:>6} {used:>6} {result['kept']:6}"
        line += " " + (f"{'-':>7}" if seconds is None else f"{seconds:7.3f}")
        lines.append(f"{line}  {_ending(run)}")
    seed = runs[0].result["config"]["seed"]
    lines.append(
        f"Mean over the answer tokens of {start['forget']['rows']} forget and "
        f"{start['retain']['rows']} retain rows; loss in nats per token; one seed ({seed})."
    )
    lines.append(
        "Steps: those of the adapter that is kept. Forgotten: a loss of "
        f"{runs[0].result['forget_target']:.3g} or more."
    )
    lines += _cross_entropies(runs)
    lines += [f"{run.adapter}: {each}" for run, each in _allocations(runs)]
    minimised = runs[0].result["config"].get("losses")
    if minimised:
        lines.append(f"Minimised: {described(minimised)}")
    return lines


def _ending(run: Run) -> str:
    """Why the run ended, and whether its last step is the one that is kept."""
    result, kept = run.result, run.kept["step"]
    last = result["history"][-1]["step"]
    said = {
        "forget_target": "ended: forgotten, and the rest kept",
        "retain_limit": f"ended at step {last} by retain_limit",
        "all steps": "" if kept == last else f"the best of {last} steps",
    }[result["stopped"]]
    if kept != last and result["stopped"] != "all steps":
        said += f" (step {kept} is the best)"
    if kept > 0 and run.kept["forget"]["loss"] >= result["forget_target"]:
        return said
    return f"{said}{', ' if said else ''}not forgotten"


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
    """Three panels over steps: forget loss, retain loss, largest |ΔW| with each bound dotted.

    A thin line is the loss of each step's batch, the marks are evaluations, the largest of them the
    one that is kept.
    """
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
            axis.plot(
                [line["step"] for line in run.steps],
                [line[f"{side}_loss"] for line in run.steps],
                **{**style, "linewidth": 0.7, "alpha": 0.55, "label": None},
            )
            axis.plot(at, [each[side]["loss"] for each in history], **style, marker=".")
            axis.plot(run.kept["step"], run.kept[side]["loss"], "o", color=style["color"])
        moved = [(li["step"], li["largest_delta"]) for li in run.steps if "largest_delta" in li]
        axes[2].plot([step for step, _ in moved], [delta for _, delta in moved], **style)
    for target in {run.result["forget_target"] for run in runs}:
        axes[0].axhline(target, color="0.45", linestyle=":", linewidth=1.2)
    bounds = {run.result["bound"] for run in runs} - {None}
    for bound in sorted(bounds):
        axes[2].axhline(bound, color="0.45", linestyle=":", linewidth=1.2)
    if bounds:
        axes[2].plot([], [], color="0.45", linestyle=":", label="bound")
    titles = (
        ("Forget rows", "loss, nats per token (dotted: forgotten)"),
        ("Retain rows", "loss, nats per token (lower: kept)"),
        ("How far the weights moved", "largest |ΔW| of any entry"),
    )
    for axis, (title, label) in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[2].set_yscale("log")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save_figure(figure, path)
