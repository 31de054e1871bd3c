// Work cut into pieces over torch's threads, where Ctrl-C can end it between two of them.
#pragma once

#include "core/interrupt.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastloss {

// Fixed blocks, whatever the number of threads: what is summed is the same, and so are its bits.
constexpr int64_t kBlockElements = 16384;  // that a thread takes at a time
constexpr int64_t kChunkElements = 2048;   // that a kernel gets at a time; its other operands then stay in the L1 cache

// body(begin, end) for each block of `count` elements, over torch's threads.
template <typename Body>
void for_blocks(int64_t count, const Body& body) {
  over_threads(0, (count + kBlockElements - 1) / kBlockElements, 2, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last && going_on(); ++b)
      body(b * kBlockElements, std::min(count, (b + 1) * kBlockElements));
  });
}

// The sum of body(begin, end) over the blocks, added in order in float64.
template <typename Body>
double sum_blocks(int64_t count, const Body& body) {
  std::vector<double> partial((count + kBlockElements - 1) / kBlockElements);
  for_blocks(count, [&](int64_t begin, int64_t end) { partial[begin / kBlockElements] = body(begin, end); });
  double total = 0;
  for (double p : partial) total += p;
  return total;
}

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// body(i) for i in 0 .. count, over torch's threads, `grain` of them at least to each.
template <typename Body>
void for_each(int64_t count, const Body& body, int64_t grain = 1) {
  over_threads(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last && going_on(); ++i) body(i);
  });
}

// body(i) for i in 0 .. rows of `length` elements, over as many threads as have enough to do.
template <typename Body>
void each_row(int64_t rows, int64_t length, const Body& body) {
  for_each(rows, body, std::max<int64_t>(1, 4 * kBlockElements / std::max<int64_t>(length, 1)));
}

// body(first, count) for the pieces of `size` of 0 .. total
template <typename Body>
void for_pieces(int64_t total, int64_t size, const Body& body) {
  for (int64_t i = 0; i < total; i += size) body(i, std::min(size, total - i));
}

}  // namespace fastloss
