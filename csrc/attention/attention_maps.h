// What the kernels of attention maps are handed.
#pragma once

#include "core/tensors.h"

namespace fastloss {

enum class MapMetric { js, kl, sym_kl, mse, l1, cosine };
constexpr float kLeastScore = -1e2f;  // LEAST_SCORE in divergence.py

// How an element becomes what is compared.
struct Preparation {
  bool logits, scores, added;  // `added`: the mask is added; else 0 leaves the key out
  float temperature;           // of logits
};

// The numbers of a row that are kept, as attention_maps.py has them.
struct MapStatistics {
  float peak_a, log_a, peak_b, log_b, inner_a, inner_b, scale;
};
struct RowValue {
  double value;
  bool counts;
};
// A row of both maps in float32, padded to whole vectors with what counts for nothing, and room for as much again.
struct Row {
  float *a, *b, *more_a, *more_b;
  int64_t n;
  double mean;  // 1 / keys that take part, 0 where none does
};
// What a row's gradients are multiplied with, and where they go; null: nowhere.
struct RowGradient {
  float upstream;
  float *a, *b;
};

struct MapKernels {
  void (*prepare_float)(const float* from, const float* mask, const Preparation&, int64_t n, float* to);
  void (*prepare_bfloat16)(const BFloat16* from, const float* mask, const Preparation&, int64_t n, float* to);
  void (*prepare_half)(const Half* from, const float* mask, const Preparation&, int64_t n, float* to);
  // The value of the row. Of the statistics, `scale` is given, which is `mean`.
  RowValue (*forward)(const Row&, MapStatistics&);
  void (*backward)(const Row&, const MapStatistics&, const RowGradient&);
  // to[i] = from[i], 0 where a mask or a score (as prepared) leaves the key out; both may be null
  void (*write_float)(const float* from, const float* mask, const float* scores, int64_t n, float* to);
  void (*write_bfloat16)(const float* from, const float* mask, const float* scores, int64_t n, BFloat16* to);
  void (*write_half)(const float* from, const float* mask, const float* scores, int64_t n, Half* to);
};

}  // namespace fastloss
