// Who is ordered after whom: vector clocks of warps, advanced by barriers, fences and atomics. And warp rendezvous.
#include <algorithm>

#include "lanes.h"

namespace vm {
void join(Clocks& to, const Clocks& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}
namespace {
void acquire(Warp& w, const Published& p) {
  if (p.block == w.block->linear)
    join(w.seen, p.own);
  else
    join(w.remote[p.block], p.own);
  for (auto& [block, clocks] : p.remote) {
    if (block == w.block->linear)
      join(w.seen, clocks);
    else
      join(w.remote[block], clocks);
  }
}
Snapshot snapshot(Warp& w) {
  auto s = std::make_shared<Published>(Published{w.block->linear, w.seen, w.remote});
  s->own[w.id] = w.epoch++;
  return s;
}
Snapshot merged(const Snapshot& a, const Snapshot& b) {
  if (!a) return b;
  auto s = std::make_shared<Published>(*b);
  if (a->block == s->block)
    join(s->own, a->own);
  else
    join(s->remote[a->block], a->own);
  for (auto& [block, clocks] : a->remote) join(block == s->block ? s->own : s->remote[block], clocks);
  return s;
}
}  // namespace

void fence(Warp& w) {
  if (!w.block->launch->config->check_races && !w.block->launch->config->check_global_races) return;
  for (auto& p : w.pending) acquire(w, *p);
  w.pending.clear();
  w.fenced = snapshot(w);
}
void warp_synced(Warp& w) { w.epoch++; }

// A strong access to the address `key`: reads what others published there, publishes what this warp may.
void synchronise(Warp& w, std::unordered_map<u64, Snapshot>& map, u64 key, u32 flags, bool reads, bool writes) {
  const auto found = map.find(key);
  const Snapshot before = found == map.end() ? nullptr : found->second;
  if (reads && before) {
    if (flags & ACQUIRE)
      acquire(w, *before);
    else if (w.pending.empty() || w.pending.back() != before)
      w.pending.push_back(before);
  }
  if (!writes) return;
  Snapshot mine = w.fenced;
  if (flags & RELEASE) mine = w.fenced = snapshot(w);
  if (mine && mine != before) map[key] = reads && flags & ACQUIRE && flags & RELEASE ? mine : merged(before, mine);
}

// Lanes of `wanted` meet at this instruction. Those that its guard switches off go on without it.
Flow rendezvous(Warp& w, const Op& op, u32 mask, u32 wanted, const char* what) {
  if (mask & ~wanted)
    fail(DIVERGENCE, w, u32(__builtin_ctz(mask & ~wanted)),
         std::string(what) + " by a lane outside its own member mask", op_index(w, op));
  const u32 need = wanted & w.live;
  if ((mask & need) == need) return Flow::next;
  const u32 pc = w.group().pc, off = w.group().mask & ~mask;
  w.group().mask = mask;
  w.group().state = State::rendezvous;
  if (off) w.groups.push_back({off, pc + 1, State::ready, 0, 0});
  return Flow::blocked;
}
Flow whole_warp(Warp& w, const Op& op, u32 mask, const char* what) {
  if (w.live != FULL) {
    u32 gone = u32(__builtin_ctz(~w.live));
    fail(DIVERGENCE, w, u32(__builtin_ctz(mask)),
         std::string(what) + " needs all 32 lanes; lane " + std::to_string(gone) +
             (w.lanes >> gone & 1 ? " has exited" : " does not exist"),
         op_index(w, op));
  }
  return rendezvous(w, op, mask, FULL, what);
}
}  // namespace vm
