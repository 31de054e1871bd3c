// The plain loss whose negatives are each query's own, from embeddings to loss, as softmax_loss_per_query.py defines
// it: the negatives' statistics and gradient are those of softmax_stats_per_query.cpp, what is one vector per row that
// of the plain loss.

#include "contrastive/softmax_loss.h"
#include "contrastive/softmax_stats_per_query.h"
#include "core/op.h"

namespace fastloss {
namespace {

using torch::stable::new_empty;
namespace stats_op = softmax_stats_per_query;

constexpr char kOp[] = "softmax_loss_per_query";
constexpr int64_t kSavedStats = 4;  // numbers per row: n_i, the largest logit, p_i, r_i

struct Inputs {
  Tensor query, key, negatives;
  OptionalTensor mask, scale, row_weight;
  double fixed_scale;
  bool include_positive, normalize;
  std::string reduction;
  int64_t needs;
  FASTLOSS_FIELDS(query, key, negatives, mask, scale, row_weight, fixed_scale, include_positive, normalize, reduction,
                  needs)
};
struct Saved {
  Tensor stats, logits, inverse_norms, query_grad, key_grad, scale_grad;
  FASTLOSS_FIELDS(stats, logits, inverse_norms, query_grad, key_grad, scale_grad)
};
template <typename T>
struct PerInput {
  T query, key, negatives, scale;
  FASTLOSS_FIELDS(query, key, negatives, scale)
};
using Grads = PerInput<Tensor>;
using Needs = PerInput<bool>;

// What does not concern the negatives: the positives, each in the place of the diagonal.
SoftmaxLoss loss_of(const Inputs& x) {
  softmax_loss::Inputs positives;
  positives.query = x.query;
  positives.key = x.key;
  positives.scale = x.scale;
  positives.row_weight = x.row_weight;
  positives.fixed_scale = x.fixed_scale;
  positives.include_positive = x.include_positive;
  positives.normalize = x.normalize;
  positives.reduction = x.reduction;
  SoftmaxLoss loss(kOp, positives);
  STD_TORCH_CHECK(loss.p.rows == loss.p.columns, kOp, ": key: expected as many as queries");
  return loss;
}

// The op of the negatives' statistics, whose row scales are r_i.
stats_op::Inputs stats_inputs(const Inputs& x, const SoftmaxLoss& loss, const float* row_scale, const char* save) {
  const Tensor scales = new_float32(loss.p.rows);
  std::copy_n(row_scale, loss.p.rows, output<float>(scales));
  return {loss.p.query, x.negatives, x.mask, scales, std::nullopt, x.normalize, false, 0, save};
}

std::tuple<Tensor, Saved> softmax_loss_per_query_fwd(const Inputs& x) {
  SoftmaxLoss loss = loss_of(x);
  const LogitMatrix& p = loss.p;
  loss.measure();
  const bool saves_logits = x.needs & kNegatives;
  const char* save = saves_logits ? "logits" : x.needs != 0 ? "weighted_keys" : "";
  const stats_op::Saved found = stats_op::softmax_stats_per_query_fwd(stats_inputs(x, loss, p.row_scale.data(), save));
  const float* lse = input<float>(found.stats);
  softmax_loss::Grads grads{new_float32({x.needs & kQuery ? p.rows : 0, p.dim}),
                            new_float32({x.needs & kKey ? p.rows : 0, p.dim}),
                            new_float32(x.needs & kScale ? p.rows : 0)};
  if (x.needs & (kQuery | kKey | kScale)) {
    Tensor weighted_keys = view_of(found.weighted_keys, {p.rows, p.dim}, {p.dim, 1}, 0);
    make_row_grads(loss, lse, weighted_keys, grads);
  }
  std::copy_n(lse, p.rows, loss.row_lse.begin());
  const Tensor stats = new_float32({kSavedStats, saves_logits ? p.rows : 0});
  if (saves_logits) {
    float* to = std::copy_n(lse, 2 * p.rows, output<float>(stats));
    std::copy_n(p.row_scale.begin(), p.rows, std::copy_n(loss.positive.begin(), p.rows, to));
  }
  return {loss.result(), Saved{stats, found.logits, found.inverse_norms, grads.query, grads.key, grads.scale}};
}

// The gradient of the negatives where loss_i counts weight[i]; rows of weight 0 get none.
Tensor negatives_grad(const Inputs& x, const SoftmaxLoss& loss, const Saved& saved, const std::vector<float>& weight) {
  const int64_t rows = loss.p.rows;
  const Tensor grad_stats = new_float32({2, rows});
  const float *lse = input<float>(saved.stats), *positive = lse + 2 * rows, *row_scale = positive + rows;
  for (int64_t i = 0; i < rows; ++i) {
    const double grad_lse = loss.row_weight[i] == 0 ? 0 : loss.grad_lse(lse[i], positive[i]);
    output<float>(grad_stats)[i] = static_cast<float>(weight[i] * grad_lse);
    output<float>(grad_stats)[rows + i] = 0;  // of the largest logit
  }
  const stats_op::Saved of_stats{saved.stats, new_float32(0), saved.logits, saved.inverse_norms};
  return stats_op::softmax_stats_per_query_bwd(grad_stats, stats_inputs(x, loss, row_scale, "logits"), of_stats,
                                               {false, true, false})
      .negatives;
}

Grads softmax_loss_per_query_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  const SoftmaxLoss loss = loss_of(x);
  const int64_t rows = loss.p.rows;
  STD_TORCH_CHECK(!needs.negatives || saved.stats.numel() == kSavedStats * rows, kOp,
                  ": needs: the forward was not told that negatives need a gradient");
  const Tensor up = as_contiguous(grad);
  std::vector<float> weight(rows);  // of loss_i
  for (int64_t i = 0; i < rows; ++i)
    weight[i] = loss.row_weight[i] == 0 ? 0 : input<float>(up)[loss.unreduced ? i : 0] * loss.row_weight[i];
  const auto weight_of = [&](int64_t i) { return weight[i]; };
  return {
      needs.query ? scaled_rows(saved.query_grad, weight_of, x.query) : new_empty(x.query, {0}),
      needs.key ? scaled_rows(saved.key_grad, weight_of, x.key) : new_empty(x.key, {0}),
      needs.negatives ? negatives_grad(x, loss, saved, weight) : new_empty(x.negatives, {0}),
      needs.scale && x.scale.has_value() ? sum_of_scale_grads(saved.scale_grad, weight_of, *x.scale) : new_float32(0)};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_loss_per_query_fwd", FASTLOSS_BOX(&fastloss::softmax_loss_per_query_fwd));
  m.impl("softmax_loss_per_query_bwd", FASTLOSS_BOX(&fastloss::softmax_loss_per_query_bwd));
}
