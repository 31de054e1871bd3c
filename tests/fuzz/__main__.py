"""python -m tests.fuzz: drawn calls of the public API, judged against the float64 reference."""

from __future__ import annotations

import argparse
import os
import sys

from tests.fuzz import targets


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=20000, help="how many, over all losses in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each loss")
    parser.add_argument("--loss", nargs="+", choices=targets.names(), metavar="NAME", help="these alone; default: all")
    parser.add_argument("--seconds", type=float, help="stop after so many, whatever is left")
    parser.add_argument("--backend", choices=("cpp", "triton"), help="triton: interpreted, on the CPU; default: cpp")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=60, help="seconds after which a call counts as hung")
    parser.add_argument(
        "--compiled", type=float, default=0.004, help="share of calls under torch.compile, which are slow"
    )
    parser.add_argument(
        "--replay", nargs="+", metavar="LOSS:SEED", help="judge these cases in this process, and print them"
    )
    options = parser.parse_args()
    if options.backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]], os.environ | {"TRITON_INTERPRET": "1"}
        )
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process; some calls have more threads
    if options.replay:
        return replay(options.replay, options.loss)
    from tests.fuzz.run import cases, report, run

    names = options.loss or targets.names()
    todo = cases(names, options.calls, options.seed, options.compiled)
    totals = run(todo, options.calls, options.processes, options.timeout, options.seconds)
    print(report(totals))
    return 1 if totals.failures or not totals.calls else 0


def replay(which: list[str], names: list[str] | None) -> int:
    """Each case as code, then what is wrong with it. A seed alone: that of every loss, or of those of --loss."""
    from tests.fuzz.draw import draw
    from tests.fuzz.judge import Failure, judge
    from tests.fuzz.shrink import shrunk

    if os.environ.get("TRITON_INTERPRET") == "1":
        import tests.triton.interpreter  # noqa: F401 patches Triton's interpreter
    failed = False
    for word in which:
        name, _, rest = word.rpartition(":") if word.count(":") < 2 else (word.split(":")[0], "", word.split(":", 1)[1])
        seed, _, mode = rest.partition(":")
        for one in [name] if name else names or targets.names():
            call = draw(one, int(seed), mode or None)
            print(call.code(), flush=True)
            found = judge(call)
            print(f"-> {found or 'as the reference has it'}\n")
            if isinstance(found, Failure):
                failed = True
                simpler = shrunk(call, found, seconds=30)
                print(f"simpler:\n{simpler.code()}\n-> {judge(simpler)}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
