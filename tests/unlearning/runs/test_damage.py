"""Files of a run that are damaged: named with the remedy, or cut back to what is sound."""

from __future__ import annotations

import json
import random
import warnings

import pytest
import torch

from fastbound.cli import main
from fastbound.errors import DamageWarning, InputError
from fastbound.unlearning import command
from fastbound.unlearning.data.rows import RepeatedRowsWarning
from fastbound.unlearning.evaluation.templates import EmptyAnswerWarning
from fastbound.unlearning.runs.folder import LOG, RunFolder
from fastbound.unlearning.runs.identity import digest
from fastbound.unlearning.runs.lines import CheckedLines
from fastbound.unlearning.training.ending import ForgottenWarning
from tests.support.arguments import replaced


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A run with three lines of log and a checkpoint that counts on two of them."""
    made = RunFolder(tmp_path / "run", {"steps": 4}, resume=False)
    made.begin()
    for step in (1, 2):
        made.log({"event": "step", "step": step})
    made.save_checkpoint({"step": 2, "adapter": {"A": torch.arange(600.0)}})
    made.log({"event": "step", "step": 3})
    return made


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder.path / LOG).read_text().splitlines()]


def test_the_log_is_cut_back_to_what_the_checkpoint_counts_on(folder):
    state = folder.load_checkpoint()
    assert state is not None and state["step"] == 2 and steps(folder) == [1, 2]


@pytest.mark.parametrize(
    ("held", "given", "said"),
    [
        ({"rows": None, "losses": {"npo": 1.0, "retain": 1.0}}, {"rows": None}, "losses.npo 1.0"),
        ({"losses": {"npo": 1.0, "retain": 1.0}}, {"losses": {"npo": 1.0}}, "losses.retain 1.0"),
        ({"losses": {"npo": 1.0}}, {"losses": None}, "losses.npo 1.0, this one has None"),
        ({"membership": ["loss"]}, {}, r"membership \['loss'\], this one has None"),
        ({}, {"membership": ["loss"]}, r"membership None, this one has \['loss'\]"),
        (
            {"losses": {"npo": 1.0, "retain": 1.0}},
            {"losses": {"retain": 1.0, "npo": 1.0}},
            "the same settings in another order",
        ),
    ],
)
def test_a_setting_that_only_one_of_two_runs_has_is_named(tmp_path, held, given, said):
    RunFolder(tmp_path, held, resume=False).begin()
    with pytest.raises(InputError, match=said):
        RunFolder(tmp_path, given, resume=True)
    RunFolder(tmp_path, held, resume=True)


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit_of_a_checkpoint_never_changes_what_is_read(folder, seed):
    whole = folder.load_checkpoint()
    path = folder.path / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    bit = random.Random(seed).randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
        state = folder.load_checkpoint()
    except InputError as error:
        assert "checkpoint.pt is damaged: put a sound copy back, or delete it" in str(error)
    else:  # the bit was of padding or of the container alone
        assert digest(state) == digest(whole)


@pytest.mark.parametrize(
    ("log", "kept"),
    [
        (b"", []),
        (b'{"event": "step", "step": 1}\n', [1]),
        (b'{"event": "step", "step": 1}\n' + 30 * b"\0", [1]),
        (60 * b"\0", []),
        (b'{"event": "step", "step": 1}\n{"event": "st', [1]),
        (b'{"event": "step", "step": 1}\nnonsense of the same length.\n', [1]),
    ],
)
def test_a_log_shorter_than_its_checkpoint_or_full_of_nul_is_cut_back_and_said(folder, log, kept):
    (folder.path / LOG).write_bytes(log)
    with pytest.warns(DamageWarning, match="not the log that the checkpoint relies on"):
        folder.load_checkpoint()
    assert steps(folder) == kept


def test_a_checkpoint_of_another_run_is_refused(folder, tmp_path):
    other = RunFolder(tmp_path / "other", {"steps": 5}, resume=False)
    other.begin()
    (other.path / "checkpoint.pt").write_bytes((folder.path / "checkpoint.pt").read_bytes())
    with pytest.raises(InputError, match="checkpoint of another run: put this run's own back"):
        other.load_checkpoint()


@pytest.mark.parametrize("damage", ["{", "[]", "null", '"x"', "[" * 100_000, "\udcff"])
def test_run_json_of_every_kind_of_damage_is_named(folder, damage):
    (folder.path / "run.json").write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"run\.json (cannot be read|holds no JSON object)"):
        RunFolder(folder.path, {"steps": 4}, resume=True)


def test_ranks_that_were_edited_are_refused(folder):
    folder.keep("ranks.json", {"ranks": {"a": 2}})
    assert folder.kept("ranks.json") == {"ranks": {"a": 2}}
    path = folder.path / "ranks.json"
    path.write_text(path.read_text().replace("2", "3"))
    with pytest.raises(InputError, match=r"ranks\.json is damaged: put a sound copy back"):
        folder.kept("ranks.json")


def test_lines_that_are_damaged_or_of_another_run_are_left_out_and_said(tmp_path):
    path = tmp_path / "cells.jsonl"
    for run, value in (("one", 1), ("two", 2), ("one", 3)):
        CheckedLines(path, run).add({"value": value})
    with pytest.warns(DamageWarning, match="line 2: damaged or of another run"):
        assert CheckedLines(path, "one").read() == [{"value": 1}, {"value": 3}]
    path.write_bytes(path.read_bytes().replace(b'"value": 3', b'"value": 4'))
    with pytest.warns(DamageWarning, match="line 2"):
        assert CheckedLines(path, "one").read() == [{"value": 1}]
    with path.open("ab") as file:  # killed while writing: nobody needs to hear of it
        file.write(b'{"val')
    assert CheckedLines(path, "one").read() == [{"value": 1}]


@pytest.fixture
def arguments(model_folder, write_rows, forget_rows, retain_rows, tmp_path) -> list[str]:
    return [
        *("unlearn", "--model", str(model_folder), "--output", str(tmp_path / "run")),
        *("--forget", str(write_rows("f.jsonl", forget_rows))),
        *("--retain", str(write_rows("r.jsonl", retain_rows))),
        *["--epochs", "1", "--batch-size", "6", "--rank", "2", "--device", "cpu"],
    ]


def test_resuming_on_another_base_is_refused_by_what_differs(
    arguments, new_model, tokenizer, tmp_path, capsys
):
    assert main(arguments) == 0
    other = new_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    again = replaced(arguments, "--model", str(tmp_path / "other"))
    capsys.readouterr()
    assert main([*again, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "digests.weights" in said and "give the one that the run began with" in said
    assert main([*arguments, "--resume"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--forget", ""], "--forget: is empty"),
        (["--output", " "], "--output: is empty"),
        (["--model", ""], "--model: is empty"),
        (["--forget-weight", "0", "--retain-weight", "0"], "every weight is 0"),
        (["--loss", "npo=1", "--loss", "npo=3"], "--loss names a loss twice"),
        (["--loss", "npo=0"], "every weight is 0"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--lr", "nan"], 'lr, unless "auto", must be positive'),
        (["--retain-slack", "-1"], "retain_slack must be >= 0"),
    ],
)
def test_options_that_ask_for_nothing_are_refused(arguments, flags, message, tmp_path, capsys):
    try:
        status = main(replaced(arguments, *flags))
    except SystemExit as error:  # argparse's own
        status = error.code
    said = capsys.readouterr().err
    assert status == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind", [DamageWarning, RepeatedRowsWarning, EmptyAnswerWarning, ForgottenWarning]
)
def test_a_warning_of_our_own_is_one_line(arguments, monkeypatch, kind):
    said = []

    def load(*given, **named):
        said.append(warnings.formatwarning(kind("it is so"), kind, "file.py", 3))
        raise InputError("stopped here")

    monkeypatch.setattr(command, "load_rows", load)
    assert main(arguments) == 2
    assert said == ["warning: it is so\n"]


def test_an_option_given_twice_is_said(arguments, capsys):
    assert main([*arguments, "--rank", "3"]) == 0
    assert "--rank is given twice: 3 takes the place of 2" in capsys.readouterr().err


def test_scores_of_an_earlier_adapter_are_not_taken_for_a_new_ones(
    arguments, evaluate_arguments, tmp_path, capsys
):
    scores = tmp_path / "scores"
    adapter = ("--adapter", str(tmp_path / "run" / "adapter"), "--rows", "1")
    assert main(arguments) == 0
    assert main(evaluate_arguments("tofu", scores, *adapter)) == 0
    assert main(evaluate_arguments("tofu", scores, *adapter, "--resume")) == 0
    (tmp_path / "run").rename(tmp_path / "old")
    assert main(replaced(arguments, "--lr", "0.5")) == 0
    capsys.readouterr()
    assert main(evaluate_arguments("tofu", scores, *adapter, "--resume")) == 2
    assert "digests.weights" in capsys.readouterr().err
