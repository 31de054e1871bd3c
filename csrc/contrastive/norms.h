// The lengths of embeddings, and what their normalisation does to a gradient.
#pragma once

#include "contrastive/logit_matrix.h"

#include <cmath>

namespace fastloss {

constexpr double kTiny = 1e-12;  // as TINY_NORM in embeddings.py

inline float inverse_length(double square) {
  const double length = std::sqrt(square);
  return length <= kTiny ? 0.0f : static_cast<float>(1 / length);
}

template <typename T>
Combine<T> combine_of(const ContrastiveKernels& kernels) {
  if constexpr (std::is_same_v<T, float>) return kernels.combine;
  if constexpr (std::is_same_v<T, BFloat16>) return kernels.combine_bfloat16;
  if constexpr (std::is_same_v<T, Half>) return kernels.combine_half;
}

// Embeddings, float32 [rows, width], and their inverse lengths, or null: as they are.
struct Lengths {
  const Tensor& x;
  const float* inverse;

  // Rows begin .. of the gradient by x: v - <v, x> x / |x|^2. The product is of v as it was rounded, so that nothing of
  // its rounding errors is left along x. `to` may be the memory of v.
  template <typename T>
  void put(int64_t begin, const Tensor& v, T* to) const {
    const auto kernels = contrastive_kernels();
    const auto combine = combine_of<T>(kernels);
    const int64_t width = x.size(1), pitch = v.stride(0);
    const float *all_v = input<float>(v), *all_x = input<float>(x);
    each_row(v.size(0), width, [&](int64_t r) {
      const float *from = all_v + r * pitch, *row = all_x + (begin + r) * width;
      const double c = inverse ? inverse[begin + r] : 0;
      const double along = c != 0 ? -kernels.products(row, from, width).both * c * c : 0;
      combine(from, 1.0f, c != 0 ? row : nullptr, static_cast<float>(along), width, to + (begin + r) * width);
    });
  }
  // The same of `to`'s dtype; v itself is the result where nothing is left to do.
  void put(int64_t begin, const Tensor& v, Tensor& to) const {
    if (!inverse && to.scalar_type() == ScalarType::Float && v.size(0) == to.size(0) && v.is_contiguous()) {
      to = v;
      return;
    }
    for_dtype(to.scalar_type(), "contrastive", [&](auto element) { put(begin, v, output<decltype(element)>(to)); });
  }
};

// factor(i) from_i in the dtype of `like`
template <typename Factor>
Tensor scaled(const Tensor& from, const Factor& factor, const Tensor& like) {
  Tensor to = torch::stable::new_empty(like, {from.size(0), from.size(1)});
  const int64_t width = from.size(1);
  for_dtype(like.scalar_type(), "contrastive", [&](auto element) {
    using T = decltype(element);
    const auto combine = combine_of<T>(contrastive_kernels());
    const float* all_from = input<float>(from);  // not in the loop: calls into torch
    T* all_to = output<T>(to);
    each_row(from.size(0), width,
             [&](int64_t i) { combine(all_from + i * width, factor(i), nullptr, 0.0f, width, all_to + i * width); });
  });
  return to;
}

}  // namespace fastloss
