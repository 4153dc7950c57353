"""The training loop: gradient difference through an adapter, on one or several devices."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastbound.errors import InputError, NonFiniteError
from fastbound.files import writing
from fastbound.models.ranks import RankAllocation
from fastbound.performance.progress import progress as progress_of
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import Encoded
from fastbound.unlearning.data.limits import check_fits
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.data.sampling import Pairing, evenly
from fastbound.unlearning.losses.cross_entropy import check_cross_entropy
from fastbound.unlearning.losses.objective import Objective
from fastbound.unlearning.metrics.answers import Score, totals
from fastbound.unlearning.model import (
    autocast_dtype,
    check_plain,
    checkpoint_activations,
    keeping_modes,
)
from fastbound.unlearning.runs.folder import (
    ADAPTER,
    RANKS,
    RESULT,
    RunFolder,
    write_json,
)
from fastbound.unlearning.runs.identity import fingerprint, model_identity, tokenizer_identity
from fastbound.unlearning.runs.peak_memory import peak_memory, reset_peak_memory
from fastbound.unlearning.runs.random_state import random_state, set_random_state
from fastbound.unlearning.training.adapters import Adapter, Layers, attach, target_layers
from fastbound.unlearning.training.ending import Ending, forget_ceiling
from fastbound.unlearning.training.fila import fila_importance
from fastbound.unlearning.training.processes import (
    is_sharded,
    score_together,
    start_processes,
    starts_first,
)
from fastbound.unlearning.training.rank_choice import choose_ranks
from fastbound.unlearning.training.result import Evaluation, UnlearnResult
from fastbound.unlearning.training.sides import Sides, encode_sides
from fastbound.unlearning.training.step import Training


def unlearn(
    model: nn.Module,
    tokenizer: Any,
    forget: str | Path | Sequence[Row],
    retain: str | Path | Sequence[Row],
    config: UnlearnConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> UnlearnResult:
    """Make `model` forget some rows and keep others, by gradient difference through an adapter.

    It minimises `retain_weight · CE(retain) − forget_weight · CE(forget)`, or the sum of
    `config.losses`, over A and B, by AdamW with a linear warm-up and decay. It runs on the CPU, on
    one GPU, or in several processes under `accelerate launch`.

    Args:
        model: a causal language model of transformers, changed in place.
        tokenizer: its fast tokenizer.
        forget, retain: rows, or what `load_rows` takes. The two must not share a row.
        config: settings; None takes the defaults.
        output: folder for log, checkpoints, adapter and result; None writes nothing.
        resume: continue from the checkpoint in `output`, which gives the same bits as a run without
            interruption; `model` must be the unadapted one, as at the first start.
        progress: show progress with both losses and max|ΔW|.

    Raises:
        InputError: rows, settings, model or output folder cannot be used; nothing was written.
        NonFiniteError: loss or gradient stopped being finite. The step is not taken, and the
            checkpoint stays as it was.
    """
    config = config or UnlearnConfig()
    check_plain(model, type(model).__name__)
    ceiling = forget_ceiling(config, model)
    objective = Objective(config.weighted_losses, config.seed, ceiling=ceiling)
    objective.layer(model)  # refused before any work
    sides = encode_sides(forget, retain, tokenizer, config, refuse=objective.needs_refusals)
    check_fits(model, tokenizer, [*sides.forget, *sides.retain, *sides.refused])
    first = output is not None and starts_first()
    with writing(Path(cast(str, output))) if first else contextlib.nullcontext():
        mode = model.training
        with keeping_modes(model):
            run = _Run(model, tokenizer, sides, objective, config, output, resume, progress)
            result = run.go()
            result.model.train(mode)  # LoRA's is PEFT's wrapper around the one given
            return result


class _Run:
    """State of one run: what `unlearn` sets up, steps through and finishes."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        sides: Sides,
        objective: Objective,
        config: UnlearnConfig,
        output: str | Path | None,
        resume: bool,
        progress: bool,
    ) -> None:
        self.config = config
        self.sides = sides
        self.accelerator = start_processes(config)
        self.sharded = is_sharded(self.accelerator, config)
        self.processes: int = self.accelerator.num_processes
        self.pairing = Pairing(
            len(sides.forget),
            len(sides.retain),
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            processes=self.processes,
            seed=config.seed,
        )
        self.steps = self.pairing.steps(config.epochs)
        self.ending = Ending(config, model, self.steps)
        self.eval_every = config.evaluation_interval(self.pairing.steps(1))
        self.checkpoint_every = config.checkpoint_every or self.eval_every
        self.folder = self._folder(model, tokenizer, output, resume)
        check_cross_entropy(config.cross_entropy, model, self.accelerator.device)
        layers, self.skipped = target_layers(model, config)
        self.ranks = self._ranks(model, layers, resume)
        state = self.folder.load_checkpoint() if self.folder and resume else None
        ranks = cast(int, config.rank) if self.ranks is None else self.ranks.ranks
        importance = self._importance(model, layers, resume)
        self.adapter: Adapter = attach(model, config, ranks, importance)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        self.training = Training(
            self.adapter, sides, objective, self.pairing, self.accelerator, self.sharded, config
        )
        self.step = 0
        self.history: list[Evaluation] = []
        self.kept: dict[str, torch.Tensor] = {}  # A and B of the best evaluation so far
        self.durations: list[float] = []
        self.progress = progress and self.accelerator.is_main_process
        self._begin()
        if state is not None:
            self._restore(state)

    def go(self) -> UnlearnResult:
        reset_peak_memory(self.training.device)
        self.training.model.train()
        with progress_of(self.steps, "unlearning", "step", shown=self.progress) as self.bar:
            self.bar.update(self.step)
            if not self.history:
                self._evaluate()
                if self.accelerator.is_main_process:
                    self.ending.check_start(self.history[0])
                self._save_checkpoint()
            stopped = self.ending.reason(self.history, self.step)
            while stopped is None:
                self._take_step()
                if self.step % self.eval_every == 0 or self.step == self.steps:
                    self._evaluate()
                stopped = self.ending.reason(self.history, self.step)
                if self.step % self.checkpoint_every == 0 or stopped:
                    self._save_checkpoint()
        return self._finish(stopped)

    def _take_step(self) -> None:
        start = time.perf_counter()
        losses = self.training.gradients(self.step)
        if not all(map(math.isfinite, losses)):
            raise NonFiniteError(self._blame(*losses))
        rate = self.training.update(losses)
        self.step += 1
        seconds = time.perf_counter() - start
        self.durations.append(seconds)
        self.bar.update()
        line = {
            "step": self.step,
            "forget_loss": losses.forget,
            "retain_loss": losses.retain,
            "lr": rate,
            "grad_norm": losses.grad_norm,
            "seconds": round(seconds, 4),
            **self.training.objective.state(),
        }
        if self.step % self.config.log_every == 0 or self.step == self.steps:
            delta = self.adapter.delta()
            line["largest_delta"] = delta.largest
            self.bar.set_postfix_str(
                f"forget {losses.forget:.3f}, retain {losses.retain:.3f}, "
                f"max|ΔW| {delta.largest:.3g}"
            )
        self._log(event="step", **line)

    def _evaluate(self) -> None:
        forget, retain = (
            self._score(evenly(rows, self.config.eval_rows))
            for rows in (self.sides.forget, self.sides.retain)
        )
        self.history.append(Evaluation(self.step, forget, retain))
        if self.ending.best(self.history) is self.history[-1]:
            self.kept = self.training.factors()
        self._log(event="evaluation", **asdict(self.history[-1]))

    def _score(self, rows: Sequence[Encoded]) -> Score:
        batch_size = 2 * self.config.batch_size
        score_rows = functools.partial(
            totals,
            self.adapter.model,
            pad=self.sides.pad,
            batch_size=batch_size,
            device=self.training.device,
            dtype=self.training.dtype,
            cross_entropy=self.training.cross_entropy,
        )
        return score_together(score_rows, rows, batch_size, self.accelerator, self.sharded)

    def _finish(self, stopped: str) -> UnlearnResult:
        kept = self.ending.best(self.history)
        if kept.step != self.step:
            self.training.put_factors(self.kept)
        delta = self.adapter.delta()
        memory, kind = peak_memory(self.training.device)
        result = UnlearnResult(
            model=self.adapter.model,
            disabled=self.adapter.disabled,
            config=self.config,
            history=tuple(self.history),
            cross_entropy=self.training.cross_entropy,
            skipped=self.skipped,
            ranks=self.ranks,
            stopped=stopped,
            forget_target=self.ending.target,
            forget_ceiling=self.training.objective.ceiling,
            kept=kept.step,
            lr=self.training.highest_rate,
            largest_delta=delta.largest,
            bound=delta.bound,
            bound_in_use=delta.in_use,
            seconds_per_step=statistics.median(self.durations) if self.durations else None,
            peak_memory=memory,
            peak_memory_kind=kind,
        )
        if self.folder and (self.folder.writes or self.sharded):
            self.adapter.save(self.folder.path / ADAPTER)
        if self.folder and self.folder.writes:
            write_json(self.folder.path / RESULT, result.as_dict())
        self.accelerator.wait_for_everyone()
        return result

    def _blame(self, forget: float, retain: float, grad_norm: float) -> str:
        rows = self.sides.where(
            self.pairing.batch(self.step, part, process)
            for part in range(self.config.accumulation)
            for process in range(self.processes)
        )
        kept = (
            f"the checkpoint in {self.folder.path} is intact"
            if self.folder
            else "nothing was saved (no output folder)"
        )
        return (
            f"step {self.step + 1} of {self.steps} is not finite: forget loss {forget:.4g}, "
            f"retain loss {retain:.4g}, gradient norm {grad_norm:.4g}; its batch: "
            f"{'; '.join(rows)}. The step was not taken, {kept}. Try a lower lr than "
            f"{self.training.highest_rate:g}, clip=1.0, a smaller alpha or bound, or dtype float32"
        )

    def _folder(
        self, model: nn.Module, tokenizer: Any, output: str | Path | None, resume: bool
    ) -> RunFolder | None:
        if output is None:
            if resume:
                raise InputError("resume needs output, the folder of the run to continue")
            return None
        identity = {
            "config": self.config.as_dict(),
            "rows": {
                "forget": fingerprint(self.sides.forget),
                "retain": fingerprint(self.sides.retain),
            },
            "steps": self.steps,
            "processes": self.processes,
            "digests": {**model_identity(model), "tokenizer": tokenizer_identity(tokenizer)},
        }
        return RunFolder(
            output, identity, resume=resume, writes=bool(self.accelerator.is_main_process)
        )

    def _begin(self) -> None:
        """Mark the folder as this run's once every process has found it free."""
        self.accelerator.wait_for_everyone()
        if self.folder:
            self.folder.begin()
            if self.ranks is not None:
                self.folder.keep(RANKS, asdict(self.ranks))

    def _ranks(self, model: nn.Module, layers: Layers, resume: bool) -> RankAllocation | None:
        """The ranks of `rank="auto"`: those of the run to continue, or newly chosen ones."""
        if self.config.rank != "auto":
            return None
        held = self.folder.kept(RANKS) if self.folder and resume else None
        if held is not None:
            return RankAllocation(**held)
        return choose_ranks(model, layers, self.sides, self.config, self.accelerator)

    def _importance(
        self, model: nn.Module, layers: Layers, resume: bool
    ) -> dict[str, torch.Tensor] | None:
        """For lora_start "fila", unless a checkpoint holds the start."""
        held = self.folder is not None and resume and self.folder.has_checkpoint
        if self.config.lora_start == "zero" or held:
            return None
        return fila_importance(
            model,
            layers,
            self.sides.forget,
            self.sides.retain,
            self.sides.pad,
            device=self.accelerator.device,
            dtype=autocast_dtype(self.config.dtype),
        )

    def _log(self, **line: Any) -> None:
        if self.folder:
            self.folder.log(line)

    def _save_checkpoint(self) -> None:
        if not self.folder:
            return
        from accelerate.utils import gather_object

        self.folder.save_checkpoint(
            {
                "step": self.step,
                **self.training.state(),
                "kept": self.kept,
                "random": gather_object([random_state()]),
                "history": [asdict(each) for each in self.history],
                "durations": self.durations,
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.training.restore(state)
        set_random_state(state["random"][self.accelerator.process_index])
        self.step = state["step"]
        self.kept = state["kept"]
        self.durations = list(state["durations"])
        self.history = [
            Evaluation(each["step"], Score(**each["forget"]), Score(**each["retain"]))
            for each in state["history"]
        ]
