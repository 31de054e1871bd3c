// What the softmax contrastive kernels work on: operands of the op, tiles of logits.
#pragma once

#include "core/matmul.h"
#include "core/parallel.h"
#include "core/tensors.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fastloss {

constexpr int64_t kColumns = 1024;  // a tile of logits, kRows x kColumns, is read twice: it stays in a thread's cache
constexpr int64_t kRows = 32;
constexpr float kLowest = -3.40282347e38f;  // stands for the maximum of nothing: -inf - -inf is NaN
constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kUpper = 1024;  // rows and columns of a block at most where the triangle above the diagonal is all

struct RowOf {
  float scale, ceiling;
  int64_t id;
};
struct ColumnsOf {
  const float *scale, *bias;
  const int64_t* ids;    // null: none
  const float* ceiling;  // null: the row's counts
};
struct SumAndCount {
  double sum, count;
};
struct OwnAndBoth {
  double own, both;
};
// The maximum of a row, or of columns, and below it the log-sum-exps at 1 + hardness and at hardness; their gradients.
template <typename T>
struct HardSums {
  T most, harder, hard;
};
template <typename T>
struct HardGrads {
  T harder, hard;
};
template <typename T>
using Combine = void (*)(const float* v, float factor, const float* x, float along, int64_t n, T* to);
struct ContrastiveKernels {
  void (*logits)(const float* raw, int64_t n, const RowOf&, const ColumnsOf&, float* to);
  float (*most)(const float* s, int64_t n, float* of_columns);
  double (*row)(const float* s, int64_t n, float factor, float most);
  void (*columns)(const float* s, int64_t n, float factor, const float* most, float* total);
  SumAndCount (*moments)(const float* s, int64_t n, float* column_sum, float* column_count);
  void (*merge)(int64_t n, float factor, const float* before, const float* now, const float* most, const float* part,
                double* total);
  void (*raise)(int64_t n, const float* most, float* now);
  void (*grad_both)(const float* s, int64_t n, float at, float row, const float* column, float* g);
  void (*grad_row)(const float* s, int64_t n, float lse, float grad, float* g);
  void (*grad_columns)(const float* s, int64_t n, const float* lse, const float* grad, float* g);
  void (*grad_hard_row)(const float* s, int64_t n, float hardness, const HardSums<float>&, const HardGrads<float>&,
                        float* g);
  void (*grad_hard_columns)(const float* s, int64_t n, float hardness, const HardSums<const float*>&,
                            const HardGrads<const float*>&, float* g);
  void (*grad_sum)(const float* s, int64_t n, float row, const float* column, float* g);
  double (*finish)(const float* raw, const float* g, int64_t n, float scale, const float* column_scale, float* of_scale,
                   float* of_bias, float* to);
  double (*pull)(const float* s, int64_t n, float factor, float most, const float* column_scale, float* to);
  void (*pull_sum)(const float* s, int64_t n, const float* column_scale, float* to);
  OwnAndBoth (*products)(const float* a, const float* b, int64_t n);
  Combine<float> combine;
  Combine<BFloat16> combine_bfloat16;
  Combine<Half> combine_half;
};

ContrastiveKernels contrastive_kernels();  // of the CPU at hand

// Tiles of a chunk that are worth a thread.
inline int64_t tiles_grain(int64_t rows, int64_t columns) {
  return std::max<int64_t>(1, kBlock / std::max<int64_t>(std::min(rows, kRows) * std::min(columns, kColumns), 1));
}

// A vector of `length` values of type T, those that are not given (or beyond the given) filled in.
template <typename T>
std::vector<T> padded(const std::optional<Tensor>& given, ScalarType dtype, int64_t n, int64_t length, T filling) {
  std::vector<T> to(length, filling);
  if (!given.has_value()) return to;
  STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == n && given->scalar_type() == dtype,
                  "contrastive: an operand of rows or columns has a wrong shape or dtype");
  const Tensor dense = torch::stable::contiguous(*given);
  std::copy_n(input<T>(dense), n, to.begin());
  return to;
}

inline bool are_bfloat16(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == ScalarType::BFloat16 && b.scalar_type() == ScalarType::BFloat16;
}

// A matrix in float32 and contiguous.
inline Tensor single(const Tensor& t) {
  const Tensor from = t.is_contiguous() ? t : torch::stable::contiguous(t);
  if (from.scalar_type() == ScalarType::Float) return from;
  const Tensor to = floats({from.size(0), from.size(1)});
  const auto kernels = matmul_kernels();
  const bool half = from.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(half || from.scalar_type() == ScalarType::BFloat16,
                  "contrastive: expected float32, bfloat16, float16");
  for_blocks(from.numel(), [&](int64_t begin, int64_t end) {
    float* target = output<float>(to) + begin;
    if (half)
      kernels.widen_half(input<Half>(from) + begin, end - begin, target);
    else
      kernels.widen_bfloat16(input<BFloat16>(from) + begin, end - begin, target);
  });
  return to;
}

using Given = std::optional<Tensor>;

// What the matrix of logits is like; Form in fastloss/contrastive/options.py explains each.
struct Form {
  bool diagonal = false, symmetric = false, self_similarity = false, moments = false, bfloat16 = false;
  template <typename F>
  void fields(const F& f) {
    f(diagonal), f(symmetric), f(self_similarity), f(moments), f(bfloat16);
  }
};

// The operands of the op; those of columns are padded to whole vectors.
struct LogitMatrix {
  Tensor query, key;                                // float32, contiguous
  std::vector<Tensor> query_pieces, key_pieces;     // columns, kTerms at a time, of the rows at hand and of all keys
  std::pair<int64_t, int64_t> rows_at_hand{-1, 0};  // first and count
  Tensor queries, keys;  // the same as operands of products: where those may be of bfloat16, in that
  int64_t rows, columns, width, padded_columns;
  bool diagonal, moments, upper, symmetric, two_ceilings = false;
  bool once = false;  // every key is needed for one product only: cut into pieces for that, not kept in key_pieces
  // f of each log-sum-exp, log sum e^(f s): 1 and, with hardness, 1 + hardness and hardness, these of s - maximum
  std::vector<float> factors;
  std::vector<float> row_scale, column_scale, bias, ceiling, column_ceiling;
  std::vector<int64_t> excluded, row_ids, column_ids;

  LogitMatrix(const Tensor& q, const Tensor& k, const Form& form, double hardness)
      : query(single(q)),
        key(single(k)),
        queries(query),
        keys(key),
        rows(q.size(0)),
        columns(k.size(0)),
        width(q.size(1)),
        padded_columns((columns + 15) / 16 * 16),
        diagonal(form.diagonal),
        moments(form.moments),
        upper(form.self_similarity),
        symmetric(upper || form.symmetric),
        factors{1.0f} {
    STD_TORCH_CHECK(q.dim() == 2 && k.dim() == 2 && k.size(1) == width, "contrastive: expected [M, D] and [N, D]");
    STD_TORCH_CHECK(!symmetric || rows == columns, "contrastive: symmetric needs as many keys as queries");
    if (form.bfloat16 && has_bf16_products()) {
      const auto given = [](const Tensor& t, const Tensor& wide) {
        if (t.scalar_type() != ScalarType::BFloat16) return torch::stable::to(wide, ScalarType::BFloat16);
        return t.is_contiguous() ? t : torch::stable::contiguous(t);
      };
      queries = given(q, query);
      keys = given(k, key);
    }
    if (hardness > 0) factors = {1.0f, static_cast<float>(1 + hardness), static_cast<float>(hardness)};
  }

  void scales(const Tensor& row, const Given& column, const Given& column_bias) {
    row_scale = padded(Given(row), ScalarType::Float, rows, rows, 0.0f);
    column_scale = padded(column, ScalarType::Float, columns, padded_columns, 1.0f);
    bias = padded(column_bias, ScalarType::Float, columns, padded_columns, 0.0f);
  }

  void masks(const Given& out, const Given& ids, const Given& ids_of_columns, const Given& highest) {
    excluded = padded<int64_t>(out, ScalarType::Long, rows, rows, -1);
    const bool both = ids.has_value() && ids_of_columns.has_value();
    row_ids = padded<int64_t>(both ? ids : std::nullopt, ScalarType::Long, rows, rows, 0);
    if (both) column_ids = padded<int64_t>(ids_of_columns, ScalarType::Long, columns, padded_columns, 0);
    const float none = std::numeric_limits<float>::infinity();
    ceiling = padded(highest, ScalarType::Float, rows, rows, none);
    two_ceilings = symmetric && highest.has_value();
    if (two_ceilings) column_ceiling = padded(highest, ScalarType::Float, columns, padded_columns, none);
  }

  // One row of a tile, columns first .. first + n, of one direction (which matters with ceilings only).
  void logits(const ContrastiveKernels& kernels, const float* raw, int64_t i, int64_t first, int64_t n, bool back,
              float* to) const {
    const RowOf row{row_scale[i], ceiling[i], row_ids[i]};
    const ColumnsOf of{&column_scale[first], &bias[first], column_ids.empty() ? nullptr : &column_ids[first],
                       back && two_ceilings ? &column_ceiling[first] : nullptr};
    kernels.logits(raw, n, row, of, to);
    const auto leave_out = [&](int64_t j) {
      if (j >= first && j < first + n) to[j - first] = -std::numeric_limits<float>::infinity();
    };
    if (diagonal) leave_out(i);
    if (upper) std::fill_n(to, std::clamp<int64_t>(i + 1 - first, 0, n), -std::numeric_limits<float>::infinity());
    leave_out(excluded[i]);
  }

  // The products of rows begin .. and columns first ..
  Tensor raw(int64_t begin, int64_t m, int64_t first, int64_t n) {
    if (narrow()) return product(slice(queries, 0, begin, m), slice(keys, 0, first, n));
    if (is_small(m, n, width)) return blas_product(slice(query, 0, begin, m), slice(key, 0, first, n), std::nullopt);
    const auto cut = [&](const Tensor& x, std::vector<Tensor>& pieces) {
      pieces.clear();
      for_pieces(width, kTerms, [&](int64_t k, int64_t terms) { pieces.push_back(dense(slice(x, 1, k, terms))); });
    };
    if (rows_at_hand != std::pair(begin, m)) cut(slice(query, 0, begin, m), query_pieces);
    rows_at_hand = {begin, m};
    if (!once && key_pieces.empty()) cut(key, key_pieces);
    std::optional<Tensor> total;
    for_pieces(width, kTerms, [&](int64_t k, int64_t terms) {
      const size_t piece = static_cast<size_t>(k / kTerms);
      const Tensor w =
          once ? dense(slice(slice(key, 0, first, n), 1, k, terms)) : slice(key_pieces[piece], 0, first, n);
      total = product(query_pieces[piece], w, total);
    });
    return *total;
  }

  // Whether the factors of products, the gradient of the raw products too, are rounded to bfloat16.
  bool narrow() const { return queries.scalar_type() == ScalarType::BFloat16; }
  bool hard() const { return factors.size() > 1; }
  float hardness() const { return factors[2]; }
  bool empty() const { return rows == 0 || columns == 0; }
  int64_t directions() const { return symmetric && !upper ? 2 : 1; }
  // Whether rows from `begin` on have no pair with columns before `end`.
  bool below(int64_t begin, int64_t end) const { return upper && end <= begin; }
  // Of columns first .. first + n those, in whole vectors, that rows from `begin` on have no pair with.
  int64_t idle(int64_t begin, int64_t first, int64_t n) const {
    return upper ? std::clamp<int64_t>((begin + 1 - first) / 16 * 16, 0, n) : 0;
  }
  int64_t statistics() const { return 2 + 2 * moments + 2 * hard(); }
  // Statistics with a gradient, in the order of the pulls: the log-sum-exps, then the sum.
  int64_t sums() const { return static_cast<int64_t>(factors.size()) + moments; }
  // The statistic that holds the log-sum-exp of factors[f].
  int64_t lse_of(size_t f) const { return f == 0 ? 0 : statistics() - 3 + static_cast<int64_t>(f); }
};

// Height and width of as many float32 logits as fit in `mib`, one row of a tile at least; widths are whole tiles.
inline std::pair<int64_t, int64_t> rectangle(const LogitMatrix& p, double mib, int64_t widest) {
  const int64_t area = static_cast<int64_t>(std::min(mib, 1e6) * kMiB) / 4;
  if (p.upper) widest = std::min(widest, kUpper);
  const int64_t width = std::min({widest, std::max(area / kColumns, int64_t{1}) * kColumns, p.columns});
  const int64_t highest = std::max<int64_t>(p.upper ? std::min(p.rows, kUpper) : p.rows, 1);
  const int64_t height = std::clamp<int64_t>(area / std::max<int64_t>(width, 1), 1, highest);
  return {height > kRows ? height / kRows * kRows : height, width};
}

}  // namespace fastloss
