"""sentence_transformers' ranking losses and their drop-ins, on embeddings and on a small encoder."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastloss.compat import _common
from tests.compat.tools import Draws

pytest.importorskip("sentence_transformers")
from sentence_transformers import util  # noqa: E402
from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402

from fastloss.compat import sentence_transformers as ours  # noqa: E402

FORMS = [
    {},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"directions": ("query_to_doc", "doc_to_query")},
    {"directions": ("query_to_doc", "query_to_query")},
    {"directions": ("query_to_doc", "doc_to_doc")},
    {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
]


def columns(draw):
    rows, dim = draw.size(8, 24), draw.size(8, 40)
    return [draw.normal(rows, dim) for _ in range(draw.one_of(2, 2, 3, 4))]


def options_of(draw):
    options = draw.one_of(*FORMS) | {"scale": draw.one_of(1.0, 5.0, 20.0)}
    if draw.one_of(True, False, False):
        options |= {"similarity_fct": util.dot_score, "scale": draw.one_of(0.05, 0.1)}
    return options


def test_multiple_negatives_ranking_loss():
    for draw in Draws(96):
        options = options_of(draw)
        pair = [m.MultipleNegativesRankingLoss(None, **options) for m in (ours, theirs)]
        draw.compare(*(lambda *e, f=f: f.compute_loss_from_embeddings(list(e), None) for f in pair), columns(draw))


def test_the_symmetric_loss():
    for draw in Draws(16):
        with pytest.warns(DeprecationWarning, match="MultipleNegativesSymmetricRankingLoss is deprecated"):
            pair = [m.MultipleNegativesSymmetricRankingLoss(None, scale=10.0) for m in (ours, theirs)]
        assert isinstance(pair[0], ours.MultipleNegativesRankingLoss)
        draw.compare(*(lambda *e, f=f: f.compute_loss_from_embeddings(list(e), None) for f in pair), columns(draw))


def test_what_is_the_librarys():
    """Penalties of hard negatives, and other similarities."""
    for draw in Draws(4):
        options = draw.one_of({"hardness_mode": "all_negatives", "hardness_strength": 2.0},
                              {"similarity_fct": util.euclidean_sim})  # fmt: skip
        pair = [m.MultipleNegativesRankingLoss(None, **options) for m in (ours, theirs)]
        fns = [lambda *e, f=f: f.compute_loss_from_embeddings(list(e), None) for f in pair]
        draw.compare(*fns, columns(draw), quiet=False)
    for loss in pair:
        with pytest.raises(ValueError, match="Expected at least 2 embeddings, got 1"):
            loss.compute_loss_from_embeddings([torch.randn(4, 8)], None)


class Encoder(torch.nn.Sequential):
    """As a SentenceTransformer is called, of vectors in place of tokens."""

    def forward(self, features):
        return features | {"sentence_embedding": super().forward(features["input_ids"])}


def encoder(dtype=torch.float32):
    torch.manual_seed(0)
    return Encoder(torch.nn.Linear(6, 8), torch.nn.Tanh()).to(dtype)


def gradients_of(loss, model, features):
    value = loss([dict(column) for column in features], None)
    return value.detach(), torch.autograd.grad(value, list(model.parameters()))


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_cache(form):
    """The same parameters' gradients as theirs, in mini-batches and without them."""
    features = [{"input_ids": x} for x in torch.randn(3, 11, 6, generator=torch.Generator().manual_seed(0))]
    found = []
    for module, name in ((ours, "Cached"), (theirs, "Cached"), (ours, "")):
        model = encoder()
        mini = {"mini_batch_size": 4} if name else {}
        loss = getattr(module, f"{name}MultipleNegativesRankingLoss")(model, scale=10.0, **mini, **form)
        _common._said.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            value = loss([dict(column) for column in features], None)
            value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-6)


def test_evaluation_and_what_has_no_gradient():
    loss = ours.CachedMultipleNegativesRankingLoss(encoder(), mini_batch_size=4)
    with torch.no_grad():
        value = loss([{"input_ids": torch.randn(9, 6)} for _ in range(2)], None)
    assert not value.requires_grad and value.isfinite()
    assert (
        loss.get_config_dict()
        == theirs.CachedMultipleNegativesRankingLoss(encoder(), mini_batch_size=4).get_config_dict()
    )


def gist(module, name, **options):
    """A loss of GIST without its constructor's tokenizers."""
    loss = getattr(module, name).__new__(getattr(module, name))
    torch.nn.Module.__init__(loss)
    names = {"temperature": 0.1, "margin_strategy": "absolute", "margin": 0.0, "contrast_anchors": True,
             "contrast_positives": True, "gather_across_devices": False, "mini_batch_size": 5,
             "mini_batch_num_tokens": None, "show_progress_bar": False, "must_retokenize": False}  # fmt: skip
    for key, value in (names | options).items():
        setattr(loss, key, value)
    loss.similarity_fct, loss.cross_entropy_loss = torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss()
    return loss


def test_gist():
    """Values and gradients of the cached loss, and the plain one on an encoder and a guide."""
    for draw in Draws(16, (torch.float32, torch.float64)):
        options = {"margin_strategy": draw.one_of("absolute", "relative"), "margin": draw.one_of(0.0, 0.1),
                   "contrast_anchors": draw.one_of(True, False)}  # fmt: skip
        embeddings, guides = columns(draw), columns(draw)
        guides = [torch.randn(len(embeddings[0]), 8, generator=draw.generator).to(draw.dtype) for _ in embeddings]
        pair = [gist(m, "CachedGISTEmbedLoss", **options) for m in (ours, theirs)]
        draw.compare(
            *(lambda *e, f=f, g=guides: f.calculate_loss([[x] for x in e], [[x.to(e[0])] for x in g]) for f in pair),
            embeddings,
        )
    features = [{"input_ids": x} for x in torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(0))]
    found = []
    for module in (ours, theirs):
        loss = gist(module, "GISTEmbedLoss")
        loss.model, loss.guide = encoder(), encoder().requires_grad_(False)
        found.append(gradients_of(loss, loss.model, features))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_another_similarity_of_gist():
    pair = [gist(m, "GISTEmbedLoss") for m in (ours, theirs)]
    for loss in pair:
        loss.similarity_fct = torch.nn.PairwiseDistance()
    assert torch.equal(*(loss.sim_matrix(torch.eye(3), torch.ones(2, 3)) for loss in pair))
