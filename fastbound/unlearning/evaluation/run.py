"""Evaluate one model on one benchmark into a folder, resuming after an interruption.

run.json                   what is evaluated; what `--resume` compares
pieces.jsonl               values of every finished batch
eval_log_aggregated.json   TOFU's log (muse_log.json, tdec_log.json for the others)
summary.json               the metrics, the convention, the environment
evaluation.png             the plots
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fastbound.errors import InputError, count_fields
from fastbound.files import writing
from fastbound.unlearning.data.limits import check_fits
from fastbound.unlearning.evaluation import benchmark_named
from fastbound.unlearning.evaluation.benchmark import Benchmark
from fastbound.unlearning.evaluation.membership import check_attacks, check_gradients
from fastbound.unlearning.evaluation.session import Pieces, Session
from fastbound.unlearning.evaluation.templates import check_family
from fastbound.unlearning.losses.cross_entropy import check_memory
from fastbound.unlearning.metrics.conventions import check_convention
from fastbound.unlearning.metrics.logs import read_log
from fastbound.unlearning.model import evaluating
from fastbound.unlearning.model import load_adapter as load_adapter
from fastbound.unlearning.runs.environment import environment
from fastbound.unlearning.runs.folder import RunFolder, finite, write_json
from fastbound.unlearning.runs.identity import fingerprint, model_identity, tokenizer_identity
from fastbound.unlearning.runs.lines import CheckedLines

SUMMARY = "summary.json"
PICTURE = "evaluation.png"
PIECES = "pieces.jsonl"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated, and how. Raises `InputError` for a setting that is out of range.

    Attributes:
        benchmark: "tofu", "muse" or "tdec".
        split: TOFU's forget split (forget10), MUSE's corpus (news), the name of TDEC's file.
        data: folder of the benchmark's files; None means the hub.
        convention: whose definitions to use; None means the benchmark's first.
        template: family of question and answer templates, for TOFU.
        batch_size: rows per batch.
        rows: use only this many rows at the start of each set; None means all. TOFU's own code uses
            300.
        n: the n of EL_n, for TDEC.
        membership: attacks of `membership.ATTACKS` to score as well, for TOFU (which then needs its
            holdout split) and MUSE.
    """

    benchmark: Literal["tofu", "muse", "tdec"]
    split: str | None = None
    data: str | None = None
    convention: str | None = None
    template: str = "phi"
    batch_size: int = 16
    rows: int | None = None
    n: int = 10
    membership: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = self.chosen.CONVENTIONS
        if self.convention is None:
            object.__setattr__(self, "convention", known[0])
        check_convention(str(self.convention), known)
        if self.split is None:
            if self.chosen.DEFAULT_SPLIT is None:
                raise InputError(
                    f"{self.benchmark} needs --split: the name of its file, without csv or npy"
                )
            object.__setattr__(self, "split", self.chosen.DEFAULT_SPLIT)
        check_family(self.template)
        object.__setattr__(self, "membership", check_attacks(self.membership))
        if self.membership and self.benchmark == "tdec":
            raise InputError("tdec has no holdout rows for membership attacks: take tofu or muse")
        count_fields(self, ("batch_size", "n"), optional=["rows"])

    @property
    def chosen(self) -> Benchmark:
        """The benchmark's module."""
        return benchmark_named(self.benchmark)


def evaluate_benchmark(
    model: nn.Module,
    tokenizer: Any,
    config: EvaluationConfig,
    output: str | Path,
    *,
    retain_log: str | Path | Mapping[str, Any] | None = None,
    reference: nn.Module | None = None,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> str:
    """Evaluate `model` as it is, write the files above, and return the table to print.

    All input is checked before the model runs. A resumed evaluation computes only the batches that
    are not on disk, with the same values as an uninterrupted one.

    Args:
        retain_log: the log of a model trained without the forget rows, for forget quality and as
            the reference of PrivLeak.
        reference: a model that never saw the forget rows, for the membership attack "reference".
        about: names of model and adapter, compared by `resume` and kept in the summary.

    Raises:
        InputError: data, logs, tokenizer or output folder cannot be used.
        NonFiniteError: a loss is not finite.
    """
    folder, chosen = Path(output), config.chosen
    retain = None if retain_log is None else read_log(retain_log)
    if ("reference" in config.membership) != (reference is not None):
        raise InputError(
            "the membership attack reference needs --reference, a model that never saw the rows"
            if reference is None
            else "--reference is for the membership attack of that name: add it, or leave it out"
        )
    if "gradnorm" in config.membership:
        check_gradients(model)
    prepared = chosen.prepare(config, tokenizer)
    for each in (model, *(() if reference is None else (reference,))):
        check_fits(each, tokenizer, prepared.encoded)
    longest = max(len(row.ids) for row in prepared.encoded)
    rows = min(config.batch_size, len(prepared.encoded))
    check_memory(model, next(model.parameters()).device, rows * longest)
    continued = prepared.continued
    check_fits(model, tokenizer, [row for row, _ in continued], [most for _, most in continued])
    if retain is not None:  # checked before minutes of evaluation
        for part, (theirs, ours) in chosen.compared(retain, prepared).items():
            if theirs != ours:
                raise InputError(
                    f"retain log has {theirs} rows in {part}, {config.split} here has {ours}: "
                    "evaluate both models on the same rows"
                )
    identity = {
        **_settings(config),
        **(about or {}),
        "tokens": fingerprint(prepared.encoded),
        "digests": {**model_identity(model), "tokenizer": tokenizer_identity(tokenizer)},
        **({} if reference is None else {"reference_digests": model_identity(reference)}),
    }
    with writing(folder):
        run = RunFolder(folder, identity, resume=resume)
        run.begin()
        pieces = Pieces(CheckedLines(folder / PIECES, run.digest))
        session = Session(model, tokenizer, config.batch_size, pieces, progress, reference)
        with evaluating(model), evaluating(model if reference is None else reference):
            log = chosen.score(session, prepared, config)
        write_json(folder / chosen.LOG, log)
        summary = chosen.summarise(log, retain, config)
        chosen.draw(folder / PICTURE, log, retain, summary)
        write_json(folder / SUMMARY, finite({**identity, **summary, "environment": environment()}))
    return "\n".join([f"{config.benchmark} {config.split}", *chosen.table(summary)])


def _settings(config: EvaluationConfig) -> dict[str, Any]:
    """The settings that affect values; the data is compared by its tokens."""
    settings = {name: value for name, value in vars(config).items() if name != "data"}
    attacks = list(settings.pop("membership"))
    return {**settings, **({"membership": attacks} if attacks else {})}
