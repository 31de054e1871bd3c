"""The training systems and the command line.

test_cli.py             the commands, their options and errors
test_imagen.py          model, losses, training, resuming
test_clip.py            image-text pre-training: data, steps, resuming, report
test_clip_ranks.py      the same on two ranks, which clip_ranks.py starts
test_files.py           metrics and checkpoints
test_data.py            folders and shards
test_shards.py          shards: names, order, what is left out
test_digits.py          the digits, their captions, tokenizers
test_digits_quality.py  backbone, judge, figures of quality
"""
