"""Triton kernels of the contrastive ops; an op's file here has the name of the op's own.

softmax_stats.py            launchers of the statistics and their gradients
softmax_loss.py             launchers of the plain loss
softmax_stats_per_query.py  statistics of negatives of each query: launchers and gradients
softmax_loss_per_query.py   the plain loss with negatives of each query: launchers, and gradients of query and key
softmax_loss_shared.py      the plain loss with a bank: launchers, and losses and gradients from what splits leave
siglip.py                   the sigmoid loss
arguments.py                what the kernels over tiles of logits are given: named tuples, with shapes
logit_matrix.py             one call: embeddings, vectors of rows and columns, form, tile
logit_tile.py               a tile of logits: products, scales, biases, and what is left out
online_softmax.py           log-sum-exps of rows and columns: running sums over tiles of logits, and their merging
logit_gradients.py          G, the gradient of the logits, a block at a time
embedding_gradients.py      the embeddings' gradients from sums over those blocks
weighted_keys.py            log-sum-exps and weighted keys of frozen keys in one pass over them
pair_gradients.py           gradients of query and key, row by row, from weighted keys
per_query_forward.py        running sums over the negatives of each query
per_query_merge.py          their merging
row_losses.py               losses of rows from their statistics and positives
norms.py                    norms of embeddings, the scales of rows and columns, the positives' logits
passes.py                   launches over all logits: statistics, blocks of gradients, their products
blocking.py                 how the logits are cut into chunks, blocks and walks
tile_configs.py             the tiles of each architecture, and the choice of one
"""
