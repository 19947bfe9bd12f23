// Sixteen floats on every instruction set: one register, two, or an array. Kernels include no std headers (the linker
// would keep one copy of an inline function for everybody, compiled for a machine that not everybody has).
#pragma once
#include "chain.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FTSO_ALWAYS_INLINE inline __attribute__((always_inline))
#define FTSO_INLINE static FTSO_ALWAYS_INLINE

namespace ftso::FTSO_ISA {

#if defined(__AMX_BF16__)
constexpr bool kTiles = true;  // there is a tile unit (tiles.h)
#else
constexpr bool kTiles = false;
#endif

#if defined(__AVX512F__)
#if defined(__AMX_BF16__)
constexpr const char* compiled_isa = "amx";
#elif defined(__AVX512BF16__)
constexpr const char* compiled_isa = "avx512bf16";
#else
constexpr const char* compiled_isa = "avx512";
#endif
constexpr int kPanel = 4;         // vectors of columns that a product holds at once
constexpr int kStateVectors = 4;  // vectors of a state that a cell holds in registers
constexpr int kWindowRows = 4;    // rows of output that a window of pixels treats at once
constexpr int kDotColumns = 4;    // by four rows: dots of planes that are taken at once
constexpr int rows_of(int nv) { return nv == 1 ? 16 : nv == 2 ? 12 : nv == 3 ? 8 : 6; }

struct Vec {
  __m512 v;
};
using Register = Vec;  // what one register holds: here a vector
constexpr int kRegister = kLanes;
FTSO_INLINE Register load_register(const float* p) { return {_mm512_loadu_ps(p)}; }
FTSO_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FTSO_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FTSO_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }  // past the caches; p at 64 bytes
FTSO_INLINE Vec set1(float s) { return {_mm512_set1_ps(s)}; }
FTSO_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FTSO_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FTSO_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FTSO_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
struct Mask {
  __mmask16 m;
};
FTSO_INLINE Mask positive(Vec x) { return {_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ)}; }
FTSO_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_mov_ps(b.v, m.m, a.v)}; }  // a where m, else b
// d where x > 0, else 0
FTSO_INLINE Vec where_positive(Vec x, Vec d) { return {_mm512_maskz_mov_ps(positive(x).m, d.v)}; }
// a where x == y, else b
FTSO_INLINE Vec where_equal(Vec x, Vec y, Vec a, Vec b) {
  return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, y.v, _CMP_EQ_OQ), a.v)};
}
// pick: source[lane[i]] where lane[i] >= 0, else kept
struct Lanes {
  __m512i at;
  __mmask16 here;
};
FTSO_INLINE Lanes lanes(const int32_t* lane) {
  const __m512i at = _mm512_loadu_si512(lane);
  return {at, _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512())};
}
FTSO_INLINE Vec pick(Vec kept, Lanes l, Vec source) {
  return {_mm512_mask_permutexvar_ps(kept.v, l.here, l.at, source.v)};
}
// The same from two sources.
using LanePairs = Lanes;
FTSO_INLINE LanePairs lane_pairs(const int32_t* first, const int32_t* second) {
  const Lanes a = lanes(first), b = lanes(second);
  const __m512i upper = _mm512_add_epi32(b.at, _mm512_set1_epi32(kLanes));
  return {_mm512_mask_mov_epi32(a.at, b.here, upper), static_cast<__mmask16>(a.here | b.here)};
}
FTSO_INLINE Vec pick(LanePairs l, Vec first, Vec second) {  // 0 where neither
  return {_mm512_maskz_permutex2var_ps(l.here, first.v, l.at, second.v)};
}
FTSO_INLINE Vec pick(Vec kept, LanePairs l, Vec first, Vec second) {
  return {_mm512_mask_mov_ps(kept.v, l.here, _mm512_permutex2var_ps(first.v, l.at, second.v))};
}
// The vector SHIFT floats, fewer than a vector, from p on, where p is a whole number of cache lines from the last: a
// load across two lines costs as much as three. Reads a vector on either side of p.
template <int SHIFT>
FTSO_INLINE Vec load_shifted(const float* p) {
  const __m512i here = _mm512_loadu_si512(p), beside = _mm512_loadu_si512(SHIFT < 0 ? p - kLanes : p + kLanes);
  return {_mm512_castsi512_ps(SHIFT < 0 ? _mm512_alignr_epi32(here, beside, (kLanes + SHIFT) % kLanes)
                                        : _mm512_alignr_epi32(beside, here, (kLanes + SHIFT) % kLanes))};
}
// The same where m, which excludes the lanes that would be beside the vector at p.
template <int SHIFT>
FTSO_INLINE Vec load_turned(const float* p, Mask m) {
  const __m512i here = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_maskz_alignr_epi32(m.m, here, here, (kLanes + SHIFT) % kLanes))};
}
FTSO_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
// The first n lanes: what lies behind them is neither read nor written.
using Tail = Mask;
FTSO_INLINE Tail tail(int64_t n) { return {static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << n) - 1)}; }
FTSO_INLINE Vec load(const float* p, Tail t) { return {_mm512_maskz_loadu_ps(t.m, p)}; }  // 0 behind
FTSO_INLINE void store(float* p, Vec a, Tail t) { _mm512_mask_storeu_ps(p, t.m, a.v); }
// The lower half: what was stored so is handed on to a load at once, as masked stores are not.
FTSO_INLINE Vec load_half(const float* p) { return {_mm512_zextps256_ps512(_mm256_loadu_ps(p))}; }
FTSO_INLINE void store_half(float* p, Vec a) { _mm256_storeu_ps(p, _mm512_castps512_ps256(a.v)); }
FTSO_INLINE Vec load_halves(const float* low, const float* high) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1)};
}
FTSO_INLINE void store_halves(float* low, float* high, Vec a) {
  store_half(low, a), _mm256_storeu_ps(high, _mm512_extractf32x8_ps(a.v, 1));
}
FTSO_INLINE Mask mask_of(uint32_t bits) { return {static_cast<__mmask16>(bits)}; }  // lane i: bit i
// out[i] = the sum of register i.
FTSO_INLINE void store_sums(float* out, const Register (&v)[kLanes]) {
  __m512 quarters[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    __m512d halves[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512 a = v[4 * q + 2 * h].v, b = v[4 * q + 2 * h + 1].v;
      halves[h] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    }
    quarters[q] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(halves[0], halves[1])),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(halves[0], halves[1])));
  }
  __m512 pairs[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
    pairs[h] = _mm512_add_ps(_mm512_shuffle_f32x4(quarters[2 * h], quarters[2 * h + 1], 0x44),
                             _mm512_shuffle_f32x4(quarters[2 * h], quarters[2 * h + 1], 0xee));
  store(out, {_mm512_add_ps(_mm512_shuffle_f32x4(pairs[0], pairs[1], 0x88),
                            _mm512_shuffle_f32x4(pairs[0], pairs[1], 0xdd))});
}
FTSO_INLINE void add_to(double* p, Vec a) {  // 16 doubles
  const __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  const __m512d hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), lo));
  _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), hi));
}
FTSO_INLINE double sum_in_double(Vec a) {
  const __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  return _mm512_reduce_add_pd(_mm512_add_pd(lo, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))));
}

#elif defined(__AVX2__)
constexpr const char* compiled_isa = "avx2";
constexpr int kPanel = 1;
constexpr int kStateVectors = 4;
constexpr int kWindowRows = 2;
constexpr int kDotColumns = 3;
constexpr int rows_of(int) { return 6; }

struct Register {
  __m256 v;
};
constexpr int kRegister = 8;
FTSO_INLINE Register load_register(const float* p) { return {_mm256_loadu_ps(p)}; }
FTSO_INLINE Register fma(Register a, Register b, Register c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FTSO_INLINE float sum(Register a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

struct Vec {
  __m256 lo, hi;
};
FTSO_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FTSO_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
FTSO_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.lo), _mm256_stream_ps(p + 8, a.hi); }
FTSO_INLINE Vec set1(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
FTSO_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
FTSO_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
FTSO_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
FTSO_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
struct Mask {
  __m256 lo, hi;
};
FTSO_INLINE Mask positive(Vec x) {
  const __m256 z = _mm256_setzero_ps();
  return {_mm256_cmp_ps(x.lo, z, _CMP_GT_OQ), _mm256_cmp_ps(x.hi, z, _CMP_GT_OQ)};
}
FTSO_INLINE Vec select(Mask m, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
FTSO_INLINE Vec where_positive(Vec x, Vec d) {
  const Mask m = positive(x);
  return {_mm256_and_ps(m.lo, d.lo), _mm256_and_ps(m.hi, d.hi)};
}
FTSO_INLINE Vec where_equal(Vec x, Vec y, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_EQ_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_EQ_OQ))};
}
struct Lanes {
  __m256i lo, hi;
};
FTSO_INLINE Lanes lanes(const int32_t* lane) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane + 8))};
}
FTSO_INLINE __m256 pick8(__m256 kept, __m256i at, Vec source) {
  const __m256 lo = _mm256_permutevar8x32_ps(source.lo, at), hi = _mm256_permutevar8x32_ps(source.hi, at);
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // bit 3 of the lane, as a sign
  return _mm256_blendv_ps(_mm256_blendv_ps(lo, hi, upper), kept, _mm256_castsi256_ps(at));
}
FTSO_INLINE Vec pick(Vec kept, Lanes l, Vec source) {
  return {pick8(kept.lo, l.lo, source), pick8(kept.hi, l.hi, source)};
}
FTSO_INLINE float sum(Vec a) { return sum(Register{_mm256_add_ps(a.lo, a.hi)}); }
using Tail = Mask;
FTSO_INLINE __m256 below8(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane));
}
FTSO_INLINE Tail tail(int64_t n) { return {below8(n), below8(n - 8)}; }
FTSO_INLINE Vec load(const float* p, Tail t) {
  return {_mm256_maskload_ps(p, _mm256_castps_si256(t.lo)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(t.hi))};
}
FTSO_INLINE Vec load_half(const float* p) { return {_mm256_loadu_ps(p), _mm256_setzero_ps()}; }
FTSO_INLINE void store_half(float* p, Vec a) { _mm256_storeu_ps(p, a.lo); }
FTSO_INLINE Vec load_halves(const float* low, const float* high) {
  return {_mm256_loadu_ps(low), _mm256_loadu_ps(high)};
}
FTSO_INLINE void store_halves(float* low, float* high, Vec a) {
  _mm256_storeu_ps(low, a.lo), _mm256_storeu_ps(high, a.hi);
}
FTSO_INLINE Mask mask_of(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const auto half = [=](uint32_t b) {
    return _mm256_castsi256_ps(
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b)), lane), lane));
  };
  return {half(bits), half(bits >> 8)};
}
FTSO_INLINE void store(float* p, Vec a, Tail t) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(t.lo), a.lo), _mm256_maskstore_ps(p + 8, _mm256_castps_si256(t.hi), a.hi);
}

#else
constexpr const char* compiled_isa = "scalar";
constexpr int kPanel = 1;
constexpr int kStateVectors = 0;
constexpr int kWindowRows = 1;
constexpr int kDotColumns = 4;
constexpr int rows_of(int) { return 2; }

struct Vec {
  float at[kLanes];
};
using Register = Vec;
constexpr int kRegister = kLanes;
#define FTSO_LANES(expression)                           \
  Vec r;                                                 \
  for (int i = 0; i < kLanes; ++i) r.at[i] = expression; \
  return r
FTSO_INLINE Vec load(const float* p) { FTSO_LANES(p[i]); }
FTSO_INLINE Register load_register(const float* p) { return load(p); }
FTSO_INLINE void store(float* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.at[i];
}
FTSO_INLINE void stream(float* p, Vec a) { store(p, a); }
FTSO_INLINE Vec set1(float s) { FTSO_LANES(s); }
FTSO_INLINE Vec add(Vec a, Vec b) { FTSO_LANES(a.at[i] + b.at[i]); }
FTSO_INLINE Vec mul(Vec a, Vec b) { FTSO_LANES(a.at[i] * b.at[i]); }
FTSO_INLINE Vec fma(Vec a, Vec b, Vec c) { FTSO_LANES(a.at[i] * b.at[i] + c.at[i]); }
FTSO_INLINE Vec max(Vec a, Vec b) { FTSO_LANES(a.at[i] > b.at[i] ? a.at[i] : b.at[i]); }
struct Mask {
  bool at[kLanes];
};
FTSO_INLINE Mask positive(Vec x) {
  Mask m;
  for (int i = 0; i < kLanes; ++i) m.at[i] = x.at[i] > 0;
  return m;
}
FTSO_INLINE Vec select(Mask m, Vec a, Vec b) { FTSO_LANES(m.at[i] ? a.at[i] : b.at[i]); }
FTSO_INLINE Vec where_positive(Vec x, Vec d) { FTSO_LANES(x.at[i] > 0 ? d.at[i] : 0); }
FTSO_INLINE Vec where_equal(Vec x, Vec y, Vec a, Vec b) { FTSO_LANES(x.at[i] == y.at[i] ? a.at[i] : b.at[i]); }
struct Lanes {
  const int32_t* at;
};
FTSO_INLINE Lanes lanes(const int32_t* lane) { return {lane}; }
FTSO_INLINE Vec pick(Vec kept, Lanes l, Vec source) { FTSO_LANES(l.at[i] >= 0 ? source.at[l.at[i]] : kept.at[i]); }
FTSO_INLINE float sum(Vec a) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += a.at[i];
  return s;
}
struct Tail {
  int64_t n;
};
FTSO_INLINE Tail tail(int64_t n) { return {n < kLanes ? n : kLanes}; }
FTSO_INLINE Vec load(const float* p, Tail t) { FTSO_LANES(i < t.n ? p[i] : 0); }
FTSO_INLINE void store(float* p, Vec a, Tail t) {
  for (int64_t i = 0; i < t.n; ++i) p[i] = a.at[i];
}
FTSO_INLINE Vec load_half(const float* p) { FTSO_LANES(i < kLanes / 2 ? p[i] : 0); }
FTSO_INLINE void store_half(float* p, Vec a) {
  for (int i = 0; i < kLanes / 2; ++i) p[i] = a.at[i];
}
FTSO_INLINE Vec load_halves(const float* low, const float* high) {
  FTSO_LANES(i < kLanes / 2 ? low[i] : high[i - kLanes / 2]);
}
FTSO_INLINE void store_halves(float* low, float* high, Vec a) {
  for (int i = 0; i < kLanes; ++i) (i < kLanes / 2 ? low[i] : high[i - kLanes / 2]) = a.at[i];
}
FTSO_INLINE Mask mask_of(uint32_t bits) {
  Mask m;
  for (int i = 0; i < kLanes; ++i) m.at[i] = bits >> i & 1;
  return m;
}
FTSO_INLINE Vec load(const float* p, Mask m) { FTSO_LANES(m.at[i] ? p[i] : 0); }
FTSO_INLINE Vec select(Tail t, Vec a, Vec b) { FTSO_LANES(i < t.n ? a.at[i] : b.at[i]); }
#undef FTSO_LANES
#endif

FTSO_INLINE Vec zero() { return set1(0); }
FTSO_INLINE Vec rectified(Vec x) { return max(zero(), x); }  // NaN stays NaN
FTSO_INLINE Vec keep(Tail t, Vec a) { return select(t, a, zero()); }

// Pairs: bfloat16 values 2i and 2i + 1 in the place of float i.
#if defined(__AVX512BF16__)
FTSO_INLINE void store_pairs(float* p, Vec a) {  // 16 values, 8 pairs; rounded to nearest even
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
FTSO_INLINE Vec fma_pairs(Vec a, Vec b, Vec c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)}; }
#else
FTSO_INLINE void store_pairs(float* p, Vec a) {
  uint32_t bits[kLanes], pairs[kLanes / 2];
  store(reinterpret_cast<float*>(bits), a);
  for (int i = 0; i < kLanes; ++i) bits[i] = bf16_bits(bits[i]);
  for (int i = 0; i < kLanes / 2; ++i) pairs[i] = bits[2 * i] | bits[2 * i + 1] << 16;
  __builtin_memcpy(p, pairs, sizeof pairs);
}
FTSO_INLINE Vec fma_pairs(Vec a, Vec b, Vec c) {
  uint32_t x[kLanes], y[kLanes], low[2][kLanes], high[2][kLanes];
  store(reinterpret_cast<float*>(x), a), store(reinterpret_cast<float*>(y), b);
  for (int i = 0; i < kLanes; ++i) low[0][i] = x[i] << 16, low[1][i] = y[i] << 16;
  for (int i = 0; i < kLanes; ++i) high[0][i] = x[i] & 0xffff0000, high[1][i] = y[i] & 0xffff0000;
  const auto as_float = [](const uint32_t* bits) { return load(reinterpret_cast<const float*>(bits)); };
  return fma(as_float(high[0]), as_float(high[1]), fma(as_float(low[0]), as_float(low[1]), c));
}
#endif
#if !defined(__AVX512F__)
template <int SHIFT>
FTSO_INLINE Vec load_shifted(const float* p) {
  return load(p + SHIFT);
}
template <int SHIFT>
FTSO_INLINE Vec load_turned(const float* p, Mask m) {
  return load(p + SHIFT, m);
}
struct LanePairs {
  Lanes first, second;
};
FTSO_INLINE LanePairs lane_pairs(const int32_t* first, const int32_t* second) { return {lanes(first), lanes(second)}; }
FTSO_INLINE Vec pick(Vec kept, LanePairs l, Vec first, Vec second) {
  return pick(pick(kept, l.first, first), l.second, second);
}
FTSO_INLINE Vec pick(LanePairs l, Vec first, Vec second) { return pick(zero(), l, first, second); }
#endif
// n floats, at most a vector.
FTSO_INLINE Vec load_part(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : n == kLanes / 2 ? load_half(p) : load(p, tail(n));
}
FTSO_INLINE void store_part(float* p, Vec a, int64_t n) {
  n >= kLanes ? store(p, a) : n == kLanes / 2 ? store_half(p, a) : store(p, a, tail(n));
}
FTSO_INLINE void add_to(float* p, Vec a) { store(p, add(load(p), a)); }
FTSO_INLINE void prefetch(const float* p) { __builtin_prefetch(p, 0, 2); }  // into the second level
#if !defined(__AVX512F__)
template <int N>
FTSO_INLINE void store_sums(float* out, const Register (&v)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) out[i] = sum(v[i]);
}
FTSO_INLINE void add_to(double* p, Vec a) {  // 16 doubles
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < kLanes; ++i) p[i] += lanes[i];
}
FTSO_INLINE double sum_in_double(Vec a) {
  float lanes[kLanes];
  store(lanes, a);
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}
#endif

}  // namespace ftso::FTSO_ISA
