"""The reference training system: model, losses of a step, loop, checkpoints, resuming, reports."""

from __future__ import annotations

import math
import os
import signal
import sys
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from fastloss import MemoryBank, core  # noqa: E402
from fastloss.recipes.data.samples import caption_ids  # noqa: E402
from fastloss.recipes.data.tokenizer import ByteTokenizer, WordTokenizer  # noqa: E402
from fastloss.recipes.imagen.build import generate, load_model  # noqa: E402
from fastloss.recipes.imagen.config import (  # noqa: E402
    WEIGHTS,  # noqa: E402
    Config,
    parse_weights,
)
from fastloss.recipes.imagen.losses import ImagenLosses, make_views  # noqa: E402
from fastloss.recipes.imagen.model import ImageDecoder, ImageEncoder, Imagen, PretrainedTextEncoder, TextEncoder  # noqa: E402
from fastloss.recipes.imagen.train import Trainer  # noqa: E402
from fastloss.recipes.training.checkpoint import load_checkpoint  # noqa: E402
from fastloss.recipes.training.interrupt import Interrupted  # noqa: E402
from fastloss.recipes.training.metrics import read_metrics  # noqa: E402

CAPTIONS = ["a bold handwritten seven leaning right", "a thin handwritten one upright", "a handwritten two upright"]


def small(out, **changes):
    options = {"out": str(out), "steps": 4, "batch_size": 8, "dim": 16, "depth": 1, "log_every": 2, "val_every": 100}
    return Config(**(options | changes))


def make_small(size=32, channels=1, z_dim=4):
    tokenizer = WordTokenizer.from_captions(CAPTIONS)
    shape = {"size": size, "channels": channels, "dim": 16, "emb_dim": 16, "z_dim": z_dim}
    return Imagen(TextEncoder(tokenizer, 16, 16, depth=1), ImageDecoder(**shape, depth=1), ImageEncoder(**shape))


def trained_parts(trainer):
    return [p.detach().clone() for p in trainer.trained]


# model


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (64, 3), (128, 3)])
def test_model_makes_images_of_every_size(size, channels):
    torch.manual_seed(0)
    model = make_small(size, channels)
    images = model(CAPTIONS)
    assert images.shape == (3, channels, size, size)
    assert 0 <= images.min() and images.max() <= 1
    assert model.image_encoder(images).emb.shape == (3, 16)


def test_z_and_words_change_the_image_and_padding_does_not():
    torch.manual_seed(0)
    model = make_small().eval()
    z = torch.randn(1, 4)
    one = model(CAPTIONS[:1], z)
    assert (one - model(CAPTIONS[:1], -z)).abs().max() > 1e-3
    assert (one - model(CAPTIONS[1:2], z)).abs().max() > 1e-4
    ids, mask = model.text_encoder.encode(CAPTIONS[:1])
    cut = int(mask.sum())
    torch.testing.assert_close(model((ids[:, :cut], mask[:, :cut]), z), one, rtol=1e-4, atol=1e-6)


def test_generation_follows_the_seed_alone():
    model = make_small()
    before = torch.get_rng_state()
    first = generate(model, CAPTIONS, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert torch.equal(first, generate(model, CAPTIONS, seed=3))
    assert not torch.equal(first, generate(model, CAPTIONS, seed=4))
    assert model.training


def test_byte_tokenizer_and_unknown_size():
    encoder = TextEncoder(ByteTokenizer(max_length=24), 16, 8, depth=1)
    assert encoder(["naïve ✓", ""]).emb.isfinite().all()
    with pytest.raises(ValueError, match="size: expected one of"):
        ImageDecoder(size=48)


def test_pretrained_text_encoder_is_frozen(monkeypatch):
    class Tokenizer:
        def __call__(self, captions, **options):
            assert options["truncation"] and options["max_length"] == 64
            ids = torch.ones(len(captions), 5, dtype=torch.int64)
            return {"input_ids": ids, "attention_mask": ids.clone()}

    class Model(torch.nn.Module):
        config = types.SimpleNamespace(hidden_size=12, model_type="bert")

        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(3, 12)

        def forward(self, input_ids, attention_mask):
            return types.SimpleNamespace(last_hidden_state=self.embed(input_ids))

    auto = [types.SimpleNamespace(from_pretrained=lambda name, make=make: make()) for make in (Tokenizer, Model)]
    fake = types.ModuleType("transformers")
    fake.AutoTokenizer, fake.AutoModel = auto
    monkeypatch.setitem(sys.modules, "transformers", fake)
    encoder = PretrainedTextEncoder("some/model", dim=16, emb_dim=8).train()
    features = encoder(CAPTIONS)
    assert features.emb.shape == (3, 8) and features.tokens.shape == (3, 5, 16)
    features.emb.sum().backward()
    assert not encoder.model.training and encoder.model.embed.weight.grad is None
    assert encoder.project.weight.grad is not None
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        PretrainedTextEncoder("some/model")


# losses of a step


def views_of_batch(model, batch=6):
    captions = [CAPTIONS[i % 3] for i in range(batch)]
    image = torch.rand(batch, 1, 32, 32)
    return make_views(model, image, model.text_encoder.encode(captions)), image, caption_ids(captions)


def test_parts_agree_with_losses_written_by_hand():
    torch.manual_seed(0)
    views, image, ids = views_of_batch(make_small())
    names = ("contrastive", "pixel", "mode_seeking", "attention", "prior")
    losses = ImagenLosses({name: 0.0 for name in WEIGHTS} | {name: 0.5 for name in names})
    total, parts = losses(views, image, ids)
    assert set(parts) == set(names)

    def nce(image_emb):
        logits = F.normalize(views.text.emb, dim=1) @ F.normalize(image_emb, dim=1).T / 0.1
        same = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)
        logits, labels = logits.masked_fill(same, -math.inf), torch.arange(len(ids))
        return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))

    def attention(pair):
        logits = pair.q @ pair.k.transpose(-1, -2) / pair.q.shape[-1] ** 0.5
        return logits.masked_fill(~views.text.mask[:, None, None, :], -1e9).log_softmax(-1)

    a, b = attention(views.attention_a), attention(views.attention_b)
    distance = (views.image_a - views.image_b).abs().mean() / (views.z_a - views.z_b).abs().mean()
    normal = torch.distributions.Normal
    posterior = normal(views.real.mu, (0.5 * views.real.log_var).exp())
    by_hand = {
        "contrastive": 0.5 * (nce(views.real.emb) + nce(views.emb_b)),
        "pixel": F.mse_loss(views.image_a, image),
        "mode_seeking": 1 / (distance + 1e-5),
        "prior": torch.distributions.kl_divergence(posterior, normal(0.0, 1.0)).sum(1).mean(),
    }
    for name, value in by_hand.items():
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-5, atol=1e-6)
    symmetric = ((a.exp() - b.exp()) * (a - b)).sum(-1).mean()
    assert min(abs(parts["attention"] - symmetric), abs(parts["attention"] - symmetric / 2)) < 1e-6
    torch.testing.assert_close(total, 0.5 * sum(parts.values()), rtol=1e-5, atol=1e-6)


def test_generated_image_is_judged_by_frozen_weights():
    torch.manual_seed(0)
    model = make_small()
    views, image, ids = views_of_batch(model)
    views.emb_b.sum().backward()
    grads = [p.grad for p in model.image_encoder.parameters() if p.grad is not None]
    assert not any(g.abs().max() > 0 for g in grads)
    assert any(p.grad is not None for p in model.image_decoder.parameters())


def test_weight_zero_is_not_computed_and_all_zero_raises():
    losses = ImagenLosses({name: 0.0 for name in WEIGHTS if name != "pixel"})
    assert list(losses.weights) == ["pixel"]
    with pytest.raises(ValueError, match="all losses have weight 0"):
        ImagenLosses({name: 0.0 for name in WEIGHTS})
    with pytest.raises(ValueError, match="perceptual"):
        ImagenLosses()


def test_memory_bank_keeps_the_latest_and_adds_negatives():
    bank = MemoryBank(4, 2)
    for start in (0, 3):
        emb = torch.arange(start, start + 3.0)[:, None].expand(3, 2)
        bank.push(emb, torch.arange(start, start + 3))
    emb, ids = bank.stored()
    assert sorted(ids.tolist()) == [2, 3, 4, 5] and torch.equal(emb[:, 0], ids.float())
    torch.manual_seed(0)
    only = {name: 0.0 for name in WEIGHTS} | {"contrastive": 1.0}
    views, image, ids = views_of_batch(make_small())
    same = torch.zeros_like(ids)
    losses = ImagenLosses(only, bank=6, emb_dim=16)
    for _ in range(2):  # equal captions are no negatives, of the batch or of the bank
        assert losses(views, image, same)[0] == 0
    losses.bank.push(views.real.emb.detach(), same + 1)
    text, real = F.normalize(views.text.emb, dim=1), F.normalize(views.real.emb, dim=1)
    logits = text @ real.T / 0.1
    by_hand = 0.0
    for emb in (real, F.normalize(views.emb_b, dim=1)):
        positive = (text * emb).sum(1, keepdim=True) / 0.1
        by_hand += 0.25 * F.cross_entropy(torch.cat([positive, logits], 1), same)  # the other direction has none
    torch.testing.assert_close(losses(views, image, same)[0], by_hand, rtol=1e-5, atol=1e-6)
    copy = ImagenLosses(only, bank=6, emb_dim=16)
    copy.bank.load_state_dict(losses.bank.state_dict())
    assert copy.bank.pushed == losses.bank.pushed


def test_caption_ids_are_fixed():
    ids = caption_ids(["a", "b", "a"])
    assert ids[0] == ids[2] != ids[1] and ids.dtype == torch.int64
    assert ids[0] == caption_ids(["a"])[0]


# configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
        ({"temperature": math.nan}, "temperature"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"data": "cats"}, "data: expected digits"),
        ({"size": 33}, "size: expected one of"),
        ({"dim": 20}, "dim: expected a multiple of 16"),
        ({"losses": "slow"}, "losses: expected one of"),
        ({"weights": "beauty=1"}, "unknown loss 'beauty'"),
        ({"weights": "pixel"}, "expected name=number"),
        ({"weights": "pixel=nan"}, "finite weight"),
        ({"channels": 3}, "the digits are grey"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_weights_are_parsed():
    assert parse_weights(" pixel = 1, prior=2e-3,") == {"pixel": 1.0, "prior": 0.002}


# training


def test_fast_and_reference_losses_give_one_curve(tmp_path):
    curves = {}
    for losses in ("fast", "reference"):
        Trainer(small(tmp_path / losses, losses=losses, bank=16), quiet=True).run()
        curves[losses] = read_metrics(tmp_path / losses / "metrics.csv")
    assert curves["fast"]["step"] == [1, 2, 3, 4]
    for name in ("loss", *WEIGHTS):
        torch.testing.assert_close(
            torch.tensor(curves["fast"][name]), torch.tensor(curves["reference"][name]), rtol=2e-4, atol=1e-6
        )


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "relobralo"])
def test_resumed_run_repeats_the_uninterrupted_one(tmp_path, weighting):
    options = {"steps": 6, "bank": 12, "weighting": weighting}
    whole = Trainer(small(tmp_path / "whole", **options), quiet=True)
    whole.run()
    part = Trainer(small(tmp_path / "part", **options), quiet=True)
    steps = part._batches()
    for _ in range(3):
        part.train_step(next(steps))
    part.save()
    torch.manual_seed(99)
    resumed = Trainer.resume(tmp_path / "part", {}, quiet=True)
    assert resumed.step == 3
    resumed.run()
    for a, b in zip(trained_parts(whole), trained_parts(resumed), strict=True):
        assert torch.equal(a, b)
    assert whole.figures == resumed.figures


def test_resume_crosses_epochs_and_refuses_other_settings(tmp_path):
    options = {"steps": 6, "batch_size": 600}  # two batches an epoch
    whole = Trainer(small(tmp_path / "whole", **options), quiet=True)
    batches = whole._batches()
    seen = [next(batches)["caption"] for _ in range(5)]
    part = Trainer(small(tmp_path / "part", **options), quiet=True)
    part.step = 4
    part.save()
    resumed = Trainer.resume(tmp_path / "part", {"steps": 7}, quiet=True)
    assert resumed.config.steps == 7
    assert next(resumed._batches())["caption"] == seen[4]
    with pytest.raises(ValueError, match="batch_size: the run in"):
        Trainer.resume(tmp_path / "part", {"batch_size": 9}, quiet=True)


def test_interrupt_saves_and_resume_ends_with_every_row_once(tmp_path, monkeypatch):
    trainer = Trainer(small(tmp_path, steps=5), quiet=True)
    step = trainer.train_step

    def interrupted(batch):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(batch)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        trainer.run()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,1\n")  # a row cut short by a crash
    Trainer.resume(tmp_path, {}, quiet=True).run()
    assert read_metrics(tmp_path / "metrics.csv")["step"] == [1, 2, 3, 4, 5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_early_stopping_keeps_the_best(tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr("fastloss.recipes.imagen.train.validate", lambda *_: {"score": next(scores)})
    trainer = Trainer(small(tmp_path, steps=50, val_every=1, patience=2, weights="perceptual=0"), quiet=True)
    trainer.run()
    assert trainer.step == 4 and trainer.best == 0.5
    assert load_checkpoint(tmp_path)["progress"]["step"] == 2
    model, config = load_model(tmp_path)
    assert not model.training and generate(model, CAPTIONS, 0).shape == (3, 1, 32, 32)


def test_quality_aimed_for_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fastloss.recipes.imagen.train.validate", lambda *_: {"score": 0.9})
    trainer = Trainer(small(tmp_path, steps=50, val_every=3, quality=0.8), quiet=True)
    trainer.run()
    assert trainer.step == 3


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = Trainer(small(tmp_path), quiet=True)
    with torch.no_grad():
        trainer.model.image_decoder.position.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        trainer.run()


def test_amp_and_compile_train(tmp_path):
    trainer = Trainer(small(tmp_path, amp=True, steps=2), quiet=True)
    trainer.run()
    assert all(math.isfinite(v) for v in read_metrics(tmp_path / "metrics.csv")["loss"])


def test_backend_force_ends_with_the_step(tmp_path):
    Trainer(small(tmp_path, losses="reference", steps=1), quiet=True).run()
    assert core.backends.state.forced == (os.environ.get("FASTLOSS_BACKEND") or None)
