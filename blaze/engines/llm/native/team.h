// The threads of one step: they share out items and meet after each phase.
//
// A phase is microseconds long, and a thread can lose its core for a hundred times as long to whatever else
// runs on the machine. So nobody waits for long for an item that another has begun: who has nothing left to
// do computes it too, and whoever of the two is done first puts it into its place. An item is therefore
// computed into memory of the thread's own. (What is not covered: small items, the putting into place, and
// the end of the step, where all threads meet.)

#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include <immintrin.h>

namespace {

// Who has nothing to do spins, for the others are about to finish; but not for long: its core may be wanted.
constexpr int kSpins = 1000;
constexpr uint64_t kShortest = 2000; // ticks before somebody is helped, whatever items take

std::atomic<int64_t> items_overtaken{0}; // since the library was loaded

class Team {
public:
  explicit Team(int64_t most_threads) : held_(most_threads) {}

  class Member;

private:
  // What a thread holds, in one word: the phase, the item that it computes, the one after it, and how far it is.
  enum Mode : uint64_t { kFree, kComputing, kPlacing };
  static constexpr uint64_t kNone = (1 << 23) - 1; // no item
  struct alignas(64) Held {
    std::atomic<uint64_t> word{kFree};
  };

  std::vector<Held> held_;
  alignas(64) std::atomic<uint64_t> given_{0}; // phase << 32 | how many of its items somebody has taken
  alignas(64) std::atomic<uint64_t> done_{0};  // items of the phase
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// One thread of a team.
class Team::Member {
public:
  Member(Team &team, int64_t index) : team_(team), held_(team.held_[index].word) {}

  // Every member calls it with the same arguments: each item is done once, by whoever is free, and all are
  // done when it returns. `compute(i, next)` writes to nothing that others see; it is told what this thread
  // does next, so that it can be fetched meanwhile (`items` and more stand for nothing). `place(i)` comes
  // after it, unless the item was taken over. What is computed by a thread that was overtaken may be
  // anything, for what it reads is being changed already: only indices may not be read from there.
  template <typename Compute, typename Place>
  void each(int64_t items, const Compute &compute, const Place &place) {
    if (!items) return;
    const uint64_t began = __rdtsc();
    uint64_t item = take(items), done = 0;
    while (item != kNone) {
      item = carry_out(items, item, take(items), compute, place);
      done++;
    }
    uint64_t since = __rdtsc();
    if (done) usual_ = (since - began) / done;
    uint64_t patience = kShortest + usual_ + usual_ / 2; // who is at work should have finished by then
    for (int spin = 0; !over(); spin++) {
      bool busy = false;
      if (const uint64_t next = take_next(busy); next != kNone) {
        carry_out(items, next, kNone, compute, place);
        since = __rdtsc();
        spin = 0;
      } else if (busy) {
        spin = 0;
        if (__rdtsc() - since > patience) {
          help(items, compute, place);
          since = __rdtsc();
          patience *= 2; // helping has been of no use, or the others are many
        } else {
          _mm_pause();
        }
      } else if (spin < kSpins) {
        _mm_pause();
      } else {
        team_.phase_.wait(phase_, std::memory_order_acquire);
      }
    }
    phase_++;
  }

  // Items too small to be taken over, which write where they like.
  template <typename Do> void each_small(int64_t items, const Do &item) {
    if (!items) return;
    for (uint64_t i = take(items); i != kNone; i = take(items)) {
      item(i);
      finished(items);
    }
    for (int spin = 0; !over(); spin++)
      if (spin < kSpins)
        _mm_pause();
      else
        team_.phase_.wait(phase_, std::memory_order_acquire);
    phase_++;
  }

private:
  // All members have the same number of phases behind them when they meet; who was overtaken catches up here.
  bool over() const { return int32_t(team_.phase_.load(std::memory_order_acquire) - phase_) > 0; }

  uint64_t word(uint64_t item, uint64_t next, Mode mode) const {
    return uint64_t(phase_) << 48 | item << 25 | next << 2 | mode;
  }

  uint64_t take(int64_t items) {
    uint64_t given = team_.given_.load(std::memory_order_acquire);
    while (given >> 32 == phase_ && int64_t(given & 0xffffffff) < items)
      if (team_.given_.compare_exchange_weak(given, given + 1, std::memory_order_acq_rel)) return given & 0xffffffff;
    return kNone;
  }

  // One copy of each in the program, whoever calls it: two could be compiled to other roundings.
  template <typename Compute> __attribute__((noinline)) static void run(const Compute &compute, uint64_t item, int64_t next) {
    compute(int64_t(item), next);
  }
  template <typename Place> __attribute__((noinline)) static void put(const Place &place, uint64_t item) {
    place(int64_t(item));
  }

  // Gives the item that this thread has to do next.
  template <typename Compute, typename Place>
  uint64_t carry_out(int64_t items, uint64_t item, uint64_t next, const Compute &compute, const Place &place) {
    uint64_t holds = word(item, next, kComputing);
    held_.store(holds, std::memory_order_release);
    run(compute, item, next == kNone ? items : int64_t(next));
    while (!held_.compare_exchange_weak(holds, word(item, kNone, kPlacing), std::memory_order_acq_rel))
      if (holds == word(item, kNone, kComputing))
        next = kNone; // somebody else does it
      else if (holds != word(item, next, kComputing))
        return take(items); // overtaken
    put(place, item);
    finished(items);
    return next == kNone ? take(items) : next;
  }

  void finished(int64_t items) {
    if (int64_t(team_.done_.fetch_add(1, std::memory_order_acq_rel)) + 1 < items) return;
    team_.done_.store(0, std::memory_order_relaxed);
    team_.given_.store(uint64_t(phase_ + 1) << 32, std::memory_order_relaxed);
    team_.phase_.store(phase_ + 1, std::memory_order_seq_cst); // before notify looks for who sleeps
    team_.phase_.notify_all();
  }

  // What another member has not begun; `busy`: somebody is at work.
  uint64_t take_next(bool &busy) {
    for (Held &other : team_.held_) {
      uint64_t holds = other.word.load(std::memory_order_acquire);
      const uint64_t item = holds >> 25 & kNone, next = holds >> 2 & kNone;
      if (holds != word(item, next, kComputing)) continue;
      busy = true;
      if (next == kNone) continue;
      if (other.word.compare_exchange_strong(holds, word(item, kNone, kComputing), std::memory_order_acq_rel)) return next;
    }
    return kNone;
  }

  // Does what another member has not finished; whoever of the two is done first puts it into its place.
  template <typename Compute, typename Place> void help(int64_t items, const Compute &compute, const Place &place) {
    for (Held &other : team_.held_) {
      uint64_t holds = other.word.load(std::memory_order_acquire);
      const uint64_t item = holds >> 25 & kNone;
      if (holds != word(item, kNone, kComputing)) continue;
      run(compute, item, items);
      if (!other.word.compare_exchange_strong(holds, word(item, kNone, kFree), std::memory_order_acq_rel)) return;
      items_overtaken.fetch_add(1, std::memory_order_relaxed);
      put(place, item);
      finished(items);
      return;
    }
  }

  Team &team_;
  std::atomic<uint64_t> &held_;
  uint32_t phase_ = 0;
  uint64_t usual_ = 0; // duration of an item, in ticks of the processor's clock
};

} // namespace
