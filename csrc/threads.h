// Work on torch's pool of threads; see launch.cpp.
#pragma once
#include <cstdint>
#include <vector>

namespace ftso {

bool in_forked_child();

// The calling thread's scratch memory, kept from call to call.
float* thread_scratch(int64_t floats);

// work(chunk) for chunks 0..count-1, each on whichever thread is free.
template <typename Work>
void over_chunks_of_work(int64_t count, int threads, Work work) {
  if (in_forked_child()) threads = 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t chunk = 0; chunk < count; ++chunk) work(chunk);
}

}  // namespace ftso
