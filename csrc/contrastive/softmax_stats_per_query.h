// The op of per-sample negatives, which softmax_loss_per_query.cpp calls too.
#pragma once

#include "core/tensors.h"

namespace fastloss::softmax_stats_per_query {

struct Inputs {
  Tensor query, negatives, row_scale;
  std::optional<Tensor> ceiling;
  bool normalize = false, moments = false;
  double hardness = 0;
  std::string save;

  template <typename F>
  void fields(const F& f) {
    f(query), f(negatives), f(row_scale), f(ceiling), f(normalize), f(moments), f(hardness), f(save);
  }
};
struct Saved {
  Tensor stats, weighted_keys, logits, inverse_norms;

  template <typename F>
  void fields(const F& f) {
    f(stats), f(weighted_keys), f(logits), f(inverse_norms);
  }
};
struct Grads {
  Tensor query, negatives, row_scale;

  template <typename F>
  void fields(const F& f) {
    f(query), f(negatives), f(row_scale);
  }
};
struct Needs {
  bool query, negatives, row_scale;

  template <typename F>
  void fields(const F& f) {
    f(query), f(negatives), f(row_scale);
  }
};

Saved softmax_stats_per_query_fwd(const Inputs& x);

// For the negatives' gradient alone `saved.weighted_keys` is not read.
Grads softmax_stats_per_query_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs);

}  // namespace fastloss::softmax_stats_per_query
