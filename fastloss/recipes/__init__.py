"""Whole training systems, made of the losses and with dependencies of their own (the extra `train`).

data/      captioned images: data sets, tokenizers, batches
training/  what any training loop needs: checkpoints, metrics, stopping
clip/      image-text pre-training, of the command line too
imagen/    the text-to-image system of the command line
"""
