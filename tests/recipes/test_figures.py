"""Figures know their n: windows, intervals, the error of a score, distances of images, trials that are alike."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastloss import ssim_loss  # noqa: E402
from fastloss.recipes.data.splits import Splits  # noqa: E402
from fastloss.recipes.imagen.config import Config  # noqa: E402
from fastloss.recipes.imagen.curves import percent, shares, windows  # noqa: E402
from fastloss.recipes.imagen.digits_quality import counts  # noqa: E402
from fastloss.recipes.imagen.examples import Progress, nearest_training_images, real_images, seen_examples  # noqa: E402
from fastloss.recipes.imagen.figures import FIGURES, interval, rows, score_error, shown, validated  # noqa: E402
from fastloss.recipes.imagen.image_quality import frechet_distance, image_figures  # noqa: E402
from fastloss.recipes.imagen.losses import perceptual_loss  # noqa: E402
from fastloss.recipes.imagen.report import random_backbones, resolved  # noqa: E402
from fastloss.recipes.imagen.tune import Trial, alike, alike_in_words  # noqa: E402
from fastloss.recipes.training.metrics import Metrics, read_metrics  # noqa: E402
from tests.recipes.test_imagen import make_small  # noqa: E402


@pytest.mark.parametrize(("steps", "n"), [(1, 1), (2, 1), (3, 1), (99, 49), (100, 50), (1000, 50)])
def test_first_and_last_window_have_no_step_in_common(steps, n):
    curves = {"step": [float(k) for k in range(1, steps + 1)]}
    found = windows(curves)
    assert found.n == n
    assert found.first["step"] == (n + 1) / 2 and found.last["step"] == steps - (n - 1) / 2
    assert steps == 1 or 2 * found.n <= steps


def test_weighted_shares_of_the_loss():
    curves = {"step": [1.0, 2.0], "pixel": [9.0, 0.5], "prior": [9.0, 30.0]}
    assert shares(curves, {"pixel": 1.0, "prior": 0.05, "attention": 3.0}) == {"pixel": 0.25, "prior": 0.75}
    assert [percent(x) for x in (0.0, 0.004, 0.25)] == ["0%", "<1%", "25%"]


def test_interval_is_wilsons():
    share, n, z = 0.3, 40, 1.959964
    middle = (share + z * z / 2 / n) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    assert interval(share, n) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert interval(0.0, 3)[0] == 0 and interval(0.0, 3)[1] > 0.5


def test_figures_are_shown_with_their_count():
    figures = {"retrieval": 0.5, "mae": 0.25, "score": 0.25, "n": 10}
    assert shown("retrieval", figures) == "50.0% (24 to 76%, n 10)" and shown("mae", figures) == "0.2500 (n 10)"
    table = {row[0]: row[1:] for row in rows(figures, Config(data="folder:x"))}
    assert table["retrieval"][:4] == ("0.5000", "0.237 to 0.763", "", 10) and table["score"][-1] == "retrieval less mae"
    assert set(validated(Config())) <= set(FIGURES) and validated(Config(data="wds:x")) == ["score", "mae", "retrieval"]
    assert not any("|" in figure.meaning for figure in FIGURES.values())  # they stand in a table
    low, high = interval(0.5, 10)
    assert score_error(figures) == pytest.approx((high - low) / 2 / 1.96)
    assert math.isnan(score_error({"score": 1.0}))


def test_counts_of_the_digits_figures():
    found = counts("test")
    assert (found["accuracy"], found["grid_accuracy"], found["weight_effect"]) == (400, 270, 180)
    assert 40 <= found["worst_digit_accuracy"] <= 67


def test_frechet_distance_of_gaussians():
    torch.manual_seed(0)
    x = torch.randn(200, 3, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # mean 0, covariance I
    scale = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    assert frechet_distance(x, x * scale + 1) == pytest.approx(3 + (0 + 1 + 16), rel=1e-6)
    assert frechet_distance(x, x) < 1e-6
    linalg = pytest.importorskip("scipy.linalg")
    y = torch.randn(100, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64)
    first, second = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    root = linalg.sqrtm(first @ second).real
    by_scipy = (x.mean(0) - y.mean(0)).square().sum() + (first + second - 2 * root).trace()
    assert frechet_distance(x, y) == pytest.approx(by_scipy.item(), rel=1e-6)
    with pytest.raises(ValueError, match="generated: expected"):
        frechet_distance(x[:1], y)


def test_image_figures_know_their_n():
    torch.manual_seed(0)
    model, config = make_small().eval(), Config(batch_size=50)
    data = Splits(config)["test"]
    with torch.no_grad():
        found = image_figures(model, config, data, perceptual_loss(["digits"]))
        assert (found["n_ssim"], found["n_frechet"]) == (200, 200) and found["frechet"] > 1
        mu = model.image_encoder(data.images).mu
        rebuilt = model.image_decoder(model.text_encoder(data.captions), mu)[0]
        assert found["ssim"] == pytest.approx(1 - ssim_loss(data.images, rebuilt).item(), abs=1e-4)
        assert set(image_figures(model, config, data, None)) == {"ssim", "n_ssim"}


def test_nearest_and_seen_images_and_real_ones():
    splits = Splits(Config())
    train = splits["train"]
    nearest, count = nearest_training_images(train.images[[5, 700]] + 0.01, splits)
    assert count == len(train) == 1397 and torch.equal(nearest, train.images[[5, 700]])
    seen = seen_examples(splits)
    assert seen.captions == train.captions[:4] and torch.equal(torch.stack(seen.real), train.images[:4])
    assert real_images(["a dog"], train) == [None]


def test_progress_keeps_a_bounded_number_of_pictures():
    progress, model, config = Progress(), make_small(), Config()
    splits = Splits(config)
    for step in range(1, 40):
        progress.add(step, model, config, splits)
    assert len(progress.steps) == len(progress.images) <= 16 and progress.steps[0] == 1
    copy = Progress()
    copy.load_state_dict(progress.state_dict())
    assert copy.steps == progress.steps and copy.images[3].dtype == torch.uint8


def test_options_are_resolved_and_random_backbones_bold():
    config = Config(data="folder:x", backbones="vgg16,alexnet", backbone_weights="random", device="cpu")
    found = resolved(config)
    assert found["backbone_weights"] == "**random**" and random_backbones(config) == ["vgg16", "alexnet"]
    assert (found["tokenizer"], found["channels"], found["device"]) == ("byte", 3, "cpu")
    assert "auto" not in resolved(Config()).values() and "" not in resolved(Config()).values()
    assert random_backbones(Config()) == []
    one = Config(data="folder:x", backbones="vgg16,alexnet", backbone_weights="random,a.pth")
    assert random_backbones(one) == ["vgg16"] and resolved(one)["backbone_weights"] == "**random**,a.pth"


def test_validation_stands_in_the_row_of_its_step_and_older_files_are_kept(tmp_path):
    def open_metrics(step, validated):
        return Metrics(tmp_path, ["pixel"], step, tensorboard=False, validated=validated)

    metrics = open_metrics(0, [])  # as an older version wrote them
    metrics.add(1, torch.tensor([1.0, 2.0]), 0.1, 8)
    metrics.flush()
    metrics.close()
    metrics = open_metrics(1, ["score", "mae"])
    for step in (2, 3, 4):
        metrics.add(step, torch.tensor([1.0, float(step)]), 0.1, 8)
        metrics.flush()
        if step == 3:
            metrics.add_validation({"score": 0.5, "n": 200})
    metrics.close()
    found = read_metrics(tmp_path / "metrics.csv")
    assert found["step"] == [1, 2, 3, 4] and found["pixel"] == [2, 2, 3, 4]
    assert [str(v) for v in found["val_score"]] == ["nan", "nan", "0.5", "nan"]
    assert all(math.isnan(v) for v in found["val_mae"])


def test_trials_that_cannot_be_told_apart():
    trials = [Trial(k, score, 0.01, 200, {}) for k, score in enumerate((0.5, 0.48, 0.471, 0.4))]
    assert [trial.number for trial in alike(trials)] == [1]  # 1.96 sqrt(2) 0.01 is 0.0277
    assert alike_in_words(trials) == (
        "1 of the other 3 cannot be told apart from it (within 1.96 standard errors, n 200)"
    )
    few = [trial._replace(n=9) for trial in trials]
    assert alike_in_words(few).endswith("n 9); 9 validation images are few")
    assert alike_in_words(trials[:2]).startswith("all of the others cannot be told apart")
    assert alike_in_words([trials[0], trials[3]]) == "it is better than all others by more than chance explains"
    assert alike_in_words(trials[:1]) == "one trial says nothing about the weights"
