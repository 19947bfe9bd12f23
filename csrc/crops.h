// Bytes of images to normalised floats: crop, flip and change of layout in one pass.
#pragma once
#include <cstdint>

namespace ftso {

// images [n][H][W][C], with `pad` pixels of value 0 thought around each. Output pixel (y, x) of image i is its pixel
// (y + rows[i] - pad, x + columns[i] - pad), mirrored in x first where flips[i]; rows, columns: 0 to 2 pad.
// values [C][256]: what each byte of a channel becomes. out [n][C][H][W].
struct Crops {
  int64_t n, H, W, C, pad;
  const uint8_t* images;
  const int64_t *rows, *columns;
  const bool* flips;
  const float* values;
  float* out;
};
void crop(const Crops& s, int threads);

}  // namespace ftso
