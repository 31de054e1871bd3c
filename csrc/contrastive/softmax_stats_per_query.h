// The op of per-sample negatives, which softmax_loss_per_query.cpp calls too.
#pragma once

#include "core/op.h"
#include "core/tensors.h"

namespace fastloss::softmax_stats_per_query {

struct Inputs {
  Tensor query, negatives;
  std::optional<Tensor> mask;
  Tensor row_scale;
  std::optional<Tensor> logit_limit;
  bool normalize = false, moments = false;
  double hardness = 0;
  std::string save;
  FASTLOSS_FIELDS(query, negatives, mask, row_scale, logit_limit, normalize, moments, hardness, save)
};
struct Saved {
  Tensor stats, weighted_keys, logits, inverse_norms;
  FASTLOSS_FIELDS(stats, weighted_keys, logits, inverse_norms)
};
template <typename T>
struct PerInput {
  T query, negatives, row_scale;
  FASTLOSS_FIELDS(query, negatives, row_scale)
};
using Grads = PerInput<Tensor>;
using Needs = PerInput<bool>;

Saved softmax_stats_per_query_fwd(const Inputs& x);

// For the negatives' gradient alone `saved.weighted_keys` is not read.
Grads softmax_stats_per_query_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs);

}  // namespace fastloss::softmax_stats_per_query
