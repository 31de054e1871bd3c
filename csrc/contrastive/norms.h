// The norms of embeddings, and what normalisation does to a gradient.
#pragma once

#include "contrastive/logit_matrix.h"

#include <cmath>

namespace fastloss {

inline float inverse_norm(double square) {
  const double norm = std::sqrt(square);
  return norm <= kTinyNorm ? 0.0f : static_cast<float>(1 / norm);
}

template <typename T>
Combine<T> combine_of(const ContrastiveKernels& kernels) {
  if constexpr (std::is_same_v<T, float>) return kernels.combine;
  if constexpr (std::is_same_v<T, BFloat16>) return kernels.combine_bfloat16;
  if constexpr (std::is_same_v<T, Half>) return kernels.combine_half;
}

// Embeddings, float32 [rows, D], and their inverse norms, or null: they are taken as they are.
struct Embeddings {
  const Tensor& x;
  const float* inverse_norms;

  // Writes rows begin .. of the embeddings' gradient, of which v is that of the normalised ones: v - <v, x> x / |x|^2.
  // The product is of v as it was rounded, so that nothing of its rounding errors is left along x. `to`, all rows, may
  // be the memory of v.
  template <typename T>
  void write_grad(int64_t begin, const Tensor& v, T* to) const {
    const auto kernels = contrastive_kernels();
    const auto combine = combine_of<T>(kernels);
    const int64_t dim = x.size(1), v_stride = v.stride(0);
    const float *all_v = input<float>(v), *all_x = input<float>(x);
    each_row(v.size(0), dim, [&](int64_t r) {
      const float *from = all_v + r * v_stride, *row = all_x + (begin + r) * dim;
      const double c = inverse_norms ? inverse_norms[begin + r] : 0;
      const double x_weight = c != 0 ? -kernels.square_and_dot(row, from, dim).dot * c * c : 0;
      combine(from, 1.0f, c != 0 ? row : nullptr, static_cast<float>(x_weight), dim, to + (begin + r) * dim);
    });
  }
  // The same in the dtype of `to`; `to` becomes v itself where nothing is left to do.
  void write_grad(int64_t begin, const Tensor& v, Tensor& to) const {
    if (!inverse_norms && to.scalar_type() == ScalarType::Float && v.size(0) == to.size(0) && v.is_contiguous()) {
      to = v;
      return;
    }
    for_dtype(to.scalar_type(), "the gradient of embeddings",
              [&](auto element) { write_grad(begin, v, output<decltype(element)>(to)); });
  }
};

// weight(i) from_i, in the dtype of `like`
template <typename Weight>
Tensor scaled_rows(const Tensor& from, const Weight& weight, const Tensor& like) {
  Tensor to = torch::stable::new_empty(like, {from.size(0), from.size(1)});
  const int64_t dim = from.size(1);
  for_dtype(like.scalar_type(), "the gradient of embeddings", [&](auto element) {
    using T = decltype(element);
    const auto combine = combine_of<T>(contrastive_kernels());
    const float* all_from = input<float>(from);  // not in the loop: calls into torch
    T* all_to = output<T>(to);
    each_row(from.size(0), dim,
             [&](int64_t i) { combine(all_from + i * dim, weight(i), nullptr, 0.0f, dim, all_to + i * dim); });
  });
  return to;
}

}  // namespace fastloss
