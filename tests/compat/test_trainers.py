"""Drop-ins in the trainers that people use: the parameters that come of them are those that the libraries' own make."""

from __future__ import annotations

import contextlib
import types
import warnings

import pytest
import torch
from torch import nn

import fastloss
from tests.compat.test_ecosystem import SCALE, Step, pair

pytestmark = pytest.mark.slow


def with_and_without(library, train):
    """The parameters that a training makes with the library's classes and with ours in their place."""
    found = []
    for swap in (contextlib.nullcontext(), fastloss.patch(library)):
        with swap, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            found.append([p.detach().clone() for p in train().parameters()])
    return found


def test_lightning_and_lightly(tmp_path):
    """SimCLR with lightly's projection head."""
    lightning, lightly = pytest.importorskip("pytorch_lightning"), pytest.importorskip("lightly.loss")
    heads = pytest.importorskip("lightly.models.modules.heads")

    class SimCLR(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), heads.SimCLRProjectionHead(12, 12, 8))
            self.loss = lightly.NTXentLoss(temperature=0.3)

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


def test_transformers_trainer(tmp_path):
    transformers, info_nce = pytest.importorskip("transformers"), pytest.importorskip("info_nce")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = Step(info_nce.InfoNCE())

        def forward(self, a, b):
            return {"loss": self.step(a, b)}

    rows = [{"a": a, "b": b} for a, b in zip(*pair(24), strict=True)]

    def train():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=6, report_to="none", use_cpu=True,
            learning_rate=0.05, save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=Model(), args=arguments, train_dataset=rows)
        trainer.train()
        return trainer.model

    torch.testing.assert_close(*with_and_without("info_nce", train), rtol=1e-3, atol=1e-4)


TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize(("siglip", "accum_freq"), [(False, 2), (True, 1)])
def test_open_clips_own_trainer(siglip, accum_freq):
    """Twenty steps of `train_one_epoch` with `create_loss`, whose gradients of `logit_scale` may be accumulated."""
    open_clip, trainer = pytest.importorskip("open_clip"), pytest.importorskip("open_clip_train.train")
    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 3, 16, 16, generator=draw), torch.randint(1, 20, (4, 6), generator=draw))
        for _ in range(20 * accum_freq)
    ]
    options = {
        "device": "cpu", "precision": "fp32", "distill": False, "accum_freq": accum_freq, "skip_scheduler": False,
        "horovod": False, "grad_clip_norm": 1.0, "log_every_n_steps": 100, "batch_size": 4, "world_size": 1, "rank": 0,
        "local_rank": 0, "log_local": False, "wandb": False, "siglip": siglip, "model": "tiny", "local_loss": True,
        "gather_with_grad": True, "loss_dist_impl": None,
    }  # fmt: skip

    def train():
        args = types.SimpleNamespace(**options)
        loader = _Loader(batches)
        data = {"train": types.SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        bias = {"init_logit_scale": 2.3, "init_logit_bias": -10.0} if siglip else {}
        model = open_clip.CLIP(**TINY, output_dict=True, **bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss = open_clip.create_loss(args)
        trainer.train_one_epoch(model, data, loss, 0, optimizer, None, lambda step: None, None, args)
        return model

    theirs, ours = with_and_without("open_clip", train)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


class _Loader(list):
    """What open_clip's trainer asks of its data."""

    num_batches = property(len)
    num_samples = property(lambda self: 4 * len(self))
