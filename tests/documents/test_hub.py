"""`.ci/hub.py`: the layout of Hugging Face's `kernels`, loaded from another place as it does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastbound

USE = """
import sys
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Build

folder = Path(sys.argv[1])
print(Build.open(folder).general)
operator = get_local_kernel(folder)
import torch
y = operator.bounded_linear(
    torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 1), scaling=1.0, omega=1.0
)
print(y.item(), "fastbound" in sys.modules)
"""


def load(path: Path, name: str) -> ModuleType:
    """The package at a path under a name of the caller's, and its `__init__.py` run."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script(repository) -> ModuleType:
    return load(repository / ".ci" / "hub.py", "hub_script")


@pytest.fixture(scope="module")
def layout(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    script.write(folder, 3)
    return folder


@pytest.fixture(scope="module")
def loaded(layout) -> ModuleType:
    """What `kernels` makes of the build for the CPU: its id is the module's name."""
    variant = layout / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    return load(variant / "__init__.py", name)


@pytest.mark.parametrize("form", ["factors", "product"])
def test_the_loaded_operator_is_as_exact_as_the_installed_one(loaded, form):
    torch.manual_seed(0)
    shapes = ((7, 33), (17, 33), (3, 33), (17, 3))
    operands = [torch.randn(shape, requires_grad=i != 1) for i, shape in enumerate(shapes)]
    results = []
    for operator in (loaded.bounded_linear, fastbound.bounded_linear):
        y = operator(*operands, scaling=0.1, omega=3.0, form=form)
        inputs = [operands[0], *operands[2:]]
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(map(torch.equal, *results))


def test_its_operators_are_registered_beside_those_of_fastbound(loaded):
    assert fastbound.bounded_linear is not loaded.bounded_linear
    assert hasattr(torch.ops.fastbound, "forward")
    assert hasattr(getattr(torch.ops, loaded.__name__), "forward")


def test_the_kernels_come_along(loaded, layout):
    module = importlib.import_module(f"{loaded.__name__}.kernels.factors")
    assert Path(module.__file__).is_relative_to(layout)
    torch.manual_seed(0)
    A, B = torch.randn(3, 37), torch.randn(19, 3)
    SA, SB = module.factors(A, B, 16, 0.5, 2.0, torch.float32)
    for found, exact in (
        (SA[:3], torch.sin(2.0 * A.double())),
        (SB[:, :3], 0.5 * torch.sin(2.0 * B.double())),
    ):
        assert (found - exact).abs().max() <= 2 * torch.finfo(torch.float32).eps
    assert not SA[3:].any() and not SB[:, 3:].any()


def test_no_file_names_the_installed_package(layout):
    files = [*layout.rglob("*.py")]
    assert {path.parts[len(layout.parts)] for path in files} == {"torch-ext", "build"}
    absolute = re.compile(r"^\s*(?:from|import) (?:fastbound|kernels)\b", flags=re.M)
    assert not [path for path in files if absolute.search(path.read_text())]


def test_other_sources_have_another_name(script, layout, tmp_path, monkeypatch):
    before = (layout / "build" / "torch-cuda" / "metadata.json").read_text()
    package = script.package
    monkeypatch.setattr(script, "package", lambda: {**package(), "more.py": "MORE = 1\n"})
    script.write(tmp_path, 3)
    after = (tmp_path / "build" / "torch-cuda" / "metadata.json").read_text()
    assert json.loads(before)["id"] != json.loads(after)["id"]


def test_a_folder_that_holds_something_is_refused(script, tmp_path, capsys):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path)])
    assert "is not an empty folder: name a new one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_hugging_faces_package_loads_it_offline(layout, tmp_path):
    package = os.environ.get("FASTBOUND_HF_KERNELS")
    if package is None:
        pytest.skip("FASTBOUND_HF_KERNELS names no folder that holds Hugging Face's kernels")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(layout)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": package, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["General(backends=[Cpu, Cuda, Rocm])", "2.0 False"]
