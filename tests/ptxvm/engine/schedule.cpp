// Blocks, warps and their groups of lanes: who runs next, and what to say when nobody can.
#include <algorithm>
#include <numeric>

#include "memory.h"

namespace vm {
namespace {
enum Special : u32 {
  TID_X,
  TID_Y,
  TID_Z,
  CTAID_X,
  CTAID_Y,
  CTAID_Z,
  NTID_X,
  NTID_Y,
  NTID_Z,
  NCTAID_X,
  NCTAID_Y,
  NCTAID_Z,
  LANEID,
  WARPID,
  NWARPID,
  LT,
  LE,
  EQ,
  GE,
  GT,
  DYNAMIC_SHARED,
  TOTAL_SHARED
};

void start_warp(Warp& w, u32 id, std::vector<u8>& memory) {
  Block& b = *w.block;
  const Config& c = *b.launch->config;
  const u32 count = std::min<u32>(32, b.launch->threads - id * 32);
  w.id = id;
  w.regs = memory.data() + u64(id) * c.reg_bytes;
  w.lanes = w.live = count == 32 ? FULL : (1u << count) - 1;
  w.groups.assign(1, {w.lanes, 0, State::ready, 0, 0});
  w.current = w.spin = 0;
  w.epoch = 1;
  w.carry = 0;
  w.seen.assign(b.launch->n_warps, 0);
  w.remote.clear();
  w.fenced.reset();
  w.pending.clear();
  w.copies.clear();
  std::fill(w.committed, w.committed + 32, 0);
  w.local.assign(u64(32) * c.local_bytes, 0xff);
  for (u32 s = 0; s < c.n_specials; s++) {
    u32* r = w.reg<u32>(b.launch->specials[2 * s + 1]);
    for (u32 i = 0; i < 32; i++) {
      const u32 t = id * 32 + i, k = b.launch->specials[2 * s];
      if (k <= TID_Z)
        r[i] = k == TID_X ? t % c.block[0] : k == TID_Y ? t / c.block[0] % c.block[1] : t / c.block[0] / c.block[1];
      else if (k <= CTAID_Z)
        r[i] = b.index[k - CTAID_X];
      else if (k <= NTID_Z)
        r[i] = c.block[k - NTID_X];
      else if (k <= NCTAID_Z)
        r[i] = c.grid[k - NCTAID_X];
      else
        switch (k) {
          case LANEID:
            r[i] = i;
            break;
          case WARPID:
            r[i] = id;
            break;
          case NWARPID:
            r[i] = b.launch->n_warps;
            break;
          case LT:
            r[i] = (1u << i) - 1;
            break;
          case LE:
            r[i] = u32((1ull << (i + 1)) - 1);
            break;
          case EQ:
            r[i] = 1u << i;
            break;
          case GE:
            r[i] = ~((1u << i) - 1);
            break;
          case GT:
            r[i] = ~u32((1ull << (i + 1)) - 1);
            break;
          case DYNAMIC_SHARED:
            r[i] = c.dynamic_shared_bytes;
            break;
          default:
            r[i] = c.shared_bytes;
        }
    }
  }
}

struct Resident {
  Block block;
  std::vector<u8> registers;
};

void start_block(Resident& r, Launch& l, u64 linear) {
  const Config& c = *l.config;
  Block& b = r.block;
  b.launch = &l;
  b.linear = linear;
  b.exited = 0;
  b.index[0] = u32(linear % c.grid[0]);
  b.index[1] = u32(linear / c.grid[0] % c.grid[1]);
  b.index[2] = u32(linear / c.grid[0] / c.grid[1]);
  b.shared.assign(c.shared_bytes, 0xff);  // NaN in every format
  b.state.assign(c.shared_bytes, 0);
  if (c.check_races) b.cells.assign(c.shared_bytes / c.shared_granule + 1, Cell());
  b.sync.clear();
  std::fill(b.barriers, b.barriers + 16, Barrier());
  if (r.registers.empty()) {
    r.registers.assign(u64(l.n_warps) * c.reg_bytes, 0xff);
    for (u32 i = 0; i < l.n_warps; i++) std::memcpy(r.registers.data() + u64(i) * c.reg_bytes, l.consts, c.const_bytes);
    b.warps = std::vector<Warp>(l.n_warps);
  }
  for (u32 i = 0; i < l.n_warps; i++) {
    b.warps[i].block = &b;
    start_warp(b.warps[i], i, r.registers);
  }
}

// The ready group with the lowest pc, so that lanes meet again where branches join. A group that waits on a higher one
// (a lock held by another lane) gives way after a while.
bool choose(Warp& w) {
  u32 best = NO_REG;
  const bool fair = w.groups.size() > 1 && ++w.spin % 4096 == 0;
  for (u32 i = 0; i < w.groups.size(); i++) {
    if (w.groups[i].state != State::ready) continue;
    if (best == NO_REG || (fair ? w.groups[i].pc > w.groups[best].pc : w.groups[i].pc < w.groups[best].pc)) best = i;
  }
  w.current = best;
  return best != NO_REG;
}
void merge(Warp& w) {  // groups at the pc of the current one join it
  Group& g = w.group();
  for (u32 i = 0; i < w.groups.size();) {
    Group& o = w.groups[i];
    if (i != w.current && o.pc == g.pc && o.state != State::barrier) {
      w.groups[w.current].mask |= o.mask;
      if (i < w.current) w.current--;
      w.groups.erase(w.groups.begin() + i);
      return merge(w);
    }
    i++;
  }
}

void run_warp(Warp& w, u64 budget) {
  Launch& l = *w.block->launch;
  if (!choose(w)) return;
  while (budget--) {
    if (w.groups.size() > 1) {
      if (!choose(w)) return;
      merge(w);
    }
    const u32 pc = w.group().pc;
    const Op& op = l.ops[pc];
    u32 mask = w.group().mask;
    if (op.guard != NO_REG) mask &= w.pred(op.guard) ^ (op.guard_negated ? FULL : 0);
    l.executed++;
    OpCount& count = l.counts[pc];
    Flow f = Flow::next;
    if (mask) f = l.handlers[pc](w, op, mask);
    if (f != Flow::blocked) {
      count.warps++;
      count.lanes += u32(__builtin_popcount(mask));
    }
    if (f == Flow::next) {
      w.group().pc++;
      continue;
    }
    if (w.groups.empty()) return;
    if (w.current >= w.groups.size() || w.group().state != State::ready) {
      if (!choose(w)) return;
    }
  }
}

std::string lanes_name(u32 mask) {
  if (mask == FULL) return "";
  std::string s = " lanes ";
  for (u32 i = 0; i < 32; i++) {
    if (!((mask >> i) & 1)) continue;
    u32 j = i;
    while (j < 31 && (mask >> (j + 1)) & 1) j++;
    s += (s.back() == ' ' ? "" : ",") + std::to_string(i) + (j > i ? "-" + std::to_string(j) : "");
    i = j;
  }
  return s;
}
[[noreturn]] void report_stuck(Block& b) {
  std::string s = "nobody can go on:";
  u32 shown = 0;
  Warp* first = nullptr;
  bool collective = false;
  for (auto& w : b.warps)
    for (auto& g : w.groups) {
      if (!first) first = &w;
      collective |= g.state == State::rendezvous;
      if (shown++ < 8)
        s += "\n  warp " + std::to_string(w.id) + lanes_name(g.mask) +
             (g.state == State::barrier ? " waits at the barrier " : " waits for the other lanes at ") + "@op(" +
             std::to_string(g.pc) + ")";
    }
  if (shown > 8) s += "\n  and " + std::to_string(shown - 8) + " more";
  if (b.exited) {
    for (auto& w : b.warps)
      if (w.live != w.lanes) {
        s += "\n  " + thread_name(b, w.id, u32(__builtin_ctz(w.lanes & ~w.live))) + " has exited, " +
             std::to_string(b.exited) + " threads in all";
        break;
      }
  }
  u32 pc = first->groups[0].pc;
  fail(collective ? DIVERGENCE : DEADLOCK, *first, u32(__builtin_ctz(first->groups[0].mask)), s, pc);
}
}  // namespace

std::string thread_name(const Block& b, u32 warp, u32 lane) {
  const u32 t = warp * 32 + lane;
  const auto& n = b.launch->config->block;
  return "thread (" + std::to_string(t % n[0]) + "," + std::to_string(t / n[0] % n[1]) + "," +
         std::to_string(t / n[0] / n[1]) + ")";
}
u32 op_index(const Warp& w, const Op& op) { return u32(&op - w.block->launch->ops); }

void run(Launch& l) {
  const Config& c = *l.config;
  const u64 total = u64(c.grid[0]) * c.grid[1] * c.grid[2];
  std::vector<u64> order(total);
  std::iota(order.begin(), order.end(), 0);
  if (c.seed) std::shuffle(order.begin(), order.end(), l.random);
  std::vector<Resident> residents(std::min<u64>(c.resident ? c.resident : 1, total));
  std::vector<Resident*> active;
  u64 next = 0;
  for (auto& r : residents) {
    start_block(r, l, order[next++]);
    active.push_back(&r);
  }
  while (!active.empty()) {
    bool progress = false;
    for (size_t k = 0; k < active.size();) {
      Block& b = active[k]->block;
      std::vector<u32> warps(b.warps.size());
      std::iota(warps.begin(), warps.end(), 0);
      if (c.seed) std::shuffle(warps.begin(), warps.end(), l.random);
      bool alive = false;
      for (u32 i : warps) {
        Warp& w = b.warps[i];
        if (w.ready()) {
          progress = true;
          run_warp(w, c.seed ? 1 + l.random() % 500 : 20000);
        }
        alive |= !w.groups.empty();
        if (l.executed > c.max_ops)
          fail(LIMIT, w, 0,
               "still running after " + std::to_string(c.max_ops) +
                   " warp instructions; a block that waits for another one needs `resident`",
               NO_REG);
      }
      if (alive) {
        k++;
        continue;
      }
      if (next < total) {
        start_block(*active[k], l, order[next++]);
        k++;
      } else
        active.erase(active.begin() + long(k));
      progress = true;
    }
    if (!progress) report_stuck(active[0]->block);
  }
}
}  // namespace vm
