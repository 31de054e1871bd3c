// A tile of a product of packed bfloat16 pairs, and the packing; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// sum + a_0 b_0 + a_1 b_1 of the pairs in each lane
FASTLOSS_INLINE vf add_pair(vf sum, vu a, vu b) {
#if defined(FASTLOSS_HAS_BF16)
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (vf)(a << 16) * (vf)(b << 16);
  return sum + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}

// R rows of a with a panel of b.
template <int R>
FASTLOSS_INLINE void bf16_rows(const Bf16Rows& a, const uint32_t* panel, int64_t pairs, float* to, int64_t stride,
                               int64_t n, bool adds) {
  constexpr int C = kPanel / W;
  vf sums[R][C] = {};
  for (int r = 0; r < R; ++r)  // the results' lines come while the sums are made
    for (int c = 0; c < C; ++c) __builtin_prefetch(to + r * stride + c * W, 1);
  for (int64_t k = 0; k < pairs; ++k) {
    vu of_b[C];
    for (int c = 0; c < C; ++c) of_b[c] = load_bits<vu>(panel + k * kPanel + c * W);
    for (int r = 0; r < R; ++r) {
      const vu of_a = vu{} + a.pairs[r * a.row + k * a.step];
      for (int c = 0; c < C; ++c) sums[r][c] = add_pair(sums[r][c], of_a, of_b[c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C && c * W < n; ++c) {
      float* tile = to + r * stride + c * W;
      store_up_to(tile, adds ? sums[r][c] + load_up_to(tile, n - c * W) : sums[r][c], n - c * W);
    }
}

// `rows` <= kTile rows of a with a panel of b, of which n columns are there.
static void bf16_tile(const Bf16Rows& a, int64_t rows, const uint32_t* panel, int64_t pairs, float* to, int64_t stride,
                      int64_t n, bool adds) {
#if FASTLOSS_BYTES == 64
  switch (rows) {
    case 6: return bf16_rows<6>(a, panel, pairs, to, stride, n, adds);
    case 5: return bf16_rows<5>(a, panel, pairs, to, stride, n, adds);
    case 4: return bf16_rows<4>(a, panel, pairs, to, stride, n, adds);
    case 3: return bf16_rows<3>(a, panel, pairs, to, stride, n, adds);
    case 2: return bf16_rows<2>(a, panel, pairs, to, stride, n, adds);
    default: return bf16_rows<1>(a, panel, pairs, to, stride, n, adds);
  }
#else
  for (int64_t r = 0; r < rows; ++r)
    bf16_rows<1>({a.pairs + r * a.row, a.row, a.step}, panel, pairs, to + r * stride, stride, n, adds);
#endif
}

// to[i] = the pair first[i], second[i], or first[i], 0
static void bf16_zip(const uint16_t* first, const uint16_t* second, int64_t n, uint32_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = first[i] | (second ? static_cast<uint32_t>(second[i]) << 16 : 0);
}

// Transposes kSquare rows of kSquare pairs: pair k of row r goes to to[k * kPanel + r].
static void bf16_transpose(const uint16_t* from, int64_t row, uint32_t* to) {
  transpose_square(from, 2 * row, to, 4 * kPanel);
}

static void bf16_round(const float* from, int64_t n, BFloat16* to) {
  for (int64_t i = 0; i < n; i += W) store_up_to(to + i, load_up_to(from + i, n - i), n - i);
}

static Bf16Kernels bf16_kernels() { return {bf16_tile, bf16_zip, bf16_transpose, bf16_round}; }

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
