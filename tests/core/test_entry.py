"""Names that people type: other libraries' keywords, options without a name, and errors that say the right name."""

from __future__ import annotations

import inspect
import pydoc

import pytest
import torch
from torch import nn

import fastloss
from fastloss.core import Loss
from fastloss.core.entry import Names

IMAGE, PRED = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
QUERY, KEY = (torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in (2, 3))
SCALE = torch.tensor(5.0)
PAIRS = (fastloss.pixel_loss, fastloss.ssim_loss, fastloss.image_loss, fastloss.PixelLoss("mae"), fastloss.SSIMLoss(7))
PUBLIC = [getattr(fastloss, name) for name in fastloss.__all__]
MODULES = [value for value in PUBLIC if inspect.isclass(value) and issubclass(value, Loss)]
FUNCTIONS = [value for value in PUBLIC if inspect.isfunction(value) and value.__module__.count(".") == 2]
FUNCTIONS = [fn for fn in FUNCTIONS if ".core." not in fn.__module__ and fn is not fastloss.loss_and_grads]


def value_of(out):
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("loss", PAIRS, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_input_is_the_prediction_and_target_the_image(loss):
    pred = PRED.clone().requires_grad_()
    got, expected = value_of(loss(target=IMAGE, input=pred)), value_of(loss(IMAGE, PRED))
    assert torch.equal(got, expected)
    assert torch.autograd.grad(got, pred)[0].abs().sum() > 0


def test_torchs_names_of_other_losses():
    assert torch.equal(fastloss.smoothness_loss(input=PRED, p="l2"), fastloss.smoothness_loss(PRED, p=2))
    large, pred = torch.rand(1, 1, 176, 176), torch.rand(1, 1, 176, 176)
    assert torch.equal(fastloss.ms_ssim_loss(input=pred, target=large), fastloss.ms_ssim_loss(large, pred))
    perceptual = fastloss.PerceptualLoss(lambda x: [x], normalize=False)
    assert torch.equal(perceptual(input=PRED, target=IMAGE), perceptual(IMAGE, PRED))


def test_distances_by_name():
    assert torch.equal(fastloss.pixel_loss(IMAGE, PRED, p="mse"), fastloss.pixel_loss(IMAGE, PRED))
    by_name = fastloss.image_loss(IMAGE, PRED, pixel=("mae", 1.0), smoothness=("l1", 0.1), ssim=0.2).total
    assert torch.equal(by_name, fastloss.image_loss(IMAGE, PRED, pixel=(1, 1.0), smoothness=(1, 0.1), ssim=0.2).total)


def test_clip_and_siglip_take_open_clips_calls():
    """The scale, and the bias, behind the embeddings; or all by open_clip's keywords."""
    clip, siglip = fastloss.ClipLoss(), fastloss.SigLipLoss()
    expected = fastloss.clip_loss(QUERY, KEY, logit_scale=SCALE)
    assert torch.equal(clip(QUERY, KEY, SCALE), expected)
    assert torch.equal(clip(QUERY, KEY, SCALE, None), expected)
    assert torch.equal(clip(image_features=QUERY, text_features=KEY, logit_scale=SCALE), expected)
    assert torch.equal(fastloss.ClipLoss(logit_scale=9.0)(QUERY, KEY, SCALE), expected)
    expected = fastloss.siglip_loss(QUERY, KEY, logit_scale=SCALE, logit_bias=-1.0)
    assert torch.equal(siglip(QUERY, KEY, SCALE, -1.0), expected)
    for args, more in (((SCALE, None, 3), {}), ((SCALE,), {"logit_scale": 2.0})):
        with pytest.raises(TypeError, match=r"ClipLoss: expected \(image, text, logit_scale, logit_bias\), each once"):
            clip(QUERY, KEY, *args, **more)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'logit_scale'"):
        clip(QUERY, KEY)


@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda: fastloss.info_nce(QUERY, KEY, temprature=0.1),
            "info_nce: .* 'temprature'; did you mean 'temperature'",
        ),
        (lambda: fastloss.info_nce(QUERY, KEY, hardness=0.1), r"pass sampling=NegativeSampling\(hardness=\.\.\.\)"),
        (lambda: fastloss.InfoNCELoss(margin=0.1), r"InfoNCELoss: .*pass sampling=NegativeSampling\(margin"),
        (lambda: fastloss.clip_loss(QUERY, KEY, temperature=0.1), "pass logit_scale = 1 / temperature"),
        (lambda: fastloss.ClipLoss(temperature=0.1), "ClipLoss: .*pass logit_scale = 1 / temperature"),
        (lambda: fastloss.ClipLoss(local_loss=True), "ClipLoss: .*pass it to fastloss.compat.open_clip"),
        (lambda: fastloss.SigLipLoss(world_size=2), "SigLipLoss: .*pass group=..., a process group"),
        (lambda: fastloss.SupConLoss(base_temperature=0.07), "multiply the loss by temperature / base_temperature"),
        (lambda: fastloss.nt_xent_loss(QUERY, KEY, logit_scale=9.0), "pass temperature = 1 / logit_scale"),
        (lambda: fastloss.PixelLoss(weights=QUERY), "PixelLoss: .*did you mean 'weight'"),
        (lambda: fastloss.PixelLoss()(IMAGE, PRED, weights=PRED), "pixel_loss: .*did you mean 'weight'"),
        (lambda: fastloss.ssim_loss(IMAGE, PRED, window_size=7), "pass window="),
        (lambda: fastloss.image_loss(IMAGE, PRED, sigma=2.0), r"pass ssim_options=\{'sigma': \.\.\.\}"),
        (lambda: fastloss.image_loss(IMAGE, PRED, ssim=1.0, ssim_options={"sigm": 2}), "ssim_options: .*'sigma'"),
        (lambda: fastloss.CompositeLoss({"a": 1.0}, weighting="dwa", temprature=1), "did you mean 'temperature'"),
        (lambda: fastloss.pixel_loss(IMAGE, nothing_like_it=1), "the options are "),
        (lambda: fastloss.pixel_loss(IMAGE, target=PRED), r"target is another name of image, .*\(image, image_pred\)"),
        (lambda: fastloss.pixel_loss(image=IMAGE, target=PRED), "target is another name of image, which came too"),
        (lambda: fastloss.pixel_loss(input=PRED), "missing 1 required positional argument: 'image'"),
        (lambda: fastloss.PixelLoss(1, 2), "PixelLoss: expected one option at most without its name"),
        (lambda: fastloss.PixelLoss(1, p=1), "PixelLoss: expected one option at most without its name"),
    ],
)
def test_errors_say_the_right_name(call, says):
    with pytest.raises(TypeError, match=says) as raised:
        call()
    assert raised.value.__suppress_context__ or raised.value.__context__ is None  # one traceback, not two


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_every_public_function_knows_its_names(fn):
    """And no name of another library is one of its own, which nobody could then use."""
    assert isinstance(fn.names, Names), "it lacks @public_function"
    own = {*fn.names.positional, *fn.names.options}
    assert not own & {*fn.names.others, *fn.names.hints} and set(fn.names.others.values()) <= own
    with pytest.raises(TypeError, match=f"{fn.__name__}: unknown option 'no_such_option'"):
        fn(no_such_option=1)


@pytest.mark.parametrize(
    "fn, args, options",
    [
        (fastloss.pixel_loss, (), {"input": PRED, "target": IMAGE}),
        (fastloss.PixelLoss(1), (), {"input": PRED, "target": IMAGE}),
        (fastloss.ClipLoss(), (QUERY, KEY, SCALE), {}),
        (fastloss.ClipLoss(), (), {"image_features": QUERY, "text_features": KEY, "logit_scale": SCALE}),
        (fastloss.SupConLoss(), (QUERY.reshape(2, 2, 8),), {}),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_other_names_compile(fn, args, options):
    torch._dynamo.reset()
    got = torch.compile(fn, fullgraph=True, backend="eager")(*args, **options)
    torch.testing.assert_close(got, fn(*args, **options))


@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_help_of_a_module_shows_formula_tensors_and_options(cls):
    text = pydoc.plain(pydoc.render_doc(cls))
    own = inspect.signature(cls.fn).parameters.values()
    if cls is not fastloss.ContrastiveLoss:  # which has names of its own, those of the training loop
        for line in (cls.fn.__doc__ or "").split("\n\n"):
            assert line.strip().split("\n")[0] in text
        taken, called = (inspect.signature(f).parameters for f in (cls, cls().forward))
        assert list(taken) == [p.name for p in own if p.kind is p.KEYWORD_ONLY]
        assert list(called)[: -1 - len(cls.at_call)] == [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert "forward(self, " in text and "Args:" in text and "Example:" in text
