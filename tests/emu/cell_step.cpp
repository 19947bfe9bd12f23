// Every stage of a cell on memory that ends where it must not be read past: for the sanitizers, which see the kernels
// run, and for what must not change with a schedule. cell_step POLICY BLOCKS short|long: prints a digest of all output.
#include "cell_step.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <list>
#include <vector>

#include "cuda_emu.h"

namespace {

uint64_t digest = 1469598103934665603u;
uint32_t random_state = 1;

float draw() {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<float>(random_state >> 8) / (1 << 23) - 1;
}

// Heap blocks of exactly the size asked for: inputs of numbers, outputs of NaN that must all be written.
class Memory {
 public:
  float* input(size_t n) {
    blocks_.emplace_back(n);
    for (float& v : blocks_.back()) v = draw();
    return blocks_.back().data();
  }
  float* output(size_t n) {
    float* made = input(n);
    memset(made, 0xff, n * sizeof(float));
    outputs_.push_back(&blocks_.back());
    return made;
  }
  bool settle() const {
    for (const auto* out : outputs_)
      for (const float& v : *out) {
        if (v != v) return false;
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        digest = (digest ^ bits) * 1099511628211u;
      }
    return true;
  }

 private:
  std::list<std::vector<float>> blocks_;
  std::vector<const std::vector<float>*> outputs_;
};

bool stages(int B, int C, int H, int W, int k, int rows, int strided, int parts) {
  Memory m;
  const int pixels = H * W, half = H / 2 * (W / 2);
  ftso::CudaCell cell{B, C, H, W, k, m.input(14), {}};
  const int64_t image = int64_t{C} * pixels;
  for (auto& x : cell.x) x = {m.input(B * image), image, m.input(C), m.input(C)};
  ftso::CudaCellForward forward{cell, {}, {}, nullptr};
  ftso::CudaCellBackward backward{cell, {}, {}, nullptr, {}, nullptr, nullptr};
  const auto reader = [&](int n, int plane, ftso::CudaProduct& product, ftso::CudaBehind& behind) {
    const float* w = m.input(size_t{4} * n * C);
    const int64_t size = int64_t{B} * n * plane;
    product = {w, m.output(size), m.output(2 * n * ftso::cell_parts(B, C, plane, false)), n};
    behind = {w,          m.input(size), m.input(size),      m.input(n), m.input(n),
              m.input(n), nullptr,       int64_t{4} * n * C, n,          parts};
    behind.dw = m.output(parts * behind.part);
  };
  if (rows) reader(rows, pixels, forward.main, backward.main);
  if (strided) reader(strided, half, forward.strided, backward.strided);
  if (!rows) forward.pooled = m.output(size_t{4} * B * C), backward.d_pooled = m.input(size_t{4} * B * C);
  const int tiles = ftso::cell_parts(B, C, pixels, true);
  for (float*& g : backward.g) g = m.output(B * image);
  backward.sums = m.output(4 * C * tiles), backward.dots = m.output(14 * tiles);
  const bool right = !ftso::cell_step_fwd(forward, 0, nullptr) && !ftso::cell_step_bwd(backward, 0, nullptr);
  return right && m.settle();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  ftso::emu::schedule(static_cast<ftso::emu::Policy>(atoi(argv[1])), static_cast<ftso::emu::Order>(atoi(argv[2])));
  bool right = stages(2, 16, 2, 6, 4, 5, 2, 1) && stages(2, 16, 3, 3, 2, 0, 0, 1);
  if (right && strcmp(argv[3], "long") == 0)
    right = stages(2, 16, 12, 12, 8, 48, 32, 3) && stages(1, 32, 7, 11, 4, 65, 0, 2) &&
            stages(1, 32, 6, 6, 1, 64, 64, 1) && stages(2, 64, 5, 7, 4, 0, 0, 1) &&
            stages(1, 64, 4, 10, 2, 130, 64, 3) && stages(1, 128, 2, 18, 4, 257, 6, 1);
  printf("%016llx\n", static_cast<unsigned long long>(digest));
  return right ? 0 : 1;
}
