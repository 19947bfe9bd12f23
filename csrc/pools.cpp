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

// The pixels under tap column DX, the lowest number where a pair's images end.
template <int DX, int S, bool PAIR>
FTSO_INLINE Vec tap_or_lowest(const Image<S, PAIR>& image, int64_t offset) {
  const Vec v = image.template tap<3, 1, DX>(offset);
  return PAIR && DX != 1 ? select(mask_of(neighbours_of_pair(DX - 1)), v, set1(kLowest)) : v;
}

// Per output vector its maximum and the tap (0..8, in the order of rows) that has it first: put(r, c, max, tap).
template <int S, bool PAIR, typename Put>
FTSO_INLINE void maxima(const Image<S, PAIR>& image, int64_t Ho, int64_t Wo, Put put) {
  struct Best {
    Vec value, tap;
    FTSO_ALWAYS_INLINE void meet(Vec v, Vec t) {
      const Vec higher = max(value, v);
      tap = where_equal(higher, value, tap, t), value = higher;
    }
  };
  const auto of_row = [&](int64_t offset) FTSO_LAMBDA {
    Best best{tap_or_lowest<0>(image, offset), zero()};
    best.meet(tap_or_lowest<1>(image, offset), set1(1));
    best.meet(tap_or_lowest<2>(image, offset), set1(2));
    return best;
  };
  three_rows<S>(image.ld, Ho, Wo, of_row, [&](int64_t r, int64_t c, Best best, const Best& here, const Best& below) {
    best.meet(here.value, add(here.tap, set1(3)));
    best.meet(below.value, add(below.tap, set1(6)));
    put(r, c, best.value, best.tap);
  });
}

// The sums over 3x3: put(r, c, sum).
template <int S, bool PAIR, typename Put>
FTSO_INLINE void sums_of_nine(const Image<S, PAIR>& image, int64_t Ho, int64_t Wo, Put put) {
  const auto of_row = [&](int64_t offset) FTSO_LAMBDA {
    return add(add(image.template tap<3, 1, 0>(offset), image.template tap<3, 1, 1>(offset)),
               image.template tap<3, 1, 2>(offset));
  };
  three_rows<S>(image.ld, Ho, Wo, of_row,
                [&](int64_t r, int64_t c, Vec above, Vec here, Vec below) { put(r, c, add(add(above, here), below)); });
}

// As a PAIR, images of 8 x 8 are treated two at a time, side by side: rows of 16 columns.
template <int S, bool PAIR = false>
struct Pools {
  const PoolStep& s;
  Image<S, PAIR> low, zeros;  // of x, with the lowest number and with zero around
  Image<1, PAIR> d_mean, d_max, taps;
  const int64_t W, Wo;  // columns of rows of x, and of the results

  Pools(const PoolStep& step, float* scratch) : s(step), W(PAIR ? 16 : s.W), Wo(PAIR ? 16 : s.Wo) {
    scratch = Image<S, PAIR>::carve(low, scratch, s.H, s.W, 1, kLowest);
    scratch = Image<S, PAIR>::carve(zeros, scratch, s.H, s.W, 1, 0);
    scratch = Image<1, PAIR>::carve(d_mean, scratch, s.Ho, s.Wo, 1, 0);
    scratch = Image<1, PAIR>::carve(d_max, scratch, s.Ho, s.Wo, 1, 0);
    Image<1, PAIR>::carve(taps, scratch, s.Ho, s.Wo, 1, -1);
  }
  // Which planes: channel c of image b, and, as a pair, of the next where there is one.
  struct Unit {
    int64_t b, c;
    bool second;
  };
  template <typename Visit>
  void every_unit(int64_t chunk, Visit visit) const {
    for (int64_t b = s.B * chunk / kChunks, end = s.B * (chunk + 1) / kChunks; b < end; b += PAIR ? 2 : 1)
      for (int64_t c = 0; c < s.C; ++c) visit(Unit{b, c, PAIR && b + 1 < end});
  }
  // A unit of planes, row by row; the same channel of the next is asked for.
  struct Rows {
    float* at;
    int64_t other, next, width;
    bool second;
    FTSO_ALWAYS_INLINE Vec get(int64_t r, int64_t col) const {
      if constexpr (PAIR) return Pair::row(at, other, r, second);
      return load_part(at + r * width + col, width - col);
    }
    FTSO_ALWAYS_INLINE void put(int64_t r, int64_t col, Vec v) const {
      if constexpr (PAIR) return Pair::put_row(at, other, r, second, v);
      store_part(at + r * width + col, v, width - col);
    }
    // v where there are pixels, 0 elsewhere.
    FTSO_ALWAYS_INLINE Vec there(int64_t col, Vec v) const {
      if constexpr (PAIR) return Pair::there(second, v);
      return width - col < kLanes ? keep(tail(width - col), v) : v;
    }
    FTSO_ALWAYS_INLINE int64_t count(int64_t col) const {
      if constexpr (PAIR) return second ? 16 : 8;
      return width - col < kLanes ? width - col : kLanes;
    }
    FTSO_ALWAYS_INLINE void ask(int64_t r, int64_t col) const {
      prefetch(at + (PAIR ? 8 * r : r * width + col) + next);
      if (PAIR) prefetch(at + 8 * r + other + next);
    }
  };
  FTSO_ALWAYS_INLINE Rows rows(const Planes& p, Unit u, int64_t width) const {
    return {p.at + u.b * p.image + u.c * p.channel, u.second ? p.image : 0, p.channel, width, u.second};
  }
  FTSO_ALWAYS_INLINE void put_image(const Image<S, PAIR>& image, const Rows& x, float fill) const {
    if constexpr (PAIR)
      image.put_rows(8, [=](int64_t r) { return x.ask(r, 0), x.get(r, 0); });
    else
      image.put(x.at, s.H, s.W, fill, x.next, [](Vec v) { return v; });
  }
  FTSO_ALWAYS_INLINE Vec inverse(int64_t r, int64_t col) const {
    if constexpr (PAIR) return Pair::row(s.inverse, 0, r, true);
    return load_part(s.inverse + r * s.Wo + col, s.Wo - col);
  }

  // Writes the vectors of a unit and adds it to its channel's sums. Added up in float is what is left after a value of
  // the unit itself: maxima have means far above their deviations, and the digits of the variance would be lost.
  struct Sums {
    Rows to;
    float pivot = 0;
    bool begun = false;
    Vec total = zero(), squares = zero();
    FTSO_ALWAYS_INLINE void put(int64_t r, int64_t col, Vec v) {
      to.put(r, col, v);
      if (!begun) begun = true, pivot = sum(to.there(col, v)) / static_cast<float>(to.count(col));
      v = to.there(col, add(v, set1(-pivot)));
      total = add(total, v), squares = fma(v, v, squares);
    }
    void flush(double* sums, int64_t C, int64_t c, int64_t n) const {
      const double p = pivot, s = sum(total);
      sums[c] += s + p * n, sums[C + c] += sum(squares) + p * (2 * s + p * n);
    }
  };
  static void clear(const PoolStep::Kind& kind, int64_t C, int64_t chunk) {
    for (int64_t i = 0; kind.y.at && i < 2 * C; ++i) kind.sums[chunk * 2 * C + i] = 0;
  }

  void forward(int64_t chunk) const {
    clear(s.max, s.C, chunk), clear(s.mean, s.C, chunk);
    every_unit(chunk, [&](Unit u) {
      const Rows x = rows(s.x, u, s.W);
      const int64_t n = s.Ho * s.Wo * (u.second ? 2 : 1);
      if (s.max.y.at) {
        put_image(low, x, kLowest);
        Sums sums{rows(s.max.y, u, s.Wo)};
        maxima<S>(low, s.Ho, Wo, [&](int64_t r, int64_t col, Vec v, Vec) { sums.put(r, col, v); });
        sums.flush(s.max.sums + chunk * 2 * s.C, s.C, u.c, n);
      }
      if (s.mean.y.at) {
        put_image(zeros, x, 0);
        Sums sums{rows(s.mean.y, u, s.Wo)};
        sums_of_nine<S>(zeros, s.Ho, Wo,
                        [&](int64_t r, int64_t col, Vec v) { sums.put(r, col, mul(v, inverse(r, col))); });
        sums.flush(s.mean.sums + chunk * 2 * s.C, s.C, u.c, n);
      }
    });
  }

  void backward(int64_t chunk) const {
    every_unit(chunk, [&](Unit u) {
      if (s.mean.y.at) mean_gradient(u);
      if (s.max.y.at) max_gradient(u);
    });
  }
  // The gradient for a raw result, vector by vector.
  struct RawGradient {
    Rows g, y;
    Vec al, be, ga, center;
    FTSO_ALWAYS_INLINE Vec operator()(int64_t r, int64_t col) const {
      g.ask(r, col), y.ask(r, col);
      return mul(al, add(g.get(r, col), fma(add(y.get(r, col), center), be, ga)));
    }
  };
  FTSO_ALWAYS_INLINE RawGradient gradient(const PoolStep::Kind& kind, Unit u) const {
    return {rows(s.g, u, s.Wo), rows(kind.y, u, s.Wo), set1(kind.al[u.c]),
            set1(kind.be[u.c]), set1(kind.ga[u.c]),    set1(-kind.center[u.c])};
  }
  static FTSO_ALWAYS_INLINE void add_row(const Rows& gx, int64_t r, int64_t col, Vec v) {
    gx.ask(r, col);
    gx.put(r, col, add(v, gx.get(r, col)));
  }
  // A row of output gradients into a scratch image.
  FTSO_ALWAYS_INLINE static float* place(const Image<1, PAIR>& image, int64_t r, int64_t col) {
    return image.at[0] + (r + 1) * image.ld + kMargin + col;
  }
  void mean_gradient(Unit u) const {
    const RawGradient of = gradient(s.mean, u);
    for (int64_t r = 0; r < s.Ho; ++r)
      for (int64_t col = 0; col < Wo; col += kLanes)
        store(place(d_mean, r, col), of.g.there(col, mul(of(r, col), inverse(r, col))));
    const Rows gx = rows(s.gx, u, s.W);
    const auto to = [=](int64_t r, int64_t col, Vec v) { add_row(gx, r, col, v); };
    if constexpr (S == 1)
      sums_of_nine<1>(d_mean, s.H, W, to);
    else
      spread<3, 1>(d_mean, kOnes, s.H, W, to);
  }
  void max_gradient(Unit u) const {
    put_image(low, rows(s.x, u, s.W), kLowest);
    const RawGradient of = gradient(s.max, u);
    const Rows gx = rows(s.gx, u, s.W);
    maxima<S>(low, s.Ho, Wo, [&](int64_t r, int64_t col, Vec, Vec tap) {
      store(place(d_max, r, col), of.g.there(col, of(r, col)));
      const int64_t left = Wo - col;
      store(place(taps, r, col), left < kLanes ? select(tail(left), tap, set1(-1)) : tap);
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
      three_rows<1>(taps.ld, s.H, W, of_row,
                    [&](int64_t r, int64_t col, const Given& above, const Given& here, const Given& below) {
                      add_row(gx, r, col, add(add(above.row[2], here.row[1]), below.row[0]));
                    });
    } else {
      for (int64_t r = 0; r < s.Ho; ++r)
        for (int64_t col = 0; col < s.Wo; ++col) {
          const auto tap = static_cast<int64_t>(*place(taps, r, col));
          const int64_t row = 2 * r + tap / 3 - 1, column = 2 * col + tap % 3 - 1;
          if (row < 0 || column < 0) continue;  // a window of nothing but -inf
          gx.at[row * s.W + column] += *place(d_max, r, col);
        }
    }
  }
};

template <typename Visit>
void visit_pools(const PoolStep& s, float* scratch, Visit visit) {
  if (s.S == 2)
    visit(Pools<2>(s, scratch));
  else if (s.H == 8 && s.W == 8)
    visit(Pools<1, true>(s, scratch));
  else
    visit(Pools<1>(s, scratch));
}

}  // namespace

const char* pools_fwd(const PoolStep& s, int64_t chunk, float* scratch) {
  visit_pools(s, scratch, [=](const auto& pools) { pools.forward(chunk); });
  return compiled_isa;
}

const char* pools_bwd(const PoolStep& s, int64_t chunk, float* scratch) {
  visit_pools(s, scratch, [=](const auto& pools) { pools.backward(chunk); });
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
