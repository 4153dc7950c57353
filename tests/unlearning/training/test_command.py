"""`fastbound unlearn`: what it writes and prints, and one line for what it cannot do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastbound.cli import main
from fastbound.unlearning.losses.objective import Objective
from tests.support.arguments import replaced


@pytest.fixture
def arguments(model_folder, write_rows, forget_rows, retain_rows, tmp_path) -> list[str]:
    """A short run on the tiny model, into tmp_path/run."""
    settings = "--epochs 3 --batch-size 3 --rank 2 --lr 1e-2 --log-every 1 --device cpu"
    return [
        "unlearn",
        *("--model", str(model_folder), "--output", str(tmp_path / "run")),
        *("--forget", str(write_rows("f.jsonl", forget_rows))),
        *("--retain", str(write_rows("r.jsonl", retain_rows))),
        *settings.split(),
    ]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of error, after checking that it is all that was said."""
    status = main(arguments)
    said = capsys.readouterr()
    assert status == 2
    assert said.err.startswith("error: ") and "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_writes_adapter_report_and_picture(arguments, tmp_path, capsys, adapter):
    assert main(replaced(arguments, "--adapter", adapter)) == 0
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    (only,) = report["runs"]
    assert only["config"]["adapter"] == adapter and only["config"]["rank"] == 2
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith(adapter))
    last = only["history"][-1]
    assert f"{last['forget']['loss']:.3f}" in row and f"{last['retain']['accuracy']:.1%}" in row
    assert f"{only['largest_delta']:.3g}" in row
    assert ("none" in row) == (adapter == "lora")


def test_flags_reach_the_run(arguments, tmp_path):
    flags = (
        "--alpha 4 --bound 0.05 --warmup 0.5 --clip 1 --accumulation 2 --seed 7 --max-length 99 "
        "--forget-weight 0.5 --retain-weight 2 --weight-decay 0.01 --eval-every 2 --eval-rows 4 "
        "--checkpoint-every 2 --forget-target 90 --retain-limit 90 --dtype bfloat16 "
        "--gradient-checkpointing --target-modules up_proj,down_proj"
    )
    assert main(replaced(arguments, *flags.split())) == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    words = flags.replace(" --gradient-checkpointing", "").split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        found = config[flag[2:].replace("-", "_")]
        expected = value.split(",") if "," in value else value
        assert found == (type(found)(expected) if isinstance(found, (int, float)) else expected)
    assert config["gradient_checkpointing"] is True


def test_bound_alpha_is_the_literal_formula(arguments, tmp_path):
    assert main(replaced(arguments, "--alpha", "3", "--bound", "alpha")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["runs"][0]["bound"] == 3.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rank 0", "rank must be an integer >= 1, got 0"),
        ("--alpha -2", "alpha must be positive and finite, got -2.0"),
        ("--bound nan", "bound must be positive and finite, got nan"),
        (
            "--bound wide",
            'a positive multiple such as "0.5*spectral" or "2*rms", got',
        ),
        ("--adapter lora --bound 0.1", "--bound belongs to the bounded adapter, and LoRA has none"),
        ("--adapter dora", "adapter must be one of bounded, lora; got 'dora'"),
        ("--device tpu", "device must be one of auto, cpu, cuda; got 'tpu'"),
        ("--target-modules up_porj,", "up_porj"),
        ("--max-length 8", "max_length: raise it to"),
        ("--forget nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("--model no/such-model", "model 'no/such-model': there is no such folder"),
        ("--quick", "--quick"),
        ("--template {question}", "template must hold {question} and {answer} once each"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(arguments, tmp_path, capsys, flags, message):
    assert message in refused(replaced(arguments, *flags.split()), capsys)
    assert not (tmp_path / "run").exists()


def test_malformed_row_is_named(arguments, write_rows, tmp_path, capsys):
    rows = [{"question": "Q?", "answer": "A."}, {"question": "Q?"}]
    path = write_rows("bad.jsonl", rows)
    said = refused(replaced(arguments, "--retain", str(path)), capsys)
    assert said == f"error: {path}, row 2: field 'answer' is missing; found 'question'\n"


def test_rows_on_both_sides_are_refused(arguments, tmp_path, capsys):
    said = refused(replaced(arguments, "--retain", str(tmp_path / "f.jsonl")), capsys)
    assert "forget and retain share 6 rows" in said


def test_one_side_alone_is_refused(arguments, capsys):
    at = arguments.index("--retain")
    assert "--retain is missing" in refused(arguments[:at] + arguments[at + 2 :], capsys)


def test_folder_of_another_run_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "--resume (resume=True), or give another folder" in refused(arguments, capsys)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_non_finite_loss_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    honest = Objective.__call__

    def spoiled(*args, **kwargs):
        result = honest(*args, **kwargs)
        return result._replace(forget=result.loss / 0)

    monkeypatch.setattr(Objective, "__call__", spoiled)
    assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: step 1 of 6 is not finite") and "Try a lower lr" in said
    assert (tmp_path / "run" / "checkpoint.pt").is_file()


def test_the_config_of_a_run_repeats_it(arguments, tmp_path):
    flags = (
        "--bound alpha --alpha 3 --all-steps --loss npo=1,beta=0.2 --loss retain=2 "
        "--target-modules up_proj, --gradient-checkpointing"
    )
    assert main([*arguments, *flags.split()]) == 0
    kept = (tmp_path / "run" / "config.yaml").read_text()
    again = ["unlearn", "--config", str(tmp_path / "run" / "config.yaml")]
    assert main([*again, "--output", str(tmp_path / "again")]) == 0
    for name in ("run.json", "config.yaml", "adapter/adapter_model.safetensors"):
        first, second = (tmp_path / each / name for each in ("run", "again"))
        assert first.read_bytes() == second.read_bytes(), name
    # What was not given stands there too, so that a later default changes nothing.
    assert {"seed: 0", "warmup: 0.1", "bound: alpha", "target-modules: up_proj,"} <= {
        *kept.splitlines()
    }
    assert "output" not in kept.split("ANOTHER_FOLDER")[1] and "resume" not in kept


def test_the_config_of_a_lora_run_repeats_it(arguments, tmp_path):
    assert main([*arguments, "--adapter", "lora"]) == 0
    config = str(tmp_path / "run" / "config.yaml")
    assert main(["unlearn", "--config", config, "--output", str(tmp_path / "again")]) == 0
    first, second = (tmp_path / each / "run.json" for each in ("run", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_reads_real_rows(arguments, model_folder, data_folder: Path, tmp_path):
    tofu = data_folder / "tofu"
    shutil.copytree(model_folder, tmp_path / "model")  # with positions for the longest of them
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["max_position_embeddings"] = 512
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    arguments = replaced(arguments, "--model", str(tmp_path / "model"))
    flags = ["--forget", str(tofu / "forget01.jsonl"), "--retain", str(tofu / "retain.jsonl")]
    assert main(replaced(arguments, *flags, "--max-length", "512", "--epochs", "0.1")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["about"]["rows"] == {"forget": 40, "retain": 300}
