"""The attacks asked for, one after the other, into a folder.

run.json      what was attacked and how
attack.json   every figure, and the environment
attack.md     the tables
attack.png    a panel for each attack
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.figures import new_figure, save_figure
from fastbound.files import replace_files, writing
from fastbound.unlearning.data.rows import Row, authors, check_disjoint, load_rows, read_records
from fastbound.unlearning.evaluation.attacks import paraphrase, quantize, relearn
from fastbound.unlearning.evaluation.attacks.subject import (
    BEFORE,
    UNLEARNED,
    AttackConfig,
    Load,
    Subject,
)
from fastbound.unlearning.runs.environment import environment
from fastbound.unlearning.runs.folder import RUN, check_free, write_json

RESULT, REPORT, PICTURE = "attack.json", "attack.md", "attack.png"
_ATTACKS: dict[str, Any] = {module.NAME: module for module in (relearn, quantize, paraphrase)}
_SAID = {
    "relearn": "Accuracy is the share of answer tokens that are the first choice, on the forget "
    "rows that are not relearned. Recovered: 0 as unlearned, 1 as before unlearning.",
    "quantize": "Linear layers but the head, rounded to nearest: 8 bits with a scale for each row "
    "of a weight, 4 bits for each group of weights.",
    "paraphrase": "The forget rows in other words than those that were unlearned.",
}


def attack(
    models: Mapping[str, Load],
    tokenizer: Any,
    forget: str | Path,
    config: AttackConfig | None = None,
    *,
    retain: str | Path | None = None,
    unrelated: str | Path | None = None,
    output: str | Path,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Attack an unlearned model; the tables as they are printed.

    Args:
        models: functions that load "unlearned" and, where there are such, "before" and
            "reference", see `Subject`; each is called once for every use.
        forget: the rows that were unlearned, as `load_rows` takes them; a row that is there twice
            counts once. For "paraphrase" with the fields of TOFU's perturbed splits.
        retain: rows that were kept, for "relearn" and "quantize".
        unrelated: rows to relearn that have to do with neither; None takes the fictitious authors
            that come with the package, unless these are forget or retain rows.
        output: folder for the report, which must be empty or missing.
        about: names of the models, kept in the report.

    Raises:
        InputError: rows, models or the folder cannot be used. Rows and the folder are checked
            before anything is written; the figures of finished attacks are kept.
        NonFiniteError: a loss is not finite.
    """
    config = config or AttackConfig()
    folder = Path(output)
    if UNLEARNED not in models:
        raise InputError(f"models has no {UNLEARNED!r}: give the function that loads it")
    check_free(folder, RUN, resume=None)
    if "quantize" in config.attacks:
        quantize.check_installed()
    rows = _rows(forget, retain, unrelated, config)
    records = read_records(forget)
    subject = Subject(models, tokenizer, config)
    if "paraphrase" in config.attacks:
        paraphrase.check(subject, records)
    encoded = {side: subject.encode(each) for side, each in rows.items()}
    identity = {
        **asdict(config),
        "rows": {side: len(each) for side, each in rows.items()},
        **(about or {}),
    }
    with writing(folder):
        write_json(folder / RUN, identity)
        results: dict[str, Any] = {}
        for name in config.attacks:
            results[name] = _ATTACKS[name].run(subject, encoded, records)
            # After each attack, so that a later one that fails takes nothing with it.
            write_json(folder / RESULT, {**identity, **results, "environment": environment()})
        tables = {name: _ATTACKS[name].table(result) for name, result in results.items()}
        text = _markdown(tables, identity, BEFORE in models)
        replace_files({folder / REPORT: text.encode()})
        _draw(folder / PICTURE, results)
    return "\n\n".join("\n".join([f"{name}", *_aligned(each)]) for name, each in tables.items())


def _rows(
    forget: str | Path,
    retain: str | Path | None,
    unrelated: str | Path | None,
    config: AttackConfig,
) -> dict[str, list[Row]]:
    # Each once: a row that is there twice could be both relearned and measured.
    found = {"forget": list({row.key: row for row in load_rows(forget)}.values())}
    if retain is not None:
        found["retain"] = load_rows(retain)
        check_disjoint(found["forget"], found["retain"])
    if "relearn" not in config.attacks:
        return found
    if len(found["forget"]) < 2:
        raise InputError(
            "relearn takes some forget rows and measures the others: give two different ones at "
            "least, got 1"
        )
    other = load_rows(authors("retain") if unrelated is None else unrelated)
    for side, each in found.items():
        shared = {row.key for row in each} & {row.key for row in other}
        if shared:
            given = "the shipped authors" if unrelated is None else "--unrelated"
            raise InputError(
                f"{given} share {len(shared)} rows with {side}, so that they are not unrelated: "
                "give other rows as --unrelated"
            )
    return {**found, "unrelated": other}


def _markdown(
    tables: Mapping[str, Sequence[Sequence[str]]], identity: Mapping[str, Any], before: bool
) -> str:
    lines = ["# Does it stay forgotten?", ""]
    for name in ("model", "adapter", "before", "reference"):
        if identity.get(name):
            lines.append(f"- {name}: {identity[name]}")
    lines.append(f"- rows: {', '.join(f'{n} {side}' for side, n in identity['rows'].items())}")
    if not before:
        lines.append("- no model from before unlearning: what is recovered is not known")
    for name, (head, *body) in tables.items():
        lines += ["", f"## {name}", "", _SAID[name], ""]
        if name == "relearn":
            lines[-1:] = [
                f"{identity['steps']} steps of AdamW at {identity['lr']:g}, batches of "
                f"{identity['batch_size']}, {identity['weights']} weights.",
                "",
            ]
        lines.append(f"| {' | '.join(head)} |")
        lines.append(f"|{' --- |' * len(head)}")
        lines += [f"| {' | '.join(each)} |" for each in body]
    return "\n".join([*lines, "", f"![{PICTURE}]({PICTURE})", ""])


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """For the terminal: text to the left, figures to the right."""
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
    left = [not any(line[k][:1].isdigit() for line in table[1:]) for k in range(len(widths))]
    lines = [
        "  ".join(
            text.ljust(width) if to_left else text.rjust(width)
            for text, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in table
    ]
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]


def _draw(path: Path, results: Mapping[str, Any]) -> None:
    figure, (panels,) = new_figure(1, len(results), (5.6 * len(results), 4.8))
    for panel, (name, result) in zip(panels, results.items(), strict=True):
        panel.set_axisbelow(True)
        _ATTACKS[name].draw(panel, result)
    save_figure(figure, path)
