// What is remembered of each byte: is it written, is a copy to it in flight, and who touched it when.
#include "memory.h"

namespace vm {
void check_shared_state(Warp& w, const Op& op, u32 lane, u32 offset, u32 bytes, bool reads) {
  const u8* state = w.block->state.data() + offset;
  for (u32 i = 0; i < bytes; i++) {
    if (state[i] == 1) continue;
    if (state[i] > 1 && w.block->launch->config->check_races) {
      u32 other = NO_REG;
      for (auto& v : w.block->warps)
        for (auto& c : v.copies)
          if (offset + i >= c.dest && offset + i < c.dest + c.bytes) other = c.op;
      fail(ASYNC_HAZARD, w, lane,
           std::string(reads ? "read" : "write") + " of shared byte " + std::to_string(offset + i) +
               " while a cp.async to it is in flight",
           op_index(w, op), other);
    }
    if (reads && !(state[i] & 1) && w.block->launch->config->check_uninitialised)
      fail(UNINITIALISED, w, lane, "read of shared byte " + std::to_string(offset + i) + ", which nobody has written",
           op_index(w, op));
  }
}

bool ordered(const Warp& w, u32 lane, u32 other_warp, u32 time, u8 other_lane) {
  if (time == 0) return true;
  const u32 n = w.block->launch->n_warps, block = other_warp / n, index = other_warp % n;
  if (other_warp == global_id(w)) return other_lane == lane || time < w.epoch;
  if (block == w.block->linear) return time <= w.seen[index];
  const auto known = w.remote.find(block);
  return known != w.remote.end() && time <= known->second[index];
}

namespace {
std::string name_of(const Launch& l, u32 warp, u8 lane) {
  const u32 block = warp / l.n_warps, index = warp % l.n_warps;
  const auto& g = l.config->grid;
  const auto& s = l.config->block;
  auto triple = [](u64 i, const u32* n) {
    return "(" + std::to_string(i % n[0]) + "," + std::to_string(i / n[0] % n[1]) + "," +
           std::to_string(i / n[0] / n[1]) + ")";
  };
  return "block " + triple(block, g) +
         (lane == MANY_LANES ? " warp " + std::to_string(index) : " thread " + triple(index * 32 + lane, s));
}

struct Where {
  u32 range;
  u64 offset;
  u32 bytes;
};  // range NO_REG: shared memory
const char* verb(Kind k) { return k == Kind::read ? "read" : k == Kind::atomic ? "atomic" : "write"; }

void touch(Warp& w, Cell& c, u32 op, u32 lane, Kind kind, bool same_value, bool strong, const Where& at) {
  const Launch& l = *w.block->launch;
  auto race = [&](const char* other, u32 warp, u8 other_lane, u32 other_op) {
    const bool shared = at.range == NO_REG;
    fail(RACE, w, lane,
         std::string(shared ? "shared " : "global ") + verb(kind) + " of " + std::to_string(at.bytes) + " bytes at " +
             (shared ? "offset " : "byte ") + std::to_string(at.offset) +
             (shared ? "" : " of @range(" + std::to_string(at.range) + ")") + " is not ordered after the " + other +
             " by " + name_of(l, warp, other_lane),
         op, other_op);
  };
  auto check_readers = [&] {
    for (int k = 0; k < 2; k++)
      if (!ordered(w, lane, c.read_warp[k], c.read_time[k], c.read_lane[k]))
        race("read", c.read_warp[k], c.read_lane[k], c.read_op);
  };
  if (kind == Kind::intent) return check_readers();
  // The loop around a compare-and-swap begins with a plain read, whose value the swap then checks.
  const bool word_atomics = l.config->word_atomics && at.range != NO_REG;
  const bool both_strong = c.atomic && (strong || (word_atomics && kind == Kind::read));
  if (!(kind == Kind::write && same_value) && !both_strong &&
      !ordered(w, lane, c.write_warp, c.write_time, c.write_lane))
    race(c.atomic ? "atomic" : "write", c.write_warp, c.write_lane, c.write_op);
  const u32 me = global_id(w);
  if (kind == Kind::read) {
    if (strong) return;
    int k = 0;
    if (c.read_time[0] && c.read_warp[0] != me) {
      k = 1;
      if (c.read_time[1] && c.read_warp[1] != me && ordered(w, lane, c.read_warp[0], c.read_time[0], MANY_LANES)) k = 0;
    }
    c.read_lane[k] =
        c.read_time[k] == w.epoch && c.read_warp[k] == me && c.read_lane[k] != lane ? MANY_LANES : u8(lane);
    c.read_time[k] = w.epoch;
    c.read_warp[k] = me;
    c.read_op = op;
    return;
  }
  if (same_value && kind == Kind::write) return;
  if (!(word_atomics && kind == Kind::atomic)) check_readers();
  c.write_time = w.epoch;
  c.write_warp = me;
  c.write_lane = u8(lane);
  c.write_op = op;
  c.atomic = strong;
  c.read_time[0] = c.read_time[1] = 0;
}
}  // namespace

void note_shared(Warp& w, u32 op, u32 lane, u32 offset, u32 bytes, Kind kind, bool same_value, u32 flags) {
  const u32 g = w.block->launch->config->shared_granule;
  for (u32 x = offset / g; x <= (offset + bytes - 1) / g; x++)
    touch(w, w.block->cells[x], op, lane, kind, same_value, flags & STRONG, {NO_REG, offset, bytes});
}

void note(Warp& w, const Op& op, u32 lane, const Access& a, Kind kind, bool same_value) {
  if (a.space == SHARED)
    return note_shared(w, op_index(w, op), lane, u32(a.addr[lane]), a.bytes, kind, same_value, op.flags);
  Launch& l = *w.block->launch;
  const u64 begin = a.addr[lane];
  u32 i = l.last_range;
  if (!inside(l, i, begin, a.bytes))
    for (i = 0; !inside(l, i, begin, a.bytes); i++) {
    }
  const Range& r = l.ranges[i];
  if (r.read_only) return;
  const u32 g = l.config->global_granule;
  auto& cells = l.cells[r.region];
  for (u64 x = (begin - r.region_begin) / g; x <= (begin + a.bytes - 1 - r.region_begin) / g; x++) {
    if (op.flags & READ_ONLY && cells[x].write_time)
      fail(RACE, w, lane,
           "read through the non-coherent cache (ld.global.nc) of @range(" + std::to_string(i) +
               "), which this launch has written",
           op_index(w, op), cells[x].write_op);
    touch(w, cells[x], op_index(w, op), lane, kind, same_value, op.flags & STRONG, {i, begin - r.begin, a.bytes});
  }
}
}  // namespace vm
