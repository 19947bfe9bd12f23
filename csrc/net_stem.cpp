// The stem of the skip-only network: 3x3 convolution straight from padded rows, batch norm, relu, and the products that
// begin the first two cells. Its output is never stored. Its batch statistics are those of 3x3 patches, seen through
// the weights: one covariance of the patches (with a constant 1 appended, which gives the means) serves all channels
// forward, and makes the weight gradient a single pass backward.
#include "consume.h"
#include "ftso.h"

namespace ftso::FTSO_ISA {
namespace {

// One image with its border of zeros, channels last: rows of (W + 2) * channels.
struct Padded {
  const StemStep& s;
  const int64_t ld;
  float* rows;
  Padded(const StemStep& step, float* memory) : s(step), ld((step.shape.W + 2) * step.channels), rows(memory) {
    for (int64_t i = 0; i < ld * (s.shape.H + 2); ++i) rows[i] = 0;
  }
  void read(int64_t image) {
    const int64_t H = s.shape.H, W = s.shape.W;
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t r = 0; r < H; ++r) {
        const float* from = s.images + ((image * s.channels + c) * H + r) * W;
        float* to = rows + (r + 1) * ld + s.channels + c;
        for (int64_t x = 0; x < W; ++x) to[x * s.channels] = from[x];
      }
  }
  // The convolution of image row r, [W][S]: raw, or (kRelu) behind batch norm and relu.
  template <Out OUT>
  void convolve(int64_t r, float* out) const {
    const int64_t K = 3 * s.channels;
    product<OUT>({rows + r * ld, s.channels, 3, ld}, s.shape.W, s.w, s.S, K, s.S, out, s.S,
                 {nullptr, nullptr, s.scale, s.shift});
  }
};

}  // namespace

const char* stem_covariance(const StemStep& s, int64_t chunk, float* scratch) {
  const int64_t W = s.shape.W, n = s.K + 1, ld = (n + kLanes - 1) / kLanes * kLanes, K = 3 * s.channels;
  float *patches = scratch, *covariance = scratch + W * ld + kLanes;
  Padded image(s, covariance + n * ld);
  const float first_lane[kLanes] = {1};
  const Vec one = load(first_lane);
  double* total = s.covariance + chunk * n * ld;
  for (int64_t i = 0; i < n * ld; ++i) total[i] = 0;
  for (int64_t b = s.shape.B * chunk / kChunks; b < s.shape.B * (chunk + 1) / kChunks; ++b) {
    image.read(b);
    for (int64_t r = 0; r < s.shape.H; ++r) {
      for (int64_t i = 0; i < n * ld; ++i) covariance[i] = 0;
      for (int64_t x = 0; x < W; ++x) {
        float* patch = patches + x * ld;
        for (int64_t y = 0; y < 3; ++y)  // in order: what a vector writes too far is overwritten
          store(patch + y * K, load(image.rows + (r + y) * image.ld + x * s.channels));
        store(patch + s.K, one);
      }
      outer_product(patches, ld, n, patches, ld, ld, W, covariance, ld);
      for (int64_t i = 0; i < n * ld; i += kLanes) add_to(total + i, load(covariance + i));
    }
  }
  return compiled_isa;
}

const char* stem_fwd(const StemStep& s, int64_t chunk, float* scratch) {
  const int64_t W = s.shape.W, T = tile_rows(s.shape) * W;
  float *a = scratch, *room = a + T * s.S, *above = room + T * s.S;
  Padded image(s, above + W * s.product.N);
  int64_t loaded = -1;
  every_tile(s.shape, chunk, [&](int64_t b, int64_t first, int64_t P) {
    if (b != loaded) image.read(loaded = b);
    const int64_t r = first / W - b * s.shape.H;
    for (int64_t i = 0; i < P / W; ++i) image.convolve<Out::kRelu>(r + i, a + i * W * s.S);
    consume(s.product, s.shape, chunk, first, P, left_operand(s.product.pairs_forward, a, P, s.S, room), s.S, above);
  });
  return compiled_isa;
}

const char* stem_bwd(const StemStep& s, int64_t chunk, float* scratch) {
  const int64_t W = s.shape.W, T = tile_rows(s.shape) * W, K = 3 * s.channels;
  double* sums = s.sums + chunk * 2 * s.S;
  float *a = scratch, *da = a + T * s.S, *dz = da + T * s.S;
  float* room = dz + T * s.product.N;
  Padded image(s, room + T * s.product.N);
  float* dw = cleared(s.dw + chunk * s.K * s.S, s.K * s.S);
  cleared(s.product.dw + chunk * s.S * s.product.N, s.S * s.product.N);
  int64_t loaded = -1;
  every_tile(s.shape, chunk, [&](int64_t b, int64_t first, int64_t P) {
    if (b != loaded) image.read(loaded = b);
    const int64_t r = first / W - b * s.shape.H;
    gather_gradient(s.product, s.shape, first, P, s.S, dz, room, da);
    for (int64_t i = 0; i < P / W; ++i) image.convolve<Out::kStore>(r + i, a + i * W * s.S);
    for (int64_t c = 0; c < s.S; c += kLanes) {
      const Vec scale = load(s.scale + c), shift = load(s.shift + c);
      every_run(P, [&](int64_t first_of_run, int64_t n) {
        Vec total = zero(), with_raw = zero();
        for (int64_t p = first_of_run; p < first_of_run + n; ++p) {
          float *at = a + p * s.S + c, *grad = da + p * s.S + c;
          const Vec raw = load(at), x = fma(raw, scale, shift), d = where_positive(x, load(grad));
          store(at, max(x, zero())), store(grad, d);
          total = add(total, d), with_raw = fma(d, raw, with_raw);
        }
        add_to(sums + c, total), add_to(sums + s.S + c, with_raw);
      });
    }
    weight_gradient(s.product, chunk, P, a, s.S, dz);
    for (int64_t i = 0; i < P / W; ++i)
      for (int64_t y = 0; y < 3; ++y)
        outer_product(image.rows + (r + i + y) * image.ld, s.channels, K, da + i * W * s.S, s.S, s.S, W,
                      dw + y * K * s.S, s.S);
  });
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
