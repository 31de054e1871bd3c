// The plain loss whose negatives are each row's own, from embeddings to loss, as softmax_loss_per_query.py defines it:
// the negatives' statistics and gradient are those of softmax_stats_per_query.cpp, what is one vector per row those of
// the plain op.

#include "contrastive/softmax_loss.h"
#include "contrastive/softmax_stats_per_query.h"
#include "core/op.h"

namespace fastloss {
namespace {

using torch::stable::new_empty;

constexpr int64_t kRowStats = 4;  // n_i, the largest logit, p_i, r_i

struct Inputs {
  Tensor query, key, negatives;
  Given scale, row_weight;
  double fixed_scale;
  bool include_positive, normalize;
  std::string reduction;
  int64_t needs;
  template <typename F>
  void fields(const F& f) {
    f(query), f(key), f(negatives), f(scale), f(row_weight), f(fixed_scale), f(include_positive), f(normalize);
    f(reduction), f(needs);
  }
};

struct Saved {
  Tensor stats, logits, inverse_norms, query_grad, key_grad, scale_grad;
  template <typename F>
  void fields(const F& f) {
    f(stats), f(logits), f(inverse_norms), f(query_grad), f(key_grad), f(scale_grad);
  }
};

struct Forward {
  Tensor out;
  Saved saved;
  template <typename F>
  void fields(const F& f) {
    f(out), f(saved);
  }
};

struct Grads {
  Tensor query, key, negatives, scale;
  template <typename F>
  void fields(const F& f) {
    f(query), f(key), f(negatives), f(scale);
  }
};

struct Needs {
  bool query, key, negatives, scale;
  template <typename F>
  void fields(const F& f) {
    f(query), f(key), f(negatives), f(scale);
  }
};

Forward softmax_loss_per_query_fwd(const Inputs& x) {
  SoftmaxLoss call(x, std::nullopt, false);
  const LogitMatrix& p = call.p;
  STD_TORCH_CHECK(p.rows == p.columns, "softmax_loss_per_query: expected as many keys as queries");
  call.measure();
  const Tensor row_scale = vector(p.rows);
  std::copy_n(p.row_scale.begin(), p.rows, output<float>(row_scale));
  const bool logits = x.needs & kNegatives;
  const std::string save = logits ? "logits" : x.needs != 0 ? "weighted_keys" : "";
  const auto of_negatives =
      StatsPerQuery::forward({p.query, x.negatives, row_scale, std::nullopt, x.normalize, false, 0, save});
  const float* n = input<float>(of_negatives.stats);
  LossGrads grads{floats({x.needs & kQuery ? p.rows : 0, p.width}), floats({x.needs & kKey ? p.rows : 0, p.width}),
                  vector(x.needs & kScale ? p.rows : 0)};
  if (x.needs & (kQuery | kKey | kScale)) {
    Tensor weighted_keys = view_of(of_negatives.weighted_keys, {p.rows, p.width}, {p.width, 1}, 0);
    rows_pass(call, n, weighted_keys, grads);
  }
  std::copy_n(n, p.rows, call.lse.begin());
  const Tensor stats = floats({kRowStats, logits ? p.rows : 0});
  if (logits) {
    float* to = std::copy_n(n, 2 * p.rows, output<float>(stats));
    std::copy_n(p.row_scale.begin(), p.rows, std::copy_n(call.positive.begin(), p.rows, to));
  }
  return {losses(call, x.reduction),
          {stats, of_negatives.logits, of_negatives.inverse_norms, grads.query, grads.key, grads.scale}};
}

// The gradient of the negatives; `upstream` is that of loss_i.
Tensor negatives_grad(const SoftmaxLoss& call, const Inputs& x, const Saved& saved,
                      const std::vector<float>& upstream) {
  const LogitMatrix& p = call.p;
  const Tensor grad = floats({2, p.rows}), row_scale = vector(p.rows);  // of n_i and of the largest logit: 0
  const float *n = input<float>(saved.stats), *positive = n + 2 * p.rows;
  std::copy_n(positive + p.rows, p.rows, output<float>(row_scale));
  for (int64_t i = 0; i < p.rows; ++i) {
    const double slope = call.row_weight[i] == 0 ? 0 : call.slope(n[i], positive[i]);
    output<float>(grad)[i] = static_cast<float>(upstream[i] * slope);
    output<float>(grad)[p.rows + i] = 0;
  }
  const StatsPerQuery::Inputs of_negatives{p.query,     x.negatives, row_scale, std::nullopt,
                                           x.normalize, false,       0,         "logits"};
  return StatsPerQuery::backward(grad, of_negatives, {saved.stats, vector(0), saved.logits, saved.inverse_norms},
                                 {.query = false, .negatives = true, .row_scale = false})
      .negatives;
}

Grads softmax_loss_per_query_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  SoftmaxLoss call(x, std::nullopt, false);
  const LogitMatrix& p = call.p;
  const Tensor up = torch::stable::contiguous(grad);
  std::vector<float> upstream(p.rows);  // of loss_i
  for (int64_t i = 0; i < p.rows; ++i)
    upstream[i] = call.row_weight[i] == 0 ? 0 : input<float>(up)[x.reduction == "none" ? i : 0] * call.row_weight[i];
  const auto of_row = [&](int64_t i) { return upstream[i]; };
  Grads grads{needs.query ? scaled(saved.query_grad, of_row, x.query) : new_empty(x.query, {0}),
              needs.key ? scaled(saved.key_grad, of_row, x.key) : new_empty(x.key, {0}),
              needs.negatives ? negatives_grad(call, x, saved, upstream) : new_empty(x.negatives, {0}), vector(0)};
  if (needs.scale && x.scale.has_value()) {
    double total = 0;
    for (int64_t i = 0; i < p.rows; ++i) total += static_cast<double>(upstream[i]) * input<float>(saved.scale_grad)[i];
    grads.scale = empty_like(*x.scale, ScalarType::Float);
    output<float>(grads.scale)[0] = static_cast<float>(total);
  }
  return grads;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_loss_per_query_fwd", FASTLOSS_BOX(&fastloss::softmax_loss_per_query_fwd));
  m.impl("softmax_loss_per_query_bwd", FASTLOSS_BOX(&fastloss::softmax_loss_per_query_bwd));
}
