"""Drop-ins inside what people train with: compiled, exported, under autocast, checkpointed, and in others' trainers."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastloss

SCALE = 10.0


def pair(rows=8, dim=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=draw) for _ in range(2)]


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))


class Step(nn.Module):
    """An encoder and a library's loss of two views."""

    def __init__(self, loss, call=lambda loss, a, b: loss(a, b)):
        super().__init__()
        self.encoder, self.loss, self.call = encoder(), loss, call

    def forward(self, a, b):
        return self.call(self.loss, self.encoder(a), self.encoder(b))


LOSSES = {
    "clip": lambda: Step(pytest.importorskip("fastloss.compat.open_clip").ClipLoss(), lambda f, a, b: f(a, b, SCALE)),
    "siglip": lambda: Step(
        pytest.importorskip("fastloss.compat.open_clip").SigLipLoss(), lambda f, a, b: f(a, b, SCALE, -SCALE)
    ),
    "info_nce": lambda: Step(pytest.importorskip("fastloss.compat.info_nce").InfoNCE()),
    "nt_xent": lambda: Step(pytest.importorskip("fastloss.compat.lightly").NTXentLoss()),
}


def gradients(step, *inputs):
    step.zero_grad()
    value = step(*inputs)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in step.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip"])
def test_compiled_whole_for_all_batches(name):
    """One graph, traced for the first batch and not again for other numbers of rows."""
    step = LOSSES[name]()
    torch._dynamo.reset()
    traced = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=traced)
    counts = []
    for rows in (8, 12, 5):
        torch.testing.assert_close(gradients(compiled, *pair(rows)), gradients(step, *pair(rows)))
        counts.append(traced.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LOSSES))
def test_exported(name):
    step = LOSSES[name]()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(step, tuple(pair()), dynamic_shapes=({0: rows}, {0: rows}))
    torch.testing.assert_close(program.module()(*pair(5)), step(*pair(5)))


@pytest.mark.parametrize("name", list(LOSSES))
def test_autocast_and_a_gradient_scaler(name):
    """Gradients of a scaled loss of half-precision embeddings, unscaled, beside those of float32."""
    step, exact = LOSSES[name](), gradients(LOSSES[name](), *pair())
    optimizer, scaler = torch.optim.SGD(step.parameters(), lr=0.0), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", torch.bfloat16):
        value = step(*pair())
    assert value.dtype == torch.float32
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    found = [value.detach(), *(p.grad for p in step.parameters())]
    for got, wanted in zip(found, exact, strict=True):
        assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max() + 1e-3


@pytest.mark.parametrize("name", list(LOSSES))
def test_checkpointed(name):
    """The loss computed again in the backward, of activations made again."""
    step = LOSSES[name]()
    exact = gradients(step, *pair())
    step.zero_grad()
    value = checkpoint(step, *pair(), use_reentrant=False)
    value.backward()
    torch.testing.assert_close([value.detach(), *(p.grad for p in step.parameters())], exact)


def with_and_without(library, train):
    """The parameters that a training makes with the library's classes and with ours in their place."""
    found = []
    for swap in (contextlib.nullcontext(), fastloss.patch(library)):
        with swap, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            found.append([p.detach().clone() for p in train().parameters()])
    return found


@pytest.mark.slow
def test_lightning(tmp_path):
    lightning, lightly = pytest.importorskip("pytorch_lightning"), pytest.importorskip("lightly.loss")

    class SimCLR(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.loss = encoder(), lightly.NTXentLoss(temperature=0.3)

        def training_step(self, batch, _):
            return self.loss(self.encoder(batch[0]), self.encoder(batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train():
        model = SimCLR()
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair(32)), batch_size=8)
        trainer = lightning.Trainer(
            max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data)
        return model

    torch.testing.assert_close(*with_and_without("lightly", train), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_accelerate():
    accelerate, open_clip = pytest.importorskip("accelerate"), pytest.importorskip("open_clip")

    def train():
        accelerator = accelerate.Accelerator(cpu=True)
        model = Step(open_clip.ClipLoss(), lambda f, a, b: f(a, b, SCALE))
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for seed in range(4):
            optimizer.zero_grad()
            accelerator.backward(model(*pair(seed=seed)))
            optimizer.step()
        return model

    torch.testing.assert_close(*with_and_without("open_clip", train), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_sentence_transformers_trainer(tmp_path):
    """Transformers' Trainer, as sentence_transformers has it, on a bag of words."""
    library, tokenizers = pytest.importorskip("sentence_transformers"), pytest.importorskip("tokenizers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = [f"w{i}" for i in range(30)]
    vocabulary = {"[UNK]": 0} | {word: i + 1 for i, word in enumerate(words)}

    def train():
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        model = library.SentenceTransformer(
            modules=[StaticEmbedding(tokenizer, embedding_weights=torch.randn(31, 8))], device="cpu"
        )
        texts = {"anchor": [f"w{i} w{i + 1}" for i in range(24)], "positive": [f"w{i + 1} w{i + 2}" for i in range(24)]}
        arguments = library.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=6, report_to="none", use_cpu=True,
            learning_rate=0.05, save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = library.SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(texts), loss=loss
        )
        trainer.train()
        return model

    torch.testing.assert_close(*with_and_without("sentence_transformers", train), rtol=1e-3, atol=1e-4)
