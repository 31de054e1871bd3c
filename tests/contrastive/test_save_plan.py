"""The C++ forwards save what `save` says, in the shapes of the fakes; and the numbers that both languages have."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

from fastloss import core
from fastloss.contrastive import save_plan
from fastloss.contrastive.embeddings import TINY_NORM
from fastloss.contrastive.ops import softmax_loss as loss_op
from fastloss.contrastive.ops import softmax_stats as stats_op
from fastloss.contrastive.ops import softmax_stats_per_query as per_query_op
from fastloss.contrastive.options import Form
from fastloss.contrastive.save_plan import KEY, NEGATIVES, QUERY, SCALE

CSRC = pathlib.Path(__file__).parents[2] / "csrc"
ROWS, KEYS, DIM = 40, 70, 8

cpp_only = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")


def stats_inputs(save, keys=KEYS, **options):
    query, key = torch.randn(ROWS, DIM), torch.randn(keys, DIM)
    flags = dict.fromkeys(Form._fields, False) | options
    hardness = flags.pop("hardness", 0.0)
    return stats_op.Inputs(
        query, key, torch.ones(ROWS), *[None] * 6, **flags, hardness=hardness, workspace_mib=0.01, save=save
    )


def loss_inputs(save, saved_rows=0, keys=KEYS, symmetric=False, normalize=True, needs=QUERY + KEY + SCALE):
    query, key = torch.randn(ROWS, DIM), torch.randn(keys, DIM)
    return loss_op.Inputs(
        query, key, torch.ones(1), None, None, 1.0, True, symmetric, normalize, "mean", needs, save, saved_rows, 0.01
    )


def per_query_inputs(save, moments=False, hardness=0.0):
    query, negatives = torch.randn(ROWS, DIM), torch.randn(ROWS, 5, DIM)
    return per_query_op.Inputs(query, negatives, None, torch.ones(ROWS), None, True, moments, hardness, save)


CALLS = {
    stats_op.softmax_stats: [
        *(stats_inputs(save) for save in ("", "weighted_keys", "logits")),
        *(stats_inputs(save, moments=True, hardness=0.5) for save in ("", "weighted_keys", "logits")),
        *(stats_inputs(save, ROWS, symmetric=True, diagonal=True) for save in ("", "logits")),
        *(stats_inputs(save, ROWS, self_similarity=True) for save in ("", "logits")),
    ],
    loss_op.softmax_loss: [
        *(loss_inputs(save) for save in ("", "grads")),
        *(loss_inputs("row_grads", needs=needs) for needs in (QUERY, SCALE, QUERY + SCALE)),
        *(loss_inputs("logits", rows) for rows in (0, 5, ROWS)),
        *(loss_inputs("logits", rows, ROWS, True, False) for rows in (0, 32, ROWS)),
        loss_inputs("grads", 0, ROWS, True, needs=KEY),
    ],
    per_query_op.softmax_stats_per_query: [
        *(per_query_inputs(save) for save in ("", "weighted_keys", "logits")),
        *(per_query_inputs(save, True, 0.5) for save in ("", "weighted_keys", "logits")),
    ],
}


@cpp_only
@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.name)
def test_saved_shapes_are_those_of_the_fakes(op):
    for x in CALLS[op]:
        fake = op.fwd(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in x))
        for name, ours, theirs in zip(op.outputs, op.fwd(*x), fake, strict=True):
            assert (name, ours.shape, ours.dtype) == (name, theirs.shape, theirs.dtype), x


@cpp_only
def test_what_cpp_cannot_save():
    for op, inputs in (
        (stats_op.softmax_stats, stats_inputs),
        (loss_op.softmax_loss, loss_inputs),
        (per_query_op.softmax_stats_per_query, per_query_inputs),
    ):
        for save in ("exps", "everything"):
            with pytest.raises(RuntimeError, match=rf'{op.name}: save: the C\+\+ kernels cannot save "{save}"'):
                op.fwd(*inputs(save))
    with pytest.raises(RuntimeError, match="softmax_loss: saved_rows"):
        loss_op.softmax_loss.fwd(*loss_inputs("logits", ROWS + 1))
    with pytest.raises(RuntimeError, match='softmax_loss: save: "row_grads"'):
        loss_op.softmax_loss.fwd(*loss_inputs("row_grads", needs=KEY))
    with pytest.raises(RuntimeError, match='softmax_stats: save: "weighted_keys"'):
        stats_op.softmax_stats.fwd(*stats_inputs("weighted_keys", ROWS, symmetric=True))


def constant(file: str, name: str) -> float:
    found = re.search(rf"\b{name} = ([^,;]+)[,;]", (CSRC / file).read_text())
    assert found, f"{name} is not in {file}"
    return float(found[1])


@pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources")
def test_numbers_that_both_languages_have():
    for file, numbers in {
        "core/constants.h": {"kTinyNorm": TINY_NORM},
        "contrastive/logit_matrix.h": {"kTileRows": save_plan.TILE_ROWS},
        "contrastive/softmax_loss.cpp": {"kLeastRows": save_plan.LEAST_ROWS, "kChunkMiB": save_plan.GRADS_MIB},
        "contrastive/softmax_loss.h": {"kQuery": QUERY, "kKey": KEY, "kScale": SCALE, "kNegatives": NEGATIVES},
        "contrastive/siglip.cpp": {
            "kImage": save_plan.IMAGE, "kText": save_plan.TEXT, "kScaleAndBias": save_plan.SCALE_AND_BIAS
        },
    }.items():  # fmt: skip
        assert {name: constant(file, name) for name in numbers} == numbers
