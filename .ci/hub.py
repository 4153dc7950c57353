"""The operator in the layout that Hugging Face's `kernels` loads: `python .ci/hub.py FOLDER`.

    FOLDER/build.toml                   what kernel-builder reads
    FOLDER/torch-ext/fastbound/         the sources: `bounded_linear` and all that it imports
    FOLDER/build/torch-{cpu,cuda,rocm}  what `kernels.get_kernel` and `get_local_kernel` load

Nothing is compiled: Triton does that on the user's card. A module of the hub is loaded from any
place, under any name, beside another version of itself and beside an installed fastbound. So the
absolute imports of the sources become relative ones, and the operators are registered under a name
of their own, which `_ops.py` makes from the digest of the sources, as kernel-builder does.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "fastbound"
BACKENDS = ("cpu", "cuda", "rocm")
ENTRY = "fastbound.operator.function"
LICENCE = "Apache-2.0"

INIT = '''"""y = x (W + ΔW)ᵀ + bias with W frozen and |ΔW| bounded, fused: see `bounded_linear`."""

from .operator.function import bounded_linear

__all__ = ["bounded_linear"]
'''
OPS = '''"""Under which name the operators are registered: a different one for other sources."""

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{NAMESPACE}}::{{op_name}}"
'''
BUILD = """[general]
edition = 5
name = "{name}"
version = {version}
license = "{licence}"
backends = [{backends}]

[torch-noarch]
"""


def source_of(module: str) -> Path | None:
    """The file of a module of ours; None if there is none of that name."""
    parts = module.split(".")
    folder = ROOT / "kernels" if parts[1:2] == ["kernels"] else ROOT.joinpath(*parts[:2])
    rest = parts[2:]
    if len(parts) == 2 and parts[1] != "kernels":
        folder, rest = ROOT / NAME, parts[1:]
    path = folder.joinpath(*rest)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if rest and file.is_file():
            return file
    return None


def closure(entry: str) -> dict[str, Path]:
    """The modules that importing `entry` can need, functions' own imports too: name -> file."""
    found: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        path = source_of(module)
        if module in found or path is None:
            continue
        found[module] = path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
                waiting += [str(node.module), *(f"{node.module}.{a.name}" for a in node.names)]
    return found


def relative(source: str, depth: int) -> str:
    """The source of a module `depth` folders below the package, without the package's name."""
    up = "." * (depth + 1)
    source = re.sub(
        r"^(\s*)from fastbound(?:\.([\w.]+))? import", rf"\1from {up}\2 import", source, flags=re.M
    )
    changed = source.replace(
        'torch.library.Library("fastbound",', "torch.library.Library(NAMESPACE,"
    )
    changed = re.sub(r'"fastbound::(\w+)"', r'add_op_namespace_prefix("\1")', changed)
    changed = re.sub(r"\btorch\.ops\.fastbound\b", "ops", changed)
    if changed != source:
        line = f"from {up}_ops import NAMESPACE, add_op_namespace_prefix, ops\n"
        changed = changed.replace("\nimport torch\n", f"\nimport torch\n{line}", 1)
    return changed


def package() -> dict[str, str]:
    """The text of each file of the package, by its path below the package."""
    texts = {"__init__.py": INIT}
    for module, path in closure(ENTRY).items():
        place = Path(*module.split(".")[1:])
        place = place / "__init__.py" if path.name == "__init__.py" else place.with_suffix(".py")
        texts[place.as_posix()] = relative(path.read_text(), len(place.parts) - 1)
    for plans in sorted((ROOT / NAME / "dispatch" / "plans").glob("*.json")):
        texts[f"dispatch/plans/{plans.name}"] = plans.read_text()
    return texts


def write(folder: Path, version: int) -> list[Path]:
    """Write the layout into `folder` and return the folders that `kernels` chooses from."""
    texts = package()
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:8]
    backends = ", ".join(f'"{name}"' for name in BACKENDS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.toml").write_text(
        BUILD.format(name=NAME, version=version, licence=LICENCE, backends=backends)
    )
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    _write_files(folder / "torch-ext" / NAME, texts)
    variants = []
    for backend in BACKENDS:
        namespace = f"_{NAME}_{backend}_{digest}"
        metadata = {
            "name": NAME,
            "id": namespace,
            "version": version,
            "license": LICENCE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        variants.append(folder / "build" / f"torch-{backend}")
        made = {"_ops.py": OPS.format(namespace=namespace), "metadata.json": json.dumps(metadata)}
        _write_files(variants[-1], {**texts, **made})
    return variants


def _write_files(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python .ci/hub.py",
        description="Write the operator in the layout that Hugging Face's kernels package loads.",
    )
    parser.add_argument("folder", type=Path, help="a new or an empty folder")
    parser.add_argument(
        "--version", type=int, default=1, help="of the kernel, by which users ask for it (1)"
    )
    options = parser.parse_args(arguments)
    if options.folder.exists() and (options.folder.is_file() or any(options.folder.iterdir())):
        parser.error(f"{options.folder} is not an empty folder: name a new one")
    for variant in write(options.folder, options.version):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
