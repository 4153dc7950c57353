"""The training loop: gradient difference through an adapter, on one device or several."""

from __future__ import annotations

import functools
import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import fastbound
from fastbound.partition import like, whole
from fastbound.unlearning.adapters import Adapter, attach
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data import Row, check_disjoint, load_rows
from fastbound.unlearning.encoding import (
    Batch,
    Encoded,
    answer_length,
    collate,
    encode_all,
    padding,
)
from fastbound.unlearning.errors import InputError, NonFiniteError
from fastbound.unlearning.evaluate import Score, autocast, forward, score, totals
from fastbound.unlearning.folder import ADAPTER, RESULT, RunFolder, fingerprint, write_json
from fastbound.unlearning.objective import Objective, refusals
from fastbound.unlearning.pretrained import checkpoint_activations
from fastbound.unlearning.processes import is_sharded, shares, start_processes
from fastbound.unlearning.random_state import random_state, set_random_state
from fastbound.unlearning.result import Evaluation, UnlearnResult
from fastbound.unlearning.sampling import Pairing, evenly


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

    Minimises `retain_weight · CE(retain) − forget_weight · CE(forget)`, or the sum of
    `config.losses`, over A and B with AdamW, linear warm-up and decay. Runs on the CPU, on one
    GPU, or on several processes under `accelerate launch`.

    Args:
        model: a causal language model of transformers, changed in place.
        tokenizer: its fast tokenizer.
        forget, retain: rows, or what `load_rows` takes. They must not share a row.
        config: settings; None for the defaults.
        output: folder for log, checkpoints, adapter and result; None keeps nothing.
        resume: go on from the checkpoint in `output`, to the bits of an uninterrupted run; `model`
            must be the unadapted one, as for the first start.
        progress: show a bar with both losses and max|ΔW|.

    Raises:
        InputError: rows, settings, model or output folder cannot be used; nothing was written.
        NonFiniteError: loss or gradient stopped being finite. The step is not taken, the
            checkpoint stays as it was.
    """
    config = config or UnlearnConfig()
    forget_rows = _rows(forget)
    retain_rows = _rows(retain)
    check_disjoint(forget_rows, retain_rows)
    sides = [
        encode_all(rows, tokenizer, max_length=config.max_length, template=config.template)
        for rows in (forget_rows, retain_rows)
    ]
    objective = Objective(config.weighted_losses)
    refused: Sequence[Encoded] = ()
    if objective.needs_refusals:
        refused = encode_all(
            refusals(forget_rows),
            tokenizer,
            max_length=config.max_length,
            template=config.template,
        )
    run = _Run(
        model,
        sides[0],
        sides[1],
        refused,
        objective,
        padding(tokenizer),
        config,
        output,
        resume,
        progress,
    )
    return run.go()


def _rows(source: str | Path | Sequence[Row]) -> Sequence[Row]:
    rows = load_rows(source) if isinstance(source, (str, Path)) else source
    if not rows:
        raise InputError("forget and retain need at least one row each")
    return rows


class _Run:
    """State of one run: what `unlearn` sets up, steps through and takes down."""

    def __init__(
        self,
        model: nn.Module,
        forget: Sequence[Encoded],
        retain: Sequence[Encoded],
        refused: Sequence[Encoded],
        objective: Objective,
        pad: int,
        config: UnlearnConfig,
        output: str | Path | None,
        resume: bool,
        progress: bool,
    ) -> None:
        self.config = config
        self.forget = forget
        self.retain = retain
        self.refused = refused
        self.objective = objective
        self.pad = pad
        self.lengths = [[answer_length(row) for row in side] for side in (forget, retain)]
        self.accelerator = start_processes(config)
        self.device: torch.device = self.accelerator.device
        self.dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
        self.sharded = is_sharded(self.accelerator, config)
        self.processes: int = self.accelerator.num_processes
        self.process: int = self.accelerator.process_index
        self.pairing = Pairing(
            len(forget),
            len(retain),
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            processes=self.processes,
            seed=config.seed,
        )
        self.steps = self.pairing.steps(config.epochs)
        each_epoch = self.pairing.steps(1)
        self.eval_every = config.eval_every or each_epoch
        self.checkpoint_every = config.checkpoint_every or self.eval_every
        self.folder = self._folder(output, resume)
        self.adapter: Adapter = attach(model, config)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        self.inner = self.adapter.model
        self.model = self._spread(self.inner)
        self.parameters = [p for p in self.inner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step = 0
        self.history: list[Evaluation] = []
        self.durations: list[float] = []
        self.bar = _bar(self.steps, progress and self.accelerator.is_main_process)
        state = self._begin(resume)
        if state is not None:
            self._restore(state)

    def go(self) -> UnlearnResult:
        self._reset_peak()
        self.model.train()
        self.bar.update(self.step)
        if not self.history:
            self._evaluate()
            self._save_checkpoint()
        stopped = self._stop_reason()
        while stopped is None:
            self._take_step()
            if self.step % self.eval_every == 0 or self.step == self.steps:
                self._evaluate()
            stopped = self._stop_reason()
            if self.step % self.checkpoint_every == 0 or stopped:
                self._save_checkpoint()
        self.bar.close()
        return self._finish(stopped)

    def _take_step(self) -> None:
        config = self.config
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(2, device=self.device)
        weights = shares(self.pairing, self.step, self.process, *self.lengths)
        for part, (forget_share, retain_share) in enumerate(weights):
            pairs = self.pairing.batch(self.step, part, self.process)
            rows = [self.forget[i] for i in pairs[0]] + [self.retain[i] for i in pairs[1]]
            if self.refused:
                rows += [self.refused[i] for i in pairs[0]]
            batch = collate(rows, self.pad).to(self.device)
            reference = self._reference(batch)
            last = part == config.accumulation - 1
            with self._synchronised(last), autocast(self.device, self.dtype):
                logits = forward(self.model, batch.input_ids, batch.attention_mask)
                difference = self.objective(
                    logits,
                    batch,
                    (len(pairs[0]), len(pairs[1]), len(pairs[0]))[: 3 if self.refused else 2],
                    reference=reference,
                    shares=(forget_share, retain_share),
                    part=1 / config.accumulation,
                )
                self.accelerator.backward(difference.loss)
            means = torch.stack(
                [forget_share * difference.forget, retain_share * difference.retain]
            )
            losses += means.to(losses)
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, config.clip or math.inf))
        # Averaged over processes, so that all of them see the same and stop together.
        losses = self.accelerator.reduce(losses, reduction="mean")
        forget, retain, grad_norm = torch.stack([*losses, norm.to(losses)]).tolist()
        if not all(map(math.isfinite, (forget, retain, grad_norm))):
            self.bar.close()
            raise NonFiniteError(self._blame(forget, retain, grad_norm))
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        seconds = time.perf_counter() - start
        self.durations.append(seconds)
        self.bar.update()
        if self.step % config.log_every == 0 or self.step == self.steps:
            delta = self.adapter.delta()
            self._log(
                event="step",
                step=self.step,
                forget_loss=forget,
                retain_loss=retain,
                lr=rate,
                grad_norm=grad_norm,
                largest_delta=delta.largest,
                seconds=round(seconds, 4),
            )
            self.bar.set_postfix_str(
                f"forget {forget:.3f}, retain {retain:.3f}, max|ΔW| {delta.largest:.3g}"
            )

    @torch.no_grad()
    def _reference(self, batch: Batch) -> torch.Tensor | None:
        """Logits of the model as it was, from the same weights: no second copy of them."""
        if not self.objective.needs_reference:
            return None
        self.model.eval()
        with self.adapter.disabled(), autocast(self.device, self.dtype):
            logits = forward(self.model, batch.input_ids, batch.attention_mask)
        self.model.train()
        return cast(torch.Tensor, logits)

    def _evaluate(self) -> None:
        forget, retain = (
            self._score(evenly(rows, self.config.eval_rows)) for rows in (self.forget, self.retain)
        )
        self.history.append(Evaluation(self.step, forget, retain))
        self._log(event="evaluation", **asdict(self.history[-1]))

    def _score(self, rows: Sequence[Encoded]) -> Score:
        score_rows = functools.partial(
            totals,
            self.inner,
            pad=self.pad,
            batch_size=2 * self.config.batch_size,
            device=self.device,
            dtype=self.dtype,
        )
        shares = [rows[process :: self.processes] for process in range(self.processes)]
        sums = score_rows(shares[self.process])
        if self.sharded:
            # Each forward gathers weights from everyone: all make as many as the first.
            batches = [math.ceil(len(share) / (2 * self.config.batch_size)) for share in shares]
            for _ in range(batches[0] - batches[self.process]):
                score_rows(rows[:1])
        if self.processes > 1:
            sums = self.accelerator.reduce(torch.tensor(sums, device=self.device)).tolist()
        return score(sums)

    def _stop_reason(self) -> str | None:
        last = self.history[-1]
        config = self.config
        if last.step == self.step:
            if config.forget_target is not None and last.forget.loss >= config.forget_target:
                return "forget_target"
            if config.retain_limit is not None and last.retain.loss > config.retain_limit:
                return "retain_limit"
        return "all steps" if self.step >= self.steps else None

    def _finish(self, stopped: str) -> UnlearnResult:
        delta = self.adapter.delta()
        memory, kind = self._peak()
        result = UnlearnResult(
            model=self.inner,
            config=self.config,
            history=tuple(self.history),
            stopped=stopped,
            largest_delta=delta.largest,
            bound=delta.bound,
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

    def _rate(self, step: int) -> float:
        """Share of `lr` at a step: up over the warm-up, then down to 0 after the last step."""
        rising = math.ceil(self.config.warmup * self.steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        return (self.steps - step) / max(1, self.steps - rising)

    def _spread(self, model: nn.Module) -> Any:
        """The model as the processes hold it: each a copy, or each a part."""
        if self.sharded:
            return fastbound.shard(model.to(self.device))
        return self.accelerator.prepare(model)

    def _synchronised(self, last: bool) -> Any:
        """Gradients travel between processes once a step, with the last batch."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            return autocast("cpu", None)
        return autocast("cpu", None) if last else self.accelerator.no_sync(self.model)

    def _blame(self, forget: float, retain: float, grad_norm: float) -> str:
        places = [
            self.pairing.batch(self.step, part, process)
            for part in range(self.config.accumulation)
            for process in range(self.processes)
        ]
        rows = [self.forget[i].where for pair in places for i in pair[0]]
        rows += [self.retain[i].where for pair in places for i in pair[1]]
        kept = (
            f"the checkpoint in {self.folder.path} is intact"
            if self.folder
            else "nothing was saved (no output folder)"
        )
        return (
            f"step {self.step + 1} of {self.steps} is not finite: forget loss {forget:.4g}, "
            f"retain loss {retain:.4g}, gradient norm {grad_norm:.4g}; its batch: "
            f"{'; '.join(rows)}. The step was not taken, {kept}. Try a lower lr than "
            f"{self.config.lr:g}, clip=1.0, a smaller alpha or bound, or dtype float32"
        )

    def _folder(self, output: str | Path | None, resume: bool) -> RunFolder | None:
        if output is None:
            if resume:
                raise InputError("resume needs the output folder of the run to go on with")
            return None
        identity = {
            "config": self.config.as_dict(),
            "rows": {"forget": fingerprint(self.forget), "retain": fingerprint(self.retain)},
            "steps": self.steps,
            "processes": self.processes,
        }
        return RunFolder(
            output, identity, resume=resume, writes=bool(self.accelerator.is_main_process)
        )

    def _begin(self, resume: bool) -> dict[str, Any] | None:
        """Mark the folder, once every process has found it free; the state to resume, if any."""
        self.accelerator.wait_for_everyone()
        if not self.folder:
            return None
        self.folder.begin()
        return self.folder.load_checkpoint() if resume else None

    def _log(self, **line: Any) -> None:
        if self.folder:
            self.folder.log(line)

    def _save_checkpoint(self) -> None:
        if not self.folder:
            return
        from accelerate.utils import gather_object

        trained = {
            n: whole(p.detach()) for n, p in self.inner.named_parameters() if p.requires_grad
        }
        self.folder.save_checkpoint(
            {
                "step": self.step,
                "adapter": trained,
                "optimizer": tree_map_only(torch.Tensor, whole, self.optimizer.state_dict()),
                "scheduler": self.scheduler.state_dict(),
                "random": gather_object([random_state()]),
                "history": [asdict(each) for each in self.history],
                "durations": self.durations,
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        trained = {n: p for n, p in self.inner.named_parameters() if p.requires_grad}
        if trained.keys() != state["adapter"].keys():
            raise InputError("the checkpoint is of another model: give the one the run began with")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(like(state["adapter"][name], parameter))
        self.optimizer.load_state_dict(state["optimizer"])
        for owner, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if value.shape == owner.shape:
                    kept[name] = like(value, owner)
        self.scheduler.load_state_dict(state["scheduler"])
        set_random_state(state["random"][self.process])
        self.step = state["step"]
        self.durations = list(state["durations"])
        self.history = [
            Evaluation(each["step"], Score(**each["forget"]), Score(**each["retain"]))
            for each in state["history"]
        ]

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> tuple[int, str]:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), "device memory"
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set"


def _bar(steps: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, disable=not shown, desc="unlearning", unit="step", dynamic_ncols=True)
