// Bytes of images to normalised floats: crop, flip and change of layout in one pass.
#pragma once
#include <cstdint>

namespace ftso {

// images [n][H][W][C], with `pad` pixels of value 0 thought around each, are cut and mirrored as their 64 random bits
// say: the highest 24 choose the first row, the next 24 the first column, both of 2 pad + 1, the lowest one whether the
// cut is mirrored. values [C][256]: what each byte of a channel becomes. out [n][C][H][W].
struct Crops {
  int64_t n, H, W, C, pad;
  const uint8_t* images;
  const uint64_t* bits;
  const float* values;
  float* out;
};
void crop(const Crops& s, int threads);

}  // namespace ftso
