#include "crops.h"

#include <algorithm>

#include "chunks.h"
#include "threads.h"

namespace ftso {

// One row of one channel: pixels from `first` on, C bytes apart, where they lie within the image.
static void crop_row(const Crops& s, const uint8_t* row, const float* values, int64_t first, bool flip, float* out) {
  const int64_t begin = std::clamp<int64_t>(-first, 0, s.W), end = std::clamp<int64_t>(s.W - first, begin, s.W);
  const int64_t step = flip ? -1 : 1;
  float* to = flip ? out + s.W - 1 : out;
  for (int64_t x = 0; x < begin; ++x) to[step * x] = values[0];
  for (int64_t x = begin; x < end; ++x) to[step * x] = values[row[(first + x) * s.C]];
  for (int64_t x = end; x < s.W; ++x) to[step * x] = values[0];
}

void crop(const Crops& s, int threads) {
  const uint64_t choices = 2 * s.pad + 1, mask = (1 << 24) - 1;
  over_chunks_of_work(kChunks, threads, [&](int64_t chunk) {
    for (int64_t i = s.n * chunk / kChunks; i < s.n * (chunk + 1) / kChunks; ++i) {
      const int64_t row = static_cast<int64_t>((s.bits[i] >> 40) * choices >> 24) - s.pad;
      const int64_t column = static_cast<int64_t>((s.bits[i] >> 16 & mask) * choices >> 24) - s.pad;
      for (int64_t c = 0; c < s.C; ++c)
        for (int64_t y = 0; y < s.H; ++y) {
          const int64_t from = y + row;
          const float* values = s.values + c * 256;
          float* out = s.out + ((i * s.C + c) * s.H + y) * s.W;
          if (from < 0 || from >= s.H)
            std::fill(out, out + s.W, values[0]);
          else
            crop_row(s, s.images + (i * s.H + from) * s.W * s.C + c, values, column, s.bits[i] & 1, out);
        }
    }
  });
}

}  // namespace ftso
