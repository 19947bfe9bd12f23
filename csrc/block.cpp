// A separable block between two batch norms: normalise, ReLU, depthwise, pointwise, statistics; and its gradients.
//
// Images are treated in groups whose depthwise results stay in the second level cache: they never reach memory, and
// backward they are computed again. Columns of the products are pixels, rows are channels.
#include "ftso.h"
#include "stencil.h"

namespace ftso::FTSO_ISA {
namespace {

// Where the vectors of a group's columns lie within the planes of an image: offset from the group's first image, and
// how many pixels are left there.
struct Columns {
  int64_t *offset, *left;
  static float* carve(Columns& columns, float* memory, const Group& g, int64_t HW, int64_t image, bool pair) {
    const int64_t n = (g.images + (pair ? g.images % 2 : 0)) * g.plane / kLanes;
    columns.offset = reinterpret_cast<int64_t*>(memory);
    columns.left = columns.offset + n;
    if (pair)  // row v % 8 of the pair v / 8
      for (int64_t v = 0; v < n; ++v) columns.offset[v] = v / 8 * 2 * image + v % 8 * 8, columns.left[v] = v / 8 * 2;
    for (int64_t i = 0, v = 0; !pair && i < g.images; ++i)
      for (int64_t within = 0; within < g.plane; within += kLanes, ++v)
        columns.offset[v] = i * image + within, columns.left[v] = HW - within;
    return memory + rounded_up(4 * n, kLanes);
  }
};

// Vectors that a lane adds up in float before the sum goes on in double: long sums of small gradients lose digits.
constexpr int64_t kRun = 16;

// put(row, column, acc[MR][NV]) for a[P][K] w[K][N], N whole vectors.
template <int NV, int MR, typename Put>
FTSO_INLINE void product_rows(const float* a, int64_t K, const float* w, int64_t ldw, int64_t row, int64_t column,
                              Put put) {
  Vec acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = zero();
  multiply<MR, NV, false>(Rows{a + row * K, K}, w + column, ldw, K, acc);
  put(row, column, acc);
}
template <typename Put>
FTSO_INLINE void product_of_planes(const float* a, int64_t P, int64_t K, const float* w, int64_t ldw, int64_t N,
                                   Put put) {
  panels(N, [=](auto width, int64_t c) {
    constexpr int NV = decltype(width)::value, MR = rows_of(NV);
    int64_t p = 0;
    for (; p + MR <= P; p += MR) product_rows<NV, MR>(a, K, w, ldw, p, c, put);
    if constexpr (MR > 4)
      for (; p + 4 <= P; p += 4) product_rows<NV, 4>(a, K, w, ldw, p, c, put);
    for (; p + 2 <= P; p += 2) product_rows<NV, 2>(a, K, w, ldw, p, c, put);
    for (; p < P; ++p) product_rows<NV, 1>(a, K, w, ldw, p, c, put);
  });
}

// out[m][k] += <a row m, b row k>: the weights' gradient. Blocks at the rim repeat their last row.
FTSO_INLINE void dots_of_planes(const float* a, int64_t M, const float* b, int64_t K, int64_t ld, int64_t n,
                                float* out) {
  for (int64_t m = 0; m < M; m += 4)
    for (int64_t k = 0; k < K; k += 4) {
      const float *left[4], *right[4];
      for (int64_t i = 0; i < 4; ++i) {
        left[i] = a + (m + i < M ? m + i : M - 1) * ld;
        right[i] = b + (k + i < K ? k + i : K - 1) * ld;
      }
      Vec acc[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) acc[i] = zero();
      for (int64_t p = 0; p < n; p += kLanes) {
        Vec row[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) row[j] = load(right[j] + p);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vec l = load(left[i] + p);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) acc[4 * i + j] = fma(l, row[j], acc[4 * i + j]);
        }
      }
      float found[16];
      store(found, sums_of(acc));
      for (int64_t i = 0; i < 4 && m + i < M; ++i)
        for (int64_t j = 0; j < 4 && k + j < K; ++j) out[(m + i) * K + k + j] += found[4 * i + j];
    }
}

// What both directions share: the group's buffers, and how the pixels of x become activations.
// As a PAIR, images of 8 x 8 are treated two at a time, side by side: a unit is 8 rows of 16 columns.
template <int K, int S, int D, bool PAIR = false>
struct Block {
  static constexpr int64_t kUnit = PAIR ? 2 : 1;
  const BlockStep& s;
  const int64_t HW, Q;  // pixels of x's planes, and of y's
  const Group group;
  Image<S, PAIR> image;
  Image<1, PAIR> d_image;
  float *depthwise, *d_depthwise, *dy;  // [C], [C], [N] rows of group.ld
  float* row_sums;                      // [2][N] vectors
  Columns columns;

  Block(const BlockStep& step, float* scratch)
      : s(step), HW(s.H * s.W), Q(s.Ho * s.Wo), group(s.B, s.C > s.N ? s.C : s.N, Q) {
    constexpr int P = D * (K / 2);
    if constexpr (K > 1) {
      scratch = Image<S, PAIR>::carve(image, scratch, s.H, s.W, P, 0);
      scratch = Image<1, PAIR>::carve(d_image, scratch, s.Ho, s.Wo, P, 0);
    }
    scratch = Columns::carve(columns, scratch, group, Q, s.y.image, PAIR);
    row_sums = scratch, scratch += 2 * s.N * kLanes;
    depthwise = scratch, scratch += s.C * group.ld;
    d_depthwise = scratch, scratch += s.C * group.ld;
    dy = scratch;
    if (Q % kLanes)  // what lies between images stays zero
      for (float* p = depthwise; p < dy; ++p) *p = 0;
  }
  // Whether the unit from image b on, in a group that ends before `end`, has a second image.
  static bool both(int64_t b, int64_t end) { return PAIR && b + 1 < end; }
  // Row r of a pair.
  FTSO_ALWAYS_INLINE static Vec row_of(const Planes& p, int64_t b, int64_t c, int64_t r, bool second) {
    const float* at = p.at + b * p.image + c * p.channel + 8 * r;
    return second ? load_halves(at, at + p.image) : load_half(at);
  }
  FTSO_ALWAYS_INLINE static void put_row(const Planes& p, int64_t b, int64_t c, int64_t r, bool second, Vec v) {
    float* at = p.at + b * p.image + c * p.channel + 8 * r;
    second ? store_halves(at, at + p.image, v) : store_half(at, v);
  }
  FTSO_ALWAYS_INLINE static Vec there(bool second, Vec v) { return second ? v : keep(tail(8), v); }
  int64_t columns_of(int64_t n) const { return (n + kUnit - 1) / kUnit * kUnit * group.plane; }
  const float* x(int64_t b, int64_t c) const { return s.x.at + b * s.x.image + c * s.x.channel; }

  FTSO_ALWAYS_INLINE Vec normalised(int64_t c, Vec v) const {
    return s.scale ? fma(v, set1(s.scale[c]), set1(s.shift[c])) : v;
  }
  // Activations of channel c of image b after the depthwise convolution.
  FTSO_ALWAYS_INLINE void put_image(int64_t b, int64_t end, int64_t c) const {
    if constexpr (PAIR) {
      const bool second = both(b, end);
      image.put_rows(
          8, [&](int64_t r) { return there(second, max(zero(), normalised(c, row_of(s.x, b, c, r, second)))); });
      return;
    }
    image.put(x(b, c), s.H, s.W, 0, [&](Vec v) { return max(zero(), normalised(c, v)); });
  }
  FTSO_ALWAYS_INLINE void put_depthwise(int64_t b, int64_t c, float* out) const {
    const auto relu = [&](Vec v) { return max(zero(), normalised(c, v)); };
    if constexpr (PAIR) {
      windows<K, S, D>(image, s.depthwise + c * K * K, 8, 16,
                       [&](int64_t r, int64_t, Vec v) { store(out + 16 * r, v); });
    } else if constexpr (K > 1) {
      windows<K, S, D>(image, s.depthwise + c * K * K, s.Ho, s.Wo,
                       [&](int64_t r, int64_t col, Vec v) { store_part(out + r * s.Wo + col, v, s.Wo - col); });
    } else if constexpr (S == 1) {
      for (int64_t p = 0; p < Q; p += kLanes) store_part(out + p, relu(load_part(x(b, c) + p, Q - p)), Q - p);
    } else {
      for (int64_t r = 0; r < s.Ho; ++r)
        split_row(x(b, c) + 2 * r * s.W, 2 * s.Wo - 1,
                  [&](int64_t col, Vec even, Vec) { store_part(out + r * s.Wo + col, relu(even), s.Wo - col); });
    }
  }

  // Visits (first image, images) of the chunk's groups.
  template <typename Visit>
  FTSO_ALWAYS_INLINE void every_group(int64_t chunk, Visit visit) const {
    for (int64_t b = s.B * chunk / kChunks, end = s.B * (chunk + 1) / kChunks; b < end; b += group.images)
      visit(b, end - b < group.images ? end - b : group.images);
  }

  void forward(int64_t chunk) {
    double *sums = s.sums + chunk * 2 * s.ld_sums, *squares = sums + s.ld_sums;
    for (int64_t m = 0; m < s.N; ++m) sums[m] = squares[m] = 0;
    every_group(chunk, [&](int64_t b, int64_t n) {
      for (int64_t i = 0; i < 2 * s.N * kLanes; i += kLanes) store(row_sums + i, zero());
      forward_group(b, n);
      for (int64_t m = 0; m < s.N; ++m) {
        sums[m] += sum(load(row_sums + m * kLanes));
        squares[m] += sum(load(row_sums + (s.N + m) * kLanes));
      }
    });
  }
  void forward_group(int64_t b, int64_t n) {
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t i = 0; i < n; i += kUnit) {
        if constexpr (K > 1) put_image(b + i, b + n, c);
        put_depthwise(b + i, c, depthwise + c * group.ld + i * group.plane);
      }
    product_of_planes(s.pointwise, s.N, s.C, depthwise, group.ld, columns_of(n),
                      [&](int64_t row, int64_t col, auto& acc) { put_y(b, n, row, col, acc); });
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE void put_y(int64_t b, int64_t n, int64_t row, int64_t col, Vec (&acc)[MR][NV]) {
    float* base = s.y.at + b * s.y.image + row * s.y.channel;
    const int64_t first = col / kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      Vec total = zero(), squares = zero();
      const Vec bias = s.bias ? set1(s.bias[row + i]) : zero();
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if (s.bias) acc[i][v] = add(acc[i][v], bias);
        float* to = base + i * s.y.channel + columns.offset[first + v];
        const int64_t left = columns.left[first + v];
        if constexpr (PAIR) {
          const bool second = left + 1 < n;
          second ? store_halves(to, to + s.y.image, acc[i][v]) : store_half(to, acc[i][v]);
        } else {
          store_part(to, acc[i][v], left);
        }
        total = add(total, acc[i][v]), squares = fma(acc[i][v], acc[i][v], squares);
      }
      if (s.sums) add_to(row_sums + (row + i) * kLanes, total), add_to(row_sums + (s.N + row + i) * kLanes, squares);
    }
  }

  void backward(int64_t chunk) {
    const bool weights = s.d_pointwise;
    float* d_weights = weights ? s.d_pointwise + chunk * s.N * s.C : nullptr;
    float* d_windows = weights && K > 1 ? s.d_depthwise + chunk * s.C * K * K : nullptr;
    double* sums = s.gx_sums ? s.gx_sums + chunk * 2 * s.C : nullptr;
    for (int64_t i = 0; weights && i < s.N * s.C; ++i) d_weights[i] = 0;
    for (int64_t i = 0; d_windows && i < s.C * K * K; ++i) d_windows[i] = 0;
    for (int64_t i = 0; sums && i < 2 * s.C; ++i) sums[i] = 0;
    every_group(chunk, [&](int64_t b, int64_t n) {
      for (int64_t c = 0; c < s.N; ++c)
        for (int64_t i = 0; i < n; i += kUnit) put_dy(b + i, b + n, c, dy + c * group.ld + i * group.plane);
      product_of_planes(s.pointwise_t, s.C, s.N, dy, group.ld, columns_of(n),
                        [&](int64_t row, int64_t col, auto& acc) { put_d_depthwise(row, col, acc); });
      for (int64_t c = 0; c < s.C; ++c) backward_channel(b, n, c, d_windows ? d_windows + c * K * K : nullptr, sums);
      if (weights) dots_of_planes(dy, s.N, depthwise, s.C, group.ld, columns_of(n), d_weights);
    });
  }
  FTSO_ALWAYS_INLINE void put_dy(int64_t b, int64_t end, int64_t c, float* out) const {
    const float *g = s.g.at + b * s.g.image + c * s.g.channel, *y = s.y.at + b * s.y.image + c * s.y.channel;
    const Vec al = set1(s.al[c]), be = set1(s.be[c]), ga = set1(s.ga[c]), center = set1(-s.center[c]);
    if constexpr (PAIR) {
      const bool second = both(b, end);
      for (int64_t r = 0; r < 8; ++r) {
        const Vec hat = add(row_of(s.y, b, c, r, second), center);
        store(out + 16 * r, there(second, fma(row_of(s.g, b, c, r, second), al, fma(hat, be, ga))));
      }
      return;
    }
    int64_t p = 0;
    for (; p + kLanes <= Q; p += kLanes) store(out + p, fma(load(g + p), al, fma(add(load(y + p), center), be, ga)));
    if (p < Q) {
      const Tail t = tail(Q - p);
      store(out + p, keep(t, fma(load(g + p, t), al, fma(add(load(y + p, t), center), be, ga))));
    }
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE void put_d_depthwise(int64_t row, int64_t col, Vec (&acc)[MR][NV]) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(d_depthwise + (row + i) * group.ld + col + v * kLanes, acc[i][v]);
  }
  void backward_channel(int64_t b, int64_t n, int64_t c, float* d_windows, double* sums) {
    Vec acc[K * K];
    for (int t = 0; t < K * K; ++t) acc[t] = zero();
    for (int64_t i = 0; i < n; i += kUnit) {
      const float* d = d_depthwise + c * group.ld + i * group.plane;
      if (s.d_pointwise) {
        if constexpr (K > 1) put_image(b + i, b + n, c);
        put_depthwise(b + i, c, depthwise + c * group.ld + i * group.plane);
        if constexpr (K > 1) windows_gradient<K, S, D>(image, d, s.Ho, PAIR ? 16 : s.Wo, acc);
      }
      if (s.gx.at) input_gradient(b + i, b + n, c, d, sums);
    }
    if (d_windows)
      for (int t = 0; t < K * K; ++t) d_windows[t] += sum(acc[t]);
  }
  void input_gradient(int64_t b, int64_t end, int64_t c, const float* d, double* sums) {
    const float* from = x(b, c);
    float* to = s.gx.at + b * s.gx.image + c * s.gx.channel;
    Vec total = zero(), dots = zero();
    int64_t run = 0;
    const auto flush = [&] {
      sums[c] += sum(total), sums[s.C + c] += sum(dots);
      total = dots = zero(), run = 0;
    };
    const bool second = both(b, end);
    const auto put = [&](int64_t r, int64_t col, Vec v) {
      const int64_t at = r * s.W + col, left = s.W - col;
      const Vec pixel = PAIR ? row_of(s.x, b, c, r, second) : load_part(from + at, left);
      v = where_positive(normalised(c, pixel), v);
      if (PAIR)
        v = there(second, v);
      else if (left < kLanes)
        v = keep(tail(left), v);
      if (sums) {
        if (++run > kRun) flush();
        total = add(total, v);
        dots = fma(v, add(pixel, set1(-s.center_x[c])), dots);
      }
      if (PAIR)
        put_row(s.gx, b, c, r, second, s.add ? add(v, row_of(s.gx, b, c, r, second)) : v);
      else
        store_part(to + at, s.add ? add(v, load_part(to + at, left)) : v, left);
    };
    if constexpr (K > 1) {
      if constexpr (PAIR)
        d_image.put_rows(8, [&](int64_t r) { return load(d + 16 * r); });
      else
        d_image.put(d, s.Ho, s.Wo, 0, [](Vec v) { return v; });
      const float* w = s.depthwise + c * K * K;
      if constexpr (S == 2) {
        spread<K, D>(d_image, w, s.H, s.W, put);
      } else {
        float turned[K * K];
        for (int t = 0; t < K * K; ++t) turned[t] = w[K * K - 1 - t];
        windows<K, 1, D>(d_image, turned, s.H, PAIR ? 16 : s.W, put);
      }
    } else if constexpr (S == 1) {
      for (int64_t p = 0; p < Q; p += kLanes) put_flat(from, to, d, p, c);
    } else {
      const LanePairs low = lane_pairs(kLow[0], kLow[1]), high = lane_pairs(kHigh[0], kHigh[1]);
      for (int64_t r = 0; r < s.Ho; ++r)
        for (int64_t col = 0; col < s.Wo; col += kLanes) {
          const Vec v = load_part(d + r * s.Wo + col, s.Wo - col);
          put_picked(from, to, 2 * r * s.W + 2 * col, 2 * (s.Wo - col) - 1, c, pick(low, v, zero()));
          if (s.Wo - col > kLanes / 2)
            put_picked(from, to, 2 * r * s.W + 2 * col + kLanes, 2 * (s.Wo - col) - 1 - kLanes, c,
                       pick(high, v, zero()));
        }
    }
    if (sums) flush();
  }
  FTSO_ALWAYS_INLINE void put_flat(const float* from, float* to, const float* d, int64_t p, int64_t c) const {
    const Vec v = where_positive(normalised(c, load_part(from + p, Q - p)), load_part(d + p, Q - p));
    store_part(to + p, s.add ? add(v, load_part(to + p, Q - p)) : v, Q - p);
  }
  FTSO_ALWAYS_INLINE void put_picked(const float* from, float* to, int64_t at, int64_t left, int64_t c, Vec v) const {
    v = where_positive(normalised(c, load_part(from + at, left)), v);
    store_part(to + at, add(v, load_part(to + at, left)), left);
  }
};

// Inference: a group goes through both blocks before the next; `second` reads what `first` leaves in scratch.
template <int K, int S, bool PAIR>
void run_chain(BlockStep first, BlockStep second, int64_t chunk, float* scratch) {
  float* between = scratch + rounded_up(block_scratch(first), kLanes) + rounded_up(block_scratch(second), kLanes);
  Block<K, S, 1, PAIR && S == 1> one(first, scratch);
  Block<K, 1, 1, PAIR> two(second, scratch + rounded_up(block_scratch(first), kLanes));
  one.every_group(chunk, [&](int64_t b, int64_t n) {
    first.y.at = between - b * first.y.image, second.x = first.y;
    one.forward_group(b, n);
    for (int64_t i = 0; i < n; i += two.group.images)
      two.forward_group(b + i, n - i < two.group.images ? n - i : two.group.images);
  });
}

template <int K, int S, int D, bool PAIR = false>
void run_one(const BlockStep& s, int64_t chunk, float* scratch) {
  Block<K, S, D, PAIR> block(s, scratch);
  block.every_group(chunk, [&](int64_t b, int64_t n) { block.forward_group(b, n); });
}

template <int K, int S, int D, bool PAIR = false>
void run(const BlockStep& s, int64_t chunk, bool backward, float* scratch) {
  Block<K, S, D, PAIR> block(s, scratch);
  backward ? block.backward(chunk) : block.forward(chunk);
}

bool pairs(const BlockStep& s) { return s.K > 1 && s.S == 1 && s.H == 8 && s.W == 8; }
int kind_of(const BlockStep& s) {
  if (pairs(s)) return 10 + (s.K == 3 ? 0 : 2) + s.D - 1;
  return s.K == 1 ? s.S - 1 : (s.K == 3 ? 2 : 6) + 2 * (s.D - 1) + s.S - 1;
}

void run_any(const BlockStep& s, int64_t chunk, bool backward, float* scratch) {
  constexpr void (*kRuns[])(const BlockStep&, int64_t, bool, float*) = {
      run<1, 1, 1>,       run<1, 2, 1>,       run<3, 1, 1>,       run<3, 2, 1>,      run<3, 1, 2>,
      run<3, 2, 2>,       run<5, 1, 1>,       run<5, 2, 1>,       run<5, 1, 2>,      run<5, 2, 2>,
      run<3, 1, 1, true>, run<3, 1, 2, true>, run<5, 1, 1, true>, run<5, 1, 2, true>};
  kRuns[kind_of(s)](s, chunk, backward, scratch);
}

}  // namespace

const char* block_infer(const BlockStep& s, int64_t chunk, float* scratch) {
  constexpr void (*kRuns[])(const BlockStep&, int64_t, float*) = {
      run_one<1, 1, 1>,       run_one<1, 2, 1>,       run_one<3, 1, 1>,       run_one<3, 2, 1>,      run_one<3, 1, 2>,
      run_one<3, 2, 2>,       run_one<5, 1, 1>,       run_one<5, 2, 1>,       run_one<5, 1, 2>,      run_one<5, 2, 2>,
      run_one<3, 1, 1, true>, run_one<3, 1, 2, true>, run_one<5, 1, 1, true>, run_one<5, 1, 2, true>};
  kRuns[kind_of(s)](s, chunk, scratch);
  return compiled_isa;
}

const char* chain_infer(const BlockStep& first, const BlockStep& second, int64_t chunk, float* scratch) {
  constexpr void (*kRuns[])(BlockStep, BlockStep, int64_t, float*) = {
      run_chain<3, 1, false>, run_chain<3, 1, true>, run_chain<3, 2, false>, run_chain<3, 2, true>,
      run_chain<5, 1, false>, run_chain<5, 1, true>, run_chain<5, 2, false>, run_chain<5, 2, true>};
  const auto run = kRuns[(first.K == 3 ? 0 : 4) + 2 * (first.S - 1) + pairs(second)];
  run(first, second, chunk, scratch);
  return compiled_isa;
}

const char* block_fwd(const BlockStep& s, int64_t chunk, float* scratch) {
  run_any(s, chunk, false, scratch);
  return compiled_isa;
}

const char* block_bwd(const BlockStep& s, int64_t chunk, float* scratch) {
  run_any(s, chunk, true, scratch);
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
