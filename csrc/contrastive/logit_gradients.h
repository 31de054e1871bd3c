// The gradients of softmax losses. H_ij is the gradient of the raw product <query_i, key_j>: that of the logit, G_ij,
// times the scales of row and column. It is made block by block, from products that were saved or are made again. Two
// more products per block turn it into the embeddings' gradients.
#pragma once

#include "contrastive/logit_matrix.h"

#include <cmath>

namespace fastloss {

constexpr double kGradientBlockMiB = 16;         // a block of H, and its transpose, each at most
constexpr int64_t kGradientBlockColumns = 8192;  // at most: keys are packed once per block of rows

// The gradients of one direction's statistics, and its log-sum-exps; of each padded to whole vectors. Of a row without
// negatives, whose log-sum-exp is -inf, both are 0, so that nothing comes of it.
struct Upstream {
  std::vector<std::vector<float>> grad_lse, lse;  // by power
  std::vector<float> max;                         // what the log-sum-exps of all powers but the first are relative to
  std::vector<float> grad_sum;                    // empty: no moments

  Upstream() = default;
  // Of the log-sum-exps alone, all 0 for a start.
  explicit Upstream(int64_t rows) : grad_lse(1, std::vector<float>(whole_vectors(rows), 0.0f)), lse(grad_lse) {}

  // Both tensors are [directions, statistics, rows].
  Upstream(const LogitMatrix& p, const Tensor& grads, const Tensor& stats, int64_t direction) {
    const auto row = [&](const Tensor& t, int64_t k) {
      return input<float>(t) + (direction * p.stats_count() + k) * p.rows;
    };
    const int64_t length = whole_vectors(p.rows);
    for (size_t a = 0; a < p.powers.size(); ++a) {
      grad_lse.emplace_back(length, 0.0f);
      lse.emplace_back(length, 0.0f);
      for (int64_t i = 0; i < p.rows; ++i) {
        const float value = row(stats, p.lse_index(a))[i];
        if (value == -std::numeric_limits<float>::infinity()) continue;
        grad_lse[a][i] = row(grads, p.lse_index(a))[i];
        lse[a][i] = value;
      }
    }
    if (p.has_hardness()) {
      max.assign(length, 0.0f);
      for (int64_t i = 0; i < p.rows; ++i) max[i] = std::max(row(stats, 1)[i], kLowest);
    }
    if (!p.moments) return;
    grad_sum.assign(length, 0.0f);
    std::copy_n(row(grads, 2), p.rows, grad_sum.begin());
  }
};

// Makes H from raw products.
class LogitGradients {
 public:
  // `rows`, `columns`: the upstream gradients of the two directions; with one direction `columns` is empty.
  // `positive_grads` (or empty): the gradients of the positives' logits, (i, i) or (i, targets_i), which no statistic
  // contains.
  LogitGradients(const LogitMatrix& p, Upstream rows, Upstream columns, std::vector<float> positive_grads = {})
      : p_(p),
        kernels_(contrastive_kernels()),
        matmul_(matmul_kernels()),
        rows_(std::move(rows)),
        columns_(std::move(columns)),
        positive_grads_(std::move(positive_grads)),
        tiles_per_row_(blocks_of(p.columns, kTileColumns)) {
    find_common_exponent();
    row_scale_grad_parts_.assign(p.rows * tiles_per_row_, 0.0);
    column_scale_grad_.assign(p.columns, 0.0);
    bias_grad_.assign(p.columns, 0.0);
  }

  bool needs_column_scale = false, needs_bias = false;

  // Where H goes: from this row and column of `to` on, and transposed to `to_transposed` (null: nowhere).
  struct Target {
    const Panels& to;
    int64_t row, column;
    const Panels* to_transposed;
  };

  // H of rows begin .. and columns first .. from their products `raw`.
  void add_block(const Tensor& raw, int64_t begin, int64_t first, const Target& target) {
    const int64_t groups = blocks_of(raw.size(0), kTileRows), across = blocks_of(raw.size(1), kTileColumns);
    const int64_t width = whole_vectors(raw.size(1));
    std::vector<float> scale_grads(needs_column_scale ? groups * width : 0, 0.0f);
    std::vector<float> bias_grads(needs_bias ? groups * width : 0, 0.0f);
    over_threads(0, groups * across, tiles_grain(raw.size(0), raw.size(1)), [&](int64_t from, int64_t last) {
      for (int64_t t = from; t < last && going_on(); ++t) {
        const int64_t group = t / across, tile_column = t % across * kTileColumns;
        float* scale_grad = needs_column_scale ? &scale_grads[group * width] : nullptr;
        float* bias_grad = needs_bias ? &bias_grads[group * width] : nullptr;
        add_tile(raw, begin, first, {group * kTileRows, tile_column}, scale_grad, bias_grad, target);
      }
    });
    for (int64_t g = 0; g < groups; ++g) {
      for (size_t j = 0; needs_column_scale && j < static_cast<size_t>(raw.size(1)); ++j)
        column_scale_grad_[first + j] += scale_grads[g * width + j];
      for (size_t j = 0; needs_bias && j < static_cast<size_t>(raw.size(1)); ++j)
        bias_grad_[first + j] += bias_grads[g * width + j];
    }
  }

  double row_scale_grad(int64_t i) const {
    double sum = 0;
    for (int64_t b = 0; b < tiles_per_row_; ++b) sum += row_scale_grad_parts_[i * tiles_per_row_ + b];
    return sum;
  }
  Tensor row_scale_grad() const {
    const Tensor to = new_float32(p_.rows);
    for (int64_t i = 0; i < p_.rows; ++i) output<float>(to)[i] = static_cast<float>(row_scale_grad(i));
    return to;
  }
  Tensor column_scale_grad() const { return float32(column_scale_grad_); }
  Tensor bias_grad() const { return float32(bias_grad_); }

 private:
  struct Offset {
    int64_t row, column;
  };

  // The tile of the block at `tile`. Gradients of column scales and biases: [columns of the block], or null.
  void add_tile(const Tensor& raw, int64_t begin, int64_t first, const Offset& tile, float* scale_grad,
                float* bias_grad, const Target& target) {
    const int64_t rows = std::min(kTileRows, raw.size(0) - tile.row);
    const int64_t columns = std::min(kTileColumns, raw.size(1) - tile.column);
    const int64_t skipped = p_.columns_below_diagonal(begin + tile.row, first + tile.column, columns);
    const int64_t column = tile.column + skipped, n = columns - skipped;
    for (int64_t r = tile.row; r < tile.row + rows; ++r) {
      const Offset to{target.row + r, target.column + tile.column};
      clear(target.to, to, skipped);
      if (n > 0)
        add_row(input<float>(raw) + r * raw.stride(0) + column, begin + r, first + column, n,
                scale_grad ? scale_grad + column : nullptr, bias_grad ? bias_grad + column : nullptr, target.to,
                {to.row, to.column + skipped});
    }
    if (target.to_transposed)
      transpose(target.to, {target.row + tile.row, target.column + tile.column}, rows, columns, *target.to_transposed);
  }

  static void clear(const Panels& to, const Offset& offset, int64_t n) {
    for (int64_t c = 0, count; c < n; c += count) {
      count = std::min(n - c, kTerms - (offset.column + c) % kTerms);
      std::fill_n(to.at(offset.row, offset.column + c), count, 0.0f);
    }
  }
  static Tensor float32(const std::vector<double>& values) {
    const Tensor to = new_float32(static_cast<int64_t>(values.size()));
    std::copy(values.begin(), values.end(), output<float>(to));
    return to;
  }

  // Where all log-sum-exps are within e^(+-50) of each other, e^(s - exponent) serves both directions of all pairs.
  void find_common_exponent() {
    if (!p_.symmetric || p_.two_limits || p_.has_hardness()) return;
    float lowest = std::numeric_limits<float>::infinity(), highest = -lowest;
    for (int64_t i = 0; i < p_.rows; ++i) {
      const float row = rows_.lse[0][i], column = columns_.lse[0][i];
      if (!std::isfinite(row) || !std::isfinite(column)) return;
      lowest = std::min({lowest, row, column});
      highest = std::max({highest, row, column});
    }
    if (!(highest - lowest <= 100)) return;
    has_common_exponent_ = true;
    exponent_ = lowest + (highest - lowest) / 2;
    row_grad_.assign(p_.padded_columns, 0.0f);
    column_grad_.assign(p_.padded_columns, 0.0f);
    for (int64_t i = 0; i < p_.rows; ++i) {
      row_grad_[i] = rows_.grad_lse[0][i] * std::exp(static_cast<double>(exponent_) - rows_.lse[0][i]);
      column_grad_[i] = columns_.grad_lse[0][i] * std::exp(static_cast<double>(exponent_) - columns_.lse[0][i]);
    }
  }

  // Copies m rows and n columns to the transpose.
  void transpose(const Panels& from, const Offset& offset, int64_t m, int64_t n, const Panels& to) const {
    for (int64_t r = offset.row, rows; r < offset.row + m; r += rows) {
      rows = std::min(offset.row + m - r, kTerms - r % kTerms);
      for (int64_t c = offset.column, columns; c < offset.column + n; c += columns) {
        columns = std::min(offset.column + n - c, kTerms - c % kTerms);
        matmul_.transpose(from.at(r, c), from.width(c), rows, columns, to.at(c, r), to.width(r));
      }
    }
  }

  // G of row i and n columns from `first` on, in `g`; `s` is memory for their logits.
  void make_grad_logits(const float* raw, int64_t i, int64_t first, int64_t n, float* s, float* g) const {
    p_.logits(kernels_, raw, i, first, n, false, s);
    if (has_common_exponent_) {
      kernels_.grad_both(s, n, exponent_, row_grad_[i], &column_grad_[first], g);
    } else {
      std::fill_n(g, whole_vectors(n), 0.0f);
      kernels_.grad_row(s, n, rows_.lse[0][i], rows_.grad_lse[0][i], g);
      if (p_.has_hardness())
        kernels_.grad_hardness_row(s, n, p_.hardness(), {rows_.max[i], rows_.lse[1][i], rows_.lse[2][i]},
                                   {rows_.grad_lse[1][i], rows_.grad_lse[2][i]}, g);
    }
    if (p_.moments) kernels_.grad_sum(s, n, rows_.grad_sum[i], nullptr, g);
    if (p_.symmetric && (!has_common_exponent_ || p_.moments)) {
      const Upstream& up = columns_;
      if (p_.two_limits) p_.logits(kernels_, raw, i, first, n, true, s);
      if (!has_common_exponent_) kernels_.grad_columns(s, n, &up.lse[0][first], &up.grad_lse[0][first], g);
      if (p_.has_hardness())
        kernels_.grad_hardness_columns(s, n, p_.hardness(), {&up.max[first], &up.lse[1][first], &up.lse[2][first]},
                                       {&up.grad_lse[1][first], &up.grad_lse[2][first]}, g);
      if (p_.moments) kernels_.grad_sum(s, n, 0.0f, &up.grad_sum[first], g);
    }
    if (!positive_grads_.empty()) {
      const int64_t target = (p_.diagonal ? i : p_.targets[i]) - first;
      if (target >= 0 && target < n) g[target] = positive_grads_[i];
    }
  }

  void add_row(const float* raw, int64_t i, int64_t first, int64_t n, float* scale_grad, float* bias_grad,
               const Panels& to, const Offset& offset) {
    alignas(64) float s[kTileColumns], g[kTileColumns];
    make_grad_logits(raw, i, first, n, s, g);
    double row_scale_grad = 0;
    for (int64_t c = 0, count; c < n; c += count) {
      count = std::min(n - c, kTerms - (offset.column + c) % kTerms);
      row_scale_grad += kernels_.grad_raw(raw + c, g + c, count, p_.row_scale[i], &p_.column_scale[first + c],
                                          scale_grad ? scale_grad + c : nullptr, bias_grad ? bias_grad + c : nullptr,
                                          to.at(offset.row, offset.column + c));
    }
    row_scale_grad_parts_[i * tiles_per_row_ + first / kTileColumns] = row_scale_grad;
  }

  const LogitMatrix& p_;
  const ContrastiveKernels kernels_;
  const MatmulKernels matmul_;
  Upstream rows_;
  Upstream columns_;
  std::vector<float> positive_grads_;
  const int64_t tiles_per_row_;
  bool has_common_exponent_ = false;
  float exponent_ = 0;
  std::vector<float> row_grad_, column_grad_;  // of the log-sum-exps, times e^(exponent - lse)
  std::vector<double> row_scale_grad_parts_, column_scale_grad_, bias_grad_;
};

// Which of the embeddings' gradients are wanted.
struct EmbeddingNeeds {
  bool query, key;
};

// Calls put_query(begin, H key [m, D]) with m rows at a time and put_key(first, H^T query [n, D]) with n columns at a
// time. `saved_logits` [saved_rows, N]: the products of the first rows; those of the others are made again.
template <typename PutQuery, typename PutKey>
void make_embedding_grads(LogitGradients& gradients, LogitMatrix& p, const Tensor& saved_logits, double workspace_mib,
                          const EmbeddingNeeds& needs, const PutQuery& put_query, const PutKey& put_key) {
  const auto [block_rows, block_columns] =
      block_size(p, std::min(kGradientBlockMiB, workspace_mib / (needs.key ? 4 : 2)), kGradientBlockColumns);
  const BlockSize product_size = block_size(p, std::min(kProductMiB, workspace_mib / 4), kProductColumns);
  const Tensor memory = new_float32({block_rows, block_columns});
  const Tensor transposed_memory = new_float32({needs.key ? block_columns : 0, block_rows});
  std::vector<std::optional<Tensor>> key_grads(blocks_of(p.columns, block_columns));  // sums over the rows so far
  for (int64_t begin = 0; begin < p.rows; begin += block_rows) {
    std::optional<Tensor> query_grad;  // sum over the columns so far
    const int64_t m = std::min(block_rows, p.rows - begin);
    for (int64_t first = 0; first < p.columns; first += block_columns) {
      const int64_t n = std::min(block_columns, p.columns - first);
      if (p.is_below_diagonal(begin, first + n)) continue;
      const Panels h(memory, m, n), h_transposed(transposed_memory, n, m);
      for_pieces(m, product_size.rows, [&](int64_t row, int64_t rows) {
        for_pieces(n, product_size.columns, [&](int64_t column, int64_t columns) {
          const bool saved = begin + row + rows <= saved_logits.size(0);
          const Tensor raw = saved ? slice(slice(saved_logits, 0, begin + row, rows), 1, first + column, columns)
                                   : p.products(begin + row, rows, first + column, columns);
          gradients.add_block(raw, begin + row, first + column, {h, row, column, needs.key ? &h_transposed : nullptr});
        });
      });
      std::optional<Tensor>& key_grad = key_grads[first / block_columns];
      if (needs.query) query_grad = product(h, transposed(slice(p.key_factor, 0, first, n)), query_grad);
      if (needs.key) key_grad = product(h_transposed, transposed(slice(p.query_factor, 0, begin, m)), key_grad);
    }
    if (needs.query) put_query(begin, *query_grad);
  }
  for (int64_t first = 0; needs.key && first < p.columns; first += block_columns)
    put_key(first, *key_grads[first / block_columns]);
}

}  // namespace fastloss
