// The stem of the skip-only network: 3x3 convolution straight from padded rows, batch norm, relu, and the products that
// begin the first two cells. Its output is never stored. Its batch statistics are those of 3x3 patches, seen through
// the weights: one covariance of the patches (with a constant 1 appended, which gives the means) serves all channels
// forward, and makes the weight gradient a single pass backward.
#include "ftso.h"
#include "patches.h"
#include "tiled.h"

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

// On the tile unit: the network of 16 channels, three vectors of columns behind the convolution and behind the product,
// patches in one block. Sixteen pixels travel together, in two halves that do not cross a row.
constexpr int64_t kColumns = 3 * kLanes, kPixels = 16, kOut = kPixels * kColumns;
FTSO_INLINE bool tiled(const StemStep& s, const float* weights) {
  return kTiles && s.w_tiles && weights && s.channels == 3 && s.S == kColumns && s.product.N == kColumns &&
         !s.product.windows.C && s.shape.W % 8 == 0;
}

// The patches of sixteen pixels as rows of a left operand.
class Patches {
  static constexpr int64_t kPiece = 9;  // of a patch, from one row
  const int64_t ld_;
  const float* half_[2];
  const Mask first_, second_, rest_, third_;

 public:
  explicit Patches(const Padded& image)
      : ld_(image.ld),
        first_(mask_of(0x01ff)),
        second_(mask_of(0xfe00)),
        rest_(mask_of(0x0003)),
        third_(mask_of(0x07fc)) {}
  void begin(const Padded& image, int64_t pixel) {
    const int64_t W = image.s.shape.W;
    for (int h = 0; h < 2; ++h, pixel += 8) half_[h] = image.rows + pixel / W * ld_ + (pixel % W - 8 * h) * 3;
  }
  FTSO_ALWAYS_INLINE void store(int64_t pixel, float* left) const {
    const float* at = half_[pixel >= 8] + pixel * 3;
    const Vec low = select(second_, load(at + ld_ - kPiece), load(at, first_));
    const Vec high = select(third_, load(at + 2 * (ld_ - kPiece) + kLanes), load(at + ld_ - kPiece + kLanes, rest_));
    store_thirds(left + pixel * kLanes, low, high);
  }
};

// Rows of the product from `pixel` on, with their sums.
template <bool PAST>
FTSO_INLINE void put_rows(const Product& p, int64_t pixel, const float* from, int64_t rows, Vec (&s)[3], Vec (&q)[3]) {
#pragma GCC unroll 3
  for (int v = 0; v < 3; ++v) {
    const Plane& plane = p.plane(v * kLanes);
    const int64_t n = plane.n;
    float* z = plane.z + pixel * n + v * kLanes - plane.c;
    for (int64_t i = 0; i < rows; ++i) {
      const Vec value = load(from + i * kColumns + v * kLanes);
      put(z + i * n, PAST, value);
      s[v] = add(s[v], value), q[v] = fma(value, value, q[v]);
    }
  }
}

// While the unit convolves a group the processor makes the left operand of the one before, and while it multiplies
// that, the next patches, and puts the results before. Tiles are stored behind a product, so one buffer of each does,
// and with the weights they fit the first level of the caches: with two of each it took a fifth longer.
template <bool PAST>
void convolve_beside_tiles(const StemStep& s, int64_t chunk, float* scratch) {
  const TileUnit unit;
  float *patches = scratch, *x = patches + thirds_floats(kInner, kPixels), *left = x + kOut;
  float* out = left + thirds_floats(kColumns, kPixels);
  Padded image(s, out + kOut);
  Patches patch(image);
  const int64_t B = s.shape.B, HW = s.shape.H * s.shape.W, first = first_image(B, chunk);
  const int64_t groups = (first_image(B, chunk + 1) - first) * HW / kPixels;
  double* sums = s.product.sums + chunk * 2 * kColumns;
  const Vec scale[3] = {load(s.scale), load(s.scale + kLanes), load(s.scale + 2 * kLanes)};
  const Vec shift[3] = {load(s.shift), load(s.shift + kLanes), load(s.shift + 2 * kLanes)};
  // Of group g the patches are made in step g - 1, the convolution in step g, the product in step g + 1.
  for (int64_t g = -1; groups && g < groups + 2; ++g) {
    int64_t made = 0;
    if (g >= 0)
      multiply_tiles<1, 3>(patches, s.w_tiles, 1, false, x, kColumns, [&] {
        if (g == 0) return;
        for (const int64_t to = made + 3 < kPixels ? made + 3 : kPixels; made < to; ++made) {
          const auto value = [&](int v) {
            return rectified(fma(load(x + made * kColumns + v * kLanes), scale[v], shift[v]));
          };
          store_thirds(left + made * kLanes, value(0), value(1));
          store_thirds(left + 3 * kTileWords + made * kLanes, value(2), zero());
        }
      });
    const int64_t pixel = (g + 1) * kPixels;
    const bool more = g + 1 < groups;
    if (more) {
      if (pixel % HW == 0) image.read(first + pixel / HW);
      patch.begin(image, pixel % HW);
    }
    int64_t step = 0;
    Vec s_of[3] = {zero(), zero(), zero()}, q_of[3] = {zero(), zero(), zero()};
    const auto meanwhile = [&] {
      if (step < 8) {
        for (int64_t i = 2 * step; more && i < 2 * step + 2; ++i) patch.store(i, patches);
      } else if (step > 8 && g >= 2) {
        const int64_t row = (step - 9) * 5;
        put_rows<PAST>(s.product, first * HW + (g - 2) * kPixels + row, out + row * kColumns, step == 11 ? 6 : 5, s_of,
                       q_of);
      }
      ++step;
    };
    if (g > 0)
      multiply_tiles<1, 3>(left, s.product.w_tiles, 2, false, out, kColumns, meanwhile);
    else
      for (int i = 0; i < 12; ++i) meanwhile();
    for (int v = 0; v < 3; ++v) add_to(sums + v * kLanes, s_of[v]), add_to(sums + kColumns + v * kLanes, q_of[v]);
  }
}

struct Part {  // of an axis, as patches.h numbers them
  int64_t begin, end;
};
FTSO_INLINE Part part(int which, bool apart, int64_t n) {
  if (!apart) return {0, n};
  return which == 0 ? Part{0, 1} : which == 1 ? Part{1, n - 1} : Part{n - 1, n};
}

// One image as planes between zeros, and behind them a plane of ones.
template <int C>
class Planes {
  const int64_t H_, W_, ld_, plane_;
  float* const at_;

 public:
  Planes(const Shape& s, float* memory)
      : H_(s.H),
        W_(s.W),
        ld_((W_ + kLanes - 1) / kLanes * kLanes + kLanes),
        plane_((H_ + 2) * ld_),
        at_(cleared(memory, kLanes + C * plane_) + kLanes) {
    for (int64_t i = 0; i < plane_; ++i) at_[C * plane_ + i] = 1;
  }
  void read(const float* image) {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t y = 0; y < H_; ++y, image += W_)
        for (int64_t x = 0; x < W_; ++x) at_[c * plane_ + y * ld_ + x] = image[x];
  }
  // Adds the products of the pixels in that part with those at the offset, [C][C + 1] channels, the last if N is C + 1.
  // A vector is summed in double: neighbours are alike, and a filter's variance a small difference of these sums.
  // Not inlined: among the loops over parts its addresses would not stay in registers.
  template <int N>
  __attribute__((noinline)) void add_products(Part rows, Part columns, int64_t dy, int64_t dx, double* sums) const {
    for (int64_t x = columns.begin; x < columns.end; x += kLanes) {
      const Tail here = tail(columns.end - x);
      Vec total[C][N];
      for (auto& row : total)
        for (Vec& v : row) v = zero();
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        const float* at = at_ + y * ld_ + x;
        Vec left[C];
        for (int c = 0; c < C; ++c) left[c] = load(at + c * plane_, here);
        for (int n = 0; n < N; ++n) {
          const Vec right = load(at + n * plane_ + dy * ld_ + dx);
          for (int c = 0; c < C; ++c) total[c][n] = fma(left[c], right, total[c][n]);
        }
      }
      for (int c = 0; c < C; ++c)
        for (int n = 0; n < N; ++n) sums[c * (C + 1) + n] += sum_in_double(total[c][n]);
    }
  }
};

template <int C>
void covariance(const StemStep& s, int64_t chunk, float* scratch) {
  const int64_t B = s.shape.B, H = s.shape.H, W = s.shape.W;
  constexpr int kSums = C * (C + 1);
  double* sums = s.covariance + chunk * kPatchSums * kSums;
  for (int64_t i = 0; i < kPatchSums * kSums; ++i) sums[i] = 0;
  Planes<C> planes(s.shape, scratch);
  for (int64_t b = first_image(B, chunk); b < first_image(B, chunk + 1); ++b) {
    planes.read(s.images + b * C * H * W);
    double* of_part = sums;
    every_patch_sum([&](int dy, int dx, int y, int x) {
      const Part rows = part(y, dy == 0, H), columns = part(x, dx == 0, W);
      dy || dx ? planes.template add_products<C>(rows, columns, dy, dx, of_part)
               : planes.template add_products<C + 1>(rows, columns, dy, dx, of_part);
      of_part += kSums;
    });
  }
}

}  // namespace

const char* stem_covariance(const StemStep& s, int64_t chunk, float* scratch) {
  (s.channels == 1 ? covariance<1> : covariance<3>)(s, chunk, scratch);
  return compiled_isa;
}

const char* stem_fwd(const StemStep& s, int64_t chunk, float* scratch) {
  if (tiled(s, s.product.w_tiles)) {
    const bool past_caches = streams(s.shape.B * s.shape.H * s.shape.W, kColumns);
    (past_caches ? convolve_beside_tiles<true> : convolve_beside_tiles<false>)(s, chunk, scratch);
    return compiled_isa;
  }
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
          store(at, rectified(x)), store(grad, d);
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
