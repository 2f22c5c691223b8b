// The row blocks of NT-Xent, and all pairs of them in parallel, in a fixed order for each block.
#pragma once

#include "nt_xent_tiles.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace ssl_fast::nt_xent {

struct Pair {
  int64_t i, j, round;  // i <= j
};

// The rows of each half (z1, then z2) in blocks of kBlock, so that a row and its positive have the same place in blocks
// b and b + count / 2. Packed arrays hold each half padded to a multiple of kRowMultiple.
struct Blocks {
  int64_t n;       // N, rows of a half
  int64_t padded;  // of a half
  int64_t per_half;

  explicit Blocks(int64_t n) : n(n), padded(round_up(n, kRowMultiple)), per_half(ceil_div(n, kBlock)) {}
  int64_t count() const { return 2 * per_half; }
  int64_t half(int64_t b) const { return b / per_half; }
  int64_t first(int64_t b) const { return b % per_half * kBlock; }  // row of its half
  int rows(int64_t b) const { return static_cast<int>(std::min<int64_t>(kBlock, n - first(b))); }
  int64_t packed(int64_t b) const { return half(b) * padded + first(b); }
  int64_t packed_row(int64_t i) const { return i < n ? i : padded + i - n; }
  // Whether i == j within the pair of blocks are self terms or positives.
  bool diagonal(const Pair& pair) const { return pair.i == pair.j || pair.i + per_half == pair.j; }
};

// Round 0 pairs each block with itself. Rounds 1 .. blocks - 1 are the circle method: the last block stays, the others
// move round; blocks is even.
inline Pair tournament_pair(int64_t blocks, int64_t index) {
  if (index < blocks) return {index, index, 0};
  const int64_t round = 1 + (index - blocks) / (blocks / 2), table = (index - blocks) % (blocks / 2);
  const int64_t ring = blocks - 1, first = (round - 1 + table) % ring;
  const int64_t second = table == 0 ? blocks - 1 : (round - 1 - table + ring) % ring;
  return {std::min(first, second), std::max(first, second), round};
}

// visit(pair) for all pairs i <= j, on up to `threads` threads. A thread takes the next pair and waits until both blocks
// have finished the round before; pairs are taken in order of rounds, so some earlier pair can always go on.
template <class Visit>
void for_each_pair(int64_t blocks, int64_t threads, const Visit& visit) {
  const int64_t tasks = blocks + (blocks - 1) * (blocks / 2);
  std::atomic<int64_t> next{0};
  std::vector<std::atomic<int64_t>> rounds_done(blocks);
  const auto await = [&](int64_t block, int64_t round) {
    while (rounds_done[block].load(std::memory_order_acquire) != round) std::this_thread::yield();
  };
  const auto work = [&] {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const Pair pair = tournament_pair(blocks, task);
      await(pair.i, pair.round);
      await(pair.j, pair.round);
      visit(pair);
      rounds_done[pair.i].store(pair.round + 1, std::memory_order_release);
      rounds_done[pair.j].store(pair.round + 1, std::memory_order_release);
    }
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) work();
  });
}

}  // namespace ssl_fast::nt_xent
