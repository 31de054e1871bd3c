// The op of per-sample negatives, which softmax_loss_per_query.cpp too calls; softmax_stats_per_query.py says what its
// arguments are.
#pragma once

#include "core/tensors.h"

namespace fastloss {

struct StatsPerQuery {
  struct Inputs {
    Tensor query, negatives, row_scale;
    std::optional<Tensor> ceiling;
    bool normalize, moments;
    double hardness;
    std::string save;  // "", "weighted_keys" or "logits"
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

  static Saved forward(const Inputs& x);
  // Without gradients of query and row_scale, `saved.weighted_keys` is not read.
  static Grads backward(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs);
};

}  // namespace fastloss
