// Maximum and mean over 3x3 windows in one pass, raw, with the sums of the batch norms behind them; their gradients.
#include "ftso.h"
#include "stencil.h"

namespace ftso::FTSO_ISA {
namespace {

constexpr float kLowest = -__builtin_inff();
constexpr float kOnes[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};

// Per output vector its maximum and the tap (0..8, in the order of rows) that has it first: put(r, c, max, tap).
template <int S, typename Put>
FTSO_INLINE void maxima(const Image<S>& image, int64_t Ho, int64_t Wo, Put put) {
  for (int64_t r = 0; r < Ho; ++r)
    for (int64_t c = 0; c < Wo; c += kLanes) {
      Vec best = image.template tap<3, 1, 0>(S * r * image.ld + c), tap = zero();
      each<8>([&](auto i) FTSO_LAMBDA {
        constexpr int t = i.value + 1;
        const Vec v = image.template tap<3, 1, t % 3>((S * r + t / 3) * image.ld + c), higher = max(best, v);
        tap = where_equal(higher, best, tap, set1(static_cast<float>(t)));
        best = higher;
      });
      put(r, c, best, tap);
    }
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
        low.put(x, s.H, s.W, kLowest, 0, [](Vec v) { return v; });
        Sums sums;
        float* y = at(s.max.y, b, c);
        maxima<S>(low, s.Ho, s.Wo,
                  [&](int64_t r, int64_t col, Vec v, Vec) { sums.put(y + r * s.Wo + col, v, s.Wo - col); });
        sums.flush(s.max.sums + chunk * 2 * s.C, s.C, c, Q);
      }
      if (s.mean.y.at) {
        zeros.put(x, s.H, s.W, 0, 0, [](Vec v) { return v; });
        Sums sums;
        float* y = at(s.mean.y, b, c);
        windows<3, S, 1>(zeros, kOnes, s.Ho, s.Wo, [&](int64_t r, int64_t col, Vec v) {
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
    const Vec g = load_part(at(s.g, b, c) + p, left), y = load_part(at(kind.y, b, c) + p, left);
    const Vec hat = add(y, set1(-kind.center[c]));
    return mul(set1(kind.al[c]), add(g, fma(hat, set1(kind.be[c]), set1(kind.ga[c]))));
  }
  FTSO_ALWAYS_INLINE void add_row(float* gx, int64_t r, int64_t col, Vec v) const {
    float* to = gx + r * s.W + col;
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
      windows<3, 1, 1>(d_mean, kOnes, s.H, s.W, to);
    else
      spread<3, 1>(d_mean, kOnes, s.H, s.W, to);
  }
  void max_gradient(int64_t b, int64_t c, const float* x, float* gx) const {
    low.put(x, s.H, s.W, kLowest, 0, [](Vec v) { return v; });
    maxima<S>(low, s.Ho, s.Wo, [&](int64_t r, int64_t col, Vec, Vec tap) {
      const int64_t left = s.Wo - col;
      put(d_max, r, col, gradient(s.max, b, c, r * s.Wo + col, left));
      store(taps.at[0] + (r + 1) * taps.ld + kMargin + col, left < kLanes ? select(tail(left), tap, set1(-1)) : tap);
    });
    if constexpr (S == 1) {
      for (int64_t r = 0; r < s.H; ++r)
        for (int64_t col = 0; col < s.W; col += kLanes) {
          Vec total = zero();
          each<9>([&](auto i) FTSO_LAMBDA {  // the window that has this pixel at tap t
            constexpr int t = i.value, dx = 1 - t % 3;
            const int64_t there = (r + 2 - t / 3) * taps.ld + kMargin + col;
            total = add(total, where_equal(load_shifted<dx>(taps.at[0] + there), set1(static_cast<float>(t)),
                                           load_shifted<dx>(d_max.at[0] + there), zero()));
          });
          add_row(gx, r, col, total);
        }
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
