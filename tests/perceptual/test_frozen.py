"""The networks of PerceptualLoss are no part of the model that holds it: checkpoints, freezing, moving, copying."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fastloss import PerceptualLoss
from tests.perceptual.test_perceptual_loss import Net, images, twice_pooled

LINS = [torch.linspace(0, 1, 5), torch.linspace(1, 2, 4)]


def made(net: nn.Module | None = None, criterion: str = "lpips", **options) -> PerceptualLoss:
    lins = {"lin_weights": LINS} if criterion == "lpips" else {}
    return PerceptualLoss(net or Net(), criterion=criterion, **lins, **options)


class Model(nn.Module):
    def __init__(self, loss: nn.Module | None) -> None:
        super().__init__()
        self.decoder, self.loss = nn.Conv2d(3, 3, 1), loss


def test_models_with_and_without_their_loss_load_each_others_checkpoints():
    with_loss, without = Model(made()), Model(None)
    assert list(with_loss.state_dict()) == list(without.state_dict()) == ["decoder.weight", "decoder.bias"]
    for target, source in ((with_loss, without), (without, with_loss)):
        source.decoder.weight.data.uniform_()
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target.decoder.weight, source.decoder.weight)
    assert not made().state_dict() and not list(made().parameters())


def old_checkpoint(loss: PerceptualLoss) -> dict:
    """As versions that had the networks as submodules saved it."""
    state = {f"loss.backbones.{key}": value.clone() for key, value in loss.backbones.state_dict().items()}
    state |= {f"loss.lins.{key}": value.clone() for key, value in loss.lins.state_dict().items()}
    return state | {key: value.clone() for key, value in Model(None).state_dict().items()}


def test_a_checkpoint_that_has_the_networks_loads_strictly_and_leaves_them_as_they_are():
    image, image_pred = images()
    model, state = Model(made()), old_checkpoint(made())
    before = model.loss(image, image_pred)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model.loss(image, image_pred), before)
    assert torch.equal(model.decoder.weight, state["decoder.weight"])
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "loss.backbone"'):
        model.load_state_dict(state | {"loss.backbone": torch.zeros(1)})


def test_save_networks_keeps_them_and_loads_them_strictly():
    image, image_pred = images()
    source = Model(made(save_networks=True))
    state = source.state_dict()
    assert "loss.backbones.0.a.0.weight" in state and torch.equal(state["loss.lins.0.lin1"], LINS[1])
    assert set(state) == set(old_checkpoint(source.loss))
    target = Model(made(save_networks=True))
    assert (target.loss(image, image_pred) - source.loss(image, image_pred)).abs() > 1e-6
    for given in (state, old_checkpoint(source.loss)):
        target.load_state_dict(given, strict=True)
        assert torch.equal(target.loss(image, image_pred), source.loss(image, image_pred))
    assert not any(p.requires_grad for p in target.loss.backbones.parameters())
    Model(made()).load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match='Missing key.*"loss.backbones.0.a.0.weight"'):
        target.load_state_dict(Model(None).state_dict())
    found = target.load_state_dict(Model(None).state_dict(), strict=False)
    missing = {key for key in state if key.startswith("loss.") and not key.endswith("num_batches_tracked")}
    assert set(found.missing_keys) == missing and len(missing) == 10 and not found.unexpected_keys
    with pytest.raises(RuntimeError, match='Unexpected key.*"loss.lins.0.lin7"'):
        target.load_state_dict(state | {"loss.lins.0.lin7": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"(?s)loss.lins.*size mismatch for 0.lin1"):
        target.load_state_dict(state | {"loss.lins.0.lin1": torch.zeros(7)})
    with pytest.raises(TypeError, match="save_networks: expected True or False, got str"):
        made(save_networks="yes")


@pytest.mark.parametrize("save", [False, True])
def test_what_a_model_does_to_all_its_parts_passes_the_networks_by(save):
    image, image_pred = images()
    loss = made(criterion="l1", save_networks=save)
    model = Model(loss)
    before = loss(image, image_pred)
    model.train()
    model.requires_grad_(True)
    model.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Conv2d) else None)
    assert loss.training and not any(m.training for m in loss.backbones.modules())
    assert not any(p.requires_grad for p in loss.backbones.parameters())
    own = list(model.parameters())
    assert len(own) == 2 and len(list(model.modules())) == 3 and not list(loss.buffers())[2:]
    optimizer = torch.optim.AdamW(own, lr=1.0, weight_decay=0.5)
    loss(image, model.decoder(image_pred)).backward()
    optimizer.step()
    assert model.decoder.bias.abs().min() > 0.5
    assert torch.equal(loss(image, image_pred), before)


def test_a_network_that_another_module_holds_too_stays_in_eval_mode():
    net = Net()
    model = nn.ModuleList([net, made(net)]).train()
    assert not net.a[1].training and model.training


def test_moving_and_casting_reaches_them():
    model = Model(made())
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert {p.dtype for p in (*model.loss.backbones.parameters(), *model.loss.lins.buffers())} == {dtype}
    model.to("meta")
    assert {p.device.type for p in (*model.loss.backbones.parameters(), *model.loss.lins.buffers())} == {"meta"}


def test_copies_and_pickles_carry_them():
    image, image_pred = images()
    model = Model(PerceptualLoss([Net(), twice_pooled]))
    expected = model.loss(image, image_pred)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for form in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(form.loss(image, image_pred), expected)
        assert not any(m.training for m in form.loss.backbones.modules())
        assert not any(p.requires_grad for p in form.loss.backbones.parameters())
        assert form.loss.backbones[0].b.weight.data_ptr() != model.loss.backbones[0].b.weight.data_ptr()


def test_a_pickle_of_a_version_with_submodules_still_loads():
    image, image_pred = images()
    loss = made()
    expected, state = loss(image, image_pred), dict(loss.__dict__)
    state["_modules"] = {name: state.pop(name) for name in ("backbones", "lins")}
    del state["save_networks"]
    other = PerceptualLoss.__new__(PerceptualLoss)
    other.__setstate__(state)
    assert torch.equal(other(image, image_pred), expected)
    assert not list(other.parameters()) and not other.state_dict() and other.backbones is loss.backbones


def test_repr_shows_the_networks():
    shown = repr(Model(made()))
    assert "Net(" in shown and "Conv2d(3, 5" in shown and "save_networks=False" in shown
