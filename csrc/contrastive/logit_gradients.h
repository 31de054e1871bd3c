// The gradients of softmax losses. H_ij is the gradient of the raw product <query_i, key_j>: that of the logit, G_ij,
// times the scales of row and column. It is made in blocks, from products that were kept or are made again. Two more
// products per block turn it into the embeddings' gradients.
#pragma once

#include "contrastive/logit_matrix.h"

#include <cmath>

namespace fastloss {

constexpr double kGradientBlock = 16;  // MiB of a block of H and of its transpose, each at most
constexpr int64_t kWidest = 8192;      // its columns at most: keys are packed once per block of rows

// The upstream gradients of one direction's statistics, and its log-sum-exps. Of a row without negatives, whose
// log-sum-exp is -inf, both are 0, so that nothing comes of it.
struct Upstream {
  std::vector<std::vector<float>> grad, lse;  // by factor
  std::vector<float> most;                    // what the log-sum-exps of all factors but the first are below
  std::vector<float> sum;                     // empty: no moments

  Upstream() = default;
  // of the log-sum-exps alone
  explicit Upstream(int64_t rows) : grad(1, std::vector<float>((rows + 15) / 16 * 16, 0.0f)), lse(grad) {}

  Upstream(const LogitMatrix& p, const Tensor& grads, const Tensor& stats, int64_t direction) {
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
        grad[f][i] = row(grads, p.lse_of(f))[i];
        lse[f][i] = value;
      }
    }
    if (p.hard()) {
      most.assign(length, 0.0f);
      for (int64_t i = 0; i < p.rows; ++i) most[i] = std::max(row(stats, 1)[i], kLowest);
    }
    if (!p.moments) return;
    sum.assign(length, 0.0f);
    std::copy_n(row(grads, 2), p.rows, sum.begin());
  }
};

// Makes H from raw products.
class Gradient {
 public:
  // `rows`, `columns`: the upstream gradients of the two directions; with one direction `columns` is empty. `positives`
  // (or empty): the gradients of the positives' logits, (i, i) or (i, excluded_i), which no statistic contains.
  Gradient(const LogitMatrix& p, Upstream rows, Upstream columns, std::vector<float> positives = {})
      : p_(p),
        kernels_(contrastive_kernels()),
        matmul_(matmul_kernels()),
        rows_(std::move(rows)),
        columns_(std::move(columns)),
        positives_(std::move(positives)),
        blocks_(blocks_of(p.columns, kColumns)) {
    find_common();
    row_parts_.assign(p.rows * blocks_, 0.0);
    of_scale_.assign(p.columns, 0.0);
    of_bias_.assign(p.columns, 0.0);
  }

  bool needs_column_scale = false, needs_bias = false;

  // H of rows begin .. and columns first .. from their products `raw`, to row and column of `to` and, transposed, of
  // `back` (or null).
  void chunk(const Tensor& raw, int64_t begin, int64_t first, const Panels& to, int64_t to_row, int64_t to_column,
             const Panels* back) {
    const int64_t groups = blocks_of(raw.size(0), kRows), across = blocks_of(raw.size(1), kColumns);
    const int64_t width = (raw.size(1) + 15) / 16 * 16;
    std::vector<float> of_scale(needs_column_scale ? groups * width : 0, 0.0f);
    std::vector<float> of_bias(needs_bias ? groups * width : 0, 0.0f);
    const int64_t grain = tiles_grain(raw.size(0), raw.size(1));
    over_threads(0, groups * across, grain, [&](int64_t from, int64_t last) {
      for (int64_t t = from; t < last && going_on(); ++t) {
        const int64_t row = t / across * kRows, start = t % across * kColumns;
        const int64_t whole = std::min(kColumns, raw.size(1) - start);
        const int64_t idle = p_.idle(begin + row, first + start, whole), n = whole - idle, at = start + idle;
        const int64_t sums = t / across * width + at;
        float* scale = needs_column_scale ? of_scale.data() + sums : nullptr;
        float* bias = needs_bias ? of_bias.data() + sums : nullptr;
        for (int64_t r = row; r < std::min(row + kRows, raw.size(0)); ++r) {
          const float* x = input<float>(raw) + r * raw.stride(0) + at;
          clear(to, to_row + r, to_column + start, idle);
          if (n > 0) line(x, begin + r, first + at, n, scale, bias, to, to_row + r, to_column + at);
        }
        if (back) turn(to, to_row + row, std::min(kRows, raw.size(0) - row), to_column + start, whole, *back);
      }
    });
    for (int64_t g = 0; g < groups; ++g) {
      for (size_t j = 0; needs_column_scale && j < static_cast<size_t>(raw.size(1)); ++j)
        of_scale_[first + j] += of_scale[g * width + j];
      for (size_t j = 0; needs_bias && j < static_cast<size_t>(raw.size(1)); ++j)
        of_bias_[first + j] += of_bias[g * width + j];
    }
  }

  double of_row_scale(int64_t i) const {
    double total = 0;
    for (int64_t b = 0; b < blocks_; ++b) total += row_parts_[i * blocks_ + b];
    return total;
  }
  Tensor row_scale(const Tensor& like) const {
    Tensor to = torch::stable::new_empty(like, {p_.rows});
    for (int64_t i = 0; i < p_.rows; ++i) output<float>(to)[i] = static_cast<float>(of_row_scale(i));
    return to;
  }
  Tensor column_scale(const Tensor& like) const { return vector(like, of_scale_); }
  Tensor bias(const Tensor& like) const { return vector(like, of_bias_); }

 private:
  static void clear(const Panels& to, int64_t row, int64_t column, int64_t n) {
    for (int64_t c = 0, some; c < n; c += some) {
      some = std::min(n - c, kTerms - (column + c) % kTerms);
      std::fill_n(to.at(row, column + c), some, 0.0f);
    }
  }
  static Tensor vector(const Tensor& like, const std::vector<double>& values) {
    Tensor to = torch::stable::new_empty(like, {static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), output<float>(to));
    return to;
  }

  // Where all log-sum-exps are within e^(+-50) of each other, e^(s - common) serves both directions of all pairs.
  void find_common() {
    if (!p_.symmetric || p_.two_ceilings || p_.hard()) return;
    const Upstream& back = columns_;
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

  // Copies m rows and n columns to the transpose.
  void turn(const Panels& from, int64_t row, int64_t m, int64_t column, int64_t n, const Panels& to) const {
    for (int64_t r = row, rows; r < row + m; r += rows) {
      rows = std::min(row + m - r, kTerms - r % kTerms);
      for (int64_t c = column, columns; c < column + n; c += columns) {
        columns = std::min(column + n - c, kTerms - c % kTerms);
        matmul_.transpose(from.at(r, c), from.width(c), rows, columns, to.at(c, r), to.width(r));
      }
    }
  }

  void line(const float* raw, int64_t i, int64_t first, int64_t n, float* of_scale, float* of_bias, const Panels& to,
            int64_t to_row, int64_t to_column) {
    alignas(64) float s[kColumns], g[kColumns];
    p_.logits(kernels_, raw, i, first, n, false, s);
    if (shared_) {
      kernels_.grad_both(s, n, common_, row_share_[i], &column_share_[first], g);
    } else {
      std::fill_n(g, (n + 15) / 16 * 16, 0.0f);
      kernels_.grad_row(s, n, rows_.lse[0][i], rows_.grad[0][i], g);
      if (p_.hard())
        kernels_.grad_hard_row(s, n, p_.hardness(), {rows_.most[i], rows_.lse[1][i], rows_.lse[2][i]},
                               {rows_.grad[1][i], rows_.grad[2][i]}, g);
    }
    if (p_.moments) kernels_.grad_sum(s, n, rows_.sum[i], nullptr, g);
    if (p_.symmetric && (!shared_ || p_.moments)) {
      const Upstream& back = columns_;
      if (p_.two_ceilings) p_.logits(kernels_, raw, i, first, n, true, s);
      if (!shared_) kernels_.grad_columns(s, n, &back.lse[0][first], &back.grad[0][first], g);
      if (p_.hard())
        kernels_.grad_hard_columns(s, n, p_.hardness(), {&back.most[first], &back.lse[1][first], &back.lse[2][first]},
                                   {&back.grad[1][first], &back.grad[2][first]}, g);
      if (p_.moments) kernels_.grad_sum(s, n, 0.0f, &back.sum[first], g);
    }
    if (!positives_.empty()) {
      const int64_t own = (p_.diagonal ? i : p_.excluded[i]) - first;
      if (own >= 0 && own < n) g[own] = positives_[i];
    }
    double total = 0;
    for (int64_t c = 0, some; c < n; c += some) {
      some = std::min(n - c, kTerms - (to_column + c) % kTerms);
      total += kernels_.finish(raw + c, g + c, some, p_.row_scale[i], &p_.column_scale[first + c],
                               of_scale ? of_scale + c : nullptr, of_bias ? of_bias + c : nullptr,
                               to.at(to_row, to_column + c));
    }
    row_parts_[i * blocks_ + first / kColumns] = total;
  }

  const LogitMatrix& p_;
  const ContrastiveKernels kernels_;
  const MatmulKernels matmul_;
  Upstream rows_;
  Upstream columns_;
  std::vector<float> positives_;
  const int64_t blocks_;
  bool shared_ = false;
  float common_ = 0;
  std::vector<float> row_share_, column_share_;
  std::vector<double> row_parts_, of_scale_, of_bias_;
};

// Hands out the gradients of embeddings' products, v = H key and u = H^T query: rows(begin, v [m, D]) of m rows at a
// time, columns(first, u [n, D]) of n columns at a time. `stash` [S, N]: the products of the first S rows.
template <typename Rows, typename Columns>
void make_gradients(Gradient& gradient, LogitMatrix& p, const Tensor& stash, double workspace_mib, bool needs_query,
                    bool needs_key, const Rows& rows, const Columns& columns) {
  const auto [height, width] = rectangle(p, std::min(kGradientBlock, workspace_mib / (needs_key ? 4 : 2)), kWidest);
  const auto [high, wide] = rectangle(p, std::min(kProduct, workspace_mib / 4), kWide);
  const Tensor block = floats({height, width}), turned = floats({needs_key ? width : 0, height});
  std::vector<std::optional<Tensor>> of_columns(blocks_of(p.columns, width));  // of the rows so far
  for (int64_t begin = 0; begin < p.rows; begin += height) {
    std::optional<Tensor> of_rows;  // of the columns so far
    const int64_t m = std::min(height, p.rows - begin);
    for (int64_t first = 0; first < p.columns; first += width) {
      const int64_t n = std::min(width, p.columns - first);
      if (p.below(begin, first + n)) continue;
      const Panels h(block, m, n), back(turned, n, m);
      for_pieces(m, high, [&, wide = wide](int64_t r, int64_t some) {
        for_pieces(n, wide, [&](int64_t c, int64_t across) {
          const Tensor raw = begin + r + some <= stash.size(0)
                                 ? slice(slice(stash, 0, begin + r, some), 1, first + c, across)
                                 : p.raw(begin + r, some, first + c, across);
          gradient.chunk(raw, begin + r, first + c, h, r, c, needs_key ? &back : nullptr);
        });
      });
      std::optional<Tensor>& below = of_columns[first / width];
      if (needs_query) of_rows = product(h, flipped(slice(p.keys, 0, first, n)), of_rows);
      if (needs_key) below = product(back, flipped(slice(p.queries, 0, begin, m)), below);
    }
    if (needs_query) rows(begin, *of_rows);
  }
  for (int64_t first = 0; needs_key && first < p.columns; first += width) columns(first, *of_columns[first / width]);
}

}  // namespace fastloss
