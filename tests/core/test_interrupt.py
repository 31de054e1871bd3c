"""Ctrl-C during a long call of a C++ op: Python's exception, soon, and a process that goes on. Work is told by the
process's CPU time, which says the same on a busy machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastloss import core

pytestmark = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")

# Where a shell starts processes in the background, SIGINT is ignored, and Python then installs no handler.
PREPARED = """
import os, signal, threading, time
import torch, fastloss
signal.signal(signal.SIGINT, signal.default_int_handler)

def rows(n, width=256):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n))

def images(n):
    return torch.rand(n, 3, 256, 256, generator=torch.Generator().manual_seed(n))

def clip(n):
    x, y = rows(n), rows(n).flip(0)
    return lambda: fastloss.clip_loss(x, y, logit_scale=0.1)

def clip_backward(n):
    x = rows(n).requires_grad_()
    loss = fastloss.clip_loss(x, rows(n).flip(0), logit_scale=0.1)
    return lambda: torch.autograd.grad(loss, x, retain_graph=True)[0]

def compiled_clip(n):
    x, y = rows(n), rows(n).flip(0)
    compiled = torch.compile(fastloss.clip_loss, backend="aot_eager", dynamic=True)
    compiled(rows(32), rows(32), logit_scale=0.1)
    return lambda: compiled(x, y, logit_scale=0.1)

def siglip(n):
    x, y = rows(n), rows(n).flip(0)
    return lambda: fastloss.siglip_loss(x, y, logit_scale=1.0, logit_bias=-1.0)

def nt_xent(n):
    x, y = rows(n), rows(n).flip(0)
    return lambda: fastloss.nt_xent_loss(x, y)

def own_negatives(n):
    x, each = rows(n), rows(64).expand(n, 64, 256)
    return lambda: fastloss.info_nce(x, x, each)

def ssim(n):
    x, y = images(1), images(2)[1:]
    return lambda: fastloss.ssim_loss(x.expand(n, 3, 256, 256), y.expand(n, 3, 256, 256))

# A small size, and a large one that costs so many times as much.
CALLS = {
    "clip": (clip, 1024, 12288, 144),
    "clip backward": (clip_backward, 4352, 13056, 9),  # fewer rows leave it less to do
    "compiled clip": (compiled_clip, 1024, 12288, 144),
    "siglip": (siglip, 1024, 12288, 144),
    "nt_xent": (nt_xent, 1024, 8192, 64),
    "own negatives": (own_negatives, 512, 65536, 128),
    "ssim": (ssim, 16, 1024, 64),
}

def signal_after(work):
    # Once the process has done so much work; says when that was.
    sent, begin = [], time.process_time()

    def send():
        while time.process_time() - begin < work:
            time.sleep(0.005)
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    return sent
"""

INTERRUPTED = """
import sys

def interrupt(name):
    prepare, small, large, times = CALLS[name]
    few, many = prepare(small), prepare(large)
    first = few()
    spent = []
    for _ in range(3):
        begin = time.process_time()
        few()
        spent.append(time.process_time() - begin)
    whole = times * max(spent)
    sent = signal_after(0.1 * whole)
    try:
        many()
        raise SystemExit(f"{name} came to its end")
    except KeyboardInterrupt:
        more = time.process_time() - sent[0]
    assert more < 0.6 * whole, f"{name}: {more} s of work after the signal, of {whole} s in all"
    assert torch.equal(few(), first), name

torch.set_num_threads(int(sys.argv[1]))
for name in sys.argv[2:]:
    interrupt(name)
    print(name)
"""

HANDLED = """
x, y = rows(6144), rows(6144).flip(0)
torch.set_num_threads(1)
expected = fastloss.clip_loss(x, y, logit_scale=0.1)
begin = time.process_time()
assert torch.equal(fastloss.clip_loss(x, y, logit_scale=0.1), expected)
whole, seen = time.process_time() - begin, []

def handler(*_):  # calls an op itself, which must not disturb the other
    fastloss.clip_loss(x[:64], y[:64], logit_scale=0.1)
    seen.append(time.process_time())

signal.signal(signal.SIGINT, handler)
signal_after(0.2 * whole)
got, end = fastloss.clip_loss(x, y, logit_scale=0.1), time.process_time()
assert torch.equal(got, expected)
assert seen and end - seen[0] > 0.1 * whole, (seen, end, whole)

class Late(Exception):
    pass

def late(*_):
    raise Late("of the handler")

signal.signal(signal.SIGINT, late)
signal_after(0.2 * whole)
try:
    fastloss.clip_loss(x, y, logit_scale=0.1)
    raise SystemExit("the call came to its end")
except Late as error:
    assert str(error) == "of the handler"
print("handled")
"""

ELSEWHERE = """
x, y = rows(6144), rows(6144).flip(0)
torch.set_num_threads(1)
expected, found = fastloss.clip_loss(x, y, logit_scale=0.1), []
thread = threading.Thread(target=lambda: found.append(fastloss.clip_loss(x, y, logit_scale=0.1)))
thread.start()
signal_after(0.05)
try:
    while True:
        time.sleep(0.01)
except KeyboardInterrupt:
    pass
thread.join()
assert torch.equal(found[0], expected)
print("elsewhere")
"""


def child(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREPARED + script, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ctrl_c_ends_a_long_call():
    """One after the other in one process, which so shows that it goes on."""
    calls = ["clip", "clip backward", "compiled clip", "siglip", "nt_xent", "own negatives", "ssim"]
    assert child(INTERRUPTED, "1", *calls).splitlines() == calls


def test_ctrl_c_stops_all_threads():
    assert child(INTERRUPTED, "2", "clip") == "clip"


def test_a_handler_that_does_not_raise_changes_nothing():
    assert child(HANDLED) == "handled"


def test_a_signal_does_not_end_calls_of_other_threads():
    assert child(ELSEWHERE) == "elsewhere"
