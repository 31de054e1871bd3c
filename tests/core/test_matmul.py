"""The CPU's products of bfloat16 with float32 sums, against float64: shapes, strides, CPUs, threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss import core

pytestmark = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")

CPUS = ("default", "avx2", "avx512", "avx512_bf16")
FORMS = {
    "rows": lambda t: t,
    "columns": lambda t: t.T.contiguous().T,
    "gaps": lambda t: torch.stack((t, t), -1)[..., 0],
    "part": lambda t: torch.cat((t, t[:, :1]), 1)[:, :-1],
    "broadcast": lambda t: t[:1].expand_as(t),
}


@pytest.fixture(scope="module")
def product():
    """The kernel has no schema: no op of the library is a bare product."""
    assert core.backend_report()["cpp"] == "available"
    library = torch.library.Library("fastloss", "FRAGMENT")
    library.define("bf16_product(Tensor a, Tensor b) -> Tensor")
    yield torch.ops.fastloss.bf16_product
    library._destroy()


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n + k)
    return tuple(torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))


def check(product, a: Tensor, b: Tensor) -> None:
    """At most K roundings of float32 on each element: products of bfloat16 are exact in it."""
    got, exact = product(a, b), a.double() @ b.double().T
    assert got.dtype == torch.float32 and got.shape == exact.shape
    bound = a.shape[1] * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs().T)
    assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("k", [1, 2, 3, 31, 32, 33, 511, 512, 513, 1025])
def test_shapes_that_are_no_multiple_of_any_tile(monkeypatch, product, cpu, k):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for m, n in ((1, 1), (5, 63), (6, 64), (7, 65), (13, 16), (49, 130), (97, 515)):
        check(product, *operands(m, n, k))


@pytest.mark.parametrize("cpu", CPUS)
def test_float32_rows_are_rounded_as_torch_rounds(monkeypatch, product, cpu):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for m, n, k in ((1, 1, 1), (7, 65, 33), (49, 130, 513)):
        b = operands(m, n, k)[1]
        a = torch.randn(m, k + 3)[:, :k]
        a[0, 0] = float("inf")
        assert torch.equal(product(a, b), product(a.bfloat16(), b))
        with pytest.raises(RuntimeError, match="dense float32 rows"):
            product(torch.cat((a, a), 1)[:, ::2] if k > 1 else a.double(), b)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("of_a", FORMS)
@pytest.mark.parametrize("of_b", FORMS)
def test_strides(monkeypatch, product, cpu, of_a, of_b):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for shape in ((50, 70, 37), (9, 33, 600)):
        a, b = operands(*shape)
        check(product, FORMS[of_a](a), FORMS[of_b](b))


def test_more_rows_than_are_packed_at_a_time(product):
    check(product, *operands(3, 2048 + 65, 40))


def test_empty(product):
    for m, n, k in ((0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)):
        got = product(*operands(m, n, k))
        assert got.shape == (m, n) and not got.any()


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_infinities_and_nan_reach_their_row_and_no_other(monkeypatch, product, cpu, value):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for k, at in ((1, 0), (7, 6), (8, 3)):
        a, b = operands(8, 70, k)
        a[4, at] = value
        b[:, at] = b[:, at].abs() + 1
        expected = a.float() @ b.float().T
        got = product(a, b)
        torch.testing.assert_close(got[4], expected[4], rtol=0, atol=0, equal_nan=True)
        assert got[:4].isfinite().all() and got[5:].isfinite().all()


def test_thread_counts_give_the_same_bits(product):
    a, b = operands(301, 700, 1300)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(product(a, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_bad_operands(product):
    a, b = operands(2, 3, 4)
    with pytest.raises(RuntimeError, match="expected bfloat16 operands"):
        product(a, b.float())
    with pytest.raises(RuntimeError, match=r"expected \[m, K\], \[n, K\]"):
        product(a, b[:, 1:])
