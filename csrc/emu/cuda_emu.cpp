// The scheduler of the emulator: compiled without sanitizers, which it tells about fibers and synchronisation instead.
#include "cuda_emu.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

extern "C" {
#define WEAK __attribute__((weak))
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}

#if defined(__x86_64__)
// Saves what a callee keeps, and the stack, in *from; goes on where `to` left off.
extern "C" void ftso_emu_switch(void** from, void* to);
asm(R"(
.text
.globl ftso_emu_switch
.hidden ftso_emu_switch
.type ftso_emu_switch, @function
ftso_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ftso_emu_switch, .-ftso_emu_switch
)");
#else
#include <ucontext.h>
#endif

namespace ftso::emu {

Thread* self;
Shape shape;

namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;
constexpr unsigned kNoSync = 1;  // of __tsan_switch_to_fiber

enum class State { kReady, kBarrier, kWarp, kDone };

struct Fiber {
  Thread at;
  State state = State::kDone;
  const char* file = nullptr;  // where it waits
  int line = 0;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
};

struct Warp {
  int lanes = 0, waiting = 0, generation = 0;
  uint64_t values[2][32] = {};
  char tags[2] = {};  // in turn: who has not yet left an exchange learns nothing of those already at the next
};

struct Settings {
  Policy policy = Policy::kAscending;
  Order order = Order::kAscending;
  uint32_t random = 1;
  bool join = false;
} settings;

Fiber scheduler;
std::vector<Fiber> pools[2];  // blocks take turns, so that a race detector knows neighbours apart
std::vector<Fiber>* block;
std::vector<Warp> warps;  // of this block alone, and one more for its barriers: nor may tags outlive a block
const std::function<void()>* kernel;
char *shared, launch_tag, end_tag;
size_t shared_size;
std::vector<char*> finished;  // blocks' shared memory
const void* main_stack;
size_t main_stack_size;

[[noreturn]] void fault(const char* what, const Fiber* a, const Fiber* b = nullptr) {
  fprintf(stderr, "cuda_emu: block (%u, %u, %u): %s\n", a->at.block.x, a->at.block.y, a->at.block.z, what);
  for (const Fiber* f : {a, b})
    if (f) fprintf(stderr, "  thread %u: %s:%d\n", f->at.thread.x, f->file ? f->file : "never waited", f->line);
  fflush(stderr);
  _Exit(kFault);
}

void acquire(char& tag) {
  if (__tsan_acquire) __tsan_acquire(&tag);
}
void release(char& tag) {
  if (__tsan_release) __tsan_release(&tag);
}

void swap(Fiber& from, Fiber& to, bool last) {
  const bool home = &to == &scheduler;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, home ? main_stack : to.stack,
                                   home ? main_stack_size : kStack);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, kNoSync);
#if defined(__x86_64__)
  ftso_emu_switch(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

Fiber& current() { return *reinterpret_cast<Fiber*>(self); }

void wait(State state, const char* file, int line) {
  Fiber& f = current();
  f.state = state, f.file = file, f.line = line;
  swap(f, scheduler, false);
}

void body() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
  acquire(launch_tag);
  (*kernel)();
  release(end_tag);
  Fiber& f = current();
  f.state = State::kDone;
  swap(f, scheduler, true);
  abort();
}

int thread_of(const Fiber& f) {
  return f.at.thread.x + shape.threads.x * (f.at.thread.y + shape.threads.y * f.at.thread.z);
}

void begin(Fiber& f) {
  if (!f.stack) {
    char* pages = static_cast<char*>(
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (pages == MAP_FAILED || mprotect(pages, kGuard, PROT_NONE)) abort();
    f.stack = pages + kGuard;
    if (__tsan_create_fiber) f.tsan = __tsan_create_fiber(0);
  }
  f.state = State::kReady, f.file = nullptr, f.line = 0;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + kStack) - 2;  // 16 bytes aligned behind the return address
  *top = reinterpret_cast<void*>(&body);
  f.sp = top - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = kStack, f.context.uc_link = nullptr;
  makecontext(&f.context, &body, 0);
#endif
}

uint32_t draw() {
  settings.random = settings.random * 1664525u + 1013904223u;
  return settings.random >> 8;
}

// Lets everybody through, where all wait at one barrier.
bool open_barrier() {
  const Fiber *first = nullptr, *gone = nullptr;
  for (const Fiber& f : *block) {
    if (f.state == State::kReady || f.state == State::kWarp) return false;
    if (f.state == State::kDone) {
      gone = &f;
      continue;
    }
    if (first && (f.line != first->line || strcmp(f.file, first->file))) fault("barriers diverge", first, &f);
    if (!first) first = &f;
  }
  if (!first) return false;
  if (gone) fault("a thread waits at a barrier and another has left the kernel", first, gone);
  for (Fiber& f : *block) f.state = State::kReady;
  ++warps.back().generation;
  return true;
}

int next(int last) {
  const int n = static_cast<int>(block->size());
  const Policy p = settings.policy;
  const bool down = p == Policy::kDescending || p == Policy::kLastAhead;
  const bool in_turn = p == Policy::kAscending || p == Policy::kDescending;
  const int start = p == Policy::kRandom ? static_cast<int>(draw() % n) : in_turn ? last : down ? n : -1;
  for (int step = 1; step <= n; ++step) {
    const int i = ((down ? start - step : start + step) % n + n) % n;
    if ((*block)[i].state == State::kReady) return i;
  }
  return -1;
}

// To a race detector this is a write: only after the blocks that used the memory.
void give_back() {
  for (char* memory : finished) free(memory);
  finished.clear();
}

void run_block(uint3 at, std::vector<Fiber>& fibers) {
  block = &fibers;
  const dim3 d = shape.threads;
  const int n = static_cast<int>(d.x * d.y * d.z);
  fibers.resize(n);
  warps = std::vector<Warp>((n + 31) / 32 + 1);
  for (int w = 0; 32 * w < n; ++w) warps[w].lanes = std::min(32, n - 32 * w);
  for (int i = 0; i < n; ++i) {
    fibers[i].at = {{i % d.x, i / d.x % d.y, i / (d.x * d.y)}, at};
    begin(fibers[i]);
  }
  // fresh and not a number, so that nothing is left from another block and whatever nobody wrote shows
  shared = static_cast<char*>(shared_size ? aligned_alloc(16, (shared_size + 15) / 16 * 16) : nullptr);
  if (shared) memset(shared, 0xff, shared_size);
  release(launch_tag);
  for (int i = settings.policy == Policy::kDescending ? n : -1;;) {
    const int chosen = next(i);
    if (chosen >= 0) {
      i = chosen;
      self = &fibers[i].at;
      swap(scheduler, fibers[i], false);
    } else if (!open_barrier()) {
      const Fiber* stuck = nullptr;
      for (const Fiber& f : fibers)
        if (f.state != State::kDone) stuck = &f;
      if (!stuck) break;
      const Fiber* other = nullptr;
      for (const Fiber& f : fibers)
        if (thread_of(f) / 32 == thread_of(*stuck) / 32 && f.state != State::kWarp) other = &f;
      fault("a warp's exchange waits for lanes that do not come", stuck, other);
    }
  }
  if (settings.join) acquire(end_tag);
  finished.push_back(shared);
  if (settings.join || !__tsan_acquire) give_back();
}

void wait_for_warp(Warp& w, const char* file, int line) {
  const Fiber& mine = current();
  const int first = thread_of(mine) / 32 * 32;
  for (int i = first; i < first + w.lanes; ++i) {
    const Fiber& f = (*block)[i];
    if (f.state == State::kWarp && (f.line != line || strcmp(f.file, file))) {
      Fiber here = mine;
      here.file = file, here.line = line;
      fault("exchanges of a warp diverge", &here, &f);
    }
  }
  char& tag = w.tags[w.generation & 1];
  release(tag);
  if (++w.waiting == w.lanes) {
    w.waiting = 0, ++w.generation;
    for (int i = first; i < first + w.lanes; ++i)
      if ((*block)[i].state == State::kWarp) (*block)[i].state = State::kReady;
  } else {
    wait(State::kWarp, file, line);
  }
  acquire(tag);
}

}  // namespace

void schedule(Policy policy, Order blocks, uint32_t seed, bool join) { settings = {policy, blocks, seed, join}; }

void launch(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& body_of_kernel) {
  shape = {blocks, threads}, kernel = &body_of_kernel, shared_size = shared_bytes;
  if (threads.x * threads.y * threads.z > 1024 || !threads.x || !blocks.x || blocks.y > 65535 || blocks.z > 65535) {
    fprintf(stderr, "cuda_emu: launch: no GPU takes this grid\n");
    _Exit(kFault);
  }
  if (__tsan_get_current_fiber) scheduler.tsan = __tsan_get_current_fiber();
  const unsigned n = blocks.x * blocks.y * blocks.z;
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) order[i] = settings.order == Order::kDescending ? n - 1 - i : i;
  if (settings.order == Order::kShuffled)
    for (unsigned i = n; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  for (unsigned i = 0; i < n; ++i) {
    const unsigned b = order[i];
    run_block({b % blocks.x, b / blocks.x % blocks.y, b / (blocks.x * blocks.y)}, pools[i % 2]);
  }
  acquire(end_tag);
  give_back();
}

void* shared_memory(size_t bytes) {
  if (bytes > shared_size) fault("the launch gave less shared memory than the kernel uses", &current());
  return shared;
}

void barrier(const char* file, int line) {
  Warp& all = warps.back();
  char& tag = all.tags[all.generation & 1];
  release(tag);
  wait(State::kBarrier, file, line);
  acquire(tag);
}

void warp_barrier(const char* file, int line) { wait_for_warp(warps[thread_of(current()) / 32], file, line); }

uint64_t exchange(unsigned mask, uint64_t mine, Pick pick, const char* file, int line) {
  Fiber& f = current();
  Warp& w = warps[thread_of(f) / 32];
  const int lane = thread_of(f) % 32;
  const unsigned all = w.lanes == 32 ? ~0u : (1u << w.lanes) - 1;
  if (mask != all) f.file = file, f.line = line, fault("an exchange is not of the whole warp", &f);
  const int from = w.generation & 1;  // two rooms: nobody can be two exchanges ahead
  w.values[from][lane] = mine;
  wait_for_warp(w, file, line);
  const int segment = lane / pick.width * pick.width;
  int source = pick.how == 'i'   ? segment + pick.by % pick.width
               : pick.how == 'x' ? lane ^ pick.by
               : pick.how == 'u' ? lane - pick.by
                                 : lane + pick.by;
  if (source < segment || source >= segment + pick.width) source = lane;
  if (source >= w.lanes) f.file = file, f.line = line, fault("an exchange reads a lane that is not there", &f);
  return w.values[from][source];
}

}  // namespace ftso::emu
