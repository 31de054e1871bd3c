"""pytorch_metric_learning's NTXentLoss and SupConLoss and their drop-ins."""

from __future__ import annotations

import warnings

import pytest
import torch

import fastloss
from fastloss.compat import _common
from tests.compat.tools import Draws

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402

from fastloss.compat import pytorch_metric_learning as ours  # noqa: E402

theirs = {"NTXentLoss": losses.NTXentLoss, "SupConLoss": losses.SupConLoss}
names = pytest.mark.parametrize("name", list(theirs))


def made(name, **options):
    return [kind(**options) for kind in (getattr(ours, name), theirs[name])]


def embeddings(draw, labels=4):
    rows = draw.size(9, 24)
    classes = draw.integers(labels, rows)
    classes[:4] = torch.tensor([0, 0, 1, 1])  # two classes with two rows each
    return draw.normal(rows, draw.size(8, 24)), classes


@names
def test_losses(name):
    for draw in Draws(48):
        options = {"temperature": draw.one_of(0.1, 0.5, 1.0)}
        if draw.one_of(True, False):
            options["distance"] = draw.one_of(
                distances.CosineSimilarity(),
                distances.DotProductSimilarity(normalize_embeddings=draw.one_of(True, False)),
            )
        if draw.one_of(True, False):
            options["reducer"] = draw.one_of(reducers.MeanReducer(), reducers.DoNothingReducer())
        elif draw.one_of(True, False):
            options["embedding_regularizer"] = regularizers.LpRegularizer()
        features, labels = embeddings(draw)
        if options.get("distance") is not None and not options["distance"].normalize_embeddings:
            features = 0.1 * features
        pair = made(name, **options)
        if isinstance(options.get("reducer"), reducers.DoNothingReducer):
            pair = [lambda e, y, f=f: f(e, y)["loss"]["losses"] for f in pair]
        draw.compare(*pair, [features, labels])


def test_nt_xent_against_other_embeddings():
    for draw in Draws(24):
        features, labels = embeddings(draw)
        rows = draw.size(4, 30)
        other, other_labels = draw.normal(rows, features.shape[1]), draw.integers(4, rows)
        other_labels[:2] = torch.tensor([0, 1])
        pair = [lambda e, y, r, z, f=f: f(e, y, ref_emb=r, ref_labels=z) for f in made("NTXentLoss", temperature=0.2)]
        draw.compare(*pair, [features, labels, other, other_labels])


@names
def test_two_views(name):
    """SelfSupervisedLoss, symmetric or not, around the drop-in."""
    for draw in Draws(12):
        symmetric = name == "SupConLoss" or draw.one_of(True, False)
        pair = [losses.SelfSupervisedLoss(f, symmetric=symmetric) for f in made(name, temperature=0.2)]
        draw.compare(*pair, [draw.normal(12, 16), draw.normal(12, 16)])


@names
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0], [0, 0], [0, 1]])
def test_batches_without_pairs_have_loss_0(name, labels):
    values = []
    for loss in made(name):
        features = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        value = loss(features, torch.tensor(labels))
        value.backward()
        values.append((value.detach(), features.grad))
    torch.testing.assert_close(*values)
    assert values[0][0] == 0


@names
def test_what_is_the_librarys(name):
    """Miners, other distances, and SupCon against other embeddings."""
    for draw in Draws(2):
        features, labels = embeddings(draw)
        pairs = miners.BatchEasyHardMiner()(features.float(), labels)
        draw.compare(*(lambda e, y, f=f, p=pairs: f(e, y, p) for f in made(name)), [features, labels], quiet=False)
        pair = made(name, distance=distances.LpDistance())
        draw.compare(*pair, [features, labels], quiet=False)
    if name == "SupConLoss":
        for draw in Draws(2):
            features, labels = embeddings(draw)
            pair = [lambda e, y, f=f: f(e, y, ref_emb=2 * e, ref_labels=y.clone()) for f in made(name)]
            draw.compare(*pair, [features, labels], quiet=False)


@names
def test_a_memory_of_batches(name):
    memories = [losses.CrossBatchMemory(loss, embedding_size=8, memory_size=16) for loss in made(name)]
    _common._said.clear()
    for _ in range(3):
        features, labels = torch.randn(8, 8), torch.arange(8) % 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            mine, other = (memory(features, labels) for memory in memories)
        assert torch.equal(mine, other)


def test_large_losses_are_exact():
    """87.3 is the most that theirs can say in float32."""
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    mine, other = (loss(features, torch.tensor([0, 0, 1, 1])) for loss in made("NTXentLoss", temperature=0.01))
    exact = theirs["NTXentLoss"](temperature=0.01)(features.double(), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=0)
    assert other < exact - 10


def test_attributes_wrappers_and_errors():
    mine, other = made("SupConLoss", temperature=0.3)
    assert isinstance(mine, theirs["SupConLoss"]) and mine.temperature == 0.3
    assert type(mine.reducer) is type(other.reducer) and type(mine.distance) is type(other.distance)
    _common._said.clear()
    for loss in (mine, other):
        with pytest.raises(ValueError):
            loss(torch.randn(4, 8), torch.arange(3))
        with pytest.raises(ValueError):
            loss(torch.randn(4, 8), None)


def test_patched():
    with fastloss.patch("pytorch_metric_learning"):
        loss = losses.SelfSupervisedLoss(losses.NTXentLoss())
        assert type(loss.loss) is ours.NTXentLoss
    assert losses.NTXentLoss is theirs["NTXentLoss"]
