"""The tensors of a call by the names of its positional parameters: a new loss of known names needs no row here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fuzz.drawer import Drawer
from tests.fuzz.values import Spelled, T

RANKS = {"pixel_loss": (0, 1, 2, 3, 4, 5), "smoothness_loss": (4, 5), "image_loss": (4, 4, 5)}  # else images are 4-D


def contrastive(d: Drawer, name: str) -> tuple:
    """query, key, and some negatives."""
    rows, width = d.size(most=300 if d.large else 40), max(d.size(1, 300 if d.large else 40), 1)
    keys = rows if d.chance(0.6) else rows + d.size(most=20)
    query = d.tensor(rows, width)
    key = d.beside(query) if keys == rows else d.tensor(keys, width)
    d.sizes = {"rows": rows, "keys": keys, "columns": keys, "per_sample": False, "width": width}
    if d.chance(0.5):
        return query, key
    count = d.size(most=50)
    per_sample = d.chance(0.5)
    negatives = d.tensor(rows, count, width) if per_sample else d.tensor(count, width)
    d.sizes |= {"per_sample": per_sample, "columns": keys if per_sample else keys + count, "negatives": count}
    return query, key, negatives


def paired(d: Drawer, name: str) -> tuple:
    """Two sets of embeddings, row by row."""
    rows, width = d.size(most=300 if d.large else 40), max(d.size(1, 300 if d.large else 40), 1)
    one = d.tensor(rows, width)
    d.sizes = {"rows": rows, "texts": rows, "keys": rows, "columns": rows}
    if name == "siglip_loss" and d.chance(0.2):  # negative_only: any number of texts
        d.sizes["texts"] = d.size(most=40)
        return one, d.tensor(d.sizes["texts"], width)
    return one, d.beside(one)


def labelled(d: Drawer, name: str) -> tuple:
    rows, width = d.size(most=300 if d.large else 50), max(d.size(1, 100), 1)
    d.sizes = {"rows": rows, "width": width}
    return d.tensor(rows, width), d.integers(d.pick(1, 2, 4, max(rows, 1)), rows, low=d.pick(0, 0, -3))


def layers(d: Drawer, name: str) -> tuple:
    """Two lists of features, and lists of weights of their channels where the function has them."""
    samples = d.size(most=6)
    count = d.pick(1, 1, 2, 3, 5)
    flat = name == "feature_distance" and d.chance(0.3)
    shapes = []
    for _ in range(count):
        sides = [d.size(most=40 if d.large else 12) for _ in range(d.pick(0, 1, 2, 3))] if flat else [
            d.size(low=0 if d.chance(0.1) else 1, most=60 if d.large else 20) for _ in range(2)]  # fmt: skip
        shapes.append((samples, *sides) if flat else (samples, d.size(0 if d.chance(0.1) else 1, 70), *sides))
    features = [d.tensor(*shape) for shape in shapes]
    targets = [d.beside(f) for f in features]
    d.sizes = {"layers": count, "features": features}
    lists: list[Any] = [features, targets]
    if name in ("lpips_distance", "dists_distance"):
        for _ in range(1 if name == "lpips_distance" else 2):
            weights = [channel_weights(d, f.shape[1]) for f in features]
            lists.append(None if d.chance(0.3) else weights)
    if d.spells and d.chance(0.3):
        lists = [Spelled("Rest", v) if isinstance(v, list) and d.chance(0.5) else v for v in lists]
    elif d.chance(0.2):
        lists = [tuple(v) if isinstance(v, list) else v for v in lists]
    while lists[-1] is None and name == "dists_distance" and d.chance(0.7):
        lists.pop()
    return tuple(lists)


def channel_weights(d: Drawer, channels: int) -> T:
    shape = (1, channels, 1, 1) if d.chance(0.3) else (channels,)
    return d.tensor(*shape, grad=d.chance(0.3), fill=d.pick("uniform", "uniform", "ones", "zeros", "rectified"))


def tapped(d: Drawer, name: str) -> tuple:
    one = d.tensor(*[d.size(most=12) for _ in range(d.pick(1, 2, 3, 4, 4, 5))])
    d.sizes = {"layers": 1, "features": [one]}
    return one, d.beside(one)


def feature_map(d: Drawer, name: str) -> tuple:
    return (d.tensor(*(d.size(most=20) for _ in range(4))),)


def image_shape(d: Drawer, ranks: tuple[int, ...]) -> tuple[int, ...]:
    rank = d.pick(*ranks)
    side = 200 if d.large and rank == 4 else 60 if rank < 5 else 8
    sizes = [d.size(0 if d.chance(0.2) else 1, 4), d.size(0 if d.chance(0.2) else 1, 5)]
    return tuple((sizes + [d.size(0 if d.chance(0.2) else 1, side) for _ in range(3)])[:rank])


def images(d: Drawer, name: str) -> tuple:
    shape = image_shape(d, RANKS.get(name, (4,)))
    d.sizes = {"shape": shape}
    target = d.tensor(*shape)
    return target, d.beside(target)


def image(d: Drawer, name: str) -> tuple:
    shape = image_shape(d, RANKS.get(name, (4,)))
    d.sizes = {"shape": shape}
    return (d.tensor(*shape),)


def bank(d: Drawer, name: str) -> tuple:
    trailing = [d.size(1, 12) for _ in range(d.pick(0, 1, 2, 3))]
    generated = d.tensor(d.size(most=12), *trailing)
    return generated, d.tensor(d.size(1, 30), *trailing, grad=None)


def noises(d: Drawer, name: str) -> tuple:
    count = d.size(0 if d.chance(0.1) else 1, 8)
    one, z = (d.tensor(count, *(d.size(1, 12) for _ in range(d.pick(0, 1, 2)))) for _ in range(2))
    return one, d.beside(one), z, d.beside(z)


def images_and_noises(d: Drawer, name: str) -> tuple:
    count = d.size(0 if d.chance(0.1) else 1, 8)
    one, z = (d.tensor(count, *(d.size(1, 12) for _ in range(d.pick(0, 1, 2)))) for _ in range(2))
    return one, z


def attention(d: Drawer, name: str) -> tuple:
    """Maps, or lists of them: of logits, or as probabilities."""
    count = d.pick(0, 0, 0, 1, 2, 3)
    lead = [d.size(most=4) for _ in range(d.pick(0, 1, 2))]
    shapes = [(*lead, d.size(most=12), d.size(1, 40)) for _ in range(max(count, 1))]
    one = [d.tensor(*shape, fill=d.pick("uniform", "uniform", "normal", d.fill())) for shape in shapes]
    two = [d.beside(t) if d.chance(0.6) else d.tensor(*t.shape, fill="uniform") for t in one]
    d.sizes = {"layers": count, "shape": shapes[0], "lists": count > 0}
    if not count:
        return one[0], two[0]
    return (d.sequence(one), d.sequence(two)) if d.chance(0.3) else (one, two)


def queries_and_keys(d: Drawer, name: str) -> tuple:
    batch, heads, queries, keys = d.size(most=3), d.size(1, 3), d.size(most=12), d.size(1, 20)
    widths = [d.size(1, 16)] * 2 if d.chance(0.7) else [d.size(1, 16), d.size(1, 16)]
    d.sizes = {"shape": (batch, heads, queries, keys)}
    one = [d.tensor(batch, heads, rows, widths[0]) for rows in (queries, keys)]
    two = [d.tensor(batch, heads, rows, widths[1]) for rows in (queries, keys)]
    if widths[0] == widths[1] and d.chance(0.6):
        two = [d.beside(t) for t in one]
    return (*one, *two)


def parts(d: Drawer, name: str) -> tuple:
    """The named parts of a CompositeLoss, of several steps."""
    names = d.rng.sample(["pixel", "contrastive", "perceptual", "gan"], d.pick(1, 2, 3, 4))
    d.sizes = {"names": names}
    steps = d.pick(1, 1, 2, 3, 5)
    return ([{part: d.tensor() for part in names} for _ in range(steps)],)


INPUTS: dict[tuple[str, ...], Callable[[Drawer, str], tuple]] = {
    ("query", "key", "negatives"): contrastive,
    ("text_emb", "image_emb", "negative_embs"): contrastive,
    ("image", "text"): paired,
    ("view_a", "view_b"): paired,
    ("features", "labels"): labelled,
    ("features", "targets"): layers,
    ("features", "targets", "lin_weights"): layers,
    ("features", "targets", "alphas", "betas"): layers,
    ("feature", "target"): tapped,
    ("features",): feature_map,
    ("image", "image_pred"): images,
    ("image_pred",): image,
    ("generated", "bank"): bank,
    ("images_a", "images_b", "z_a", "z_b"): noises,
    ("images", "z"): images_and_noises,
    ("a", "b"): attention,
    ("q1", "k1", "q2", "k2"): queries_and_keys,
    ("steps",): parts,
}
