// Products of bfloat16 matrices with float32 sums: blocks of b are packed as pairs along K in panels of kPanel rows,
// which all the rows of a then meet in tiles of kTile rows, whose sums stay in registers for kDeep terms.

#include "core/bf16_product.h"
#include "core/op.h"
#include "core/parallel.h"

#include <cstring>

namespace fastloss {
namespace {

constexpr int64_t kPanel = 64;     // rows of b in a panel: four vectors of sums for a row of a
constexpr int64_t kTile = 6;       // rows of a: 24 of 32 registers hold sums, the most that leave room for the operands
constexpr int64_t kSquare = 16;    // rows and pairs that are transposed at a time
constexpr int64_t kDeep = 512;     // terms of a tile: 6 KiB of a stay in the L1 cache, 64 KiB of b in the L2
constexpr int64_t kTall = 48;      // rows of a and
constexpr int64_t kAcross = 512;   // rows of b that a thread takes at a time
constexpr int64_t kPacked = 2048;  // rows of b that are packed at a time, 2 MiB

// Pair k of row r is pairs[r * row + k * step].
struct Bf16Rows {
  const uint32_t* pairs;
  int64_t row, step;
};
struct Bf16Kernels {
  void (*tile)(const Bf16Rows& a, int64_t rows, const uint32_t* panel, int64_t pairs, float* to, int64_t stride,
               int64_t n, bool adds);
  void (*zip)(const uint16_t* first, const uint16_t* second, int64_t n, uint32_t* to);
  void (*transpose)(const uint16_t* from, int64_t row, uint32_t* to);
  void (*round)(const float* from, int64_t n, BFloat16* to);
};

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "core/bf16_product_simd.h"
#define FASTLOSS_WITH_BF16
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

Bf16Kernels bf16_kernels() {
#if defined(__x86_64__)
  if (has_bf16_products()) return isa_avx512_bf16::bf16_kernels();
#endif
  return FASTLOSS_PICK(bf16_kernels());
}

// Rows first .. of an operand and terms begin .., all that a tile or panel needs of it.
struct Piece {
  const uint16_t* data;
  int64_t row, term;  // strides
  int64_t rows, terms;

  Piece(const Tensor& t, int64_t first, int64_t count, int64_t begin, int64_t terms)
      : data(static_cast<const uint16_t*>(t.const_data_ptr()) + first * t.stride(0) + begin * t.stride(1)),
        row(t.stride(0)),
        term(t.stride(1)),
        rows(count),
        terms(terms) {}

  int64_t pairs() const { return (terms + 1) / 2; }
  uint32_t pair(int64_t r, int64_t k) const {
    const uint16_t* first = data + r * row + 2 * k * term;
    return first[0] | (2 * k + 1 < terms ? static_cast<uint32_t>(first[term]) << 16 : 0);
  }
};

// Pairs of the piece's rows one beside the other, k after k; rows beyond the piece's up to `width` are 0.
void pack_across(const Bf16Kernels& kernels, const Piece& from, int64_t width, uint32_t* to) {
  for (int64_t k = 0; k < from.pairs(); ++k) std::fill(to + k * width + from.rows, to + (k + 1) * width, 0u);
  if (from.row == 1) {
    for (int64_t k = 0; k < from.pairs(); ++k) {
      const uint16_t* first = from.data + 2 * k * from.term;
      kernels.zip(first, 2 * k + 1 < from.terms ? first + from.term : nullptr, from.rows, to + k * width);
    }
    return;
  }
  for (int64_t r = 0; r < from.rows; r += kSquare)
    for (int64_t k = 0; k < from.pairs(); k += kSquare) {
      if (from.term == 1 && width == kPanel && r + kSquare <= from.rows && 2 * (k + kSquare) <= from.terms) {
        kernels.transpose(from.data + r * from.row + 2 * k, from.row, to + k * width + r);
        continue;
      }
      for (int64_t i = k; i < std::min(k + kSquare, from.pairs()); ++i)
        for (int64_t j = r; j < std::min(r + kSquare, from.rows); ++j) to[i * width + j] = from.pair(j, i);
    }
}

// The piece's rows as the tiles read them: copied where their terms are side by side, else packed across.
Bf16Rows pack_rows(const Bf16Kernels& kernels, const Piece& from, uint32_t* to) {
  const int64_t pairs = from.pairs();
  if (from.term != 1) {
    pack_across(kernels, from, kTall, to);
    return {to, 1, kTall};
  }
  for (int64_t r = 0; r < from.rows; ++r) {
    to[r * pairs + pairs - 1] = 0;
    std::memcpy(to + r * pairs, from.data + r * from.row, from.terms * sizeof(uint16_t));
  }
  return {to, pairs, 1};
}

// The same of float32 rows, rounded.
Bf16Rows round_rows(const Bf16Kernels& kernels, const float* from, int64_t row, int64_t rows, int64_t terms,
                    uint32_t* to) {
  const int64_t pairs = (terms + 1) / 2;
  for (int64_t r = 0; r < rows; ++r) {
    to[r * pairs + pairs - 1] = 0;
    kernels.round(from + r * row, terms, reinterpret_cast<BFloat16*>(to + r * pairs));
  }
  return {to, pairs, 1};
}

// Into how many pieces of kTall rows at most to cut the tiles of a, so that no thread waits for the others long.
int64_t pieces_of(int64_t tiles, int64_t across) {
  constexpr int64_t kMost = kTall / kTile;
  const int64_t pieces = (tiles + kMost - 1) / kMost, threads = torch::stable::get_num_threads();
  return across > 1 ? pieces : std::min(tiles, (pieces + threads - 1) / threads * threads);
}

}  // namespace

void bf16_product(const Tensor& a, const Tensor& b, const Tensor& to, bool adds) {
  const int64_t m = a.size(0), n = b.size(0), terms = a.size(1);
  const bool rounds = a.scalar_type() == ScalarType::Float && (terms < 2 || a.stride(1) == 1);
  STD_TORCH_CHECK((rounds || a.scalar_type() == ScalarType::BFloat16) && b.scalar_type() == ScalarType::BFloat16 &&
                      to.scalar_type() == ScalarType::Float,
                  "bf16_product: expected bfloat16 operands (or dense float32 rows of a) and a float32 result");
  STD_TORCH_CHECK(b.size(1) == terms && to.size(0) == m && to.size(1) == n && (n < 2 || to.stride(1) == 1),
                  "bf16_product: expected [m, K], [n, K] and [m, n] with dense rows");
  if (m == 0 || n == 0) return;
  if (terms == 0) {
    for (int64_t i = 0; i < m && !adds; ++i) std::fill_n(output<float>(to) + i * to.stride(0), n, 0.0f);
    return;
  }
  const Bf16Kernels kernels = bf16_kernels();
  const int64_t deep = std::min(terms, kDeep), columns = std::min(n, kPacked);
  const int64_t packed_elements = (columns + kPanel - 1) / kPanel * kPanel * ((deep + 1) / 2);
  const Tensor workspace = torch::stable::new_empty(to, {packed_elements}, ScalarType::Float);
  uint32_t* packed = static_cast<uint32_t*>(workspace.mutable_data_ptr());
  for (int64_t first = 0; first < n; first += kPacked)
    for (int64_t begin = 0; begin < terms; begin += deep) {
      const int64_t block_terms = std::min(deep, terms - begin), block_columns = std::min(kPacked, n - first);
      const int64_t panel = (block_terms + 1) / 2 * kPanel;
      over_threads(0, (block_columns + kPanel - 1) / kPanel, 1, [&](int64_t one, int64_t last) {
        for (int64_t p = one; p < last && going_on(); ++p) {
          const int64_t rows = std::min(kPanel, block_columns - p * kPanel);
          pack_across(kernels, Piece(b, first + p * kPanel, rows, begin, block_terms), kPanel, packed + p * panel);
        }
      });
      const int64_t across = (block_columns + kAcross - 1) / kAcross, tiles = (m + kTile - 1) / kTile;
      const int64_t down = pieces_of(tiles, across);
      over_threads(0, across * down, 1, [&](int64_t one, int64_t last) {
        std::vector<uint32_t> rows(kTall * ((block_terms + 1) / 2));
        for (int64_t task = one; task < last && going_on(); ++task) {
          const int64_t i = task / across * tiles / down * kTile;
          const int64_t count = std::min(m, (task / across + 1) * tiles / down * kTile) - i;
          const Bf16Rows of_a = rounds ? round_rows(kernels, input<float>(a) + i * a.stride(0) + begin, a.stride(0),
                                                    count, block_terms, rows.data())
                                       : pack_rows(kernels, Piece(a, i, count, begin, block_terms), rows.data());
          for (int64_t j = task % across * kAcross; j < std::min(block_columns, (task % across + 1) * kAcross);
               j += kPanel)
            for (int64_t r = 0; r < count; r += kTile)
              kernels.tile({of_a.pairs + r * of_a.row, of_a.row, of_a.step}, std::min(kTile, count - r),
                           packed + j / kPanel * panel, (block_terms + 1) / 2,
                           output<float>(to) + (i + r) * to.stride(0) + first + j, to.stride(0),
                           std::min(kPanel, block_columns - j), adds || begin > 0);
        }
      });
    }
}

namespace {

Tensor product_of(const Tensor& a, const Tensor& b) {
  Tensor to = torch::stable::new_empty(a, {a.size(0), b.size(0)}, ScalarType::Float);
  bf16_product(a, b, to, false);
  return to;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) { m.impl("bf16_product", FASTLOSS_BOX(&fastloss::product_of)); }
