// Statistics of the logits of softmax contrastive losses. Logits exist one chunk at a time (or as the stash, where they
// are few): a library's matrix product writes them, one pass over tiles reads them. The backward: gradients of the
// embeddings, their scales and biases.

#include "contrastive/logit_gradients.h"
#include "contrastive/online_softmax.h"
#include "contrastive/weighted_keys.h"
#include "core/op.h"

namespace fastloss {
namespace {

std::tuple<Tensor, Tensor, Tensor> softmax_stats_fwd(const Tensor& query, const Tensor& key, const Tensor& row_scale,
                                                     std::optional<Tensor> column_scale, std::optional<Tensor> bias,
                                                     std::optional<Tensor> excluded, std::optional<Tensor> row_ids,
                                                     std::optional<Tensor> column_ids, std::optional<Tensor> ceiling,
                                                     std::string kind, double hardness, double workspace_mib,
                                                     bool keep_pulls) {
  LogitMatrix p(query, key, kind, hardness);
  p.scales(row_scale, column_scale, bias);
  p.masks(excluded, row_ids, column_ids, ceiling);
  Tensor stats = torch::stable::new_empty(row_scale, {p.directions(), p.statistics(), p.rows});
  const auto single = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(row_scale, shape); };
  Tensor pulls = single({keep_pulls ? p.sums() : 0, p.rows, p.width});
  if (keep_pulls) {
    make_pulls(p, workspace_mib, output<float>(stats), pulls);
    return {stats, single({0}), pulls};
  }
  const bool keep = fits_stash(p.rows, p.columns, workspace_mib);
  const std::optional<Tensor> kept = make_statistics(p, workspace_mib, keep ? p.rows : 0, output<float>(stats));
  if (kept.has_value()) return {stats, *kept, pulls};
  return {stats, keep ? single({p.rows, p.columns}) : single({0}), pulls};
}

// Adds h + hardness (h + g): h is the pull at 1 + hardness times its upstream gradient, g the one at hardness. h and g
// nearly cancel, so they are added before they are multiplied by the hardness.
void add_hard(int64_t width, float hardness, const HardGrads<float>& grads, const HardGrads<const float*>& pulls,
              float* to) {
  for (int64_t d = 0; d < width; ++d) {
    const float h = grads.harder * pulls.harder[d];
    to[d] += h + hardness * (h + grads.hard * pulls.hard[d]);
  }
}

// The gradients of queries and their scales (empty: not needed) from what the forward has made.
void from_pulls(const LogitMatrix& p, const Upstream& upstream, const Tensor& pulls, Tensor& query_grad,
                Tensor& scale_grad) {
  const int64_t factors = static_cast<int64_t>(p.factors.size());
  const float* from = input<float>(pulls);
  for_dtype(query_grad.scalar_type(), "contrastive", [&](auto element) {
    using T = decltype(element);
    T* to = query_grad.numel() > 0 ? output<T>(query_grad) : nullptr;
    for_each(blocks_of(p.rows, kRows), [&](int64_t block) {
      std::vector<float> t(p.width);
      for (int64_t i = block * kRows; i < std::min((block + 1) * kRows, p.rows); ++i) {
        std::fill(t.begin(), t.end(), 0.0f);
        const auto pull = [&](int64_t a) { return from + (a * p.rows + i) * p.width; };
        const auto add = [&](float share, const float* more) {
          for (int64_t d = 0; d < p.width; ++d) t[d] += share * more[d];
        };
        add(upstream.grad[0][i], pull(0));
        if (p.hard())
          add_hard(p.width, p.hardness(), {upstream.grad[1][i], upstream.grad[2][i]}, {pull(1), pull(2)}, t.data());
        if (p.moments) add(upstream.sum[i], pull(factors));
        double along = 0;
        const float* x = input<float>(p.query) + i * p.width;
        for (int64_t d = 0; d < p.width; ++d) along += static_cast<double>(x[d]) * t[d];
        if (scale_grad.numel() > 0) output<float>(scale_grad)[i] = static_cast<float>(along);
        for (int64_t d = 0; to && d < p.width; ++d) to[i * p.width + d] = static_cast<T>(p.row_scale[i] * t[d]);
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_stats_bwd(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& row_scale,
    std::optional<Tensor> column_scale, std::optional<Tensor> bias, std::optional<Tensor> excluded,
    std::optional<Tensor> row_ids, std::optional<Tensor> column_ids, std::optional<Tensor> ceiling, std::string kind,
    double hardness, double workspace_mib, bool keep, const Tensor& stats, const Tensor& stash, const Tensor& pulls,
    bool needs_query, bool needs_key, bool needs_row_scale, bool needs_column_scale, bool needs_bias) {
  LogitMatrix p(query, key, kind, hardness);
  p.scales(row_scale, column_scale, bias);
  p.masks(excluded, row_ids, column_ids, ceiling);
  const Tensor upstream = torch::stable::contiguous(grad), made = torch::stable::contiguous(stats);
  const auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  Upstream of_rows(p, upstream, made, 0);
  Tensor query_grad = needs_query ? torch::stable::new_empty(query, {p.rows, p.width}) : none(query);
  if (keep) {
    STD_TORCH_CHECK(!needs_key && !needs_column_scale && !needs_bias, "contrastive: kept nothing for this gradient");
    Tensor scale_grad = needs_row_scale ? torch::stable::new_empty(row_scale, {p.rows}) : none(row_scale);
    from_pulls(p, of_rows, pulls, query_grad, scale_grad);
    return {query_grad, none(key), scale_grad, none(row_scale), none(row_scale)};
  }
  Gradient gradient(p, std::move(of_rows), p.symmetric ? Upstream(p, upstream, made, p.directions() - 1) : Upstream());
  gradient.needs_column_scale = needs_column_scale;
  gradient.needs_bias = needs_bias;
  Tensor key_grad = needs_key ? torch::stable::new_empty(key, {p.columns, p.width}) : none(key);
  if (p.empty()) {
    torch::stable::zero_(query_grad);
    torch::stable::zero_(key_grad);
  } else {
    const auto put = [](Tensor& to, int64_t begin, const Tensor& from) {
      Tensor part = slice(to, 0, begin, from.size(0));
      torch::stable::copy_(part, from);
    };
    make_gradients(
        gradient, p, stash, workspace_mib, needs_query, needs_key,
        [&](int64_t begin, const Tensor& v) { put(query_grad, begin, v); },
        [&](int64_t first, const Tensor& u) { put(key_grad, first, u); });
  }
  return {query_grad, key_grad, needs_row_scale ? gradient.row_scale(row_scale) : none(row_scale),
          needs_column_scale ? gradient.column_scale(row_scale) : none(row_scale),
          needs_bias ? gradient.bias(row_scale) : none(row_scale)};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_stats_fwd", FASTLOSS_BOX(&fastloss::softmax_stats_fwd));
  m.impl("softmax_stats_bwd", FASTLOSS_BOX(&fastloss::softmax_stats_bwd));
}
