// What the stem's pass over the images leaves of their 3x3 patches, and the patches' covariance from it.
#pragma once
#include "chunks.h"

namespace ftso {

// Two entries (y, x, channel) of a patch, the first in reading order first: over all patches, the sum of their products
// depends on their places only through the offset between them, one of 13, but for the patch's centre, which must lie
// in the image. Along an axis where the entries differ it does if both do. Where they do not, the first (0) and the
// last (2) row or column of the image are summed apart from those between (1), and places add the parts whose centres
// lie inside. visit(offset y, offset x, rows, columns): every sum, in the order in which they are stored.
constexpr int kPatchSums = 29;
template <typename Visit>
static inline void every_patch_sum(Visit visit) {
  for (int y = 0; y < 3; ++y)
    for (int x = y ? -2 : 0; x < 3; ++x)
      for (int rows = y ? 1 : 0; rows < (y ? 2 : 3); ++rows)
        for (int columns = x ? 1 : 0; columns < (x ? 2 : 3); ++columns) visit(y, x, rows, columns);
}

// partial: the sums of all chunks, [kPatchSums][C][C + 1] each, where the last channel is the constant 1 (for the first
// offset only). covariance [9 * C][ld], the constant's column behind the patch's.
static inline void covariance_of(const double* partial, int64_t C, int64_t ld, double* covariance) {
  const int64_t K = 9 * C, stride = kPatchSums * C * (C + 1);
  for (int64_t i = 0; i < K * ld; ++i) covariance[i] = 0;
  const auto with_centre = [](int place, int part) { return place - part != 2 && part - place != 2; };
  int64_t at = 0;
  every_patch_sum([&](int dy, int dx, int rows, int columns) {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t c2 = 0; c2 <= C; ++c2) {
        const double sum = over_chunks(partial, stride, at++);
        for (int y = 0; y + dy < 3; ++y)
          for (int x = dx < 0 ? -dx : 0; x < 3 && x + dx < 3; ++x) {
            if (!with_centre(y, rows) || !with_centre(x, columns)) continue;
            const int64_t i = (3 * y + x) * C, j = i + (3 * dy + dx) * C;
            if (c2 < C)
              covariance[(i + c) * ld + j + c2] += sum;
            else if (i == j)
              covariance[(i + c) * ld + K] += sum;
          }
      }
  });
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < i; ++j) covariance[i * ld + j] = covariance[j * ld + i];
}

}  // namespace ftso
