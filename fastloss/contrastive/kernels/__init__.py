"""Triton kernels of the contrastive ops; an op's file here has the name of the op's own.

softmax_stats.py            launchers of the statistics and their gradients
softmax_loss.py             launchers of the plain loss
softmax_stats_per_query.py  statistics of each query's own negatives: launchers and gradients
softmax_loss_per_query.py   launchers of the plain loss of each query's own negatives
siglip.py                   the sigmoid loss
logit_matrix.py             what a call gives its kernels: operands, vectors, form, tile
logit_tile.py               a tile of logits: products, scales, biases, and what is left out
online_softmax.py           log-sum-exps of rows and columns: running sums over tiles of logits, and their merging
logit_gradients.py          blocks of the logits' gradients
embedding_gradients.py      the embeddings' gradients from sums over those blocks
per_query_forward.py        running sums over each query's own negatives, and their merging
row_losses.py               losses of rows from their statistics and positives
norms.py                    lengths of embeddings, and the scales of rows and columns
passes.py                   launches over all logits: statistics, blocks of gradients, their products
blocking.py                 how the logits are cut into chunks, blocks and walks
tile_configs.py             the tiles of each architecture, and the choice of one
"""
