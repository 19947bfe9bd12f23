// Weights as the tile unit (tiles.h) takes them.
#include "ftso.h"
#include "simd.h"

namespace ftso::FTSO_ISA {

// Thirds, rounded to nearest. A word holds two rows' values.
void split(const float* w, int64_t K, int64_t N, float* tiles) {
  const int64_t column = thirds_floats(K, kLanes);
  for (int64_t block = 0; block < inner_blocks(K); ++block)
    for (int64_t i = 0; i < kInner / 2; ++i)
      for (int64_t n = 0; n < N; n += kLanes) {
        union Values {
          float value[kLanes];
          uint32_t bits[kLanes];
        };
        Values rest[2], upper[2], both;
        for (int64_t h = 0; h < 2; ++h) {
          const int64_t k = block * kInner + h * kInner / 2 + i;
          store(rest[h].value, k < K ? load(w + k * N + n) : zero());
        }
        float* word = tiles + n / kLanes * column + block * 3 * kTileWords + i * kLanes;
        for (int64_t third = 0; third < 3; ++third, word += kTileWords) {
          for (int l = 0; l < kLanes; ++l) {
            for (int h = 0; h < 2; ++h) {
              upper[h].bits[l] = bf16_bits(rest[h].bits[l]) << 16;
              rest[h].value[l] -= upper[h].value[l];
            }
            both.bits[l] = upper[0].bits[l] >> 16 | upper[1].bits[l];
          }
          store(word, load(both.value));
        }
      }
}

}  // namespace ftso::FTSO_ISA
