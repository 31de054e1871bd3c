// The plain loss whose negatives are each row's own, from embeddings to loss, as softmax_loss_per_query.py defines it:
// the negatives' statistics and gradient are those of softmax_stats_per_query.cpp, what is one vector per row those of
// the plain op.

#include "contrastive/softmax_loss.h"
#include "contrastive/softmax_stats_per_query.h"
#include "core/op.h"

namespace fastloss {
namespace {

using torch::stable::new_empty;

constexpr int64_t kKept = 4;  // numbers per row of the state: n_i, the largest logit, p_i, r_i

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> softmax_loss_per_query_fwd(
    const Tensor& query, const Tensor& key, const Tensor& negatives, std::optional<Tensor> scale,
    std::optional<Tensor> share, double factor, bool include_positive, bool normalize, std::string reduction,
    int64_t needs) {
  SoftmaxLoss call(query, key, scale, share, std::nullopt, factor, include_positive, false, normalize, reduction);
  const LogitMatrix& p = call.p;
  STD_TORCH_CHECK(p.rows == p.columns, "softmax_loss_per_query: expected as many keys as queries");
  call.measure();
  const Tensor row_scale = vector(p.rows);
  std::copy_n(p.row_scale.begin(), p.rows, output<float>(row_scale));
  const bool keeps = needs & kNegatives;
  auto [stats, pulls, logits, inverse] = softmax_stats_per_query_fwd(p.query, negatives, row_scale, std::nullopt,
                                                                     normalize, "", 0, keeps ? 2 : needs != 0);
  const float* n = input<float>(stats);
  Made made{floats({needs & kQuery ? p.rows : 0, p.width}), floats({needs & kKey ? p.rows : 0, p.width}),
            vector(needs & kScale ? p.rows : 0)};
  if (needs & (kQuery | kKey | kScale)) {
    Tensor vectors = view_of(pulls, {p.rows, p.width}, {p.width, 1}, 0);
    rows_pass(call, n, vectors, made);
  }
  std::copy_n(n, p.rows, call.lse.begin());
  const Tensor state = floats({kKept, keeps ? p.rows : 0});
  if (keeps) {
    float* to = std::copy_n(n, 2 * p.rows, output<float>(state));
    std::copy_n(p.row_scale.begin(), p.rows, std::copy_n(call.positive.begin(), p.rows, to));
  }
  return {losses(call, reduction), state, logits, inverse, made.query, made.key, made.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_loss_per_query_bwd(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& negatives, std::optional<Tensor> scale,
    std::optional<Tensor> share, double factor, bool include_positive, bool normalize, std::string reduction,
    int64_t needs, const Tensor& state, const Tensor& logits, const Tensor& inverse, const Tensor& query_grad,
    const Tensor& key_grad, const Tensor& scale_grad, bool needs_query, bool needs_key, bool needs_negatives,
    bool needs_scale) {
  SoftmaxLoss call(query, key, scale, share, std::nullopt, factor, include_positive, false, normalize, reduction);
  const LogitMatrix& p = call.p;
  const Tensor up = torch::stable::contiguous(grad);
  std::vector<float> upstream(p.rows);  // of loss_i
  for (int64_t i = 0; i < p.rows; ++i)
    upstream[i] = call.share[i] == 0 ? 0 : input<float>(up)[reduction == "none" ? i : 0] * call.share[i];
  const auto of_row = [&](int64_t i) { return upstream[i]; };
  const Tensor to_query = needs_query ? scaled(query_grad, of_row, query) : new_empty(query, {0});
  const Tensor to_key = needs_key ? scaled(key_grad, of_row, key) : new_empty(key, {0});
  Tensor to_negatives = new_empty(negatives, {0}), to_scale = vector(0);
  if (needs_negatives) {
    const Tensor slopes = floats({2, p.rows}), row_scale = vector(p.rows);
    const float *n = input<float>(state), *positive = n + 2 * p.rows;
    std::copy_n(positive + p.rows, p.rows, output<float>(row_scale));
    for (int64_t i = 0; i < p.rows; ++i) {
      const double slope = call.share[i] == 0 ? 0 : call.slope(n[i], positive[i]);
      output<float>(slopes)[i] = static_cast<float>(upstream[i] * slope);
      output<float>(slopes)[p.rows + i] = 0;  // of the largest logit
    }
    to_negatives =
        std::get<1>(softmax_stats_per_query_bwd(slopes, p.query, negatives, row_scale, std::nullopt, normalize, "", 0,
                                                2, state, vector(0), logits, inverse, false, true, false));
  }
  if (needs_scale && scale.has_value()) {
    double total = 0;
    for (int64_t i = 0; i < p.rows; ++i) total += static_cast<double>(upstream[i]) * input<float>(scale_grad)[i];
    to_scale = empty_like(*scale, ScalarType::Float);
    output<float>(to_scale)[0] = static_cast<float>(total);
  }
  return {to_query, to_key, to_negatives, to_scale};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_loss_per_query_fwd", FASTLOSS_BOX(&fastloss::softmax_loss_per_query_fwd));
  m.impl("softmax_loss_per_query_bwd", FASTLOSS_BOX(&fastloss::softmax_loss_per_query_bwd));
}
