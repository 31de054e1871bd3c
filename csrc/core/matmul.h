// Matrix products in float32, or of bfloat16 with float32 results: by oneDNN, the BLAS, or bf16_product.h.
#pragma once

#include "core/bf16_product.h"
#include "core/parallel.h"
#include "core/tensors.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <optional>

// oneDNN's product, two to three times as fast as the BLAS behind addmm on some CPUs; null in a torch built without it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* out);

namespace fastloss {

constexpr int64_t kTerms = 256;    // terms of an inner sum in one call of oneDNN; longer sums are made in pieces
constexpr double kProductMiB = 8;  // a product's result at most: a larger one costs page faults
constexpr int64_t kProductColumns = 2048;    // columns of it at most: fewer allow more rows, which share packed keys
constexpr int64_t kSmall = 1 << 21;          // a product of at most so many multiplications is faster with the BLAS,
constexpr int64_t kSmallInPieces = 1 << 25;  // and one of so many, if oneDNN would have to make it in pieces

struct MatmulKernels {
  void (*add)(const float* from, int64_t n, float* to);
  void (*transpose)(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride);
  void (*rescale)(const float* from, int64_t n, float weight, float* to);
  void (*narrow)(const float* from, int64_t n, BFloat16* to);
  void (*widen_bfloat16)(const BFloat16* from, int64_t n, float* to);
  void (*widen_half)(const Half* from, int64_t n, float* to);
};

MatmulKernels matmul_kernels();  // of the CPU at hand

// to += from, both dense and of one shape
inline void add(const Tensor& from, const Tensor& to) {
  const auto kernels = matmul_kernels();
  over_threads(0, blocks_of(to.numel(), kBlockElements), 2, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kBlockElements, end = std::min(last * kBlockElements, to.numel());
    kernels.add(input<float>(from) + begin, end - begin, output<float>(to) + begin);
  });
}

// oneDNN is slow with weights that leave gaps.
inline Tensor dense(const Tensor& t) {
  const bool rows = t.stride(1) == 1 && t.stride(0) == t.size(1),
             columns = t.stride(0) == 1 && t.stride(1) == t.size(0);
  return rows || columns ? t : torch::stable::contiguous(t);
}

inline bool is_small(int64_t m, int64_t n, int64_t terms) {
  return m * n * terms <= (terms > kTerms ? kSmallInPieces : kSmall);
}

// a b^T by the BLAS, added to `total` if given.
inline Tensor blas_product(const Tensor& a, const Tensor& b, std::optional<Tensor> total) {
  const double total_weight = total.has_value() ? 1 : 0;
  if (!total.has_value()) total = new_float32({a.size(0), b.size(0)});
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(total->get(), total->get(), a.get(), transposed(b).get(), total_weight, 1.0));
  return *total;
}

// a b^T of [m, K] and [n, K] in float32, with a bfloat16 b a is rounded to it, added to `total` [m, n] if given. oneDNN
// adds up all K terms one after another; in pieces of kTerms the error is that of a BLAS.
inline Tensor product(const Tensor& a, const Tensor& b, std::optional<Tensor> total = std::nullopt) {
  if (b.scalar_type() == ScalarType::BFloat16) {
    const bool adds = total.has_value();
    if (!adds) total = new_float32({a.size(0), b.size(0)});
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

  // `memory` has rows * columns elements at least.
  Panels(const Tensor& memory, int64_t rows, int64_t columns)
      : memory(memory), rows(rows), columns(columns), data_(output<float>(memory)) {}

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

}  // namespace fastloss
