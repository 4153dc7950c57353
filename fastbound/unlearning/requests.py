"""Successive requests to forget, each with an adapter of its own that can be rolled back.

request-1/ ...     the run of each request, with its adapter
requests.json      what the model still knows after each number of requests
requests.png       the same as curves
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastbound.errors import InputError
from fastbound.figures import new_figure, save_figure
from fastbound.files import writing
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import Encoded, encode_all, padding
from fastbound.unlearning.data.limits import check_fits
from fastbound.unlearning.data.rows import Row, check_disjoint, load_rows
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.metrics.answers import Score, evaluate
from fastbound.unlearning.model import autocast_dtype, load_adapter, merged
from fastbound.unlearning.runs.folder import ADAPTER, check_free, write_json
from fastbound.unlearning.training.loop import unlearn

RESULT, PICTURE = "requests.json", "requests.png"
Source = str | Path | Sequence[Row]


@dataclass(frozen=True)
class Knowledge:
    """What the model knows after a number of requests; 0 is the model before the first.

    Attributes:
        requests: number of requests carried out.
        forget: score of each request's rows, including requests that are still to come.
        retain, general: scores of the rows to keep, and of rows unrelated to any request.
        kept, stopped: the step kept by the last request's run, and how that run ended; None before
            the first request.
    """

    requests: int
    forget: tuple[Score, ...]
    retain: Score
    general: Score | None
    kept: int | None = None
    stopped: str | None = None


def unlearn_requests(
    load: Callable[[], nn.Module],
    tokenizer: Any,
    requests: Sequence[Source],
    retain: Source,
    config: UnlearnConfig | None = None,
    *,
    output: str | Path,
    general: Source | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[Knowledge, ...]:
    """Carry out requests in order: each trains a new adapter on the model left by earlier ones.

    W + ΔW_1 + ... + ΔW_k-1 is frozen while ΔW_k is trained, so that every adapter is small and
    complete in itself. `apply_requests` merges any selection of them into the base model, so that
    leaving one out rolls it back. Each |ΔW_ij| is at most its bound, and the sum of k adapters at
    most k times that.

    Args:
        load: loads the model before the first request; called anew for each request.
        requests: the rows of each request, as for `load_rows`. No two requests share a row.
        retain: rows to keep in all requests.
        config: settings of every run; the seed of request k is `config.seed + k - 1`.
        output: folder for the runs and the report.
        general: further rows to measure.
        resume: continue where the folder's last run stopped.

    Raises:
        InputError: rows, settings, model or folder cannot be used.
        NonFiniteError: a loss is no longer finite; the requests before it are complete.
    """
    config = config or UnlearnConfig()
    folder = Path(output)
    forget, kept = [_rows(each) for each in requests], _rows(retain)
    if not forget or not all([*forget, kept]):
        raise InputError("give at least one request, and rows for every request and for retain")
    for number, rows in enumerate(forget, start=1):
        check_disjoint(rows, kept)
        for other in forget[number:]:
            check_disjoint(rows, other)
    sides = [*forget, kept, *([] if general is None else [_rows(general)])]
    encoded = [
        encode_all(rows, tokenizer, max_length=config.max_length, template=config.template)
        for rows in sides
    ]

    def knowledge(number: int, model: nn.Module, **more: Any) -> Knowledge:
        scores = [_score(model, tokenizer, rows, config) for rows in encoded]
        count = len(forget)
        other = scores[count + 1] if general is not None else None
        return Knowledge(number, tuple(scores[:count]), scores[count], other, **more)

    check_free(folder, _of(1), resume=resume)
    with writing(folder):
        first = load()
        check_fits(first, tokenizer, [row for side in encoded for row in side])
        curve = [knowledge(0, first)]
        del first
        for number, rows in enumerate(forget, start=1):
            model = apply_requests(load(), folder, range(1, number))
            result = unlearn(
                model,
                tokenizer,
                rows,
                kept,
                dataclasses.replace(config, seed=config.seed + number - 1),
                output=folder / _of(number),
                resume=resume and (folder / _of(number)).exists(),
                progress=progress,
            )
            curve.append(knowledge(number, result.model, kept=result.kept, stopped=result.stopped))
            write_json(
                folder / RESULT, {"config": config.as_dict(), "curve": list(map(asdict, curve))}
            )
        _draw(folder / PICTURE, curve)
    return tuple(curve)


def apply_requests(
    model: nn.Module, folder: str | Path, requests: Iterable[int] | None = None
) -> nn.Module:
    """Merge the adapters of some requests into `model`, the one before the first, in place.

    Leaving a request out rolls it back: the model knows its rows again, except as far as later
    requests, which were trained on top of it, affect them as well.

    Args:
        folder: the output folder of `unlearn_requests`.
        requests: numbers from 1, each once, in the order in which they are added; None means all.

    Raises InputError for a number that is given twice, or whose adapter does not exist.
    """
    path = Path(folder)
    if requests is None:
        requests = sorted(
            int(found[1])
            for each in path.glob(f"{_of('*')}/{ADAPTER}")
            if (found := re.fullmatch(_of(r"([1-9]\d*)"), each.parent.name))
        )
    chosen = list(requests)
    twice = next((number for number in chosen if chosen.count(number) > 1), None)
    if twice is not None:
        raise InputError(f"request {twice} is given twice, and its change would be added twice")
    adapters = [path / _of(number) / ADAPTER for number in chosen]
    for adapter in adapters:  # all of them before the first is merged
        if not adapter.is_dir():
            raise InputError(f"{adapter} does not exist: give numbers of requests carried out")
    for adapter in adapters:
        model = merged(load_adapter(model, adapter))
    return model


def _of(number: int | str) -> str:
    return f"request-{number}"


def _rows(source: Source) -> Sequence[Row]:
    return load_rows(source) if isinstance(source, (str, Path)) else source


def _score(
    model: nn.Module, tokenizer: Any, rows: Sequence[Encoded], config: UnlearnConfig
) -> Score:
    return evaluate(
        model,
        evenly(rows, config.eval_rows),
        pad=padding(tokenizer),
        batch_size=2 * config.batch_size,
        device=next(model.parameters()).device,
        dtype=autocast_dtype(config.dtype),
    )


def _draw(path: Path, curve: Sequence[Knowledge]) -> None:
    """Accuracy over requests: rows to keep, rows forgotten so far, rows still to come."""
    figure, ((panel,),) = new_figure(1, 1, (6.4, 4.2))
    at = [each.requests for each in curve]
    lines = {
        "retain": ("#0b6e99", [each.retain.accuracy for each in curve]),
        "forgotten so far": ("#c4511d", [_mean(each.forget[: each.requests]) for each in curve]),
        "still to come": ("0.45", [_mean(each.forget[each.requests :]) for each in curve]),
    }
    if curve[0].general is not None:
        found = [each.general.accuracy for each in curve if each.general is not None]
        lines["general"] = ("#5a8f3c", found)
    for name, (colour, values) in lines.items():
        panel.plot(at, values, color=colour, marker="o", label=name)
    panel.set_xticks(at)
    panel.set_ylim(-0.02, 1.02)
    panel.set_title("Requests to forget, one after the other")
    panel.set_xlabel("requests carried out")
    panel.set_ylabel("share of answer tokens right")
    panel.legend(fontsize="small")
    save_figure(figure, path)


def _mean(scores: Sequence[Score]) -> float:
    if not scores:
        return float("nan")
    return sum(score.accuracy for score in scores) / len(scores)
