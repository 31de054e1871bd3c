// The op of per-sample negatives, which softmax_loss_per_query.cpp too calls.
#pragma once

#include "core/tensors.h"

namespace fastloss {

// statistics, pulls, logits and inverse lengths, as softmax_stats_per_query.py defines them
std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_stats_per_query_fwd(const Tensor& query, const Tensor& negatives,
                                                                       const Tensor& row_scale,
                                                                       std::optional<Tensor> ceiling, bool normalize,
                                                                       std::string kind, double hardness, int64_t keep);

// gradients of query, negatives and row_scale; without the first and last, `pulls` is not read
std::tuple<Tensor, Tensor, Tensor> softmax_stats_per_query_bwd(
    const Tensor& grad, const Tensor& query, const Tensor& negatives, const Tensor& row_scale,
    std::optional<Tensor> ceiling, bool normalize, std::string kind, double hardness, int64_t keep, const Tensor& stats,
    const Tensor& pulls, const Tensor& logits, const Tensor& inverse, bool needs_query, bool needs_negatives,
    bool needs_row_scale);

}  // namespace fastloss
