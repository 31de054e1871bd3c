"""Drawn calls of the whole public API, judged against the float64 reference: `make fuzz`.

    python -m tests.fuzz --calls 100000          # every loss in turn; exit code 1 if a call fails
    python -m tests.fuzz --replay clip_loss:17   # one case again, printed as code that can be pasted

A plain seeded generator draws, not hypothesis: a case is then a loss and one number, costs microseconds, and the same
seed gives the same case in a fresh process, so that a crash or a hang can be replayed without a database of examples.

values.py: what a call is made of, as data that prints as code. inputs.py and options.py: the tables of what is drawn,
by parameter name. draw.py: a seed -> a call. nonsense.py: what must be refused. targets.py: how each public name is
called. outcome.py: a call -> what it gives. judge.py: a call -> its failure; rounding.py, unit_width.py: how large
errors are expected to be. shrink.py, run.py: simpler failing calls; processes, and the report.
"""
