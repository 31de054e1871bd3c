"""One forward and backward of every op on its smallest inputs, for tools that slow a device down.

    compute-sanitizer --tool memcheck --kernel-name kernel_substring=_kernel python -m tests.device_calls
    compute-sanitizer --tool racecheck ...

and of the contrastive losses with 1,500 by 2,100 logits, where programs share columns. Values are the other tests'.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("FASTLOSS_PLANS", "0")  # a call is a launch

import torch

import fastloss
from tests.conformance.cases import CASES, Draw
from tests.conformance.tools import first, leaves, ops_of, to_device

ROWS, COLUMNS, WIDTH = 1500, 2100, 96


def small_calls(device: str, chosen: str) -> int:
    made = 0
    for case in CASES:
        if not any(op.kernels["triton"] for op in ops_of(case.name)) or chosen not in case.name:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            args = case.make(Draw(dtype, device), case.shapes[0])
            for t in leaves(case, args):
                t.requires_grad_()
            loss = first(case.fn(*args, **to_device(case.options[0], device)))
            torch.autograd.grad(loss.sum(), leaves(case, args))
            made += 1
        print(case.name, flush=True)
    return made


def contrastive_calls(device: str) -> int:
    draw = lambda rows: torch.randn(rows, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)  # noqa: E731
    query, key, negatives = draw(ROWS), draw(ROWS), draw(COLUMNS)
    losses = (
        fastloss.info_nce(query, key, negatives),
        fastloss.clip_loss(query, key, logit_scale=10.0),
        fastloss.siglip_loss(query, key, logit_scale=10.0, logit_bias=-10.0),
    )
    for loss in losses:
        torch.autograd.grad(loss, (query, key))
    return len(losses)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.device_calls", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--loss", default="", help="only those with this in their names")
    args = parser.parse_args(argv)
    made = small_calls(args.device, args.loss)
    made += 0 if args.loss else contrastive_calls(args.device)
    if args.device == "cuda":
        torch.cuda.synchronize()
    print(f"{made} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
