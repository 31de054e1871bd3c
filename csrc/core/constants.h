// Numbers that the kernels of several families share.
#pragma once

#include <cstdint>

namespace fastloss {

constexpr int64_t kMiB = 1 << 20;  // bytes
// Gradients of this many bytes are written past the caches: they would not stay there, and the lines are not read
// first.
constexpr int64_t kStreamedGradientBytes = int64_t{8} << 20;
constexpr int64_t kLanes = 16;              // floats of the widest vector
constexpr float kLowest = -3.40282347e38f;  // stands for the maximum of nothing, since -inf - -inf is NaN
constexpr double kTinyNorm = 1e-12;         // a vector no longer than this counts as zero; TINY_NORM in embeddings.py

// n rounded up to whole vectors.
constexpr int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

}  // namespace fastloss
