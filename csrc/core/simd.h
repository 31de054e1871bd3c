// Vectors of FASTLOSS_BYTES bytes for the namespace FASTLOSS_ISA, on GCC's and Clang's vector extensions: arithmetic,
// comparison and ?: are the compiler's own. Included by for_each_isa.h, hence no include guard.

#ifndef FASTLOSS_INLINE
#define FASTLOSS_INLINE static inline __attribute__((always_inline, unused))
#endif

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int W = FASTLOSS_BYTES / 4;  // floats in a vector
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef double vd __attribute__((vector_size(W * 8)));  // of as many lanes as vf: two registers
typedef uint64_t vl __attribute__((vector_size(W * 8)));

FASTLOSS_INLINE vf all(float x) { return vf{} + x; }
FASTLOSS_INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
FASTLOSS_INLINE vf sign(vf x) {  // 0 for 0 and for NaN, as torch.sgn
  return (vf)(((vi)all(1.0f) & (x > 0)) | ((vi)all(-1.0f) & (x < 0)));
}
FASTLOSS_INLINE vf sqrt(vf x) {
#if defined(__x86_64__) && FASTLOSS_BYTES == 64
  return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__x86_64__) && FASTLOSS_BYTES == 32
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vf)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (vf)vsqrtq_f32((float32x4_t)x);
#else
  for (int k = 0; k < W; ++k) x[k] = __builtin_sqrtf(x[k]);
  return x;
#endif
}
FASTLOSS_INLINE vi lanes() {
  vi v{};
  for (int k = 0; k < W; ++k) v[k] = k;
  return v;
}
FASTLOSS_INLINE vf where(vi chosen, vf x) { return (vf)((vi)x & chosen); }  // 0 in the other lanes, not x * 0
FASTLOSS_INLINE vf weighted(vf x, vf weight) { return where(weight != 0.0f, x * weight); }  // 0 excludes even NaN
// 1 / sqrt(x) of a positive normal number, two ulp: the CPU's estimate and a Newton step, several times as fast as root
// and division. Without an estimate: those.
FASTLOSS_INLINE vf inverse_sqrt(vf x) {
#if defined(__x86_64__) && FASTLOSS_BYTES == 64
  const vf y = (vf)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x);
#elif defined(__x86_64__) && FASTLOSS_BYTES == 32
  const vf y = (vf)_mm256_rsqrt_ps((__m256)x);
#else
  return 1.0f / sqrt(x);
#endif
#if defined(__x86_64__) && FASTLOSS_BYTES >= 32
  return y + 0.5f * y * (1.0f - (x * y) * y);  // x y first: y^2 of a small x is infinite
#endif
}
// 1 / x of a normal number below 2^126, two ulp: the CPU's estimate and a Newton step. Without an estimate: a division.
FASTLOSS_INLINE vf inverse(vf x) {
#if defined(__x86_64__) && FASTLOSS_BYTES == 64
  const vf y = (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
#elif defined(__x86_64__) && FASTLOSS_BYTES == 32
  const vf y = (vf)_mm256_rcp_ps((__m256)x);
#else
  return 1.0f / x;
#endif
#if defined(__x86_64__) && FASTLOSS_BYTES >= 32
  return y + y * (1.0f - x * y);
#endif
}
FASTLOSS_INLINE bool every(vi mask) {  // of a comparison
#if defined(__x86_64__) && FASTLOSS_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
#elif defined(__x86_64__) && FASTLOSS_BYTES == 32
  return _mm256_movemask_ps((__m256)mask) == 0xff;
#else
  int all_of = -1;
  for (int k = 0; k < W; ++k) all_of &= mask[k];
  return all_of != 0;
#endif
}
FASTLOSS_INLINE double sum(vd x) {
  double total = 0;
  for (int k = 0; k < W; ++k) total += x[k];
  return total;
}

FASTLOSS_INLINE float sum(vf x) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) x[k] += x[k + half];
  return x[0];
}

// float16 and back. Without F16C: integer arithmetic, rounding to nearest even.
FASTLOSS_INLINE vf widen_half(vh h) {
#if defined(__x86_64__) && FASTLOSS_BYTES == 64
  return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(__x86_64__) && FASTLOSS_BYTES == 32
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  const vu bits = __builtin_convertvector(h, vu);
  const vu magnitude = (bits & 0x7fffu) << 13;
  const vf value = (vf)magnitude * 0x1p112f;                        // moves the exponent, subnormals included
  const vu big = (vu)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;  // inf, NaN
  return (vf)((vu)value | big | ((bits & 0x8000u) << 16));
#endif
}
FASTLOSS_INLINE vh narrow_half(vf x) {
#if defined(__x86_64__) && FASTLOSS_BYTES == 64
  return (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__x86_64__) && FASTLOSS_BYTES == 32
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const vu bits = (vu)abs(x);
  const vu normal = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;  // exponent - 112, rounded
  const vu small = (vu)((vf)bits + 0.5f) - 0x3f000000u;                // the addition rounds to steps of 2^-24
  vu half = (vi)bits < 0x38800000 ? small : normal;
  half = (vi)bits > 0x477fefff ? vu{} + 0x7c00u : half;  // 65520 and more
  half = (vi)bits > 0x7f800000 ? vu{} + 0x7e00u : half;
  return __builtin_convertvector(half | (((vu)x >> 16) & 0x8000u), vh);
#endif
}

FASTLOSS_INLINE vf widen_bfloat16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
FASTLOSS_INLINE vh narrow_bfloat16(vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x != x ? vu{} + 0x7fc0u : rounded, vh);
}

// Transposes 16 rows of 16 elements of 4 bytes. Strides are in bytes.
FASTLOSS_INLINE void transpose_square(const void* source, int64_t stride, void* result, int64_t result_stride) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(result);
#if defined(__x86_64__) && FASTLOSS_BYTES == 64
  __m512i x[16], y[16];
  for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(from + r * stride);
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {  // now quarter q of x[i + j] has rows i .. i + 3 of column 4 q + j
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  const auto put = [&](int k, __m512i v) { _mm512_storeu_si512(to + k * result_stride, v); };
  for (int j = 0; j < 4; ++j) {
    const __m512i even[2] = {_mm512_shuffle_i32x4(x[j], x[4 + j], 0x88),
                             _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd),
                            _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd)};
    put(j, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
    put(4 + j, _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
    put(8 + j, _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
    put(12 + j, _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
  }
#else
  uint32_t part[16][16];
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k) __builtin_memcpy(&part[k][r], from + r * stride + 4 * k, 4);
  for (int k = 0; k < 16; ++k) __builtin_memcpy(to + k * result_stride, part[k], sizeof part[k]);
#endif
}

// Unaligned loads and stores of W elements, computing in float whatever the type in memory.
template <typename V>
FASTLOSS_INLINE V load_bits(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
FASTLOSS_INLINE void store_bits(double* to, vd v) { __builtin_memcpy(to, &v, sizeof v); }
FASTLOSS_INLINE vf load(const float* from) { return load_bits<vf>(from); }
FASTLOSS_INLINE vf load(const BFloat16* from) { return widen_bfloat16(load_bits<vh>(from)); }
FASTLOSS_INLINE vf load(const Half* from) { return widen_half(load_bits<vh>(from)); }

FASTLOSS_INLINE vf as_stored(const float*, vf v) { return v; }
FASTLOSS_INLINE vh as_stored(const BFloat16*, vf v) { return narrow_bfloat16(v); }
FASTLOSS_INLINE vh as_stored(const Half*, vf v) { return narrow_half(v); }

template <typename T>
FASTLOSS_INLINE void store(T* to, vf v) {
  const auto stored = as_stored(to, v);
  __builtin_memcpy((void*)to, &stored, sizeof stored);
}

// A store past the caches, to an aligned address; fence() after the last. It spares reading the line before writing.
template <typename T>
FASTLOSS_INLINE void stream(T* to, vf v) {
#if defined(__x86_64__)
  const auto stored = as_stored(to, v);
  if constexpr (sizeof stored == 8) {
    _mm_stream_si64((long long*)to, (long long)stored);
  } else if constexpr (sizeof stored == 16) {
    _mm_stream_si128((__m128i*)to, (__m128i)stored);
#if FASTLOSS_BYTES >= 32
  } else if constexpr (sizeof stored == 32) {
    _mm256_stream_si256((__m256i*)to, (__m256i)stored);
#endif
#if FASTLOSS_BYTES == 64
  } else {
    _mm512_stream_si512((__m512i*)to, (__m512i)stored);
#endif
  }
#else
  store(to, v);
#endif
}
FASTLOSS_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first n < W elements; the other lanes read 0.
template <typename T>
FASTLOSS_INLINE vf load_some(const T* from, int64_t n) {
  alignas(FASTLOSS_BYTES) unsigned char bytes[W * sizeof(T)] = {};
  __builtin_memcpy(bytes, (const void*)from, n * sizeof(T));
  return load((const T*)bytes);
}
template <typename T>
FASTLOSS_INLINE void store_some(T* to, vf v, int64_t n) {
  const auto stored = as_stored(to, v);
  __builtin_memcpy((void*)to, &stored, n * sizeof(T));
}

// The same of W elements, if there are as many.
template <typename T>
FASTLOSS_INLINE vf load_up_to(const T* from, int64_t n) {
  return n >= W ? load(from) : load_some(from, n);
}
template <typename T>
FASTLOSS_INLINE void store_up_to(T* to, vf v, int64_t n) {
  if (n >= W)
    store(to, v);
  else
    store_some(to, v, n);
}
template <typename T>
FASTLOSS_INLINE void put(T* to, vf v, int64_t n, bool streamed) {
  if (streamed)
    stream(to, v);
  else
    store_up_to(to, v, n);
}

// The lanes at least `from` and less than `to` of W elements that start at x.
FASTLOSS_INLINE vi between(int64_t x, int64_t from, int64_t to) {
  const int64_t low = from - x, high = to - x;
  return (lanes() >= (int)(low < 0 ? 0 : low > W ? W : low)) & (lanes() < (int)(high < 0 ? 0 : high > W ? W : high));
}

// W elements from row[x] on, those in first .. last; the other lanes read 0.
template <typename T>
FASTLOSS_INLINE vf load_inside(const T* row, int64_t x, int64_t first, int64_t last) {
  if (x >= first && x + W <= last) return load(row + x);
  const int64_t from = x < first ? first : x, to = x + W < last ? x + W : last;
  if (from >= to) return vf{};
  alignas(FASTLOSS_BYTES) unsigned char bytes[W * sizeof(T)] = {};
  __builtin_memcpy(bytes + (from - x) * sizeof(T), (const void*)(row + from), (to - from) * sizeof(T));
  return load((const T*)bytes);
}

// e^x for x <= 88, two ulp; 0 below the smallest normal number, NaN for NaN.
FASTLOSS_INLINE vf exp(vf x) {
  const vf lowest = all(-87.33f);
  const vf magic = (x < lowest ? lowest : x) * 1.44269504f + 0x1.8p23f;  // rounds to an integer, in the low bits
  const vf n = magic - 0x1.8p23f;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vf power = (vf)(((vi)magic << 23) + 0x3f800000);
  return x < lowest ? all(0.0f) : p * power;
}

// x^y for x >= 0 and y > 0, computed in double so that the result is as good as
// rounded: log2 by its atanh series, 2^t by Taylor.
FASTLOSS_INLINE vf pow(vf x, double y) {
  const vd wide = __builtin_convertvector(x, vd);
  const vl bits = (vl)wide;
  const vl high = (bits - 0x3fe6a09e667f3bcdULL) & ~0xfffffffffffffULL;  // exponent, mantissa in [sqrt(1/2), sqrt(2))
  const vd mantissa = (vd)(bits - high);
  const vd exponent = (vd)(((high + (1023ULL << 52)) >> 52 & 0xfff) | 0x4330000000000000ULL) - 0x1.00000000003ffp52;
  const vd s = (mantissa - 1.0) / (mantissa + 1.0), q = s * s;
  vd series = q * (1.0 / 13) + 1.0 / 11;
  series = series * q + 1.0 / 9;
  series = series * q + 1.0 / 7;
  series = series * q + 1.0 / 5;
  series = series * q + 1.0 / 3;
  series = series * q + 1.0;
  vd t = (exponent + series * s * 2.8853900817779268) * y;
  t = t > 512.0 ? vd{} + 512.0 : t < -512.0 ? vd{} - 512.0 : t;
  const vd magic = t + 0x1.8p52;  // rounds t to an integer, in the low bits
  const vd f = (t - (magic - 0x1.8p52)) * 0.69314718055994531;
  vd e = f * (1.0 / 40320) + 1.0 / 5040;
  e = e * f + 1.0 / 720;
  e = e * f + 1.0 / 120;
  e = e * f + 1.0 / 24;
  e = e * f + 1.0 / 6;
  e = e * f + 0.5;
  e = e * f + 1.0;
  e = e * f + 1.0;
  const vf power = __builtin_convertvector((vd)((vl)e + ((vl)magic << 52)), vf);
  const vi itself = (x == 0.0f) | (x == __builtin_inff()) | (x != x);
  return itself ? x : power;
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
