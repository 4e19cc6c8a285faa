// Work in pieces, by the threads of the runtime that the host process already has.
#pragma once

#include "api.h"

namespace fewbits {

// What one thread works with: `bytes` of memory of its own, aligned to 64, whose contents are not kept.
struct Piece {
  int64_t begin, end;  // items of the job
  uint8_t *scratch;
};

// Runs work(task, piece) for pieces of at most `grain` items until `items` are done, on at most `threads`
// threads. False: no memory for the scratch; nothing ran.
bool run_pieces(void (*work)(const void *task, const Piece &piece), const void *task, int64_t items,
                int64_t grain, int64_t scratch_bytes, int32_t threads);

// Memory for one call of the API, aligned to 64 and given back at its end.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  template <class T>
  T *as() const {
    return static_cast<T *>(data_);
  }
  bool failed() const { return data_ == nullptr; }

 private:
  void *data_;
};

}  // namespace fewbits
