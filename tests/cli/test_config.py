"""`--config`: a file gives options as the command line would, and every run writes its own."""

from __future__ import annotations

import json

import pytest

from fastbound.cli import main, parse
from fastbound.errors import InputError


def options(tmp_path, text: str, *more: str, command: str = "unlearn"):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse([command, "--config", str(path), *more])


def test_a_file_gives_options_under_the_names_of_the_flags(tmp_path):
    text = (
        "rank: 4\nlr: 1e-2  # YAML alone reads this as text\nbound: 0.5*spectral\nshard: true\n"
        "all_steps: true\nquick: false\ntarget-modules: [up_proj, down_proj]\n"
        "loss: ['npo=1,beta=0.2', retain]\n"
    )
    found = options(tmp_path, text)
    assert (found.rank, found.lr, found.bound) == (4, 0.01, "0.5*spectral")
    assert found.shard is True and found.early_stop is False and found.quick is False
    assert found.target_modules == "up_proj,down_proj"
    assert found.losses == ["npo=1,beta=0.2", "retain"]
    assert found.alpha is None and found.output == "unlearned"
    assert {"rank", "early_stop"} <= found.given and "quick" not in found.given


def test_json_is_read_alike(tmp_path):
    found = options(tmp_path, json.dumps({"rank": "auto", "lr": 0.5, "loss": ["retain=2"]}))
    assert (found.rank, found.lr, found.losses) == ("auto", 0.5, ["retain=2"])


def test_the_command_line_overrides_the_file(tmp_path, capsys):
    text = "rank: 4\nlr: 0.1\nloss: [npo]\n"
    found = options(tmp_path, text, "--rank", "2", "--loss", "retain")
    assert (found.rank, found.lr, found.losses) == (2, 0.1, ["retain"])
    assert not capsys.readouterr().err


def test_a_file_can_give_what_is_required(tmp_path):
    found = options(tmp_path, "model: m\noutput: o\n", command="evaluate")
    assert (found.model, found.output) == ("m", "o")


def test_an_empty_file_changes_nothing(tmp_path):
    assert options(tmp_path, "# nothing\n").rank is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lr: 0.1\nrnak: 4\n",
            "line 2: fastbound unlearn has no option 'rnak': did you mean rank?",
        ),
        ("config: other.yaml\n", "line 1: fastbound unlearn has no option 'config'"),
        ("rank: 4\nrank: 5\n", "line 2: rank is given twice, first in "),
        ("eval-rows: 4\neval_rows: 5\n", "line 2: eval_rows is given twice, first in "),
        ("rank: many\n", "line 1: rank: 'many' is neither a whole number nor auto"),
        (
            "forget_ceiling: high\n",
            "line 1: forget_ceiling: 'high' is neither a number nor auto nor none",
        ),
        ("lr: fast\n", "line 1: lr: 'fast' is neither a number nor auto"),
        ("seed: 1.5\n", "line 1: seed: invalid int value: '1.5'"),
        ("lr:\n", "line 1: lr has no value: give one, or leave the line out"),
        ("model: ''\n", "line 1: model: is empty: give a value, or leave it out"),
        ("loss: []\n", "line 1: loss has no value"),
        ("loss: {npo: 1}\n", "line 1: an option takes a value or a list of values"),
        ("quick: perhaps\n", "line 1: quick takes true or false, got 'perhaps'"),
        ("- rank\n", "must be one option per line, such as 'rank: 8'"),
        ("rank: [\n", "line 2 is not YAML"),
        ("rank: 8\n  lr: 3\n", "line 2 is not YAML"),
        ("!!python/object/apply:os.system ['true']\n", "must be one option per line"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        options(tmp_path, text)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path, capsys):
    assert main(["unlearn", "--config", "nowhere.yaml"]) == 2
    assert "config nowhere.yaml does not exist" in capsys.readouterr().err
    assert main(["unlearn", "--config", str(tmp_path)]) == 2
    assert "cannot be read: Is a directory" in capsys.readouterr().err
    (tmp_path / "bytes.yaml").write_bytes(b"rank: \xff")
    assert main(["unlearn", "--config", str(tmp_path / "bytes.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
