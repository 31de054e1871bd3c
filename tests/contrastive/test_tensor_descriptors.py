"""Kernels with tensor descriptors (the copy engine of sm_90), interpreted: what they read and write, edges too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastloss import clip_loss, core, info_nce
from fastloss.core import plans

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not core.is_interpreting(), reason="on a device the tile table says where descriptors are used"),
]
LOSSES = {
    "clip": lambda q, k: clip_loss(q, k, logit_scale=20.0),
    "clip, no exponentials kept": lambda q, k: clip_loss(q, k, logit_scale=20.0, workspace_mib=1e-3),
    # rows so far apart that exponentials of one exponent serve no column: these tiles are made again
    "clip, far apart": lambda q, k: clip_loss(q * torch.linspace(1, 300, len(q)).to(q)[:, None], k, logit_scale=20.0),
    "info_nce": lambda q, k: info_nce(q, k, temperature=0.05),
}


def results(loss, rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    query, key = (F.normalize(torch.randn(rows, 24, generator=generator), dim=1) for _ in range(2))
    query, key = ((t.to(dtype)).requires_grad_() for t in (query, key))
    with core.use_backend("triton"):
        value = loss(query, key)
    return [value.detach(), *torch.autograd.grad(value, (query, key))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_descriptors_give_what_pointers_give(monkeypatch, name, dtype):
    from fastloss.contrastive.kernels import logit_matrix, tile_configs

    monkeypatch.setattr(plans, "ENABLED", False)  # a replayed call asks for no tile
    best = tile_configs.best_tile
    used = []

    def with_descriptors(*args, **options):
        tile, programs = best(*args, **options)
        used.append(tile.operands)
        return replace(tile, operands=tile_configs.DESCRIPTORS), programs

    for rows in (16, 37):
        expected = results(LOSSES[name], rows, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(logit_matrix, "best_tile", with_descriptors)
            got = results(LOSSES[name], rows, dtype)
        assert used and all(map(torch.equal, got, expected)), rows


@pytest.mark.parametrize("width", [16, 48])
def test_exponentials_are_found_where_wide_tiles_have_put_them(monkeypatch, width):
    """Tiles as wide as a device's: what the forward saves by its tiles' columns, the backward reads by its own."""
    from fastloss.contrastive.kernels import logit_matrix, tile_configs

    monkeypatch.setattr(plans, "ENABLED", False)
    wide = tile_configs.Tile(128, 128, 16, tile_configs.DESCRIPTORS, True, 4, 3)
    monkeypatch.setattr(logit_matrix, "best_tile", lambda *args, **options: (wide, 4))
    generator = torch.Generator().manual_seed(0)
    pair = [F.normalize(torch.randn(256, width, generator=generator), dim=1).bfloat16() for _ in range(2)]
    gradients = []
    for backend in ("triton", "reference"):
        given = [t.clone().requires_grad_() for t in pair]
        with core.use_backend(backend):
            gradients.append(torch.autograd.grad(clip_loss(*given, logit_scale=20.0), given))
    for got, expected in zip(*gradients, strict=True):
        error = (got.float() - expected.float()).norm() / expected.float().norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps
