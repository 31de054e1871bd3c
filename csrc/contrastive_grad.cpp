// Statistics of the logits of softmax contrastive losses: backward. The gradient H of the raw products is made in
// blocks, from the stash or from products made again; two further products per block turn it into embeddings' gradients.

#include "contrastive.h"

namespace fastloss {
namespace {

constexpr double kGradientBlock = 32;  // MiB of a block of H at most
constexpr int64_t kWidest = 65536;     // its columns at most

// The upstream gradients of one direction, and the log-sum-exps that belong to them; without effect where A is empty.
struct Upstream {
  std::vector<std::vector<float>> grad, lse;  // by factor; grad is times the factor
  std::vector<float> sum;                     // empty: no moments

  Upstream(const Problem& p, const Tensor& grads, const Tensor& stats, int64_t direction) {
    const auto row = [&](const Tensor& t, int64_t k) {
      return input<float>(t) + (direction * p.statistics() + k) * p.rows;
    };
    const int64_t length = (p.rows + 15) / 16 * 16;
    for (size_t f = 0; f < p.factors.size(); ++f) {
      grad.emplace_back(length, 0.0f);
      lse.emplace_back(length, 0.0f);
      for (int64_t i = 0; i < p.rows; ++i) {
        const float value = row(stats, p.lse_of(f))[i];
        if (value == -std::numeric_limits<float>::infinity()) continue;
        grad[f][i] = row(grads, p.lse_of(f))[i] * p.factors[f];
        lse[f][i] = value;
      }
    }
    if (!p.moments) return;
    sum.assign(length, 0.0f);
    std::copy_n(row(grads, 2), p.rows, sum.begin());
  }
};

class Backward {
 public:
  Backward(const Problem& p, const Tensor& grads, const Tensor& stats)
      : p_(p), kernels_(contrastive_kernels()), rows_(p, grads, stats, 0), blocks_(blocks_of(p.columns, kColumns)) {
    if (p.symmetric) columns_.emplace_back(p, grads, stats, 1);
    find_common();
    row_parts_.assign(p.rows * blocks_, 0.0);
    of_scale_.assign(p.columns, 0.0);
    of_bias_.assign(p.columns, 0.0);
  }

  bool needs_column_scale = false, needs_bias = false;

  // H, `to`, of rows begin .. and columns first .. from their products `raw`.
  void chunk(const Tensor& raw, int64_t begin, int64_t first, const Tensor& to) {
    const int64_t groups = blocks_of(raw.size(0), kRows), across = blocks_of(raw.size(1), kColumns);
    const int64_t width = (raw.size(1) + 15) / 16 * 16;
    std::vector<float> of_scale(needs_column_scale ? groups * width : 0, 0.0f);
    std::vector<float> of_bias(needs_bias ? groups * width : 0, 0.0f);
    torch::stable::parallel_for(0, groups * across, 1, [&](int64_t from, int64_t last) {
      for (int64_t t = from; t < last; ++t) {
        const int64_t row = t / across * kRows, at = t % across * kColumns, sums = t / across * width + at;
        const int64_t n = std::min(kColumns, raw.size(1) - at);
        float* scale = needs_column_scale ? &of_scale[sums] : nullptr;
        float* bias = needs_bias ? &of_bias[sums] : nullptr;
        for (int64_t r = row; r < std::min(row + kRows, raw.size(0)); ++r) {
          const float* x = input<float>(raw) + r * raw.stride(0) + at;
          line(x, begin + r, first + at, n, scale, bias, to, r * to.stride(0) + at);
        }
      }
    });
    for (int64_t g = 0; g < groups; ++g) {
      for (size_t j = 0; needs_column_scale && j < static_cast<size_t>(raw.size(1)); ++j)
        of_scale_[first + j] += of_scale[g * width + j];
      for (size_t j = 0; needs_bias && j < static_cast<size_t>(raw.size(1)); ++j)
        of_bias_[first + j] += of_bias[g * width + j];
    }
  }

  Tensor row_scale(const Tensor& like) const {
    Tensor to = torch::stable::new_empty(like, {p_.rows});
    for (int64_t i = 0; i < p_.rows; ++i) {
      double total = 0;
      for (int64_t b = 0; b < blocks_; ++b) total += row_parts_[i * blocks_ + b];
      output<float>(to)[i] = static_cast<float>(total);
    }
    return to;
  }
  Tensor column_scale(const Tensor& like) const { return vector(like, of_scale_); }
  Tensor bias(const Tensor& like) const { return vector(like, of_bias_); }

 private:
  static Tensor vector(const Tensor& like, const std::vector<double>& values) {
    Tensor to = torch::stable::new_empty(like, {static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), output<float>(to));
    return to;
  }

  // Where all log-sum-exps are within e^(+-50) of each other, e^(s - common) serves both directions of all pairs.
  void find_common() {
    if (!p_.symmetric || p_.two_ceilings || p_.factors.size() > 1) return;
    const Upstream& back = columns_[0];
    float low = std::numeric_limits<float>::infinity(), high = -low;
    for (int64_t i = 0; i < p_.rows; ++i) {
      const float one = rows_.lse[0][i], two = back.lse[0][i];
      if (!std::isfinite(one) || !std::isfinite(two)) return;
      low = std::min({low, one, two});
      high = std::max({high, one, two});
    }
    if (!(high - low <= 100)) return;
    shared_ = true;
    common_ = low + (high - low) / 2;
    row_share_.assign(p_.padded_columns, 0.0f);
    column_share_.assign(p_.padded_columns, 0.0f);
    for (int64_t i = 0; i < p_.rows; ++i) {
      row_share_[i] = rows_.grad[0][i] * std::exp(static_cast<double>(common_) - rows_.lse[0][i]);
      column_share_[i] = back.grad[0][i] * std::exp(static_cast<double>(common_) - back.lse[0][i]);
    }
  }

  void line(const float* raw, int64_t i, int64_t first, int64_t n, float* of_scale, float* of_bias, const Tensor& to,
            int64_t at) {
    alignas(64) float s[kColumns], g[kColumns];
    p_.logits(kernels_, raw, i, first, n, false, s);
    if (shared_) {
      kernels_.grad_both(s, n, common_, row_share_[i], &column_share_[first], g);
    } else {
      std::fill_n(g, (n + 15) / 16 * 16, 0.0f);
      for (size_t f = 0; f < p_.factors.size(); ++f)
        kernels_.grad_row(s, n, p_.factors[f], rows_.lse[f][i], rows_.grad[f][i], g);
    }
    if (p_.moments) kernels_.grad_sum(s, n, rows_.sum[i], nullptr, g);
    if (p_.symmetric && (!shared_ || p_.moments)) {
      const Upstream& back = columns_[0];
      if (p_.two_ceilings) p_.logits(kernels_, raw, i, first, n, true, s);
      for (size_t f = 0; !shared_ && f < p_.factors.size(); ++f)
        kernels_.grad_columns(s, n, p_.factors[f], &back.lse[f][first], &back.grad[f][first], g);
      if (p_.moments) kernels_.grad_sum(s, n, 0.0f, &back.sum[first], g);
    }
    float* h = p_.narrow() ? g : output<float>(to) + at;
    row_parts_[i * blocks_ + first / kColumns] =
        kernels_.finish(raw, g, n, p_.row_scale[i], &p_.column_scale[first], of_scale, of_bias, h);
    if (p_.narrow()) kernels_.narrow(h, n, output<BFloat16>(to) + at);
  }

  const Problem& p_;
  const ContrastiveKernels kernels_;
  const Upstream rows_;
  std::vector<Upstream> columns_;
  const int64_t blocks_;
  bool shared_ = false;
  float common_ = 0;
  std::vector<float> row_share_, column_share_;
  std::vector<double> row_parts_, of_scale_, of_bias_;
};

// Makes the block h of H whose first row and column are begin and first.
void fill(Backward& backward, Problem& p, const Tensor& stash, double workspace_mib, int64_t begin, int64_t first,
          const Tensor& h) {
  const auto [height, width] = rectangle(p, std::min(kProduct, workspace_mib / 2), kWide);
  for (int64_t r = 0; r < h.size(0); r += height)
    for (int64_t c = 0; c < h.size(1); c += width) {
      const int64_t m = std::min(height, h.size(0) - r), n = std::min(width, h.size(1) - c);
      const Tensor raw = stash.numel() > 0 ? slice(slice(stash, 0, begin + r, m), 1, first + c, n)
                                           : p.raw(begin + r, m, first + c, n);
      backward.chunk(raw, begin + r, first + c, slice(slice(h, 0, r, m), 1, c, n));
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_bwd(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& row_scale,
    std::optional<Tensor> column_scale, std::optional<Tensor> bias, std::optional<Tensor> excluded,
    std::optional<Tensor> row_ids, std::optional<Tensor> column_ids, std::optional<Tensor> ceiling, std::string kind,
    double hardness, double workspace_mib, const Tensor& stats, const Tensor& stash, bool needs_query, bool needs_key,
    bool needs_row_scale, bool needs_column_scale, bool needs_bias) {
  Problem p(query, key, kind, hardness);
  p.scales(row_scale, column_scale, bias);
  p.masks(excluded, row_ids, column_ids, ceiling);
  Backward backward(p, torch::stable::contiguous(grad), torch::stable::contiguous(stats));
  backward.needs_column_scale = needs_column_scale;
  backward.needs_bias = needs_bias;
  const auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  Tensor query_grad = needs_query ? torch::stable::new_empty(query, {p.rows, p.width}) : none(query);
  Tensor key_grad = needs_key ? torch::stable::new_empty(key, {p.columns, p.width}) : none(key);
  if (p.empty()) {
    torch::stable::zero_(query_grad);
    torch::stable::zero_(key_grad);
  } else {
    const auto [height, width] = rectangle(p, std::min(kGradientBlock, workspace_mib / 2), kWidest);
    const Tensor block = torch::stable::new_empty(p.queries, {height, width});
    std::vector<std::optional<Tensor>> of_columns(blocks_of(p.columns, width));  // transposed, of the rows so far
    for (int64_t begin = 0; begin < p.rows; begin += height) {
      std::optional<Tensor> of_rows;  // of the columns so far
      const int64_t m = std::min(height, p.rows - begin);
      for (int64_t first = 0; first < p.columns; first += width) {
        const int64_t n = std::min(width, p.columns - first);
        const Tensor h = slice(slice(block, 0, 0, m), 1, 0, n);
        fill(backward, p, stash, workspace_mib, begin, first, h);
        std::optional<Tensor>& transposed = of_columns[first / width];
        if (needs_query) of_rows = product(h, flipped(slice(p.keys, 0, first, n)), of_rows);
        if (needs_key) transposed = product(flipped(slice(p.queries, 0, begin, m)), flipped(h), transposed);
      }
      if (!needs_query) continue;
      Tensor rows = slice(query_grad, 0, begin, m);
      torch::stable::copy_(rows, *of_rows);
    }
    for (int64_t first = 0; needs_key && first < p.columns; first += width) {
      Tensor columns = slice(key_grad, 0, first, std::min(width, p.columns - first));
      torch::stable::copy_(columns, flipped(*of_columns[first / width]));
    }
  }
  return {query_grad, key_grad, needs_row_scale ? backward.row_scale(row_scale) : none(row_scale),
          needs_column_scale ? backward.column_scale(row_scale) : none(row_scale),
          needs_bias ? backward.bias(row_scale) : none(row_scale)};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) { m.impl("contrastive_bwd", TORCH_BOX(&fastloss::contrastive_bwd)); }
