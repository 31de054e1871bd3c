"""The drop-ins that need no library, in a process where none is installed, give what they give beside the libraries."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch

CALLS = """
torch.manual_seed(0)
a, b, image, image_pred = torch.randn(8, 16), torch.randn(8, 16), torch.rand(2, 3, 20, 20), torch.rand(2, 3, 20, 20)
calls = {
    "ClipLoss": lambda: open_clip.ClipLoss()(a, b, 2.0, output_dict=True)["contrastive_loss"],
    "SigLipLoss": lambda: open_clip.SigLipLoss()(a, b, 2.0, -1.0),
    "CoCaLoss": lambda: sum(open_clip.CoCaLoss(1.0, 1.0)(a, b, a.view(8, 4, 4), torch.ones(8, 4).long(), 2.0)),
    "DistillClipLoss": lambda: sum(open_clip.DistillClipLoss()(a, b, 2.0, b, a + b, 1.0)),
    "InfoNCE": lambda: info_nce.InfoNCE(0.5)(a, b),
    "SSIM": lambda: pytorch_msssim.SSIM(data_range=1.0)(image, image_pred),
    "NTXentLoss": lambda: lightly.NTXentLoss()(a, b),
    "DCLLoss": lambda: lightly.DCLLoss()(a, b),
    "DCLWLoss": lambda: lightly.DCLWLoss()(a, b),
    "fused_ssim": lambda: fused_ssim.fused_ssim(image, image_pred),
    "fused_siglip_loss": lambda: siglip_kernel.fused_siglip_loss(a, b, torch.tensor(0.5), torch.tensor(-1.0)),
    "SigLIPPlusLoss": lambda: siglip_kernel.SigLIPPlusLoss()((a, b))["total_loss"],
    "L1Loss": lambda: basicsr.L1Loss()(image, image_pred),
}
values = {name: call().item() for name, call in calls.items()}
"""
ALONE = f"""
import importlib, json, sys
import torch, fastloss
from fastloss.compat import LIBRARIES

early = [name for name in LIBRARIES if name in sys.modules]
sys.modules.update(dict.fromkeys(LIBRARIES))  # None: not installed
missing, refused = [], {{}}
for name in LIBRARIES:
    try:
        vars()[name] = importlib.import_module(f"fastloss.compat.{{name}}")
    except ModuleNotFoundError as error:
        assert f"fastloss.compat.{{name}} needs {{name}} itself, which is not installed" in str(error)
        missing.append(name)
{CALLS}
calls = {{
    "ClipLoss": lambda: open_clip.ClipLoss(world_size=2)(a, b, 2.0),
    "SigLipLoss": lambda: open_clip.SigLipLoss(world_size=2)(a, b, 2.0, None),
    "SSIM": lambda: pytorch_msssim.ssim(image, image_pred, win=torch.ones(1, 1, 1, 3) / 3),
    "InfoNCE": lambda: info_nce.info_nce(a, b[:4]),
}}
for name, call in calls.items():
    try:
        call()
    except NotImplementedError as error:
        refused[name] = str(error)
print(json.dumps([early, missing, values, refused]))
"""


@pytest.mark.filterwarnings("ignore:To copy construct")  # lightly's own, of DCLWLoss's weights
def test_without_the_libraries():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    early, missing, values, refused = json.loads(done.stdout)
    assert early == [], "import fastloss.compat imports a library"
    assert missing == ["kornia", "lpips", "piq", "pytorch_metric_learning", "sentence_transformers", "torchmetrics"]
    assert set(refused) == {"ClipLoss", "SigLipLoss", "SSIM", "InfoNCE"}
    assert all("the library computes that, and is not installed" in why for why in refused.values())
    alone = ("basicsr", "fused_ssim", "info_nce", "lightly", "open_clip", "pytorch_msssim", "siglip_kernel")
    beside = {"torch": torch} | {name: importlib.import_module(f"fastloss.compat.{name}") for name in alone}
    exec(CALLS, beside)
    for name, value in values.items():
        assert value == pytest.approx(beside["values"][name], rel=1e-6), name
