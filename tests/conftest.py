"""What every test stands on: the interpreter without a GPU, no network, the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Before anything imports triton, which reads it once: kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read when transformers and datasets are imported: no test may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data: FASTBOUND_DATA, or ../shared/data beside the checkout."""
    named = os.environ.get("FASTBOUND_DATA")
    if named is not None:
        folder = Path(named)
        if not folder.is_dir():
            pytest.fail(f"FASTBOUND_DATA={named} is not a folder: point it at the data or unset it")
        return folder
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data is not here: set FASTBOUND_DATA to its folder")
    return folder
