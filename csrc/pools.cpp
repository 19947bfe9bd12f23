// Maximum and mean over 3x3 windows in one pass, raw, with the sums of the batch norms behind them; their gradients.
#include "ftso.h"
#include "stencil.h"

namespace ftso::FTSO_ISA {
namespace {

constexpr float kLowest = -__builtin_inff();
constexpr float kOnes[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};

// Windows of three rows, column by column: of(offset) makes of a row's pixels what put(r, c, above, here, below) joins,
// once for all windows that the row is in.
template <int S, typename Of, typename Put>
FTSO_INLINE void three_rows(int64_t ld, int64_t Ho, int64_t Wo, Of of, Put put) {
  for (int64_t c = 0; c < Wo; c += kLanes) {
    auto above = of(c), here = of(ld + c);
    for (int64_t r = 0; r < Ho; ++r) {
      if (S == 2 && r > 0) here = of((2 * r + 1) * ld + c);
      const auto below = of((S * r + 2) * ld + c);
      put(r, c, above, here, below);
      above = S == 1 ? here : below, here = below;
    }
  }
}

// Per output vector its maximum and the tap (0..8, in the order of rows) that has it first: put(r, c, max, tap).
template <int S, typename Put>
FTSO_INLINE void maxima(const Image<S>& image, int64_t Ho, int64_t Wo, Put put) {
  struct Best {
    Vec value, tap;
    FTSO_ALWAYS_INLINE void meet(Vec v, Vec t) {
      const Vec higher = max(value, v);
      tap = where_equal(higher, value, tap, t), value = higher;
    }
  };
  const auto of_row = [&](int64_t offset) FTSO_LAMBDA {
    Best best{image.template tap<3, 1, 0>(offset), zero()};
    best.meet(image.template tap<3, 1, 1>(offset), set1(1));
    best.meet(image.template tap<3, 1, 2>(offset), set1(2));
    return best;
  };
  three_rows<S>(image.ld, Ho, Wo, of_row, [&](int64_t r, int64_t c, Best best, const Best& here, const Best& below) {
    best.meet(here.value, add(here.tap, set1(3)));
    best.meet(below.value, add(below.tap, set1(6)));
    put(r, c, best.value, best.tap);
  });
}

// The sums over 3x3: put(r, c, sum).
template <int S, typename Put>
FTSO_INLINE void sums_of_nine(const Image<S>& image, int64_t Ho, int64_t Wo, Put put) {
  const auto of_row = [&](int64_t offset) FTSO_LAMBDA {
    return add(add(image.template tap<3, 1, 0>(offset), image.template tap<3, 1, 1>(offset)),
               image.template tap<3, 1, 2>(offset));
  };
  three_rows<S>(image.ld, Ho, Wo, of_row,
                [&](int64_t r, int64_t c, Vec above, Vec here, Vec below) { put(r, c, add(add(above, here), below)); });
}

template <int S>
struct Pools {
  const PoolStep& s;
  Image<S> low, zeros;  // of x, with the lowest number and with zero around
  Image<1> d_mean, d_max, taps;
  const int64_t Q;

  Pools(const PoolStep& step, float* scratch) : s(step), Q(s.Ho * s.Wo) {
    scratch = Image<S>::carve(low, scratch, s.H, s.W, 1, kLowest);
    scratch = Image<S>::carve(zeros, scratch, s.H, s.W, 1, 0);
    scratch = Image<1>::carve(d_mean, scratch, s.Ho, s.Wo, 1, 0);
    scratch = Image<1>::carve(d_max, scratch, s.Ho, s.Wo, 1, 0);
    Image<1>::carve(taps, scratch, s.Ho, s.Wo, 1, -1);
  }
  template <typename Visit>
  void every_plane(int64_t chunk, Visit visit) const {
    for (int64_t b = s.B * chunk / kChunks; b < s.B * (chunk + 1) / kChunks; ++b)
      for (int64_t c = 0; c < s.C; ++c) visit(b, c, s.x.at + b * s.x.image + c * s.x.channel);
  }
  static float* at(const Planes& p, int64_t b, int64_t c) { return p.at + b * p.image + c * p.channel; }

  // Writes the vectors of a plane and adds it to its channel's sums. Added up in float is what is left after a value of
  // the plane itself: maxima have means far above their deviations, and the digits of the variance would be lost.
  struct Sums {
    float pivot = 0;
    bool begun = false;
    Vec total = zero(), squares = zero();
    FTSO_ALWAYS_INLINE void put(float* to, Vec v, int64_t left) {
      store_part(to, v, left);
      if (!begun)
        begun = true, pivot = left < kLanes ? sum(keep(tail(left), v)) / static_cast<float>(left) : sum(v) / kLanes;
      v = add(v, set1(-pivot));
      if (left < kLanes) v = keep(tail(left), v);
      total = add(total, v), squares = fma(v, v, squares);
    }
    void flush(double* sums, int64_t C, int64_t c, int64_t Q) const {
      const double p = pivot, s = sum(total);
      sums[c] += s + p * Q, sums[C + c] += sum(squares) + p * (2 * s + p * Q);
    }
  };
  static void clear(const PoolStep::Kind& kind, int64_t C, int64_t chunk) {
    for (int64_t i = 0; kind.y.at && i < 2 * C; ++i) kind.sums[chunk * 2 * C + i] = 0;
  }

  void forward(int64_t chunk) const {
    clear(s.max, s.C, chunk), clear(s.mean, s.C, chunk);
    every_plane(chunk, [&](int64_t b, int64_t c, const float* x) {
      if (s.max.y.at) {
        low.put(x, s.H, s.W, kLowest, s.x.channel, [](Vec v) { return v; });
        Sums sums;
        float* y = at(s.max.y, b, c);
        maxima<S>(low, s.Ho, s.Wo,
                  [&](int64_t r, int64_t col, Vec v, Vec) { sums.put(y + r * s.Wo + col, v, s.Wo - col); });
        sums.flush(s.max.sums + chunk * 2 * s.C, s.C, c, Q);
      }
      if (s.mean.y.at) {
        zeros.put(x, s.H, s.W, 0, s.x.channel, [](Vec v) { return v; });
        Sums sums;
        float* y = at(s.mean.y, b, c);
        sums_of_nine<S>(zeros, s.Ho, s.Wo, [&](int64_t r, int64_t col, Vec v) {
          const int64_t here = r * s.Wo + col;
          sums.put(y + here, mul(v, load_part(s.inverse + here, s.Wo - col)), s.Wo - col);
        });
        sums.flush(s.mean.sums + chunk * 2 * s.C, s.C, c, Q);
      }
    });
  }

  void backward(int64_t chunk) const {
    every_plane(chunk, [&](int64_t b, int64_t c, const float* x) {
      float* gx = at(s.gx, b, c);
      if (s.mean.y.at) mean_gradient(b, c, gx);
      if (s.max.y.at) max_gradient(b, c, x, gx);
    });
  }
  // The gradient for the raw result at a vector of pixels.
  FTSO_ALWAYS_INLINE Vec gradient(const PoolStep::Kind& kind, int64_t b, int64_t c, int64_t p, int64_t left) const {
    const float *from = at(s.g, b, c) + p, *raw = at(kind.y, b, c) + p;
    prefetch(from + s.g.channel), prefetch(raw + kind.y.channel);
    const Vec g = load_part(from, left), y = load_part(raw, left);
    const Vec hat = add(y, set1(-kind.center[c]));
    return mul(set1(kind.al[c]), add(g, fma(hat, set1(kind.be[c]), set1(kind.ga[c]))));
  }
  FTSO_ALWAYS_INLINE void add_row(float* gx, int64_t r, int64_t col, Vec v) const {
    float* to = gx + r * s.W + col;
    prefetch(to + s.gx.channel);
    store_part(to, add(v, load_part(to, s.W - col)), s.W - col);
  }
  // A row of output gradients into a scratch image.
  FTSO_ALWAYS_INLINE void put(const Image<1>& image, int64_t r, int64_t col, Vec v) const {
    const int64_t left = s.Wo - col;
    store(image.at[0] + (r + 1) * image.ld + kMargin + col, left < kLanes ? keep(tail(left), v) : v);
  }
  void mean_gradient(int64_t b, int64_t c, float* gx) const {
    for (int64_t r = 0; r < s.Ho; ++r)
      for (int64_t col = 0; col < s.Wo; col += kLanes) {
        const int64_t p = r * s.Wo + col, left = s.Wo - col;
        put(d_mean, r, col, mul(gradient(s.mean, b, c, p, left), load_part(s.inverse + p, left)));
      }
    const auto to = [&](int64_t r, int64_t col, Vec v) { add_row(gx, r, col, v); };
    if constexpr (S == 1)
      sums_of_nine<1>(d_mean, s.H, s.W, to);
    else
      spread<3, 1>(d_mean, kOnes, s.H, s.W, to);
  }
  void max_gradient(int64_t b, int64_t c, const float* x, float* gx) const {
    low.put(x, s.H, s.W, kLowest, s.x.channel, [](Vec v) { return v; });
    maxima<S>(low, s.Ho, s.Wo, [&](int64_t r, int64_t col, Vec, Vec tap) {
      const int64_t left = s.Wo - col;
      put(d_max, r, col, gradient(s.max, b, c, r * s.Wo + col, left));
      store(taps.at[0] + (r + 1) * taps.ld + kMargin + col, left < kLanes ? select(tail(left), tap, set1(-1)) : tap);
    });
    if constexpr (S == 1) {
      struct Given {
        Vec row[3];  // what a row of windows gives the pixels at its taps' first, second and third row
      };
      const auto of_row = [&](int64_t offset) FTSO_LAMBDA {
        Given found{{zero(), zero(), zero()}};
        each<3>([&](auto x) FTSO_LAMBDA {  // of the windows that have the pixels in this column of theirs
          const Vec tap = taps.template tap<3, 1, 2 - x.value>(offset),
                    d = d_max.template tap<3, 1, 2 - x.value>(offset);
          each<3>([&](auto y) FTSO_LAMBDA {
            constexpr float t = 3 * y.value + x.value;
            found.row[y.value] = add(found.row[y.value], where_equal(tap, set1(t), d, zero()));
          });
        });
        return found;
      };
      three_rows<1>(taps.ld, s.H, s.W, of_row,
                    [&](int64_t r, int64_t col, const Given& above, const Given& here, const Given& below) {
                      add_row(gx, r, col, add(add(above.row[2], here.row[1]), below.row[0]));
                    });
    } else {
      for (int64_t r = 0; r < s.Ho; ++r)
        for (int64_t col = 0; col < s.Wo; ++col) {
          const int64_t there = (r + 1) * taps.ld + kMargin + col, tap = static_cast<int64_t>(taps.at[0][there]);
          const int64_t row = 2 * r + tap / 3 - 1, column = 2 * col + tap % 3 - 1;
          if (row < 0 || column < 0) continue;  // a window of nothing but -inf
          gx[row * s.W + column] += d_max.at[0][there];
        }
    }
  }
};

}  // namespace

const char* pools_fwd(const PoolStep& s, int64_t chunk, float* scratch) {
  s.S == 1 ? Pools<1>(s, scratch).forward(chunk) : Pools<2>(s, scratch).forward(chunk);
  return compiled_isa;
}

const char* pools_bwd(const PoolStep& s, int64_t chunk, float* scratch) {
  s.S == 1 ? Pools<1>(s, scratch).backward(chunk) : Pools<2>(s, scratch).backward(chunk);
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
