"""The package as users meet it: built, installed, from a checkout, and beside other packages."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fastbound
import fastbound.unlearning
from fastbound.cli import main
from fastbound.errors import InputError, require


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """Run, demand success, return stdout. Neither PYTHONPATH nor pytest's path leaks in."""
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "TRITON_INTERPRET"}}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules_of(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py"))


def shipped(folder: Path) -> set[str]:
    """What of the source a wheel must hold, by its place in the wheel."""
    code = {
        path.relative_to(folder).as_posix()
        for pattern in ("**/*.py", "**/*.jsonl", "plans/*.json", "py.typed")
        for path in (folder / "fastbound").glob(pattern)
    }
    return code | {f"fastbound/kernels/{path.name}" for path in (folder / "kernels").glob("*.py")}


@pytest.fixture(scope="module")
def checkout(repository, tmp_path_factory) -> Path:
    """A copy of the source, so that no build leaves anything in the real one."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("fastbound", "kernels"):
        shutil.copytree(repository / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repository / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def distributions(checkout, tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder], cwd=checkout)
    return folder


@pytest.fixture
def fresh_environment(tmp_path) -> Path:
    """The python of a new virtual environment that sees this one's packages behind its own."""
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment" / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path)
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (Path(site.strip()) / "behind.pth").write_text("\n".join(paths))
    return python


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    # No dependencies and no isolation: nothing is downloaded, setuptools is the one here.
    flags = ["--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *flags, *what], cwd=cwd)


def origins(python: Path, names: list[str], cwd: Path, **environment: str) -> dict[str, Path]:
    """Where each fastbound.kernels.<name> and fastbound itself come from."""
    code = """
        import importlib, sys, fastbound
        print("fastbound", fastbound.__file__)
        for name in sys.argv[1:]:
            print(name, importlib.import_module(f"fastbound.kernels.{name}").__file__)
    """
    lines = run([python, "-c", textwrap.dedent(code), *names], cwd=cwd, **environment)
    return {name: Path(path) for name, path in map(str.split, lines.splitlines())}


def test_a_build_stops_when_kernels_became_a_package(checkout, tmp_path):
    copy = shutil.copytree(checkout, tmp_path / "copy")
    (copy / "kernels" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "kernels/__init__.py exists" in done.stderr


def test_the_wheel_holds_the_package_and_nothing_else(distributions, checkout):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"fastbound-{fastbound.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(f"{info}/")} == shipped(checkout)
    assert "fastbound/unlearning/__init__.py" in names and "fastbound/py.typed" in names
    assert any(name.endswith(".jsonl") for name in names)
    assert metadata["Version"] == fastbound.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "fastbound = fastbound.cli:main" in scripts


def test_the_sdist_can_be_built_from(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not any(name.startswith("kernels/__init__") for name in names)


@pytest.mark.slow
def test_installed_from_the_folder(checkout, fresh_environment, tmp_path):
    install(fresh_environment, ".", cwd=shutil.copytree(checkout, tmp_path / "copy"))
    names = modules_of(checkout / "kernels")
    elsewhere = origins(fresh_environment, names, cwd=tmp_path)
    assert names
    for name in names:
        assert elsewhere[name] == elsewhere["fastbound"].parent / "kernels" / f"{name}.py"
    # In a checkout the folder in the working directory comes first, and brings its own kernels.
    at_root = origins(fresh_environment, names, cwd=checkout)
    assert {at_root[name] for name in names} == {checkout / "kernels" / f"{n}.py" for n in names}
    script = fresh_environment.parent / "fastbound"
    assert "unlearn" in run([script, "--help"], cwd=tmp_path)


@pytest.mark.slow
def test_installed_editable(checkout, fresh_environment, tmp_path):
    copy = shutil.copytree(checkout, tmp_path / "copy")
    install(fresh_environment, "-e", ".", cwd=copy)
    names = modules_of(copy / "kernels")
    for cwd in (tmp_path, copy):
        found = origins(fresh_environment, names, cwd=cwd)
        assert found["fastbound"] == copy / "fastbound" / "__init__.py"
        assert {found[name] for name in names} == {copy / "kernels" / f"{n}.py" for n in names}


@pytest.mark.slow
def test_a_bare_checkout(checkout, fresh_environment, tmp_path):
    names = modules_of(checkout / "kernels")
    here = origins(fresh_environment, names, cwd=checkout)
    elsewhere = origins(fresh_environment, names, cwd=tmp_path, PYTHONPATH=str(checkout))
    assert {here[name] for name in names} == {checkout / "kernels" / f"{n}.py" for n in names}
    assert here == elsewhere
    assert "unlearn" in run([fresh_environment, "-m", "fastbound", "--help"], cwd=checkout)


LLAMA = """
import sys, torch, transformers
from transformers.utils.import_utils import is_kernels_available

config = transformers.LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()

import fastbound.kernels.thin
print(is_kernels_available(), getattr(sys.modules.get("kernels"), "__file__", None))
"""


@pytest.mark.slow
def test_llama_loads_at_the_root_without_hugging_face_kernels(repository, tmp_path):
    if _has_kernels():
        pytest.skip("Hugging Face's kernels is installed here: its absence cannot be shown")
    out = run([sys.executable, "-c", LLAMA, tmp_path], cwd=repository, HF_HUB_OFFLINE="1")
    assert out.split()[0] == "False"


@pytest.mark.slow
def test_llama_loads_at_the_root_with_hugging_face_kernels(repository, tmp_path):
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package = tmp_path / "site" / "kernels"
    (package / "layer").mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    (package / "layer" / "__init__.py").touch()
    (package / "layer" / "mode.py").write_text("from kernels import Mode\n")
    metadata = tmp_path / "site" / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    out = run(
        [sys.executable, "-c", LLAMA, tmp_path / "model"],
        cwd=repository,
        PYTHONPATH=str(tmp_path / "site"),
        HF_HUB_OFFLINE="1",
    )
    assert out.split() == ["True", str(package / "__init__.py")]


# The names that transformers takes from the package, doing nothing.
STUB = """
def _same(*args, **kwargs):
    return lambda decorated: decorated

use_kernel_forward_from_hub = use_kernelized_func = _same

class _Nothing:
    def __init__(self, *args, **kwargs): pass

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Nothing,), {})
"""


def _has_kernels() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("kernels")
    except PackageNotFoundError:
        return False
    return True


HEAVY = ("torch", "triton", "transformers", "peft", "datasets", "accelerate", "matplotlib")


def loaded_after(statement: str, repository: Path) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    return set(run([sys.executable, "-c", code], cwd=repository).split())


def test_importing_fastbound_imports_nothing_heavy(repository):
    assert loaded_after("import fastbound", repository) == set()


def test_the_help_imports_nothing_heavy(repository):
    show = "import fastbound.cli\ntry: fastbound.cli.main(['--help'])\nexcept SystemExit: pass"
    assert "torch" not in loaded_after(show, repository)
    assert not set(HEAVY) & loaded_after(show, repository)


def test_using_every_public_name_leaves_the_model_libraries_out(repository):
    peft = {"BoundedConfig", "BoundedLayer", "BoundedModel"}  # these are PEFT's classes
    names = sorted(set(fastbound.__all__) - peft)
    use = f"import fastbound; [getattr(fastbound, name) for name in {names}]"
    by_torch = loaded_after("import torch", repository)
    assert loaded_after(use, repository) - by_torch <= {"triton"}


def test_public_names(repository):
    assert sorted(fastbound.__all__) == fastbound.__all__
    assert set(fastbound.__all__) <= set(dir(fastbound))
    assert all(callable(getattr(fastbound, name)) for name in fastbound.__all__)
    with pytest.raises(AttributeError, match="module 'fastbound' has no attribute 'nope'"):
        fastbound.nope  # noqa: B018
    # A module of that name would take the function's place as soon as something imports it.
    parts = {path.stem for path in (repository / "fastbound").iterdir()}
    assert not parts & set(fastbound.__all__)


@pytest.fixture(scope="module")
def requirements(repository) -> dict[str, list[str]]:
    """Lines of pyproject.toml: extra -> its requirements, the package's own under ""."""
    text = (repository / "pyproject.toml").read_text()
    lists = re.findall(r"^(\w+) = (\[\n.*?^\])", text, flags=re.M | re.S)
    named = {name: ast.literal_eval(found) for name, found in lists}
    found = {name: named[name] for name in ("evaluation", "quantized", "trl", "docs", "test")}
    return {"": named["dependencies"], **found}


RANGES = {
    "PyTorch": "torch",
    "Triton": "triton",
    "transformers": "transformers",
    "PEFT": "peft",
}


def test_the_installation_page_states_the_ranges_of_pyproject(requirements, repository):
    everything = " ".join(each for extra in requirements.values() for each in extra)
    page = (repository / "docs" / "install.md").read_text()
    readme = " ".join((repository / "README.md").read_text().split())
    for name, package in RANGES.items():
        low, before = re.search(rf"\b{package}>=([\d.]+),<([\d.]+)", everything).groups()
        major, minor = before.split(".")
        assert f"| {name} | {low} to {major}.{int(minor) - 1}" in page
        stated = re.findall(rf"{name} (\d+\.\d+ to \d+\.\d+)", readme)
        assert set(stated) <= {f"{low} to {major}.{int(minor) - 1}"}


def test_every_extra_that_is_named_somewhere_exists(requirements, repository):
    pages = [*repository.glob("*.md"), *repository.glob("docs/*.md"), repository / "pyproject.toml"]
    named = {
        extra
        for path in [*pages, *(repository / "fastbound").rglob("*.py")]
        for extras in re.findall(r"(?:fastbound|\.)\[([a-z,]+)\]", path.read_text())
        for extra in extras.split(",")
    }
    assert {"evaluation", "quantized", "trl", "test"} <= named <= set(requirements)


def test_the_test_extra_brings_what_every_other_extra_has(requirements):
    (own,) = (each for each in requirements["test"] if each.startswith("fastbound["))
    assert set(own[len("fastbound[") : -1].split(",")) == set(requirements) - {"", "test"}


def test_a_plain_install_leaves_out_what_only_some_commands_need(requirements):
    plain = {re.match(r"[\w-]+", each).group() for each in requirements[""]}
    assert not plain & {"triton", "scipy", "scikit-learn", "rouge-score", "torchao", "trl"}


def test_a_missing_optional_package_is_named_with_the_extra_that_installs_it():
    require("evaluation", "this", "torch")
    command = (
        r"this needs nowhere_1 and nowhere_2, not installed here: pip install \"fastbound\[x\]"
    )
    with pytest.raises(InputError, match=command):
        require("x", "this", "nowhere_1", "torch", "nowhere_2")


def test_evaluate_names_its_extra_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    arguments = ["evaluate", "--benchmark", "tofu", "--model", "none", "--output", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 2
    assert 'rouge_score, not installed here: pip install "fastbound[evaluation]"' in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_the_api_page_shows_every_public_name_and_each_is_documented(repository):
    page = (repository / "docs" / "api.md").read_text()
    for module in (fastbound, fastbound.unlearning):
        shown = re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)$", page, flags=re.M)
        assert sorted(shown) == module.__all__
        assert not [name for name in shown if not getattr(module, name).__doc__]


def test_the_site_lists_every_guide(repository):
    settings = (repository / ".ci" / "mkdocs.yml").read_text()
    listed = re.findall(r"[\w-]+\.md", settings.partition("nav:")[2])
    assert sorted(listed) == sorted(path.name for path in (repository / "docs").glob("*.md"))
