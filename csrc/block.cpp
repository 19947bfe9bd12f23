// A separable block between two batch norms: normalise, ReLU, depthwise, pointwise, statistics; and its gradients.
//
// Images are treated in groups whose depthwise results stay in the second level cache: they never reach memory, and
// backward they are computed again. Columns of the products are pixels, rows are channels.
#include "columns.h"
#include "ftso.h"

namespace ftso::FTSO_ISA {
namespace {

// Vectors that a lane adds up in float before the sum goes on in double: long sums of small gradients lose digits.
constexpr int64_t kRun = 16;

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
  Outputs<PAIR> outputs;
  float *depthwise, *d_depthwise, *dy;  // [C], [C], [N] rows of group.ld
  float* tap_sums;                      // [K * K] vectors

  Block(const BlockStep& step, float* scratch)
      : s(step), HW(s.H * s.W), Q(s.Ho * s.Wo), group(s.B, s.C > s.N ? s.C : s.N, Q), outputs{step,    {},      {},
                                                                                              nullptr, nullptr, true} {
    constexpr int P = D * (K / 2);
    if constexpr (K > 1) {
      scratch = Image<S, PAIR>::carve(image, scratch, s.H, s.W, P, 0);
      scratch = Image<1, PAIR>::carve(d_image, scratch, s.Ho, s.Wo, P, 0);
    }
    scratch = Columns::carve(outputs.columns, scratch, group, Q, s.y.image, PAIR);
    if (s.plus.at) scratch = Columns::carve(outputs.columns_of_plus, scratch, group, Q, s.plus.image, PAIR);
    outputs.row_sums = scratch, scratch += 2 * s.N * kLanes;
    outputs.pivots = scratch, scratch += rounded_up(s.N, kLanes);
    tap_sums = scratch, scratch += K * K * kLanes;
    depthwise = scratch, scratch += s.C * group.ld;
    d_depthwise = scratch, scratch += s.C * group.ld;
    dy = scratch;
    if (Q % kLanes)  // what lies between images stays zero
      for (float* p = depthwise; p < dy; ++p) *p = 0;
  }
  // Whether the unit from image b on has a second image.
  static bool both(Images g, int64_t b) { return PAIR && b + 1 < g.b + g.n; }
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
  // Activations of channel c of image b.
  FTSO_APART void put_image(Images g, int64_t b, int64_t c) const {
    const Normalise normal = normalise(c);
    const auto relu = [=](Vec v) { return rectified(normal(v)); };
    const float* from = x(b, c);
    const int64_t next = ahead_of(s.x, b, g, kUnit);
    if constexpr (PAIR) {
      const bool second = both(g, b);
      const int64_t other = second ? s.x.image : 0;
      image.put_rows(8, [=](int64_t r) {
        prefetch(from + next + 8 * r), prefetch(from + other + next + 8 * r);
        return Pair::there(second, relu(Pair::row(from, other, r, second)));
      });
      return;
    }
    image.put(from, s.H, s.W, 0, next, relu);
  }
  FTSO_APART void put_depthwise(Images g, int64_t b, int64_t c, float* out) const {
    const Normalise normal = normalise(c);
    const auto relu = [=](Vec v) { return rectified(normal(v)); };
    const float* from = x(b, c);
    const int64_t Wo = s.Wo, n = Q, next = ahead_of(s.x, b, g, kUnit);
    if constexpr (PAIR) {
      windows<K, S, D>(image, s.depthwise + c * K * K, 8, 16,
                       [=](int64_t r, int64_t, Vec v) { store(out + 16 * r, v); });
    } else if constexpr (K > 1) {
      windows<K, S, D>(image, s.depthwise + c * K * K, s.Ho, Wo,
                       [=](int64_t r, int64_t col, Vec v) { store_part(out + r * Wo + col, v, Wo - col); });
    } else if constexpr (S == 1) {
      for (int64_t p = 0; p < n; p += kLanes) {
        prefetch(from + p + next);
        store_part(out + p, relu(load_part(from + p, n - p)), n - p);
      }
    } else {
      const int64_t W = s.W, Ho = s.Ho;
      for (int64_t r = 0; r < Ho; ++r)
        split_row(from + 2 * r * W, 2 * Wo - 1,
                  [=](int64_t col, Vec even, Vec) { store_part(out + r * Wo + col, relu(even), Wo - col); });
    }
  }

  // Visits the chunk's groups.
  template <typename Visit>
  FTSO_ALWAYS_INLINE void every_group(int64_t chunk, Visit visit) const {
    for (int64_t b = s.B * chunk / kChunks, end = s.B * (chunk + 1) / kChunks; b < end; b += group.images)
      visit(Images{b, end - b < group.images ? end - b : group.images});
  }

  void forward(int64_t chunk) {
    double *sums = s.sums + chunk * 2 * s.ld_sums, *squares = sums + s.ld_sums;
    for (int64_t m = 0; m < s.N; ++m) sums[m] = squares[m] = 0;
    outputs.no_pivots = true;
    every_group(chunk, [&](Images g) {
      outputs.clear();
      forward_group(g);
      outputs.flush(g.n, sums, squares);
      outputs.no_pivots = false;
    });
  }
  FTSO_APART void forward_group(Images g) const {
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t i = 0; i < g.n; i += kUnit) {
        if constexpr (K > 1) put_image(g, g.b + i, c);
        put_depthwise(g, g.b + i, c, depthwise + c * group.ld + i * group.plane);
      }
    outputs.put(depthwise, group.ld, columns_of(g.n), g);
  }

  void backward(int64_t chunk) {
    const bool weights = s.d_pointwise;
    float* d_weights = weights ? s.d_pointwise + chunk * s.N * s.C : nullptr;
    float* d_windows = weights && K > 1 ? s.d_depthwise + chunk * s.C * K * K : nullptr;
    double* sums = s.gx_sums ? s.gx_sums + chunk * 2 * s.C : nullptr;
    for (int64_t i = 0; weights && i < s.N * s.C; ++i) d_weights[i] = 0;
    for (int64_t i = 0; d_windows && i < s.C * K * K; ++i) d_windows[i] = 0;
    for (int64_t i = 0; sums && i < 2 * s.C; ++i) sums[i] = 0;
    every_group(chunk, [&](Images g) {
      for (int64_t c = 0; c < s.N; ++c)
        for (int64_t i = 0; i < g.n; i += kUnit) put_dy<PAIR>(s, g, g.b + i, c, dy + c * group.ld + i * group.plane);
      product_to_rows(s.pointwise_t, s.C, s.N, dy, columns_of(g.n), d_depthwise, group.ld);
      for (int64_t c = 0; c < s.C; ++c) backward_channel(g, c, d_windows ? d_windows + c * K * K : nullptr, sums);
      if (weights) dots_of_planes(dy, s.N, depthwise, s.C, group.ld, columns_of(g.n), d_weights);
    });
  }
  void backward_channel(Images g, int64_t c, float* d_windows, double* sums) const {
    for (int t = 0; t < K * K; ++t) store(tap_sums + t * kLanes, zero());
    for (int64_t i = 0; i < g.n; i += kUnit) {
      const float* d = d_depthwise + c * group.ld + i * group.plane;
      if (s.d_pointwise) {
        if constexpr (K > 1) put_image(g, g.b + i, c);
        put_depthwise(g, g.b + i, c, depthwise + c * group.ld + i * group.plane);
        if constexpr (K > 1) windows_gradient<K, S, D>(image, d, s.Ho, PAIR ? 16 : s.Wo, tap_sums);
      }
      if (s.gx.at) input_gradient(g, g.b + i, c, d, sums);
    }
    for (int t = 0; t < K * K && d_windows; ++t) d_windows[t] += sum(load(tap_sums + t * kLanes));
  }
  void input_gradient(Images g, int64_t b, int64_t c, const float* d, double* sums) const {
    const float* from = x(b, c);
    float* to = s.gx.at + b * s.gx.image + c * s.gx.channel;
    const int64_t W = s.W, other = s.x.image, other_to = s.gx.image;
    const int64_t next_x = ahead_of(s.x, b, g, kUnit), next_gx = ahead_of(s.gx, b, g, kUnit);
    const bool second = both(g, b), adds = s.add;
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
      prefetch(from + at + next_x), prefetch(to + at + next_gx);
      const Vec pixel = PAIR ? Pair::row(from, other, r, second) : load_part(from + at, left);
      v = where_positive(normal(pixel), v);
      if (PAIR)
        v = Pair::there(second, v);
      else if (left < kLanes)
        v = keep(tail(left), v);
      if (sums) {
        if (++run > kRun) flush();
        total = add(total, v);
        dots = fma(v, add(pixel, center), dots);
      }
      if (PAIR)
        Pair::put_row(to, other_to, r, second, adds ? add(v, Pair::row(to, other_to, r, second)) : v);
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
        prefetch(from + p + next_x), prefetch(to + p + next_gx);
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
  one.every_group(chunk, [&](Images g) {
    first.y.at = between - g.b * first.y.image, second.x = first.y;
    one.forward_group(g);
    for (int64_t i = 0; i < g.n; i += two.group.images)
      two.forward_group({g.b + i, g.n - i < two.group.images ? g.n - i : two.group.images});
  });
}

template <int K, int S, int D, bool PAIR = false>
void run_one(const BlockStep& s, int64_t chunk, float* scratch) {
  Block<K, S, D, PAIR> block(s, scratch);
  block.every_group(chunk, [&](Images g) { block.forward_group(g); });
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
