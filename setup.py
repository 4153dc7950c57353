"""What pyproject.toml cannot say: the packages, and that `kernels/` must not be one itself.

The folder kernels/ is installed as fastbound.kernels, which no search for packages finds. With an
`__init__.py` it would be an importable top-level `kernels` in every checkout, and transformers,
which looks for Hugging Face's package of that name, fails to load its models.
"""

from pathlib import Path

from setuptools import find_packages, setup

if (Path(__file__).parent / "kernels" / "__init__.py").exists():
    raise SystemExit(
        "kernels/__init__.py exists: it shadows Hugging Face's `kernels`; remove it, "
        "the folder is importable as fastbound.kernels without it"
    )

setup(packages=[*find_packages(include=["fastbound", "fastbound.*"]), "fastbound.kernels"])
