// The kernels over a tile of the bank, and what they are handed; shared by the ops that compare rows with a bank.
#pragma once

#include "core/tensors.h"

namespace fastloss {

constexpr int64_t kBankRows = 8;        // bank rows that are compared at a time,
constexpr int64_t kBankColumns = 512;   // so many of their elements: both stay in the L1 cache
constexpr int64_t kTileRows = 256;      // bank rows in a tile of distances at most, which are kept for a moment
constexpr int64_t kMaxLanes = 16;       // floats in the widest vector
constexpr int64_t kGeneratedRows = 64;  // generated rows that pass by them before the next elements

// Elements of a bank row, in whatever dtype it is kept, become weight * element + shift.
struct Affine {
  float weight, shift;
  bool changes() const { return weight != 1.0f || shift != 0.0f; }
};
struct RowSums {  // of a generated row and a bank row
  double difference, dot, generated_square, bank_square;
};
enum class Metric { l1, l2, cosine };

struct BankKernels {
  // to[i] = the bank's element i, i < n
  void (*widen_float)(const float* from, int64_t n, const Affine&, float* to);
  void (*widen_bfloat16)(const BFloat16* from, int64_t n, const Affine&, float* to);
  void (*widen_half)(const Half* from, int64_t n, const Affine&, float* to);
  void (*widen_byte)(const uint8_t* from, int64_t n, const Affine&, float* to);
  // Adds sum |a - b|, or sum (a - b)^2, of n <= kBankColumns elements of each generated row a and each of kBankRows
  // bank rows b, which lie kBankColumns apart and end with zeros, to one vector for each pair.
  void (*add_l1)(const float* generated, int64_t stride, int64_t count, const float* bank, int64_t n, float* sums);
  void (*add_l2)(const float* generated, int64_t stride, int64_t count, const float* bank, int64_t n, float* sums);
  float (*sum_vector)(const float* vector);       // of one such vector
  double (*square)(const float* row, int64_t n);  // sum of squares
  void (*add_row)(Metric, const float* generated, const float* bank, int64_t n, RowSums& sums);
  // to[i] = of_generated generated[i] + of_bank bank[i]; l1: of_generated sign(generated[i] - bank[i])
  void (*gradient)(Metric, const float* generated, const float* bank, int64_t n, double of_generated, double of_bank,
                   float* to);
  // Adds sum_r weights[r] sign(a - b_r), or sum_r weights[r] (a - b_r), over such bank rows b_r to each element.
  void (*add_signs)(const float* generated, const float* bank, const float* weights, int64_t n, float* to);
  void (*add_differences)(const float* generated, const float* bank, const float* weights, int64_t n, float* to);
  // x = weight exp((origin - x) / temperature) of n <= kTileRows elements; the sum of what is written
  double (*powers)(float* x, int64_t n, float origin, float temperature, float weight);
  int64_t lanes;  // floats in a vector
};

BankKernels bank_kernels();  // of the CPU at hand

}  // namespace fastloss
