"""Runs side by side: what came of them for the terminal, `report.json`, and their curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.figures import adapter_colour, mark_quick, new_figure, save_figure
from fastbound.models.ranks import RankAllocation
from fastbound.unlearning.losses.objective import described
from fastbound.unlearning.runs.environment import environment
from fastbound.unlearning.runs.folder import LOG, RESULT, read_json, write_json

REPORT = "report.json"
EXAMPLES = "examples.json"  # of a run: questions, with the model's answers before and after
PICTURE = "curves.png"
_NAMES = {"bounded": "bounded", "lora": "LoRA"}


@dataclass(frozen=True)
class Run:
    """One finished run as its folder holds it.

    Attributes:
        steps: the lines of its log that are about steps.
        examples: questions with the model's answers before and after.
    """

    folder: Path
    result: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    examples: Sequence[Mapping[str, str]] = ()

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises InputError if a file is damaged."""
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
    def label(self) -> str:
        """Its name for people, such as "LoRA, learning rate 0.003"."""
        start = self.result["config"].get("lora_start", "zero")
        from_start = "" if start == "zero" else f" from {start}"
        return f"{_NAMES.get(self.adapter, self.adapter)}{from_start}, learning rate {self.lr:g}"

    @property
    def forgotten(self) -> bool:
        """Whether the adapter that is kept has reached the forget target."""
        return bool(
            self.kept["step"] > 0 and self.kept["forget"]["loss"] >= self.result["forget_target"]
        )

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
    questions: Sequence[str] = (),
    timed: bool = True,
    quick: bool = False,
) -> str:
    """Write `report.json` and `curves.png` to `folder`, and return what to print.

    That begins with what was forgotten and what was kept, goes on with `questions`, and ends with
    the table.

    Args:
        about: what the runs have in common (model, rows), kept as it is.
        questions: lines that show the model's answers.
        timed: whether the time per step means anything; a model of a few layers is too small.
        quick: the runs were shortened, which the picture says.
    """
    write_json(
        folder / REPORT,
        {
            "about": about,
            "runs": [
                {"name": run.folder.name, **run.result, "examples": list(run.examples)}
                for run in runs
            ],
            "environment": environment(),
        },
    )
    draw(folder / PICTURE, runs, quick=quick)
    return "\n".join([*outcome(runs), *questions, "", *table(runs, timed=timed)])


def outcome(runs: Sequence[Run]) -> list[str]:
    """Was it forgotten, what was kept, and bounded against LoRA: in sentences."""
    start = runs[0].result["history"][0]
    width = max(len(run.label) for run in runs)
    head = "answer tokens predicted:"
    width = max(width, len(head) - 2)
    lines = [
        f"{head:{width + 2}}  {'forget rows':22}  retain rows",
        f"  {'before':{width}}  {start['forget']['accuracy']:6.1%}{'':16}  "
        f"{start['retain']['accuracy']:6.1%}",
    ]
    for run in runs:
        said = "forgotten" if run.forgotten else "not forgotten"
        lines.append(
            f"  {run.label:{width}}  {run.kept['forget']['accuracy']:6.1%} {said:15}  "
            f"{run.kept['retain']['accuracy']:6.1%}"
        )
    fastest = [run for run in runs if run.lr == max(each.lr for each in runs)]
    if len({run.adapter for run in fastest}) > 1:
        kept = [
            f"the {run.adapter} adapter keeps {run.kept['retain']['accuracy']:.1%}"
            if run.adapter == "bounded"
            else f"{_NAMES.get(run.adapter, run.adapter)} {run.kept['retain']['accuracy']:.1%}"
            for run in fastest
        ]
        lines += [
            "",
            f"At the learning rate {fastest[0].lr:g} {' and '.join(kept)} of the answer tokens of "
            "the retain rows.",
        ]
    return lines


def table(runs: Sequence[Run], *, timed: bool = True) -> list[str]:
    """Loss in nats per token and share of answer tokens right, before and after each run."""
    lines = [
        f"{'':16} {'forget rows':>17}  {'retain rows':>17}",
        f"{'adapter':8} {'lr':>7} "
        + "  ".join([f"{'loss':>8} {'accuracy':>8}"] * 2)
        + f"  {'max|ΔW|':>8} {'bound':>6} {'in use':>6} {'steps':>6}"
        + (f" {'s/step':>7}" if timed else ""),
    ]
    lines.append("─" * len(lines[-1]))
    start: Mapping[str, Any] = {}
    for run in runs:
        result = run.result
        if result["history"][0] != start:  # runs that start from the same model share one line
            start = result["history"][0]
            lines.append(f"{'before':16} {_scores(start)}")
        share = result["bound_in_use"]
        used = "-" if share is None else f"{share:.0%}"
        bound = "none" if result["bound"] is None else f"{result['bound']:.3g}"
        seconds = result["seconds_per_step"]
        line = f"{run.adapter:8} {run.lr:7g} {_scores(run.kept)}"
        line += f"  {result['largest_delta']:8.3g} {bound:>6} {used:>6} {result['kept']:6}"
        if timed:
            line += " " + (f"{'-':>7}" if seconds is None else f"{seconds:7.3f}")
        lines.append(f"{line}  {_ending(run)}")
    seed = runs[0].result["config"]["seed"]
    lines.append(
        f"Mean over the answer tokens of {start['forget']['rows']} forget and "
        f"{start['retain']['rows']} retain rows; loss in nats per token; one seed ({seed})."
    )
    ceiling = runs[0].result.get("forget_ceiling")
    if ceiling is not None:
        lines.append(
            f"Gradient ascent pushed each token up to a loss of {ceiling:.3g}, no further."
        )
    lines.append(
        "Steps: up to the evaluation whose adapter is kept. Forgotten: a loss of "
        f"{runs[0].result['forget_target']:.3g} or more. In use: root mean square of ΔW over the "
        "bound."
    )
    if start["forget"]["loss"] >= runs[0].result["forget_target"]:
        lines.append("Before the first step the rows to forget already counted as forgotten.")
    lines += _cross_entropies(runs)
    lines += dict.fromkeys(
        f"Skipped {name}: {reason}"
        for run in runs
        for name, reason in run.result.get("skipped", {}).items()
    )
    lines += [f"{run.adapter}: {each}" for run, each in _allocations(runs)]
    minimised = runs[0].result["config"].get("losses")
    if minimised:
        lines.append(f"Minimised: {described(minimised)}")
    return lines


def _ending(run: Run) -> str:
    """Why the run ended, and whether the adapter of its last step is kept."""
    result, kept = run.result, run.kept["step"]
    last = result["history"][-1]["step"]
    said = {
        "forget_target": "ended: forgotten, and the rest kept",
        "retain_limit": f"ended at step {last} by retain_limit",
        "all steps": "" if kept == last else f"the best of {last} steps",
    }[result["stopped"]]
    if kept != last and result["stopped"] != "all steps":
        said += f" (step {kept} is the best)"
    if run.forgotten:
        return said
    return f"{said}{', ' if said else ''}not forgotten"


def _cross_entropies(runs: Sequence[Run]) -> list[str]:
    """Form, reason and size of the logits; runs that agree share one line."""
    lines = []
    for run in runs:
        held = run.result["cross_entropy"]
        size = held["logits_bytes"]
        most = "" if size is None else f"; at most {size / 1e6:.4g} MB of logits at once"
        lines.append(f"Cross-entropy {held['form']} ({held['reason']}){most}.")
    return list(dict.fromkeys(lines))


def _allocations(runs: Sequence[Run]) -> list[tuple[Run, RankAllocation]]:
    """What `rank="auto"` chose, once for all runs that agree."""
    found: dict[str, tuple[Run, RankAllocation]] = {}
    for run in runs:
        if run.result["ranks"] is not None:
            each = RankAllocation(**run.result["ranks"])
            found.setdefault(str(each), (run, each))
    return list(found.values())


def _scores(evaluation: Mapping[str, Any]) -> str:
    sides = (evaluation["forget"], evaluation["retain"])
    return "  ".join(f"{side['loss']:8.3f} {side['accuracy']:8.1%}" for side in sides)


def draw(path: Path, runs: Sequence[Run], *, quick: bool = False) -> None:
    """Three panels over the steps: forget loss, retain loss, and the largest |ΔW|.

    A thin line is the loss of each step's batch, a dot an evaluation, and the large dot the
    evaluation whose adapter is kept. Every adapter has its colour, and a higher rate is dashed.
    """
    figure, (axes,) = new_figure(1, 3, (13.5, 4.6))
    slowest = min((run.lr for run in runs), default=0.0)
    for run in runs:
        style = {
            "color": adapter_colour(run.adapter),
            "linestyle": "-" if run.lr == slowest else (0, (4, 1.5)),
            "linewidth": 1.8,
            "label": run.label,
        }
        history = run.result["history"]
        at = [each["step"] for each in history]
        for axis, side in zip(axes, ("forget", "retain"), strict=False):
            axis.plot(
                [line["step"] for line in run.steps],
                [line[f"{side}_loss"] for line in run.steps],
                **{**style, "linewidth": 0.6, "alpha": 0.4, "label": None},
            )
            axis.plot(at, [each[side]["loss"] for each in history], **style, marker=".")
            axis.plot(run.kept["step"], run.kept[side]["loss"], "o", color=style["color"])
        moved = [(li["step"], li["largest_delta"]) for li in run.steps if "largest_delta" in li]
        axes[2].plot([step for step, _ in moved], [delta for _, delta in moved], **style)
    for target in {run.result["forget_target"] for run in runs}:
        _limit(axes[0], target, "above: forgotten")
    bounds = sorted({run.result["bound"] for run in runs} - {None})
    for bound in bounds:  # that of the layer that moved most, which may differ between runs
        _limit(axes[2], bound, "bound of its layer" if bound == bounds[-1] else "")
    titles = (
        ("Rows to forget: their loss should rise", "loss, nats per token"),
        ("Rows to keep: their loss should stay low", "loss, nats per token"),
        ("How far the weights have moved", "largest |ΔW| of any entry"),
    )
    for axis, (title, label) in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step (large dot: the adapter that is kept)")
        axis.set_ylabel(label)
    axes[2].set_xlabel("step")
    axes[2].set_yscale("log")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    if quick:
        mark_quick(figure)
    save_figure(figure, path)


def _limit(axis: Any, height: float, said: str) -> None:
    """A dotted line with its meaning beside it."""
    axis.axhline(height, color="0.45", linestyle=":", linewidth=1.2)
    axis.annotate(
        said,
        (1, height),
        xycoords=axis.get_yaxis_transform(),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        color="0.35",
        fontsize=8,
    )
