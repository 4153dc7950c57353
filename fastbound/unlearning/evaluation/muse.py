"""MUSE: news articles or books to forget, with questions, verbatim passages and held-out text.

Shi et al. 2024, `muse-bench/MUSE-News` and `muse-bench/MUSE-Books` on the hub. A split of rows is
`corpus/config/split`, for example `news/verbmem/forget`; an evaluation takes one whole corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbound.errors import InputError, one_of
from fastbound.unlearning import metrics
from fastbound.unlearning.data.encoding import IGNORED, Encoded, beginning
from fastbound.unlearning.data.files import SUFFIXES, read_text
from fastbound.unlearning.data.records import Records, check_split, file_of
from fastbound.unlearning.data.rows import Row, read_records, text_field
from fastbound.unlearning.evaluation.benchmark import Log, Settings, Summary
from fastbound.unlearning.evaluation.generation import until
from fastbound.unlearning.evaluation.membership import lines_of, score_sides, summary_of
from fastbound.unlearning.evaluation.picture import BLUE, GREY, RED, picture
from fastbound.unlearning.evaluation.session import Session
from fastbound.unlearning.evaluation.templates import end_of_text
from fastbound.unlearning.metrics.conventions import MUSE, MUSE_CONVENTIONS
from fastbound.unlearning.metrics.logs import column
from fastbound.unlearning.metrics.sections import MEMBERSHIP
from fastbound.unlearning.metrics.texts import rouge
from fastbound.unlearning.metrics.truth import warn_same_model

LOG = "muse_log.json"
CONVENTIONS: tuple[str, ...] = MUSE_CONVENTIONS
DEFAULT_SPLIT: str | None = "news"

VERBATIM_TOKENS = 128
ANSWER_TOKENS = 32
MAX_LENGTH = 2048
K = 0.4
# An answer ends where the model continues with a question of its own.
_STOPS = ("\n\n", "\nQuestion", "Question:")

HUB = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
CORPORA = tuple(HUB)
_SUCCESSIVE = tuple(f"forget_{number}" for number in range(1, 5))
# Config -> its splits; the last two exist for news only.
CONFIGS: Mapping[str, tuple[str, ...]] = {
    "raw": ("forget", "retain1", "retain2", "holdout"),
    "verbmem": ("forget",),
    "knowmem": ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl"),
    "privleak": ("forget", "retain", "holdout"),
    "scal": _SUCCESSIVE,
    "sust": _SUCCESSIVE,
}
SPLITS = tuple(
    f"{corpus}/{config}/{split}"
    for corpus in CORPORA
    for config, splits in CONFIGS.items()
    if corpus == "news" or config not in ("scal", "sust")
    for split in splits
)


@dataclass(frozen=True)
class Prompted:
    """Prompts, and the continuations that a model which remembers them generates."""

    prompts: Sequence[Encoded]
    expected: Sequence[str]
    most: int
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """All inputs of the model."""

    prompted: dict[str, Prompted]
    texts: dict[str, Sequence[Encoded]]

    @property
    def encoded(self) -> list[Encoded]:
        asked = (prompt for prompt, _ in self.continued)
        return [*asked, *(row for rows in self.texts.values() for row in rows)]

    @property
    def continued(self) -> list[tuple[Encoded, int]]:
        return [(prompt, part.most) for part in self.prompted.values() for prompt in part.prompts]


def load(split: str, data: str | Path | None = None) -> list[Row]:
    """Rows of one of `SPLITS`: question and answer, prompt and its true continuation, or text.

    A verbatim row has its prompt as `question` and its continuation (`gt`) as `answer`.

    Args:
        data: folder of one corpus, or one that holds `news` and `books`, with `config/split.jsonl`
            and the like, or MUSE's own files: arrays in `config/split.json`, `raw/split.txt`. A
            .txt file is one row, because nothing in it marks the end of a text. None means the hub.

    Raises:
        InputError: an unknown split, a missing file, or a row without the split's fields.
    """
    check_split("muse", split, SPLITS)
    corpus, config, name = split.split("/")
    if data is None:
        found = read_records(f"{HUB[corpus]}:{config}:{name}")
    else:
        found = _of_folder(Path(data), corpus, f"{config}/{name}")
    return [_row(record, config, where) for where, record in found]


def _of_folder(folder: Path, corpus: str, split: str) -> Records:
    if (folder / corpus).is_dir():
        folder = folder / corpus
    path = file_of("muse", split, folder, (*SUFFIXES, ".txt"))
    if path.suffix == ".txt":
        return [(str(path), {"text": read_text(path)})]
    return read_records(path)


def _row(record: Mapping[str, Any], config: str, where: str) -> Row:
    if config == "knowmem":
        question = text_field(record, "question", where)
        return Row(question, text_field(record, "answer", where), where)
    if config == "verbmem":
        prompt = text_field(record, "prompt", where)
        return Row(prompt, text_field(record, "gt", where), where)
    return Row(None, text_field(record, "text", where), where)


def prepare(settings: Settings, tokenizer: Any) -> Prepared:
    """All parts of one corpus, "news" or "books"."""
    corpus = str(settings.split)
    one_of("muse --split", corpus, tuple(CORPORA))
    end_of_text(tokenizer)

    def rows_of(split: str) -> list[Row]:
        return load(f"{corpus}/{split}", settings.data)[: settings.rows]

    verbatim = rows_of("verbmem/forget")
    expected = [row.answer for row in verbatim]
    if settings.convention == MUSE:
        expected = [_first(tokenizer, text, VERBATIM_TOKENS) for text in expected]
    prompted = {
        "forget_verbmem": Prompted(
            [_prompt(row, row.question or "", tokenizer) for row in verbatim],
            expected,
            VERBATIM_TOKENS,
        )
    }
    for side in ("forget", "retain"):
        rows = rows_of(f"knowmem/{side}_qa")
        shown = load(f"{corpus}/knowmem/{side}_qa_icl", settings.data)  # however many are asked
        examples = "".join(f"Question: {r.question}\nAnswer: {r.answer}\n\n" for r in shown)
        prompted[f"{side}_knowmem"] = Prompted(
            [_prompt(r, f"{examples}Question: {r.question}\nAnswer: ", tokenizer) for r in rows],
            [row.answer for row in rows],
            ANSWER_TOKENS,
            _STOPS,
        )
    texts: dict[str, Sequence[Encoded]] = {
        side: [_text(row, tokenizer) for row in rows_of(f"privleak/{side}")]
        for side in ("forget", "holdout")
    }
    return Prepared(prompted, texts)


def compared(retain: Log, prepared: Prepared) -> dict[str, tuple[int, int]]:
    """The numbers of texts whose membership is attacked."""
    return {
        f"privleak, {side}": (len(scores), len(prepared.texts[side]))
        for side, scores in membership_scores(retain, "retain log").items()
    }


def score(session: Session, prepared: Prepared, settings: Settings) -> dict[str, Any]:
    """A log: ROUGE-L F1 and text for each prompt, and a Min-40 % score for each text."""
    convention = str(settings.convention)
    log: dict[str, Any] = {}
    for name, part in prepared.prompted.items():
        texts = session.texts(
            name, [prompt.ids for prompt in part.prompts], [part.most] * len(part.prompts)
        )
        texts = [until(text, part.stops) for text in texts]
        log[name] = {
            "rougeL_f1": [
                rouge(expected, text, stemmer=convention != MUSE).rougeL_f1
                for expected, text in zip(part.expected, texts, strict=True)
            ],
            "generated_text": [list(pair) for pair in zip(texts, part.expected, strict=True)],
        }
    log["privleak"] = {
        side: session.attacks(f"privleak {side}", rows, k=K, convention=convention)
        for side, rows in prepared.texts.items()
    }
    if settings.membership:
        log[MEMBERSHIP] = score_sides(session, prepared.texts, settings.membership, convention)
    return log


def membership_scores(log: Mapping[str, Any], name: str) -> dict[str, list[float]]:
    """The Min-40 % scores of the forget and the holdout texts in MUSE's log.

    Raises:
        InputError: one of the two is missing, empty, or has a value that is not a finite number.
    """
    scores = {side: column(log, "privleak", side, name) for side in ("forget", "holdout")}
    for side, values in scores.items():
        if values.ndim != 1:
            raise InputError(f"{name}, privleak, {side}: needs one number per row, got lists")
    return {side: values.tolist() for side, values in scores.items()}


def summarise(log: Log, retain: Log | None, settings: Settings) -> Summary:
    """Means of the memorisation scores, AUC and PrivLeak."""
    convention, corpus = str(settings.convention), str(settings.split)
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
        reference, source = 0.5, "chance, as there is no --retain-log"
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
        "membership": summary_of(log, retain, convention),
    }


def table(summary: Summary) -> list[str]:
    return [
        f"VerbMem on forget   {summary['forget_verbmem']:.4f}   ROUGE-L F1",
        f"KnowMem on forget   {summary['forget_knowmem']:.4f}   ROUGE-L F1",
        f"KnowMem on retain   {summary['retain_knowmem']:.4f}   ROUGE-L F1",
        f"PrivLeak           {summary['privleak']:7.2f}   AUC {summary['auc']:.4f}, reference "
        f"{summary['reference_auc']:.4f} ({summary['reference']})",
        *lines_of(summary["membership"], summary["convention"]),
        f"convention          {summary['convention']} (AUC is "
        + (
            "low where the forget set is known)"
            if summary["convention"] == MUSE
            else "high where the forget set is known)"
        ),
    ]


def draw(path: Path, log: Log, retain: Log | None, summary: Summary) -> None:
    """The memorisation scores, and Min-40 % of forget and holdout texts."""
    with picture(path) as (bars, curve):
        names = ("forget_verbmem", "forget_knowmem", "retain_knowmem")
        labels = ("VerbMem, forget", "KnowMem, forget", "KnowMem, retain")
        bars.bar(labels, [summary[name] for name in names], 0.5, color=(RED, RED, BLUE))
        bars.set_ylim(0, 1)
        bars.set_title("ROUGE-L F1")
        for side, colour in (("forget", RED), ("holdout", GREY)):
            curve.ecdf(log["privleak"][side], color=colour, label=side)
        curve.set_title(f"Min-40 %, PrivLeak {summary['privleak']:.1f}")
        curve.set_xlabel("score, nats per token (low: known)")
        curve.set_ylabel("share of texts up to it")
        curve.legend(loc="lower right", fontsize="small")


def _prompt(row: Row, text: str, tokenizer: Any) -> Encoded:
    return Encoded(tuple(_ids(tokenizer, text)), (), row.where)


def _ids(tokenizer: Any, text: str) -> list[int]:
    text = beginning(text, tokenizer, MAX_LENGTH)
    return list(tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"])


def _first(tokenizer: Any, text: str, tokens: int) -> str:
    text = beginning(text, tokenizer, tokens)
    ids = tokenizer(text)["input_ids"][:tokens]  # a token before the text counts, as in MUSE's code
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _text(row: Row, tokenizer: Any) -> Encoded:
    ids = _ids(tokenizer, row.answer)
    if len(ids) < 4:  # of three labelled tokens, 40 % is one
        raise InputError(f"{row.where}: a text of {len(ids)} tokens has too few to score")
    return Encoded(tuple(ids), (IGNORED, *ids[1:]), row.where)
