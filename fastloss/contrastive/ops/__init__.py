"""The ops of the softmax contrastive losses, each with its definition and its dense reference.

softmax_stats.py            statistics of each row's negatives (log-sum-exp, maximum, ..), of shared keys: any option
softmax_stats_per_query.py  the same of negatives that are each query's own
softmax_loss.py             the plain loss (no such options) in one call, of shared keys: CLIP's above all
softmax_loss_per_query.py   the same of negatives that are each query's own
softmax_loss_shared.py      the same of a bank: frozen negatives that all queries share, none of the batch
"""
