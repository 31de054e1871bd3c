"""The search for the nearest bank row: values and winners on every backend, ties, copies, dtypes of the bank, tiles."""

from __future__ import annotations

import numpy
import pytest
import torch

from fastloss import core, diversity_loss
from fastloss.diversity.distances import METRICS, Bank, chunk_distances
from fastloss.diversity.nearest import nearest
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, Errors, places

pytestmark = pytest.mark.kernels

PLACES = places(next(case for case in CASES if case.name == "diversity_loss"))
each_place = pytest.mark.parametrize("place", PLACES)
each_kernel = pytest.mark.parametrize("place", [place for place in PLACES if place != ("cpu", "reference")])
needs_cpp = pytest.mark.skipif(INTERPRETING, reason="there are no C++ kernels beside interpreted ones")
each_metric = pytest.mark.parametrize("metric", METRICS)


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def found(place, generated, bank, metric="l1", **options):
    """[distances, indices, gradient of the distances' sum] on a backend."""
    generated = generated.detach().to(place[0]).requires_grad_()
    with core.use_backend(place[1]):
        loss, (distance, index) = diversity_loss(
            generated, bank.to(place[0]), metric=metric, reduction="none", return_nearest=True, **options
        )
    torch.testing.assert_close(distance, -loss.detach(), rtol=0, atol=0, equal_nan=True)
    assert not distance.requires_grad and index.dtype == torch.int64
    return distance.cpu(), index.cpu(), torch.autograd.grad(-loss.sum(), generated)[0].cpu()


@each_place
@each_metric
def test_values_and_winners(place, metric):
    """Rows of a vector's length and not, fewer than a tile and more, one row, an odd number of images."""
    errors = Errors(torch.float32)
    for count, rows, size in ((1, 1, 1), (3, 1, 17), (5, 7, 16), (2, 300, 33), (67, 9, 515), (3, 2100, 5), (0, 4, 3)):
        generated, bank = draw(count, size), draw(rows, size, seed=1)
        distance, index, grad = found(place, generated, bank, metric)
        x = generated.double().requires_grad_()
        exact, winner = chunk_distances(x, Bank(bank.double(), 1, 0), metric).min(1)
        (exact_grad,) = torch.autograd.grad(exact.sum(), x)
        assert torch.equal(index, winner), (count, rows, size)
        if count == 0:
            assert grad.shape == (0, 3)
            continue
        y = generated.clone().requires_grad_()
        eager = chunk_distances(y, Bank(bank, 1, 0), metric).min(1)[0]
        errors.add("distance", distance, eager, exact)
        errors.add("gradient", grad, torch.autograd.grad(eager.sum(), y)[0], exact_grad)
    errors.check()


@each_kernel
@each_metric
def test_no_digits_are_lost_near_a_copy(place, metric):
    """Distances of 1e-14 of the squares that a product would subtract keep 5 digits; equal images are at exactly 0."""
    bank = 1 + draw(200, 700)
    bank[150] = bank[17] * (1 + 2e-7 * torch.randn(700, generator=torch.Generator().manual_seed(2)))
    generated = torch.stack((bank[17], bank[150], (bank[17].double() * 0.99999).float()))
    generated[2, ::2] = bank[17, ::2]
    got = found(place, generated, bank, metric)
    exact, winner = chunk_distances(generated.double(), Bank(bank.double(), 1, 0), metric).min(1)
    assert torch.equal(got[1][:2], torch.tensor([17, 150])) and got[1][2] == winner[2]
    assert got[0][0] == 0 and got[0][1] == 0
    assert got[0][2].item() == pytest.approx(exact[2].item(), rel=1e-5)
    assert got[2][:2].abs().max() < 1e-9  # l1 and l2: 0; cosine: rounding of <a,b> a / |a|^2 - b


@each_place
@each_metric
def test_ties_go_to_the_first(place, metric):
    """Duplicates within a tile and in tiles far apart, one row repeated, and equal distances of other rows."""
    bank = draw(700, 40)
    bank[3], bank[650], bank[651] = bank[600], bank[600], bank[600]
    distance, index, _ = found(place, bank[600:602], bank, metric)
    assert index.tolist() == [3, 601]
    assert distance.abs().max() < (1e-6 if place[1] == "reference" else 1e-12)
    assert found(place, draw(3, 40, seed=4), bank[:1].expand(300, 40), metric)[1].tolist() == [0, 0, 0]
    if metric != "cosine":
        sides = torch.tensor([[3.0], [1.0], [0.0], [0.0], [1.0]])
        assert found(place, torch.tensor([[0.5], [2.0]]), sides, metric)[1].tolist() == [1, 0]


@each_place
@each_metric
def test_nan_infinities_and_zeros(place, metric):
    bank = draw(40, 9)
    bank[20, 3], bank[30, 3] = torch.nan, torch.nan
    distance, index, _ = found(place, draw(2, 9, seed=1), bank, metric)
    assert distance.isnan().all() and index.tolist() == [20, 20]
    generated = draw(3, 9, seed=2)
    generated[1, 0], generated[2] = torch.inf, 0
    distance, index, grad = found(place, generated, bank[:20], metric)
    assert distance[0].isfinite() and (distance[1].isnan() if metric == "cosine" else distance[1] == torch.inf)
    assert grad[2].isfinite().all() and (metric != "cosine" or (distance[2] == 1 and index[2] == 0))
    assert found(place, draw(1, 9), torch.zeros(3, 9), metric)[1].item() == 0
    if metric == "cosine":  # whose products underflow
        small = 1e-25 * torch.eye(4)
        if place != ("cpu", "reference"):
            assert found(place, small, small, metric)[1].tolist() == [0, 1, 2, 3]


@each_place
@each_metric
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_of_the_bank(place, metric, dtype):
    """Converted as it is read, and scaled, it gives what the converted bank gives."""
    stored = (255 * draw(300, 2, 3, 7)).round().to(dtype)
    bank = stored.float() / 128 - 1
    generated = 2 * draw(5, 2, 3, 7, seed=1) - 1
    got = found(place, generated, stored, metric, bank_scale=1 / 128, bank_shift=-1)
    for g, e in zip(got, found(place, generated, bank, metric), strict=True):
        torch.testing.assert_close(g, e)
    for mode in ("softmin", "mean"):
        options = {"mode": mode, "metric": metric, "temperature": 0.1}
        torch.testing.assert_close(
            diversity_loss(generated, stored, bank_scale=1 / 128, bank_shift=-1, **options),
            diversity_loss(generated, bank, **options),
        )


@each_place
def test_strides_and_a_memory_map(place, tmp_path):
    """Every second row, columns first, and a file that is read where it lies."""
    generated, bank = draw(4, 50), draw(60, 50, seed=1)
    numpy.memmap(tmp_path / "bank", numpy.uint8, "w+", shape=(60, 50))[:] = (255 * bank).byte().numpy()
    mapped = torch.from_numpy(numpy.memmap(tmp_path / "bank", numpy.uint8, "r+", shape=(60, 50)))
    for metric in METRICS:
        wanted = found(place, generated, bank, metric)
        spread = torch.stack((bank, bank), 1)
        for other in (spread[:, 0], bank.T.contiguous().T, torch.stack((bank, bank), -1)[..., 1]):
            for g, e in zip(found(place, generated, other, metric), wanted, strict=True):
                torch.testing.assert_close(g, e)
        of_map = found(place, generated, mapped, metric, bank_scale=1 / 255)
        for g, e in zip(of_map, found(place, generated, (255 * bank).byte() / 255, metric), strict=True):
            torch.testing.assert_close(g, e)


def test_gradients_of_losses_with_and_without_the_index_agree():
    generated, bank = draw(6, 3, 5, 5).requires_grad_(), draw(40, 3, 5, 5, seed=1)
    for options in ({}, {"margin": 0.2}, {"reduction": "sum", "metric": "cosine"}):
        plain = diversity_loss(generated, bank, **options)
        loss, where = diversity_loss(generated, bank, return_nearest=True, **options)
        assert torch.equal(plain, loss) and where.row.shape == (6,)
        assert torch.equal(torch.autograd.grad(plain, generated)[0], torch.autograd.grad(loss, generated)[0])


def test_compiles_with_the_index():
    torch._dynamo.reset()
    generated, bank = draw(3, 20), draw(30, 20, seed=1)
    f = torch.compile(lambda g: diversity_loss(g, bank, return_nearest=True), fullgraph=True, backend="aot_eager")
    loss, where = f(generated)
    expected, there = diversity_loss(generated, bank, return_nearest=True)
    assert torch.equal(loss, expected) and torch.equal(where[1], there.row)


@needs_cpp
@each_metric
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
def test_instruction_sets_agree(monkeypatch, metric, cpu):
    generated, bank = draw(7, 1037), draw(29, 1037, seed=1)
    wanted = found(("cpu", "cpp"), generated, bank, metric)
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    for g, e in zip(found(("cpu", "cpp"), generated, bank, metric), wanted, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


@pytest.fixture
def rounded_products():
    """The setting with which torch may multiply float32 in bfloat16, and does where the CPU has instructions for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@each_place
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_rounded_products_find_the_same_row(rounded_products, place, metric):
    """Rows that differ by less than bfloat16 resolves."""
    bank = 1 + 1e-3 * draw(300, 64)
    generated = bank[::40] + 1e-4 * draw(8, 64, seed=1)
    exact = chunk_distances(generated.double(), Bank(bank.double(), 1, 0), metric)
    assert found(place, generated, bank, metric)[1].tolist() == exact.argmin(1).tolist()


def test_bad_options():
    generated, bank = draw(2, 3), draw(4, 3)
    with pytest.raises(ValueError, match="bank_scale: expected the number that makes a uint8 bank's values"):
        diversity_loss(generated, bank.byte())
    with pytest.raises(ValueError, match="bank_scale: expected a number other than 0"):
        diversity_loss(generated, bank, bank_scale=0)
    with pytest.raises(ValueError, match='return_nearest: expected False with mode="mean"'):
        diversity_loss(generated, bank, mode="mean", return_nearest=True)
    with pytest.raises(TypeError, match="bank: expected a float16"):
        diversity_loss(generated, bank.int())


def test_there_are_kernels():
    assert nearest.kernels["triton"] and nearest.kernels["cpp"] != INTERPRETING
