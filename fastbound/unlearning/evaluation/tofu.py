"""TOFU: questions about fictitious authors, with paraphrased and wrong answers to compare.

Maini et al. 2024, `locuslab/TOFU` on the hub. Its log has the layout of TOFU's aggregated one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbound.errors import InputError
from fastbound.unlearning import metrics
from fastbound.unlearning.data.encoding import Encoded
from fastbound.unlearning.data.records import check_split, records
from fastbound.unlearning.data.rows import Row, read_records, text_field, texts_field
from fastbound.unlearning.evaluation.benchmark import Log, Settings, Summary
from fastbound.unlearning.evaluation.membership import (
    check_texts,
    lines_of,
    score_sides,
    summary_of,
)
from fastbound.unlearning.evaluation.picture import BLUE, GREY, RED, picture
from fastbound.unlearning.evaluation.session import Session
from fastbound.unlearning.evaluation.templates import (
    encode_answer,
    encode_prompt,
    end_of_text,
    warn_of_empty_answers,
)
from fastbound.unlearning.metrics.conventions import OPEN_UNLEARNING, TOFU_CONVENTIONS
from fastbound.unlearning.metrics.sections import (
    FORGET,
    MEMBERSHIP,
    REAL_AUTHORS,
    RETAIN,
    SECTIONS,
    WORLD_FACTS,
)
from fastbound.unlearning.metrics.texts import rouge
from fastbound.unlearning.metrics.truth import forget_ratios

LOG = "eval_log_aggregated.json"
CONVENTIONS: tuple[str, ...] = TOFU_CONVENTIONS
DEFAULT_SPLIT: str | None = "forget10"

GENERATED = 200  # open-unlearning counts new tokens, TOFU's code the prompt's, too

HUB = "locuslab/TOFU"
# Each forget split with its retain split.
RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
PLAIN = (
    "full",
    *RETAIN_OF,
    *RETAIN_OF.values(),
    "holdout01",
    "holdout05",
    "holdout10",
    "real_authors",
    "world_facts",
)
AUTHORS_PERTURBED = (*(f"{split}_perturbed" for split in RETAIN_OF), "retain_perturbed")
PUBLIC_PERTURBED = ("real_authors_perturbed", "world_facts_perturbed")
SPLITS = (*PLAIN, *AUTHORS_PERTURBED, *PUBLIC_PERTURBED)


@dataclass(frozen=True)
class TofuRow(Row):
    """A question and its answer; in a perturbed split also a paraphrase and wrong answers.

    Attributes:
        paraphrased: the right answer in other words; None if the split has none.
        perturbed: wrong answers of the same form.
    """

    paraphrased: str | None = None
    perturbed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """One section's rows as tokens.

    Attributes:
        paraphrased: the paraphrased answers, or the answers themselves if there are none.
        perturbed: wrong answers, row after row.
        most: the largest number of tokens generated for each prompt.
    """

    rows: Sequence[TofuRow]
    answers: Sequence[Encoded]
    paraphrased: Sequence[Encoded] | None
    perturbed: Sequence[Encoded]
    prompts: Sequence[list[int]]
    most: Sequence[int]

    @property
    def encoded(self) -> list[Encoded]:
        return [*self.answers, *(self.paraphrased or ()), *self.perturbed]


def load(split: str, data: str | Path | None = None) -> list[TofuRow]:
    """Rows of one of `SPLITS`.

    Args:
        data: folder with `{split}.jsonl` and the like; None takes the hub.

    Raises:
        InputError: an unknown split, a missing file, or a row whose fields are not the split's.
    """
    check_split("tofu", split, SPLITS)
    rows = [
        _row(record, split, where)
        for where, record in records("tofu", split, data, f"{HUB}:{split}:train")
    ]
    if split.endswith("_perturbed"):
        wrong = len(rows[0].perturbed)
        for row in rows:
            if len(row.perturbed) != wrong:
                raise InputError(
                    f"{row.where}: field 'perturbed_answer' has {len(row.perturbed)} answers, but "
                    f"the first row has {wrong}: give each row the same number"
                )
    return rows


def load_public(source: str | Path) -> list[TofuRow]:
    """Rows of a file with wrong answers, like those of `PUBLIC_PERTURBED`. Raises `InputError`."""
    return [_row(record, PUBLIC_PERTURBED[0], where) for where, record in read_records(source)]


def _row(record: Mapping[str, Any], split: str, where: str) -> TofuRow:
    question = text_field(record, "question", where)
    answer = text_field(record, "answer", where)
    if not split.endswith("_perturbed"):
        return TofuRow(question, answer, where)
    paraphrased = None
    if split in AUTHORS_PERTURBED:
        paraphrased = text_field(record, "paraphrased_answer", where)
    return TofuRow(
        question, answer, where, paraphrased, tuple(texts_field(record, "perturbed_answer", where))
    )


@dataclass(frozen=True)
class Sections:
    """All four sections by their names in the log; `holdout` if membership is attacked."""

    parts: dict[str, Section]
    holdout: Sequence[Encoded] = ()

    @property
    def encoded(self) -> list[Encoded]:
        return [*(row for part in self.parts.values() for row in part.encoded), *self.holdout]

    @property
    def continued(self) -> list[tuple[Encoded, int]]:
        return [
            (Encoded(tuple(prompt), (), row.where), most)
            for part in self.parts.values()
            for row, prompt, most in zip(part.rows, part.prompts, part.most, strict=True)
        ]


def prepare(settings: Settings, tokenizer: Any) -> Sections:
    """All four sections, each with at most `settings.rows` rows; TOFU's own code uses 300.

    Raises:
        InputError: the split is not "forget01", "forget05" or "forget10", or as for `load`.
    """
    split, family = str(settings.split), settings.template
    convention = str(settings.convention)
    check_split("tofu --split", split, tuple(RETAIN_OF))
    splits = {
        RETAIN: "retain_perturbed",
        REAL_AUTHORS: "real_authors_perturbed",
        WORLD_FACTS: "world_facts_perturbed",
        FORGET: f"{split}_perturbed",
    }

    def encode(row: TofuRow, answer: str) -> Encoded:
        return encode_answer(
            row.question or "", answer, row.where, tokenizer, family=family, convention=convention
        )

    sections = {}
    for section, name in splits.items():
        rows = load(name, settings.data)[: settings.rows]
        reworded = [encode(row, row.paraphrased) for row in rows if row.paraphrased is not None]
        prompts = [
            encode_prompt(row.question or "", tokenizer, family=family, convention=convention)
            for row in rows
        ]
        part = sections[section] = Section(
            rows,
            [encode(row, row.answer) for row in rows],
            reworded or None,
            [encode(row, wrong) for row in rows for wrong in row.perturbed],
            prompts,
            [
                GENERATED if convention == OPEN_UNLEARNING else max(1, GENERATED - len(prompt))
                for prompt in prompts
            ],
        )
        warn_of_empty_answers(name, part.encoded, end_of_text(tokenizer))
    if not settings.membership:
        return Sections(sections)
    unseen = load(split.replace("forget", "holdout"), settings.data)[: settings.rows]
    holdout = [encode(row, row.answer) for row in unseen]
    check_texts([*sections[FORGET].answers, *holdout])
    return Sections(sections, holdout)


def compared(retain: Log, prepared: Sections) -> dict[str, tuple[int, int]]:
    """The numbers of forget rows. Raises InputError for a log of other questions."""
    rows = prepared.parts[FORGET].rows
    theirs = forget_ratios(retain, name="retain log")
    asked = retain[FORGET].get("generated_text")
    if isinstance(asked, Sequence) and len(asked) == len(rows):
        for number, (row, (question, *_)) in enumerate(zip(rows, asked, strict=True), start=1):
            if (row.question or "") not in str(question):  # TOFU's own logs hold the whole prompt
                raise InputError(
                    f"row {number} of the retain log asks {str(question)[:80]!r}, and here "
                    f"{str(row.question)[:80]!r}: make it with the same --split and --data"
                )
    return {FORGET: (len(theirs), len(rows))}


def score(session: Session, prepared: Sections, settings: Settings) -> dict[str, Any]:
    """TOFU's aggregated log: losses, tokens, ROUGE and text per row, with EM and ES added."""
    log: dict[str, Any] = {}
    for section, part in prepared.parts.items():
        name = SECTIONS[section]
        answers = session.answers(f"{name} answers", part.answers)
        reworded = answers
        if part.paraphrased is not None:
            reworded = session.answers(f"{name} paraphrased", part.paraphrased)
        flat = iter(session.answers(f"{name} wrong", part.perturbed))
        wrong = [[next(flat) for _ in row.perturbed] for row in part.rows]
        texts = session.texts(f"{name} texts", part.prompts, part.most)
        scores = [rouge(row.answer, text) for row, text in zip(part.rows, texts, strict=True)]
        log[section] = {
            "avg_gt_loss": [each["loss"] for each in answers],
            "num_token_gt": [each["tokens"] for each in answers],
            "average_perturb_loss": [[each["loss"] for each in row] for row in wrong],
            "num_token_perturb": [[each["tokens"] for each in row] for row in wrong],
            "avg_paraphrased_loss": [each["loss"] for each in reworded],
            "num_token_paraphrased": [each["tokens"] for each in reworded],
            "rouge1_recall": [each.rouge1_recall for each in scores],
            "rougeL_recall": [each.rougeL_recall for each in scores],
            "exact_memorisation": [each["exact_memorisation"] for each in answers],
            "extraction_strength": [each["extraction_strength"] for each in answers],
            "generated_text": [
                [row.question, text, row.answer] for row, text in zip(part.rows, texts, strict=True)
            ],
        }
    if settings.membership:
        sides = {"forget": prepared.parts[FORGET].answers, "holdout": prepared.holdout}
        log[MEMBERSHIP] = score_sides(session, sides, settings.membership, OPEN_UNLEARNING)
    return log


def summarise(log: Log, retain: Log | None, settings: Settings) -> Summary:
    """Section scores, model utility, and forget quality if a retain log is given."""
    convention = str(settings.convention)
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
        "membership": summary_of(log, retain, OPEN_UNLEARNING),
    }


def table(summary: Summary) -> list[str]:
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
    lines += lines_of(summary["membership"], OPEN_UNLEARNING)
    lines.append("EM, ES          exact memorisation, extraction strength")
    return [*lines, f"convention      {summary['convention']}"]


def draw(path: Path, log: Log, retain: Log | None, summary: Summary) -> None:
    """The scores of each section, and the distribution of the forget rows' truth ratio."""
    with picture(path) as (bars, curve):
        names = list(summary["sections"])
        for place, part in enumerate(("probability", "rouge", "truth_ratio")):
            heights = [summary["sections"][name][part] for name in names]
            bars.bar(
                np.arange(len(names)) + (place - 1) * 0.26,
                heights,
                0.24,
                color=(BLUE, RED, GREY)[place],
                label=part.replace("_", " ").replace("rouge", "ROUGE-L"),
            )
        bars.set_xticks(range(len(names)), names)
        bars.set_ylim(0, 1)
        bars.set_title("Scores")
        bars.legend(fontsize="small")
        for each, label, colour in ((log, "this model", BLUE), (retain, "retain model", GREY)):
            if each is not None:
                ratio = forget_ratios(each, convention=summary["convention"])
                curve.ecdf(ratio, color=colour, label=label)
        curve.set_title("Truth ratio of forget rows")
        curve.set_xlabel("truth ratio")
        curve.set_ylabel("share of rows up to it")
        curve.legend(loc="lower right", fontsize="small")
