"""The benchmarks' options, the facts about the machine, and the closing table of ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import collect_env

from benchmarks.report.rows import BenchmarkRow, ratio_table
from benchmarks.rivals.cases import DTYPES, Case
from benchmarks.rivals.measuring import DIRECTIONS, Measurement, measure
from benchmarks.rivals.replay import Suite
from fastbound.version import __version__, versions

ROWS = pytest.StashKey[list[BenchmarkRow]]()
CASES = pytest.StashKey[dict[str, tuple[Suite, Case]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbound")
    group.addoption(
        "--smoke", action="store_true", help="use tiny sizes, to see in seconds that all of it runs"
    )
    group.addoption(
        "--tokens", help="token counts instead of the defaults, such as 1024,8192", metavar="M,M"
    )
    group.addoption(
        "--rounds", type=int, help="rounds per case (default: GPU 50, CPU 11 or 5, smoke 3)"
    )
    group.addoption("--device", help="cuda or cpu (default: cuda if there is a GPU)")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """No workers: benchmarks run one at a time in this process, to not disturb each other."""
    return 0


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[CASES] = {}


def device_of(config: pytest.Config) -> torch.device:
    named = config.getoption("--device")
    return torch.device(named or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" not in metafunc.fixturenames:
        return
    config = metafunc.config
    tokens = config.getoption("--tokens")
    suite: Suite = metafunc.module.SUITE
    selected = suite.cases(
        device_of(config).type,
        smoke=config.getoption("--smoke"),
        tokens=[int(M) for M in tokens.split(",")] if tokens else None,
    )
    config.stash[CASES].update({str(case): (suite, case) for case in selected})
    # Names rather than objects, because the JSON file stores a test's parameters.
    metafunc.parametrize("case_name", [str(case) for case in selected])
    metafunc.parametrize("direction", DIRECTIONS)
    metafunc.parametrize("competitor_name", [c.name for c in suite.competitors])


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> list[BenchmarkRow]:
    """The rows of the closing table, to which each benchmark appends its own."""
    return pytestconfig.stash[ROWS]


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return device_of(pytestconfig)


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config, device: torch.device) -> Callable[[int], int]:
    """A function that returns `--rounds` or a default; its argument is the default on a CPU."""

    def number(on_cpu: int) -> int:
        default = 50 if device.type == "cuda" else on_cpu
        return int(
            pytestconfig.getoption("--rounds")
            or (3 if pytestconfig.getoption("--smoke") else default)
        )

    return number


@pytest.fixture(scope="session")
def measured(
    request: pytest.FixtureRequest, device: torch.device, rounds: Callable[[int], int]
) -> Callable[[str, str], tuple[Case, Measurement]]:
    """A function of case and competitor that returns the samples of the case's interleaved run.

    The run happens when the first test of a case asks for it, with exactly the competitors and
    directions that were selected for this session.
    """
    config = request.config
    taken: dict[str, dict[str, Measurement]] = {}

    def lookup(case_name: str, competitor_name: str) -> tuple[Case, Measurement]:
        suite, case = config.stash[CASES][case_name]
        dtype = DTYPES[case.dtype]
        obstacles = {c.name: c.obstacle(device.type, dtype) for c in suite.competitors}
        if obstacles[competitor_name] is not None:
            pytest.skip(f"{competitor_name}: {obstacles[competitor_name]}")
        if case_name not in taken:
            every = [getattr(item, "callspec", None) for item in request.session.items]
            selected = [spec.params for spec in every if spec is not None]
            selected = [params for params in selected if params.get("case_name") == case_name]
            names = {params["competitor_name"] for params in selected}
            taken[case_name] = measure(
                case,
                [c for c in suite.competitors if c.name in names and obstacles[c.name] is None],
                device,
                rounds=rounds(suite.cpu_rounds),
                directions=[d for d in DIRECTIONS if d in {p["direction"] for p in selected}],
            )
        return case, taken[case_name][competitor_name]

    return lookup


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    device = device_of(config)
    on_gpu = device.type == "cuda"
    machine_info["fastbound"] = {
        "version": __version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(machine_info),
        "driver": collect_env.get_nvidia_driver_version(collect_env.run) if on_gpu else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **versions("torch", "triton", "peft", "transformers"),
        "threads": torch.get_num_threads(),
    }


def _cpu_name(machine_info: dict[str, Any]) -> str:
    return str(machine_info["cpu"].get("brand_raw") or machine_info["machine"])


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("ratios, from medians of interleaved rounds")
        terminalreporter.write_line(ratio_table(rows))
