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


def against_other_embeddings(draw):
    features, labels = embeddings(draw)
    rows = draw.size(4, 30)
    other, other_labels = draw.normal(rows, features.shape[1]), draw.integers(4, rows)
    other_labels[:2] = torch.tensor([0, 1])
    return [features, labels, other, other_labels]


@names
def test_against_other_embeddings(name):
    """Those that are the batch's own rows again are their positives too."""
    for draw in Draws(32):
        features, labels, other, other_labels = against_other_embeddings(draw)
        if draw.one_of(True, False):
            other, other_labels = features.clone(), labels.clone()
        pair = [lambda e, y, r, z, f=f: f(e, y, ref_emb=r, ref_labels=z) for f in made(name, temperature=0.2)]
        draw.compare(*pair, [features, labels, other, other_labels])


MINERS = [miners.BatchEasyHardMiner(), miners.MultiSimilarityMiner(), miners.PairMarginMiner(pos_margin=0.4),
          miners.TripletMarginMiner(type_of_triplets="all")]  # fmt: skip


@pytest.mark.parametrize("against", [False, True])
def test_pairs_of_a_miner(against):
    """Of NT-Xent, pairs and triplets, whose pairs come many times. Rows without a negative among them have loss 0."""
    for draw in Draws(40):
        features, labels, *other = against_other_embeddings(draw) if against else embeddings(draw)
        miner = draw.one_of(*MINERS)
        pairs = miner(features.float(), labels, *(other and [other[0].float(), other[1]]))
        if draw.one_of(True, False):
            first, second = draw.size(2, 40), draw.size(2, 40)
            pairs = tuple(p[: second if i > 1 and len(pairs) == 4 else first] for i, p in enumerate(pairs))

        def call(loss, e, y, *o, pairs=pairs):
            return loss(e, y, pairs, *(o or ()))

        loss = made("NTXentLoss", temperature=draw.one_of(0.1, 0.5))
        draw.compare(*(lambda *t, f=f: call(f, *t) for f in loss), [features, labels, *other])


DISTANCES = [
    lambda: distances.LpDistance(),
    lambda: distances.LpDistance(power=2),
    lambda: distances.SNRDistance(),
    lambda: distances.LpDistance(power=2, normalize_embeddings=False),
    lambda: distances.LpDistance(p=1),
]


@names
def test_other_distances(name):
    """A squared distance is a product and a number for each reference; others are NT-Xent's as a matrix."""
    for draw in Draws(40, (torch.float32, torch.float32, torch.float64)):
        distance = draw.one_of(*(DISTANCES if name == "NTXentLoss" else [DISTANCES[1], DISTANCES[3]]))()
        pair = made(name, distance=distance, temperature=draw.one_of(0.5, 1.0))
        if draw.one_of(True, False):
            draw.compare(*pair, list(embeddings(draw)))
        else:
            pair = [lambda e, y, r, z, f=f: f(e, y, ref_emb=r, ref_labels=z) for f in pair]
            draw.compare(*pair, against_other_embeddings(draw))


def test_what_is_the_librarys():
    """SupCon's of pairs that come twice, and of distances that are no product; not of pairs that a miner chose."""
    for draw in Draws(4, (torch.float32, torch.float64)):
        features, labels = embeddings(draw)
        pairs = miners.BatchEasyHardMiner()(features.float(), labels)
        pair = made("SupConLoss")
        draw.compare(*(lambda e, y, f=f, p=pairs: f(e, y, p) for f in pair), [features, labels])
        pairs = tuple(side.repeat(2) for side in pairs)
        draw.compare(*(lambda e, y, f=f, p=pairs: f(e, y, p) for f in pair), [features, labels], quiet=False)
        draw.compare(*made("SupConLoss", distance=distances.LpDistance()), [features, labels], quiet=False)


@names
def test_a_memory_of_batches(name):
    """Values and gradients, the batch's own rows among the memory's, which are no positives of themselves."""
    draw = torch.Generator().manual_seed(0)
    memories = [losses.CrossBatchMemory(loss, embedding_size=8, memory_size=20) for loss in made(name, temperature=0.2)]
    _common._said.clear()
    for step in range(5):
        batch, labels, found = torch.randn(8, 8, generator=draw), torch.arange(8) % 3, []
        for memory in memories:
            features = batch.clone().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                value = memory(features, labels, enqueue_mask=torch.arange(8) > 3 if step == 4 else None)
            value.backward()
            found.append((value.detach(), features.grad))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@names
def test_statistics_of_the_distance(name):
    features, labels = torch.randn(9, 8), torch.arange(9) % 3
    found = []
    for loss in made(name, distance=distances.CosineSimilarity(collect_stats=True)):
        loss(features, labels)
        found.append([getattr(loss.distance, stat) for stat in loss.distance._record_these_stats])
    assert found[0] == found[1] and 1.0 == pytest.approx(found[0][2])


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
