"""Sequence lengths share their binaries: a text a token longer does not compile."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from benchmarks.static import binaries as module
from benchmarks.static.binaries import binaries, main

MOST = 24
# Every power of two with its neighbours, multiples of 8 and of 16, and odd ones between.
LENGTHS = sorted({M for n in range(13) for M in (2**n, 2**n + 1, 3 * 2**n + 8, 7 * 2**n + 3)})
UP_TO_4096 = [M for M in LENGTHS if 1 <= M <= 4096]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_llama_needs_few_binaries_for_every_length_up_to_4096(target: str) -> None:
    found = binaries(target, UP_TO_4096)
    assert len(found) <= MOST, sorted(launch.kernel.__name__ for launch in found.values())


@pytest.mark.parametrize(("M", "even"), [(1023, 1024), (1025, 1040), (1, 16), (3, 32)])
def test_a_length_that_is_odd_or_one_needs_none_of_its_own(M: int, even: int) -> None:
    assert set(binaries("sm_90", [M])) == set(binaries("sm_90", [even]))


def test_a_size_of_the_layer_stays_known_to_the_compiler() -> None:
    """N and K, and with them the strides of the tall tensors, are multiples of 16: wide loads."""
    for launch in binaries("sm_90", [1024]).values():
        assert not {"N", "K"} & set(_alike(launch.kernel)), launch.kernel.__name__


def _alike(kernel: object) -> list[str]:
    given = getattr(kernel, "kwargs", None) or vars(kernel)
    return given["do_not_specialize"] or []


@pytest.mark.parametrize(
    "arguments",
    [["--lengths", "0", "4"], ["--lengths", "9", "4"], ["--compile", "0"], ["--target", "sm_1"]],
    ids=" ".join,
)
def test_bad_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_table_names_every_kernel_and_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lengths", "4", "5"]) == 0
    printed = capsys.readouterr().out
    assert module.MODEL in printed and "reduce" in printed and "gated: activate" in printed
    last = printed.splitlines()[-1].split()
    assert last[1:4:2] == ["total", str(len(binaries("sm_90", [4, 5])))]
