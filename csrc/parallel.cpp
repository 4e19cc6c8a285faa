#include "parallel.h"

#include <pthread.h>
#include <stdlib.h>

#include <atomic>

namespace fewbits {

namespace {

std::atomic<fewbits_parallel> runtime{nullptr};

// AddressSanitizer sees only what lies beside a block of just the size that is asked for.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool IS_CHECKED = true;
#else
constexpr bool IS_CHECKED = false;
#endif

// A call in the middle of decoding a token must not ask the system for memory each time, hence one block per
// thread is kept. Larger ones are given back at once.
constexpr int64_t KEPT_BYTES = IS_CHECKED ? 0 : 8 << 20;

struct Kept {
  void *data;
  int64_t bytes;
  bool taken;
};
thread_local Kept kept;

// Frees a thread's block at its end. A destructor of `kept` would do, if it did not need the C++ runtime library.
pthread_key_t at_exit;
pthread_once_t at_exit_made = PTHREAD_ONCE_INIT;
bool at_exit_works;

void free_at_exit(void *data) {
  pthread_once(&at_exit_made, [] { at_exit_works = pthread_key_create(&at_exit, free) == 0; });
  if (at_exit_works) pthread_setspecific(at_exit, data);
}

void *aligned(int64_t bytes) {
  void *data = nullptr;
  return posix_memalign(&data, 64, (size_t)bytes) ? nullptr : data;
}

void *take(int64_t bytes) {
  if (bytes > KEPT_BYTES || kept.taken) return aligned(bytes);
  if (bytes > kept.bytes) {
    free(kept.data);
    kept.data = aligned(bytes);
    kept.bytes = kept.data ? bytes : 0;
    free_at_exit(kept.data);
  }
  kept.taken = kept.data != nullptr;
  return kept.data;
}

void give_back(void *data) {
  if (data == kept.data && data != nullptr) {
    kept.taken = false;
  } else {
    free(data);
  }
}

struct Job {
  void (*work)(const void *task, const Piece &piece);
  const void *task;
  int64_t items, grain, scratch_bytes;
  std::atomic<int64_t> next{0};
  std::atomic<bool> no_memory{false};
};

void work_off(void *argument) {
  Job &job = *static_cast<Job *>(argument);
  Buffer scratch(job.scratch_bytes + 64);
  if (scratch.failed()) {
    job.no_memory = true;
    return;
  }
  for (;;) {
    int64_t begin = job.next.fetch_add(job.grain, std::memory_order_relaxed);
    if (begin >= job.items) return;
    int64_t end = begin + job.grain < job.items ? begin + job.grain : job.items;
    job.work(job.task, Piece{begin, end, scratch.as<uint8_t>()});
  }
}

}  // namespace

Buffer::Buffer(int64_t bytes) : data_(take(bytes < 64 ? 64 : bytes)) {}
Buffer::~Buffer() { give_back(data_); }

bool run_pieces(void (*work)(const void *task, const Piece &piece), const void *task, int64_t items,
                int64_t grain, int64_t scratch_bytes, int32_t threads) {
  Job job;
  job.work = work;
  job.task = task;
  job.items = items;
  job.grain = grain > 0 ? grain : 1;
  job.scratch_bytes = scratch_bytes;
  int64_t pieces = (items + job.grain - 1) / job.grain;
  unsigned team = (unsigned)(pieces < threads ? pieces : threads);
  fewbits_parallel start = runtime.load(std::memory_order_relaxed);
  if (team > 1 && start) {
    start(work_off, &job, team, 0);
  } else if (items > 0) {
    work_off(&job);
  }
  // A thread without memory leaves its pieces to the others; what is left when none has any is not done.
  return job.next.load() >= items || items == 0 || !job.no_memory;
}

}  // namespace fewbits

int32_t fewbits_set_parallel(fewbits_parallel parallel) {
  fewbits::runtime.store(parallel);
  return FEWBITS_OK;
}
