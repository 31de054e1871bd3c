// What the softmax contrastive kernels work on: operands of the op, matrix products, tiles of logits.
#pragma once

#include "bf16_product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cmath>
#include <limits>
#include <memory>

// oneDNN's product, two to three times as fast as the BLAS behind addmm on some CPUs; null in a torch built without it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* out);

namespace fastloss {

constexpr int64_t kColumns = 1024;          // a tile: what is read twice stays in a thread's cache
constexpr int64_t kRows = 32;
constexpr float kLowest = -3.40282347e38f;  // stands for the maximum of nothing: -inf - -inf is NaN
constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kTerms = 256;             // of a product that oneDNN adds up in one go
constexpr double kProduct = 8;              // MiB of logits of one product: a larger one costs page faults
constexpr int64_t kWide = 2048;             // its columns at most: the more rows, the rarer the keys are packed
constexpr int64_t kSmall = 1 << 21;         // multiplications of a product that the BLAS starts, and ends, sooner
constexpr int64_t kSmallInPieces = 1 << 25;  // the same of one that oneDNN would make in pieces
constexpr int64_t kStashMiB = 64;           // as in contrastive_softmax.py
constexpr int64_t kUpper = 1024;            // rows and columns of a block at most where the triangle above the diagonal is all

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
  void (*add)(const float* from, int64_t n, float* to);
  void (*transpose)(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t back);
  double (*pull)(const float* s, int64_t n, float factor, float most, const float* column_scale, float* to);
  void (*pull_sum)(const float* s, int64_t n, const float* column_scale, float* to);
  void (*rescale)(const float* from, int64_t n, float factor, float* to);
  void (*narrow)(const float* from, int64_t n, BFloat16* to);
  OwnAndBoth (*products)(const float* a, const float* b, int64_t n);
  Combine<float> combine;
  Combine<BFloat16> combine_bfloat16;
  Combine<Half> combine_half;
  void (*widen_bfloat16)(const BFloat16* from, int64_t n, float* to);
  void (*widen_half)(const Half* from, int64_t n, float* to);
};

ContrastiveKernels contrastive_kernels();  // of the CPU at hand

using torch::stable::narrow;

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// body(i) for i in 0 .. count, over torch's threads, `grain` of them at least to each.
template <typename Body>
void for_each(int64_t count, const Body& body, int64_t grain = 1) {
  over_threads(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last && going_on(); ++i) body(i);
  });
}

// body(i) for i in 0 .. rows of `width` elements: over the threads where they have something to do.
template <typename Body>
void each_row(int64_t rows, int64_t width, const Body& body) {
  for_each(rows, body, std::max<int64_t>(1, 4 * kBlock / std::max<int64_t>(width, 1)));
}

// Tiles of a chunk that are worth a thread.
inline int64_t tiles_grain(int64_t rows, int64_t columns) {
  return std::max<int64_t>(1, kBlock / std::max<int64_t>(std::min(rows, kRows) * std::min(columns, kColumns), 1));
}

// body(first, count) for the pieces of `size` of 0 .. total
template <typename Body>
void for_pieces(int64_t total, int64_t size, const Body& body) {
  for (int64_t i = 0; i < total; i += size) body(i, std::min(size, total - i));
}

// Views of a matrix, past the dispatcher: a small loss makes dozens.
inline Tensor view_of(const Tensor& t, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides, int64_t offset) {
  AtenTensorHandle to = nullptr;
  // the offset is added to that of t
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes.data(), strides.data(), offset, &to));
  return Tensor(to);
}
inline Tensor slice(const Tensor& t, int64_t dim, int64_t begin, int64_t count) {
  if (begin == 0 && count == t.size(dim)) return t;
  std::array<int64_t, 2> sizes{t.size(0), t.size(1)};
  sizes[dim] = count;
  return view_of(t, sizes, {t.stride(0), t.stride(1)}, begin * t.stride(dim));
}
inline Tensor flipped(const Tensor& t) {
  return view_of(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}, 0);
}
// Float32, dense, on the CPU.
inline Tensor floats(std::array<int64_t, 2> sizes) {
  const std::array<int64_t, 2> strides{std::max<int64_t>(sizes[1], 1), 1};
  AtenTensorHandle to = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes.data(), strides.data(), aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &to));
  return Tensor(to);
}

// to += from, both dense and of one shape
inline void add(const Tensor& from, const Tensor& to) {
  const auto kernels = contrastive_kernels();
  over_threads(0, blocks_of(to.numel(), kBlock), 2, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kBlock, end = std::min(last * kBlock, to.numel());
    kernels.add(input<float>(from) + begin, end - begin, output<float>(to) + begin);
  });
}

// oneDNN is slow with weights that leave gaps.
inline Tensor dense(const Tensor& t) {
  const bool rows = t.stride(1) == 1 && t.stride(0) == t.size(1), columns = t.stride(0) == 1 && t.stride(1) == t.size(0);
  return rows || columns ? t : torch::stable::contiguous(t);
}

inline bool is_small(int64_t m, int64_t n, int64_t terms) {
  return m * n * terms <= (terms > kTerms ? kSmallInPieces : kSmall);
}

// a b^T by the BLAS, added to `total` if given.
inline Tensor blas_product(const Tensor& a, const Tensor& b, std::optional<Tensor> total) {
  const double kept = total.has_value() ? 1 : 0;
  if (!total.has_value()) total = floats({a.size(0), b.size(0)});
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(total->get(), total->get(), a.get(), flipped(b).get(), kept, 1.0));
  return *total;
}

// a b^T of [m, K] and [n, K] in float32, with a bfloat16 b a is rounded to it, added to `total` [m, n] if given. oneDNN adds up
// all K terms one after another; in pieces of kTerms the error is that of a BLAS.
inline Tensor product(const Tensor& a, const Tensor& b, std::optional<Tensor> total = std::nullopt) {
  if (b.scalar_type() == ScalarType::BFloat16) {
    const bool adds = total.has_value();
    if (!adds) total = floats({a.size(0), b.size(0)});
    bf16_product(a, b, *total, adds);
    return *total;
  }
  if (is_small(a.size(0), b.size(0), a.size(1))) return blas_product(a, b, total);
  for_pieces(a.size(1), kTerms, [&](int64_t k, int64_t n) {
    check_signals();
    const Tensor x = slice(a, 1, k, n), w = dense(slice(b, 1, k, n));
    AtenTensorHandle out = nullptr;
    if (&aoti_torch_cpu__linear_pointwise != nullptr &&
        aoti_torch_cpu__linear_pointwise(x.get(), w.get(), nullptr, "none", nullptr, 0, nullptr, &out) == 0) {
      const Tensor part(out);
      if (total.has_value())
        add(part, *total);
      else
        total = part;
      return;
    }
    total = blas_product(x, w, total);
  });
  return *total;
}

// A matrix [rows, columns] in dense panels of kTerms columns, one below the other: what product() wants on its left.
struct Panels {
  Tensor memory;
  int64_t rows, columns;

  // in memory that is given, of rows * columns elements at least
  Panels(const Tensor& given, int64_t m, int64_t n) : memory(given), rows(m), columns(n), data_(output<float>(given)) {}

  int64_t width(int64_t column) const { return std::min(kTerms, columns - column / kTerms * kTerms); }
  float* at(int64_t row, int64_t column) const {
    return data_ + column / kTerms * kTerms * rows + row * width(column) + column % kTerms;
  }
  Tensor panel(int64_t column) const {
    const int64_t n = width(column);
    return view_of(memory, {rows, n}, {n, 1}, column / kTerms * kTerms * rows);
  }

 private:
  float* data_;
};

// panels b^T, the panels rounded where b is bfloat16, added to `total` if given
inline Tensor product(const Panels& panels, const Tensor& b, std::optional<Tensor> total = std::nullopt) {
  for_pieces(panels.columns, kTerms,
             [&](int64_t k, int64_t n) { total = product(panels.panel(k), slice(b, 1, k, n), total); });
  return *total;
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
  const auto kernels = contrastive_kernels();
  const bool half = from.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(half || from.scalar_type() == ScalarType::BFloat16, "contrastive: expected float32, bfloat16, float16");
  for_blocks(from.numel(), [&](int64_t begin, int64_t end) {
    float* target = output<float>(to) + begin;
    if (half)
      kernels.widen_half(input<Half>(from) + begin, end - begin, target);
    else
      kernels.widen_bfloat16(input<BFloat16>(from) + begin, end - begin, target);
  });
  return to;
}

// The operands of the op; those of columns are padded to whole vectors.
struct Problem {
  Tensor query, key;               // float32, contiguous
  std::vector<Tensor> query_pieces, key_pieces;  // columns, kTerms at a time, of the rows at hand and of all keys
  std::pair<int64_t, int64_t> rows_at_hand{-1, 0};  // first and count
  Tensor queries, keys;            // the same as operands of products: where those may be of bfloat16, in that
  int64_t rows, columns, width, padded_columns;
  bool diagonal, moments, upper, symmetric, two_ceilings = false;
  bool once = false;           // each key is in one product: none of them is copied before
  std::vector<float> factors;  // of the logits in the log-sum-exps: 1; below the maximum 1 + hardness, hardness
  std::vector<float> row_scale, column_scale, bias, ceiling, column_ceiling;
  std::vector<int64_t> excluded, row_ids, column_ids;

  using Given = std::optional<Tensor>;

  Problem(const Tensor& q, const Tensor& k, const std::string& kind, double hardness)
      : query(single(q)),
        key(single(k)),
        queries(query),
        keys(key),
        rows(q.size(0)),
        columns(k.size(0)),
        width(q.size(1)),
        padded_columns((columns + 15) / 16 * 16),
        diagonal(kind.find("diagonal") != std::string::npos),
        moments(kind.find("moments") != std::string::npos),
        upper(kind.find("upper") != std::string::npos),
        symmetric(upper || kind.find("symmetric") != std::string::npos),
        factors{1.0f} {
    STD_TORCH_CHECK(q.dim() == 2 && k.dim() == 2 && k.size(1) == width, "contrastive: expected [M, D] and [N, D]");
    STD_TORCH_CHECK(!symmetric || rows == columns, "contrastive: symmetric needs as many keys as queries");
    if (kind.find("bfloat16") != std::string::npos && has_bf16_products()) {
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
inline std::pair<int64_t, int64_t> rectangle(const Problem& p, double mib, int64_t widest) {
  const int64_t area = static_cast<int64_t>(std::min(mib, 1e6) * kMiB) / 4;
  if (p.upper) widest = std::min(widest, kUpper);
  const int64_t width = std::min({widest, std::max(area / kColumns, int64_t{1}) * kColumns, p.columns});
  const int64_t highest = std::max<int64_t>(p.upper ? std::min(p.rows, kUpper) : p.rows, 1);
  const int64_t height = std::clamp<int64_t>(area / std::max<int64_t>(width, 1), 1, highest);
  return {height > kRows ? height / kRows * kRows : height, width};
}

}  // namespace fastloss
