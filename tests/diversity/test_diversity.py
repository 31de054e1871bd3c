"""Diversity and mode seeking: numbers by hand, the limits of the modes, chunks, and the points without a derivative."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F

from fastloss import diversity_loss, mode_seeking_loss, normalized_diversity_loss
from fastloss.diversity import bank_distance, nearest, pair_distances
from fastloss.diversity.distances import Bank
from fastloss.diversity.diversity import METRICS, MODES

BANK = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 2.0]])


def test_numbers_by_hand():
    g = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    # distances l1: [.5, 1, 1.5], [1, .5, 1]; l2: [.5, 1, 2.5], [1, .5, 1]
    assert diversity_loss(g, BANK, reduction="none").tolist() == [-0.5, -0.5]
    assert diversity_loss(g, BANK, mode="mean", reduction="none").tolist() == pytest.approx([-1.0, -2.5 / 3])
    assert diversity_loss(g, BANK, metric="l2", mode="mean").item() == pytest.approx(-(4 / 3 + 2.5 / 3) / 2)
    assert diversity_loss(g, BANK, margin=0.75).item() == 0.25
    assert diversity_loss(g, BANK, margin=0.4).item() == 0.0
    # cosine of (1,1) with (0,0), (1,0), (2,2): distances 1, 1 - sqrt(1/2), 0
    assert diversity_loss(g[1:], BANK, metric="cosine").item() == pytest.approx(0, abs=1e-6)
    assert diversity_loss(g[1:], BANK, metric="cosine", mode="mean").item() == pytest.approx(-(2 - 0.5**0.5) / 3)


@pytest.mark.parametrize("metric", METRICS)
def test_softmin_goes_from_nearest_to_mean(metric):
    generator = torch.Generator().manual_seed(0)
    g, bank = (torch.rand(n, 3, 4, generator=generator, dtype=torch.float64) for n in (4, 9))
    nearest, mean = (diversity_loss(g, bank, mode=m, metric=metric) for m in ("nearest", "mean"))
    soft = [diversity_loss(g, bank, mode="softmin", metric=metric, temperature=t) for t in (1e-7, 1e-2, 1e-1, 1e5)]
    torch.testing.assert_close(soft[0], nearest, rtol=0, atol=1e-6)
    torch.testing.assert_close(soft[-1], mean, rtol=0, atol=1e-6)
    assert nearest > soft[1] > soft[2] > mean


def diversity_reference(generated, bank, mode, metric, temperature, workspace):
    """The definition, in chunks of a workspace in bytes."""
    mib = workspace / 2**20
    if mode == "nearest":
        return nearest.nearest_reference(nearest.Inputs(generated, bank, metric, 1.0, 0.0, mib))
    x = bank_distance.Inputs(generated, bank, mode, metric, temperature, 1.0, 0.0, mib, False)
    return bank_distance.bank_distance_reference(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_chunks_change_nothing(mode, metric):
    """One bank row at a time gives the value, gradient and second derivative of all at once."""
    generator = torch.Generator().manual_seed(1)
    g, bank = (torch.rand(n, 6, generator=generator, dtype=torch.float64) for n in (3, 7))
    got = []
    for workspace in (1, 1000, 2**28):
        x = g.clone().requires_grad_()
        out = diversity_reference(x, bank, mode, metric, 0.1, workspace)
        (first,) = torch.autograd.grad((out * out).sum(), x, create_graph=True)
        got.append((out, first, torch.autograd.grad((first**2).sum(), x)[0]))

        def distance(x, workspace=workspace):
            return diversity_reference(x, bank, mode, metric, 0.1, workspace)

        assert torch.autograd.gradcheck(distance, x)
        total = torch.func.grad(lambda x, f=distance: f(x).sum())(g)
        torch.testing.assert_close(total, torch.autograd.grad(distance(x).sum(), x)[0])
    for other in got[1:]:
        torch.testing.assert_close(other, got[0])


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("metric", "count", "rows", "image"),
    [("l1", 8, 200, (3, 32, 32)), ("l2", 8, 200, (3, 32, 32))] + [(m, 300, 2000, (2,)) for m in METRICS],
)
def test_workspace_is_bounded(mode, metric, count, rows, image):
    """8 x 200 x 3,072 differences would be 19 MiB, 300 x 2,000 distances 2.3; in 1 MiB no tensor passes 1 MiB."""
    g, bank = torch.rand(count, *image, requires_grad=True), torch.rand(rows, *image)
    with Largest() as forward:
        loss = diversity_loss(g, bank, mode=mode, metric=metric, workspace_mib=1)
    with Largest() as backward:
        loss.backward()
    assert forward.elements <= 2**18 and backward.elements <= 2**18
    expected = diversity_loss(g, bank, mode=mode, metric=metric)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(g.grad, torch.autograd.grad(expected, g)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_map_in_any_strides_comes_in_pieces(tmp_path, mode, metric):
    """2 MB of bytes, channels last: no tensor is larger than the workspace; the values are those of a plain bank."""
    stored = numpy.memmap(tmp_path / "bank", numpy.uint8, "w+", shape=(700, 32, 32, 3))
    stored[:] = torch.randint(0, 256, stored.shape, generator=torch.Generator().manual_seed(0)).numpy()
    bank = torch.from_numpy(stored).permute(0, 3, 1, 2)
    g = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    options = {"mode": mode, "metric": metric, "bank_scale": 1 / 255}
    with Largest() as largest:
        loss = diversity_loss(g, bank, workspace_mib=1, **options)
        (grad,) = torch.autograd.grad(loss, g)
    closed = mode == "mean" and metric != "l1"
    assert largest.elements <= (2**18 if closed else 2**20)  # float32, or bytes of a piece
    expected = diversity_loss(g, bank.contiguous(), **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, g)[0])


def test_pieces_of_a_bank(tmp_path):
    """In their order, on the device that is asked for, of one row at least."""
    (tmp_path / "bank").write_bytes(bytes(range(70)))
    bank = Bank(torch.from_file(str(tmp_path / "bank"), size=70, dtype=torch.uint8).view(7, 2, 5), 2.0, 1.0)
    for size, counts in ((1, [1] * 7), (25, [2, 2, 2, 1]), (2**20, [7])):
        pieces = list(bank.pieces(BANK, size))
        assert [len(piece.rows) for piece in pieces] == counts
        assert torch.equal(torch.cat([piece.values(BANK) for piece in pieces]), 1 + 2 * torch.arange(70.0).view(7, 10))
    for like, device in ((BANK, "cpu"), (BANK.to("meta"), "meta")):
        assert {piece.rows.device.type for piece in bank.pieces(like, 25)} == {device}
    with pytest.raises(ValueError, match="bank: expected a device that has its values, got meta"):
        diversity_loss(BANK, BANK.to("meta"))
    with pytest.raises(TypeError, match="bank: expected a tensor, got numpy's ndarray; pass torch.from_numpy"):
        diversity_loss(BANK, BANK.numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_bank_on_the_host(mode, metric):
    """Of images on a GPU, in pieces."""
    g, bank = torch.rand(4, 3, 32, 32, device="cuda", requires_grad=True), torch.rand(300, 3, 32, 32)
    options = {"mode": mode, "metric": metric}
    loss = diversity_loss(g, bank, workspace_mib=1, **options)
    expected = diversity_loss(g, bank.cuda(), **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, g)[0], torch.autograd.grad(expected, g)[0])


def test_chunks_compile_into_one_graph():
    g, bank = torch.rand(4, 3, 32, 32, requires_grad=True), torch.rand(11, 3, 32, 32)
    for mode in ("nearest", "softmin"):
        torch._dynamo.reset()
        compiled = torch.compile(diversity_loss, fullgraph=True, backend="aot_eager")
        got, expected = (f(g, bank, mode=mode, workspace_mib=1) for f in (compiled, diversity_loss))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, g)[0], torch.autograd.grad(expected, g)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_gradient_is_zero_at_copies_and_zero_images(mode, metric):
    g = torch.stack((BANK[1], torch.zeros(2))).requires_grad_()
    diversity_loss(g, torch.stack((BANK[1], BANK[1])), mode=mode, metric=metric).backward()
    assert g.grad[0].abs().max() < 1e-6
    assert (g.grad[1] == 0).all() if metric == "cosine" else g.grad[1, 0] != 0
    assert g.grad.isfinite().all()


def test_margin_stops_the_push():
    g = torch.tensor([[0.25, 0.0], [5.0, 5.0]], requires_grad=True)
    diversity_loss(g, BANK, margin=0.5, reduction="sum").backward()
    assert g.grad.tolist() == [[-0.5, 0.0], [0.0, 0.0]]


def test_ties_and_nan():
    g = torch.tensor([[0.5, 0.0]], requires_grad=True)  # as far from the first as from the second
    diversity_loss(g, BANK).backward()
    assert g.grad.tolist() == [[-0.5, 0.0]]
    for where in ("generated", "bank"):
        g, bank = torch.zeros(1, 2), BANK.clone()
        (g if where == "generated" else bank)[0, 0] = torch.nan
        for mode in MODES:
            assert diversity_loss(g, bank, mode=mode).isnan()


def test_bank_of_another_dtype_and_empty_batch():
    g = torch.rand(2, 5, requires_grad=True)
    bank = torch.rand(4, 5).bfloat16()
    torch.testing.assert_close(diversity_loss(g, bank), diversity_loss(g, bank.float()))
    assert diversity_loss(g[:0], bank, reduction="none").shape == (0,)
    assert diversity_loss(g[:0], bank, reduction="sum", mode="softmin").item() == 0
    assert diversity_loss(g.half(), bank, mode="mean").dtype == torch.float32


def test_images_of_one_element():
    """[N] against [M]: each number is an image."""
    generated, bank = torch.tensor([0.0, 2.0, 5.0], requires_grad=True), torch.tensor([1.0, 4.5])
    values = diversity_loss(generated, bank, reduction="none")
    torch.testing.assert_close(values, torch.tensor([-1.0, -1.0, -0.5]))
    torch.testing.assert_close(torch.autograd.grad(values.sum(), generated)[0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(diversity_loss(generated, bank, metric="l2", mode="mean"), torch.tensor(-44.75 / 6))
    assert diversity_loss(generated[:0], bank, reduction="none").shape == (0,)


def test_mode_seeking_is_msgan():
    """The printed formula: lz = mean|I2 - I1| / mean|z2 - z1|, loss = 1 / (lz + 1e-5)."""
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.rand(3, 3, 5, 5, generator=generator) for _ in range(2))
    x, y = (torch.randn(3, 8, generator=generator) for _ in range(2))
    lz = torch.mean(torch.abs(b - a)) / torch.mean(torch.abs(y - x))
    torch.testing.assert_close(mode_seeking_loss(a, b, x, y), 1 / (lz + 1e-5))


def test_mode_seeking_is_dsgan():
    """The printed formula by hand: ratios 0.2 / (1 + eps) and 0.6 / (0.5 + eps), and a pair of equal noises."""
    a, b = torch.zeros(3, 2, requires_grad=True), torch.tensor([[0.1, 0.3], [0.6, 0.6], [1.0, 1.0]])
    x, y = torch.zeros(3, 1), torch.tensor([[1.0], [-0.5], [0.0]])
    loss = mode_seeking_loss(a, b, x, y, form="dsgan")
    assert loss.item() == pytest.approx(-(0.2 + 1.2) / 3, rel=1e-4)
    assert (torch.autograd.grad(loss, a)[0][2] == 0).all()
    assert mode_seeking_loss(a, b, x[:, 0], y[:, 0], form="dsgan") == loss  # [N] noises
    bounded = mode_seeking_loss(a, b, x, y, form="dsgan", margin=0.5)
    assert bounded.item() == pytest.approx(-(0.2 + 0.5) / 3, rel=1e-4)
    assert (torch.autograd.grad(bounded, a)[0][1:] == 0).all()


def test_mode_seeking_at_equal_noises_and_images():
    a, b = torch.rand(2, 4, requires_grad=True), torch.rand(2, 4, requires_grad=True)
    x, y = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    for images, noises, expected in (((a, b), (x, x), 0), ((a, a), (x, y), 1e5), ((a, a), (x, x), 0)):
        loss = mode_seeking_loss(*images, *noises)
        assert loss.item() == pytest.approx(expected)
        for g in torch.autograd.grad(loss, (*images, *noises)):
            assert g.isfinite().all() and (expected or (g == 0).all())


def test_mode_seeking_bad_batches():
    a, z = torch.rand(2, 4), torch.rand(3, 4)
    with pytest.raises(ValueError, match="z_a: expected one noise for each of the images"):
        mode_seeking_loss(a, a, z, z)
    assert mode_seeking_loss(a, a, a * torch.nan, a).isnan() and mode_seeking_loss(a * torch.nan, a, a, a + 1).isnan()
    with pytest.raises(ValueError, match="mean of an empty batch"):
        mode_seeking_loss(a[:0], a[:0], z[:0], z[:0])


def test_normalized_diversity_by_hand():
    """Shares by rows: of z [0, 1, 3] 1/4 3/4; 1/3 2/3; 3/5 2/5; of images [0, 1, 1] 1/2 1/2; 1 0; 1 0."""
    z, images = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0.0, 1.0, 1.0], requires_grad=True)
    wanted = torch.tensor([0.0, 0.25, 0.0, 2 / 3, 0.0, 0.4]).sum() / 6
    loss = normalized_diversity_loss(images, z, alpha=1.0)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(normalized_diversity_loss(images, z[:, 0], alpha=1.0, metric="l1"), wanted)
    # the pair (0, 2) alone has a gradient: -1/2 of it a unit away; equal images have none
    torch.testing.assert_close(torch.autograd.grad(loss, images)[0], torch.tensor([1 / 12, 0.0, -1 / 12]))
    for far in (0 * z, torch.full_like(z, 3.0)):
        assert normalized_diversity_loss(far.requires_grad_(), z) > 0
    assert normalized_diversity_loss(z[:1], z[:1]).item() == 0


def test_normalized_diversity_in_chunks(monkeypatch):
    """One row of differences at a time, recomputed in the backward, gives the same numbers."""
    g = torch.Generator().manual_seed(4)
    images, z = (torch.rand(6, size, generator=g, dtype=torch.float64).requires_grad_() for size in (50, 3))
    found = []
    for workspace in (2**28, 1):
        monkeypatch.setattr(pair_distances, "_WORKSPACE", workspace)
        with Largest() as largest:
            loss = normalized_diversity_loss(images, z, alpha=1.2)
            found.append([loss, *torch.autograd.grad(loss, (images, z))])
    assert largest.elements == 6 * 50
    torch.testing.assert_close(found[0], found[1])


def test_nearest_agrees_with_cdist():
    generator = torch.Generator().manual_seed(3)
    g, bank = (torch.rand(n, 3, 6, 6, generator=generator, dtype=torch.float64) for n in (5, 40))
    d = torch.cdist(g.flatten(1), bank.flatten(1))
    torch.testing.assert_close(diversity_loss(g, bank, metric="l2"), -(d.min(1).values ** 2 / 108).mean())
    cosine = F.cosine_similarity(g.flatten(1)[:, None], bank.flatten(1)[None], dim=-1)
    torch.testing.assert_close(diversity_loss(g, bank, metric="cosine"), -(1 - cosine.max(1).values).mean())
