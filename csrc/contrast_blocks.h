// Row blocks, and all pairs of them in parallel, in a fixed order for each block.
#pragma once

#include "contrast_tiles.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace ssl_fast::contrast {

// The rows of a matrix in blocks of kBlock. Arrays over rows are padded to kRowMultiple.
struct Blocks {
  int64_t n, padded, count;

  explicit Blocks(int64_t n) : n(n), padded(round_up(n, kRowMultiple)), count(ceil_div(n, kBlock)) {}
  int64_t first(int64_t b) const { return b * kBlock; }
  int rows(int64_t b) const { return static_cast<int>(std::min<int64_t>(kBlock, n - first(b))); }
};

// The `turn_i`-th pair of block i and the `turn_j`-th of block j.
struct Pair {
  int64_t i, j, turn_i, turn_j;
};

// All pairs i <= j of an even number of blocks. Round 0 pairs each block with itself. Rounds 1 .. blocks - 1 are the
// circle method of round-robin tournaments: the last block stays, the others move round.
struct Tournament {
  int64_t blocks;

  int64_t players() const { return blocks; }
  int64_t size() const { return blocks + (blocks - 1) * (blocks / 2); }
  int64_t player_j(int64_t j) const { return j; }
  Pair pair(int64_t index) const {
    if (index < blocks) return {index, index, 0, 0};
    const int64_t round = 1 + (index - blocks) / (blocks / 2), table = (index - blocks) % (blocks / 2);
    const int64_t ring = blocks - 1, first = (round - 1 + table) % ring;
    const int64_t second = table == 0 ? blocks - 1 : (round - 1 - table + ring) % ring;
    return {std::min(first, second), std::max(first, second), round, round};
  }
};

// All pairs of a block i of one matrix with a block j of another: in each round every block of the shorter matrix meets
// the next one of the longer, round and round.
struct Meeting {
  int64_t blocks_i, blocks_j;

  int64_t players() const { return blocks_i + blocks_j; }
  int64_t size() const { return blocks_i * blocks_j; }
  int64_t player_j(int64_t j) const { return blocks_i + j; }
  Pair pair(int64_t index) const {
    const int64_t few = std::min(blocks_i, blocks_j), many = std::max(blocks_i, blocks_j);
    const int64_t round = index / few, a = index % few, b = (a + round) % many;
    // b plays in the rounds b - few + 1 .. b, modulo `many`.
    const int64_t first = b - few + 1;
    const int64_t turn = first >= 0 ? round - first : round <= b ? round : b + 1 + round - (many + first);
    return blocks_i <= blocks_j ? Pair{a, b, round, turn} : Pair{b, a, turn, round};
  }
};

// visit(pair, scratch) for all pairs of a schedule, on up to `threads` threads, each with scratch_bytes of work space. A
// thread takes the next pair and waits until both blocks have had their turns before it; pairs are taken in order of
// rounds, so some earlier pair can always go on. In a round no block plays twice: threads write straight into the sums
// and gradients of their two blocks, and each block takes its contributions in the same order whatever the number of
// threads.
template <class Schedule, class Visit>
void for_each_pair(const Schedule& schedule, int64_t threads, int64_t scratch_bytes, const Visit& visit) {
  std::atomic<int64_t> next{0};
  std::vector<std::atomic<int64_t>> turns(schedule.players());
  Failure failure;
  const auto await = [&](int64_t player, int64_t turn) {
    while (turns[player].load(std::memory_order_acquire) != turn && !failure) std::this_thread::yield();
  };
  const auto work = [&] {
    const Scratch scratch(scratch_bytes);
    for (int64_t task; !failure && (task = next.fetch_add(1, std::memory_order_relaxed)) < schedule.size();) {
      const Pair pair = schedule.pair(task);
      const int64_t player_j = schedule.player_j(pair.j);
      await(pair.i, pair.turn_i);
      await(player_j, pair.turn_j);
      if (failure) return;  // of a thread whose turn will not come
      visit(pair, scratch.get());
      // Counted once where a block meets itself. To store the next turn twice would not do: between the two, another
      // thread may end the block's next pair, whose turn the second store takes back.
      turns[pair.i].fetch_add(1, std::memory_order_release);
      if (player_j != pair.i) turns[player_j].fetch_add(1, std::memory_order_release);
    }
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) failure.guard(work);
  });
  failure.rethrow();
}

}  // namespace ssl_fast::contrast
