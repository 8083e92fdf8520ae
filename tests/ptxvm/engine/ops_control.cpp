// Branches, exits, block barriers, traps.
#include <algorithm>

#include "lanes.h"

namespace vm {
namespace {
// Lanes of mask go to target; the others fall through.
Flow jump(Warp& w, u32 mask, u32 target) {
  Group& g = w.group();
  if (mask == g.mask) {
    g.pc = target;
    return Flow::jumped;
  }
  const u32 rest = g.mask & ~mask, pc = g.pc;
  g.mask = mask;
  g.pc = target;
  w.groups.push_back({rest, pc + 1, State::ready, 0, 0});
  return Flow::jumped;
}
Flow branch(Warp& w, const Op& op, u32 mask) { return jump(w, mask, u32(op.imm[0])); }

Flow branch_indexed(Warp& w, const Op& op, u32 mask) {  // a[0] index, a[1..n] targets
  const u32* index = w.reg<u32>(op.a[0]);
  each(mask, [&](u32 i) {
    if (index[i] >= op.n) fail(TRAP, w, i, "brx.idx beyond its table", op_index(w, op));
  });
  const u32 pc = w.group().pc, off = w.group().mask & ~mask;
  std::vector<Group> split;
  if (off) split.push_back({off, pc + 1, State::ready, 0, 0});
  for (u32 k = 0; k < op.n; k++) {
    u32 m = 0;
    each(mask, [&](u32 i) { m |= u32(index[i] == k) << i; });
    if (m) split.push_back({m, op.a[1 + k], State::ready, 0, 0});
  }
  w.group() = split[0];
  w.groups.insert(w.groups.end(), split.begin() + 1, split.end());
  return Flow::jumped;
}

Flow leave(Warp& w, const Op&, u32 mask) {
  w.live &= ~mask;
  w.block->exited += u32(__builtin_popcount(mask));
  drop_copies(w, mask);
  for (auto& g : w.groups)
    if (g.state == State::rendezvous) g.state = State::ready;  // they may be complete now
  Group& g = w.group();
  if (mask == g.mask)
    w.groups.erase(w.groups.begin() + w.current);
  else {
    g.mask &= ~mask;
    g.pc++;
  }
  return Flow::jumped;
}

enum Reduction { NONE, POPC, AND, OR };
void release(Block& b, u32 id) {
  Barrier& bar = b.barriers[id];
  for (auto& w : b.warps)
    for (auto& g : w.groups) {
      if (g.state != State::barrier || g.barrier_id != id) continue;
      const Op& op = b.launch->ops[g.pc];
      if (op.shape) {
        u32 r[32];
        std::fill(r, r + 32, bar.votes);
        if (op.shape == POPC)
          put(w, op.a[3], r, g.mask);
        else
          put_pred(w, op.a[3], (op.shape == AND ? bar.votes == bar.threads : bar.votes > 0) ? FULL : 0, g.mask);
      }
      join(w.seen, bar.clock);
      for (auto& [block, clocks] : bar.remote) join(w.remote[block], clocks);
      w.epoch++;
      g.state = State::ready;
      g.pc++;
    }
  bar = Barrier();
}

// a: id, count (or none), predicate (of red), destination (of red); shape: Reduction; imm[0]: 1 for arrive.
Flow barrier(Warp& w, const Op& op, u32 mask) {
  if (Flow f = rendezvous(w, op, mask, w.live, "barrier"); f != Flow::next) return f;
  Block& b = *w.block;
  const u32 first = u32(__builtin_ctz(mask)), id = w.reg<u32>(op.a[0])[first];
  const u32 count = op.a[1] == NO_REG ? 0 : w.reg<u32>(op.a[1])[first];
  if (id > 15) fail(TRAP, w, first, "barrier " + std::to_string(id) + ": there are 16", op_index(w, op));
  if (count % 32)
    fail(TRAP, w, first, "barrier with a thread count of " + std::to_string(count) + ", no multiple of 32",
         op_index(w, op));
  Barrier& bar = b.barriers[id];
  if (!bar.warps) {
    bar.pc = w.group().pc;
    bar.count = count;
    bar.clock.assign(b.warps.size(), 0);
  } else if (bar.count != count)
    fail(DIVERGENCE, w, first,
         "barrier " + std::to_string(id) + " with a thread count of " + std::to_string(count) + "; others came with " +
             std::to_string(bar.count),
         op_index(w, op), bar.pc);
  else if (!count && bar.pc != w.group().pc)
    fail(DIVERGENCE, w, first,
         "barrier " + std::to_string(id) + " reached here by some threads and elsewhere by others", op_index(w, op),
         bar.pc);
  bar.warps++;
  bar.arrived += 32;
  bar.threads += u32(__builtin_popcount(mask));
  if (op.shape) bar.votes += u32(__builtin_popcount(w.pred(op.a[2]) & mask));
  join(bar.clock, w.seen);
  // What one warp has seen of other blocks is ordered before all that the barrier orders after it.
  for (auto& [block, clocks] : w.remote) join(bar.remote[block], clocks);
  bar.clock[w.id] = std::max(bar.clock[w.id], w.epoch);
  const bool arrive = op.imm[0] == 1;
  if (arrive) {
    w.epoch++;
    w.group().pc++;
  } else {
    w.group().state = State::barrier;
    w.group().barrier_id = id;
    w.group().barrier_count = count;
  }
  if (count ? bar.arrived == count : bar.warps == b.warps.size() && b.exited == 0) release(b, id);
  return Flow::jumped;
}

const bool defined = [] {
  define("bra", &branch);
  define("brx", &branch_indexed);
  define("exit", &leave);
  define("bar", &barrier);
  define(
      "trap", +[](Warp& w, const Op& op, u32 mask) -> Flow {
        fail(TRAP, w, u32(__builtin_ctz(mask)), "trap", op_index(w, op));
      });
  return true;
}();
}  // namespace
}  // namespace vm
