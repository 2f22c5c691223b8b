// The schedules of csrc/contrast_blocks.h with visits that only count: threads meet as often as they can.
#include "contrast_blocks.h"

using namespace ssl_fast::contrast;

// One block that meets itself again and again: each turn is awaited by the next thread.
struct Alone {
  int64_t turns;
  int64_t players() const { return 1; }
  int64_t size() const { return turns; }
  int64_t player_j(int64_t) const { return 0; }
  Pair pair(int64_t index) const { return {0, 0, index, index}; }
};

// The visits that came before a visit of one of their blocks had ended; -1 where a pair was not visited just once.
template <class Schedule>
static int64_t out_of_turn(const Schedule& schedule, int64_t threads) {
  std::vector<std::atomic<int64_t>> played(schedule.players());
  std::atomic<int64_t> visits{0}, wrong{0};
  for_each_pair(schedule, threads, 64, [&](const Pair& pair, void*) {
    const int64_t j = schedule.player_j(pair.j);
    visits += 1;
    wrong += played[pair.i]++ != pair.turn_i;
    if (j != pair.i) wrong += played[j]++ != pair.turn_j;
  });
  return visits == schedule.size() ? wrong.load() : -1;
}

extern "C" int64_t alone(int64_t turns, int64_t threads) { return out_of_turn(Alone{turns}, threads); }
extern "C" int64_t tournament(int64_t blocks, int64_t threads) { return out_of_turn(Tournament{blocks}, threads); }
extern "C" int64_t meeting(int64_t i, int64_t j, int64_t threads) { return out_of_turn(Meeting{i, j}, threads); }
