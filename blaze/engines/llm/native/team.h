// The threads of one step: they share out items and meet after each phase.

#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Between phases there are microseconds, so a thread that is early spins; but not for long, for it may be
// waiting for one whose core somebody else has taken, and then its own is better given away too.
constexpr int kSpins = 1000;

class Team {
public:
  void of(int64_t threads) { threads_ = threads; }

  // Every thread of the team calls it with the same arguments: each item is done once, by whoever is free,
  // and all are done when it returns. `item(i, next)` is told what this thread does next, so that it can be
  // fetched meanwhile; `items` and more stand for nothing.
  template <typename Do> void each(int64_t items, const Do &item) {
    int64_t next = next_.fetch_add(1, std::memory_order_relaxed);
    while (next < items) {
      const int64_t i = next;
      next = next_.fetch_add(1, std::memory_order_relaxed);
      item(i, next);
    }
    meet();
  }

private:
  void meet() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_seq_cst); // before notify looks for who sleeps
      phase_.notify_all();
      return;
    }
    for (int spin = 0; spin < kSpins; spin++) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

  int64_t threads_ = 1;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

} // namespace
