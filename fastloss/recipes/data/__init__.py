"""Captioned images and their texts.

splits.py     the splits of a run's data, each opened once
batches.py    data sets by name, and batches in an order that a seed fixes
global_batches.py  batches shared by the ranks of a run: which samples one has follows from seed and step alone
lanes.py      the same of shards, each read by few ranks
digits.py     scikit-learn's handwritten digits with captions
glyphs.py     the characters of matplotlib's fonts, with their Unicode names
folder.py     a folder of images with captions
shards.py     WebDataset tar shards
samples.py    decoding, captions, splits, and the count of what was skipped
tokenizer.py  tokenizers without downloads: bytes and words
"""
