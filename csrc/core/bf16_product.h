// Products of bfloat16 matrices with float32 sums and results, which torch has not on the CPU.
#pragma once

#include "core/isa.h"
#include "core/tensors.h"

namespace fastloss {

// Whether they are faster than products of the same numbers in float32: the CPU multiplies pairs of bfloat16.
inline bool has_bf16_products() { return cpu_level() == 3; }

// to = a b^T, or to += a b^T with `adds`, of bfloat16 [m, K] and [n, K] of any strides; `to` is float32 [m, n], its
// rows dense. a may also be float32 of dense rows, which are rounded on the way. Any CPU computes it, with the same
// bits whatever the number of threads.
void bf16_product(const Tensor& a, const Tensor& b, const Tensor& to, bool adds);

}  // namespace fastloss
