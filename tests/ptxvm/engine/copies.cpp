// cp.async. A copy is in flight from its issue to the wait that covers it; it moves its bytes at the last legal moment
// (in that wait) or, eagerly, at issue. In flight, nobody else may read or write its destination.
#include <algorithm>

#include "memory.h"

namespace vm {
namespace {
void move(Block& b, const AsyncCopy& c) {
  std::memcpy(b.shared.data() + c.dest, reinterpret_cast<const void*>(c.source), c.copied);
  std::memset(b.shared.data() + c.dest + c.copied, 0, c.bytes - c.copied);
}

// a[0] destination, a[1] source, a[2] bytes to read (the rest is zero) or none, a[3] predicate that ignores the source.
Flow copy(Warp& w, const Op& op, u32 mask) {
  Block& b = *w.block;
  const Config& config = *b.launch->config;
  const u64* from = w.reg<u64>(op.a[1]);
  const u32* sizes = op.a[2] == NO_REG ? nullptr : w.reg<u32>(op.a[2]);
  const u32 ignored = op.a[3] == NO_REG ? 0 : w.pred(op.a[3]);
  Access dest;
  dest.bytes = dest.align = op.n;
  dest.mask = mask;
  dest.space = SHARED;
  addresses(w, op, mask, dest.addr);
  u32 size[32], pending = mask;
  each(mask, [&](u32 i) {
    size[i] = (ignored >> i) & 1 ? 0 : sizes ? sizes[i] : op.n;
    if (size[i] > op.n) fail(OUT_OF_BOUNDS, w, i, "cp.async with a source size above its copy size", op_index(w, op));
    if (!size[i]) pending &= ~(1u << i);
  });
  while (pending) {  // lanes of one source size at a time
    Access source;
    source.space = GLOBAL;
    source.align = op.n;
    source.mask = 0;
    source.bytes = size[__builtin_ctz(pending)];
    each(pending, [&](u32 i) {
      if (size[i] == source.bytes) {
        source.mask |= 1u << i;
        source.addr[i] = from[i] + u64(op.imm[1]);
      }
    });
    open(w, op, source, Kind::read);
    pending &= ~source.mask;
  }
  open(w, op, dest, Kind::write);
  each(mask, [&](u32 i) {
    const AsyncCopy c{from[i] + u64(op.imm[1]), u32(dest.addr[i]), u16(op.n), u16(size[i]), u8(i),
                      op_index(w, op),          w.committed[i]};
    if (config.check_races) note_shared(w, c.op, i, c.dest, c.bytes, Kind::write, false, 0);
    for (u32 k = 0; k < c.bytes; k++) b.state[c.dest + k] += 2;
    if (!config.late_copies) move(b, c);
    w.copies.push_back(c);
  });
  return Flow::next;
}
void finish(Warp& w, const AsyncCopy& c) {
  Block& b = *w.block;
  if (b.launch->config->late_copies) move(b, c);
  for (u32 k = 0; k < c.bytes; k++) b.state[c.dest + k] = (b.state[c.dest + k] - 2) | 1;
  if (b.launch->config->check_races) note_shared(w, c.op, c.lane, c.dest, c.bytes, Kind::write, false, 0);
}
Flow commit(Warp& w, const Op&, u32 mask) {
  each(mask, [&](u32 i) { w.committed[i]++; });
  return Flow::next;
}

const bool defined = [] {
  define("cp.async", &copy);
  define("cp.async.commit_group", &commit);
  define(
      "cp.async.wait_group", +[](Warp& w, const Op& op, u32 mask) {
        finish_copies(w, mask, u64(op.imm[0]), false);
        return Flow::next;
      });
  define(
      "cp.async.wait_all", +[](Warp& w, const Op& op, u32 mask) {
        commit(w, op, mask);
        finish_copies(w, mask, 0, true);
        return Flow::next;
      });
  return true;
}();
}  // namespace

void finish_copies(Warp& w, u32 mask, u64 keep, bool all) {
  auto done = [&](const AsyncCopy& c) {
    return ((mask >> c.lane) & 1) && (all || c.group + keep < w.committed[c.lane]);
  };
  for (auto& c : w.copies)
    if (done(c)) finish(w, c);
  w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), done), w.copies.end());
}
void drop_copies(Warp& w, u32 mask) {  // a thread that exits abandons its copies; nobody may rely on them
  w.copies.erase(
      std::remove_if(w.copies.begin(), w.copies.end(), [&](const AsyncCopy& c) { return (mask >> c.lane) & 1; }),
      w.copies.end());
}
}  // namespace vm
