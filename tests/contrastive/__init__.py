"""The contrastive losses.

test_formulas.py                 the formulas, other libraries' conventions, options
test_edges.py                    infinities, empty batches, rows without negatives
test_modules.py                  modules, half precision, gradients without a graph
test_bf16.py                     products of bfloat16 on the CPU
test_scale.py                    loss scales and half precision
test_weights.py                  weights of 0, masks, large weights
test_hardness.py                 hardness that leaves float32 no digits
test_softmax_stats.py            the op of that name, and the same for the files below
test_softmax_stats_per_query.py  negatives of each query's own
test_softmax_loss.py             the plain loss in one call
test_softmax_loss_per_query.py   the plain loss of each query's own negatives
test_softmax_loss_shared.py      the plain loss of frozen negatives that all queries share
test_self_similarity.py          rows compared with one another: only the pairs above the diagonal
test_blocking.py                 how the Triton kernels cut the logits
test_siglip.py                   the sigmoid loss
"""
