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

float mean_of(const float* y, int64_t n) {
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += y[i];
  return total / static_cast<float>(n);
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
  float* tap_sums;                      // [K * K] vectors
  float* pivots;                        // [N]: the sums are of y - pivot, or a channel that hardly varies loses digits
  bool no_pivots;
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
    pivots = scratch, scratch += rounded_up(s.N, kLanes);
    tap_sums = scratch, scratch += K * K * kLanes;
    depthwise = scratch, scratch += s.C * group.ld;
    d_depthwise = scratch, scratch += s.C * group.ld;
    dy = scratch;
    if (Q % kLanes)  // what lies between images stays zero
      for (float* p = depthwise; p < dy; ++p) *p = 0;
  }
  // Whether the unit from image b on, in a group that ends before `end`, has a second image.
  static bool both(int64_t b, int64_t end) { return PAIR && b + 1 < end; }
  // Row r of a pair of planes, the second one `image` floats behind the first.
  FTSO_ALWAYS_INLINE static Vec row_of(const float* plane, int64_t image, int64_t r, bool second) {
    return second ? load_halves(plane + 8 * r, plane + 8 * r + image) : load_half(plane + 8 * r);
  }
  FTSO_ALWAYS_INLINE static void put_row(float* plane, int64_t image, int64_t r, bool second, Vec v) {
    second ? store_halves(plane + 8 * r, plane + 8 * r + image, v) : store_half(plane + 8 * r, v);
  }
  FTSO_ALWAYS_INLINE static Vec there(bool second, Vec v) { return second ? v : keep(tail(8), v); }
  int64_t columns_of(int64_t n) const { return (n + kUnit - 1) / kUnit * kUnit * group.plane; }
  const float* x(int64_t b, int64_t c) const { return s.x.at + b * s.x.image + c * s.x.channel; }

  // A store may change whatever a pointer leads to, as far as the compiler knows: what loops need stands in locals.
  struct Normalise {
    Vec scale, shift;
    FTSO_ALWAYS_INLINE Vec operator()(Vec v) const { return fma(v, scale, shift); }
  };
  FTSO_ALWAYS_INLINE Normalise normalise(int64_t c) const {
    return {set1(s.scale ? s.scale[c] : 1), set1(s.scale ? s.shift[c] : 0)};
  }
  // How far from channel c of image b, which is followed by others before `end`, the plane lies that is wanted next:
  // the same channel of the next image, then the next channel of the group's first.
  int64_t ahead(const Planes& p, int64_t b, int64_t first, int64_t end) const {
    return b + kUnit < end ? kUnit * p.image : p.channel - (b - first) * p.image;
  }
  // Activations of channel c of image b, in a group of n images from `first` on.
  FTSO_ALWAYS_INLINE void put_image(int64_t b, int64_t first, int64_t n, int64_t c) const {
    const Normalise normal = normalise(c);
    const auto relu = [=](Vec v) { return max(zero(), normal(v)); };
    const float* from = x(b, c);
    const int64_t next = ahead(s.x, b, first, first + n);
    if constexpr (PAIR) {
      const bool second = both(b, first + n);
      const int64_t other = second ? s.x.image : 0;
      image.put_rows(8, [=](int64_t r) {
        prefetch(from + next + 8 * r), prefetch(from + other + next + 8 * r);
        return there(second, relu(row_of(from, other, r, second)));
      });
      return;
    }
    image.put(from, s.H, s.W, 0, next, relu);
  }
  FTSO_ALWAYS_INLINE void put_depthwise(int64_t b, int64_t c, float* out) const {
    const Normalise normal = normalise(c);
    const auto relu = [=](Vec v) { return max(zero(), normal(v)); };
    const float* from = x(b, c);
    const int64_t Wo = s.Wo, n = Q;
    if constexpr (PAIR) {
      windows<K, S, D>(image, s.depthwise + c * K * K, 8, 16,
                       [=](int64_t r, int64_t, Vec v) { store(out + 16 * r, v); });
    } else if constexpr (K > 1) {
      windows<K, S, D>(image, s.depthwise + c * K * K, s.Ho, Wo,
                       [=](int64_t r, int64_t col, Vec v) { store_part(out + r * Wo + col, v, Wo - col); });
    } else if constexpr (S == 1) {
      for (int64_t p = 0; p < n; p += kLanes) store_part(out + p, relu(load_part(from + p, n - p)), n - p);
    } else {
      const int64_t W = s.W, Ho = s.Ho;
      for (int64_t r = 0; r < Ho; ++r)
        split_row(from + 2 * r * W, 2 * Wo - 1,
                  [=](int64_t col, Vec even, Vec) { store_part(out + r * Wo + col, relu(even), Wo - col); });
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
    no_pivots = true;
    every_group(chunk, [&](int64_t b, int64_t n) {
      for (int64_t i = 0; i < 2 * s.N * kLanes; i += kLanes) store(row_sums + i, zero());
      forward_group(b, n);
      for (int64_t m = 0; m < s.N; ++m) {
        const double pivot = pivots[m], pixels = n * Q, d = sum(load(row_sums + m * kLanes));
        sums[m] += d + pixels * pivot;
        squares[m] += sum(load(row_sums + (s.N + m) * kLanes)) + pivot * (2 * d + pixels * pivot);
      }
      no_pivots = false;
    });
  }
  void forward_group(int64_t b, int64_t n) {
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t i = 0; i < n; i += kUnit) {
        if constexpr (K > 1) put_image(b + i, b, n, c);
        put_depthwise(b + i, c, depthwise + c * group.ld + i * group.plane);
      }
    product_of_planes(s.pointwise, s.N, s.C, depthwise, group.ld, columns_of(n),
                      [&](int64_t row, int64_t col, auto& acc) { put_y(b, n, row, col, acc); });
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE void put_y(int64_t b, int64_t n, int64_t row, int64_t col, Vec (&acc)[MR][NV]) {
    const int64_t channel = s.y.channel, image_floats = s.y.image, first = col / kLanes;
    float* base = s.y.at + b * image_floats + row * channel;
    int64_t offset[NV], left[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) offset[v] = columns.offset[first + v], left[v] = columns.left[first + v];
    const float* biases = s.bias;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec bias = biases ? set1(biases[row + i]) : zero();
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if (biases) acc[i][v] = add(acc[i][v], bias);
        float* to = base + i * channel + offset[v];
        if constexpr (PAIR)
          left[v] + 1 < n ? store_halves(to, to + image_floats, acc[i][v]) : store_half(to, acc[i][v]);
        else
          store_part(to, acc[i][v], left[v]);
      }
    }
    if (!s.sums) return;
    constexpr int64_t kStored = NV * kLanes / kUnit;
    for (int i = 0; i < MR && first == 0 && no_pivots; ++i)
      pivots[row + i] = mean_of(base + i * channel, Q < kStored ? Q : kStored);
    add_up<MR, NV>(n, row, left, acc);
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE void add_up(int64_t n, int64_t row, const int64_t (&left)[NV], const Vec (&y)[MR][NV]) {
    float *totals = row_sums + row * kLanes, *square_totals = totals + s.N * kLanes;
    const float* subtract = pivots + row;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec pivot = set1(-subtract[i]);
      Vec total = zero(), squares = zero();
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        Vec d = add(y[i][v], pivot);
        if constexpr (PAIR)
          d = there(left[v] + 1 < n, d);
        else if (left[v] < kLanes)
          d = keep(tail(left[v]), d);
        total = add(total, d), squares = fma(d, d, squares);
      }
      add_to(totals + i * kLanes, total), add_to(square_totals + i * kLanes, squares);
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
        for (int64_t i = 0; i < n; i += kUnit) put_dy(b + i, b, n, c, dy + c * group.ld + i * group.plane);
      product_of_planes(s.pointwise_t, s.C, s.N, dy, group.ld, columns_of(n),
                        [&](int64_t row, int64_t col, auto& acc) { put_d_depthwise(row, col, acc); });
      for (int64_t c = 0; c < s.C; ++c) backward_channel(b, n, c, d_windows ? d_windows + c * K * K : nullptr, sums);
      if (weights) dots_of_planes(dy, s.N, depthwise, s.C, group.ld, columns_of(n), d_weights);
    });
  }
  FTSO_ALWAYS_INLINE void put_dy(int64_t b, int64_t first, int64_t images, int64_t c, float* out) const {
    const float *g = s.g.at + b * s.g.image + c * s.g.channel, *y = s.y.at + b * s.y.image + c * s.y.channel;
    const Vec al = set1(s.al[c]), be = set1(s.be[c]), ga = set1(s.ga[c]), center = set1(-s.center[c]);
    const int64_t next_g = ahead(s.g, b, first, first + images), next_y = ahead(s.y, b, first, first + images);
    if constexpr (PAIR) {
      const bool second = both(b, first + images);
      const int64_t other_g = second ? s.g.image : 0, other_y = second ? s.y.image : 0;
      for (int64_t r = 0; r < 8; ++r) {
        prefetch(g + 8 * r + next_g), prefetch(y + 8 * r + next_y);
        prefetch(g + other_g + 8 * r + next_g), prefetch(y + other_y + 8 * r + next_y);
        const Vec hat = add(row_of(y, other_y, r, second), center);
        store(out + 16 * r, there(second, fma(row_of(g, other_g, r, second), al, fma(hat, be, ga))));
      }
      return;
    }
    const int64_t n = Q;
    int64_t p = 0;
    for (; p + kLanes <= n; p += kLanes) {
      prefetch(g + p + next_g), prefetch(y + p + next_y);
      store(out + p, fma(load(g + p), al, fma(add(load(y + p), center), be, ga)));
    }
    if (p < n) {
      const Tail t = tail(n - p);
      store(out + p, keep(t, fma(load(g + p, t), al, fma(add(load(y + p, t), center), be, ga))));
    }
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE void put_d_depthwise(int64_t row, int64_t col, Vec (&acc)[MR][NV]) {
    const int64_t ld = group.ld;
    float* to = d_depthwise + row * ld + col;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(to + i * ld + v * kLanes, acc[i][v]);
  }
  void backward_channel(int64_t b, int64_t n, int64_t c, float* d_windows, double* sums) {
    for (int t = 0; t < K * K; ++t) store(tap_sums + t * kLanes, zero());
    for (int64_t i = 0; i < n; i += kUnit) {
      const float* d = d_depthwise + c * group.ld + i * group.plane;
      if (s.d_pointwise) {
        if constexpr (K > 1) put_image(b + i, b, n, c);
        put_depthwise(b + i, c, depthwise + c * group.ld + i * group.plane);
        if constexpr (K > 1) windows_gradient<K, S, D>(image, d, s.Ho, PAIR ? 16 : s.Wo, tap_sums);
      }
      if (s.gx.at) input_gradient(b + i, b + n, c, d, sums);
    }
    for (int t = 0; t < K * K && d_windows; ++t) d_windows[t] += sum(load(tap_sums + t * kLanes));
  }
  void input_gradient(int64_t b, int64_t end, int64_t c, const float* d, double* sums) {
    const float* from = x(b, c);
    float* to = s.gx.at + b * s.gx.image + c * s.gx.channel;
    const int64_t W = s.W, other = s.x.image, other_to = s.gx.image;
    const bool second = both(b, end), adds = s.add;
    const Normalise normal = normalise(c);
    const Vec center = set1(sums ? -s.center_x[c] : 0);
    Vec total = zero(), dots = zero();
    int64_t run = 0;
    const auto flush = [&] {
      sums[c] += sum(total), sums[s.C + c] += sum(dots);
      total = dots = zero(), run = 0;
    };
    const auto put = [&](int64_t r, int64_t col, Vec v) {
      const int64_t at = r * W + col, left = W - col;
      const Vec pixel = PAIR ? row_of(from, other, r, second) : load_part(from + at, left);
      v = where_positive(normal(pixel), v);
      if (PAIR)
        v = there(second, v);
      else if (left < kLanes)
        v = keep(tail(left), v);
      if (sums) {
        if (++run > kRun) flush();
        total = add(total, v);
        dots = fma(v, add(pixel, center), dots);
      }
      if (PAIR)
        put_row(to, other_to, r, second, adds ? add(v, row_of(to, other_to, r, second)) : v);
      else
        store_part(to + at, adds ? add(v, load_part(to + at, left)) : v, left);
    };
    if constexpr (K > 1) {
      if constexpr (PAIR)
        d_image.put_rows(8, [&](int64_t r) { return load(d + 16 * r); });
      else
        d_image.put(d, s.Ho, s.Wo, 0, 0, [](Vec v) { return v; });
      const float* w = s.depthwise + c * K * K;
      if constexpr (S == 2) {
        spread<K, D>(d_image, w, s.H, s.W, put);
      } else {
        float turned[K * K];
        for (int t = 0; t < K * K; ++t) turned[t] = w[K * K - 1 - t];
        windows<K, 1, D>(d_image, turned, s.H, PAIR ? 16 : s.W, put);
      }
    } else if constexpr (S == 1) {
      for (int64_t p = 0, n = Q; p < n; p += kLanes) {
        const Vec v = where_positive(normal(load_part(from + p, n - p)), load_part(d + p, n - p));
        store_part(to + p, adds ? add(v, load_part(to + p, n - p)) : v, n - p);
      }
    } else {
      const LanePairs low = lane_pairs(kLow[0], kLow[1]), high = lane_pairs(kHigh[0], kHigh[1]);
      const auto add_picked = [=](int64_t at, int64_t left, Vec v) {
        v = where_positive(normal(load_part(from + at, left)), v);
        store_part(to + at, add(v, load_part(to + at, left)), left);
      };
      for (int64_t r = 0, Ho = s.Ho, Wo = s.Wo; r < Ho; ++r)
        for (int64_t col = 0; col < Wo; col += kLanes) {
          const Vec v = load_part(d + r * Wo + col, Wo - col);
          const int64_t at = 2 * r * W + 2 * col, left = 2 * (Wo - col) - 1;
          add_picked(at, left, pick(low, v, zero()));
          if (left > kLanes) add_picked(at + kLanes, left - kLanes, pick(high, v, zero()));
        }
    }
    if (sums) flush();
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
