"""Image-text pre-training: two encoders whose embeddings of an image and of its caption meet.

config.py      the options of a run, from which the command line is made
data.py        the splits, and which captions name the same thing
model.py       image encoder, text encoder, and what the loss learns beside them
step.py        a training step: at once, or in pieces by `cached_step`
train.py       the training loop
evaluation.py  zero-shot classification and retrieval
report.py      the report with its pictures
run.py         the job behind the command line
"""
