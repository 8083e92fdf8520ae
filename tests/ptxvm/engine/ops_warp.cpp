// Instructions in which the lanes of a warp exchange values.
#include <algorithm>

#include "lanes.h"
#include "number.h"

namespace vm {
namespace {
void def(const std::string& name, Handler h) { define(name.c_str(), h); }

// The member mask of the first lane; every lane must name the same.
u32 members(Warp& w, const Op& op, u32 offset, u32 mask, const char* what) {
  const u32* m = w.reg<u32>(offset);
  const u32 first = m[__builtin_ctz(mask)];
  each(mask, [&](u32 i) {
    if (m[i] != first)
      fail(DIVERGENCE, w, i, std::string(what) + ": lanes name different member masks", op_index(w, op));
  });
  return first;
}
#define MEET(offset, what)                               \
  const u32 wanted = members(w, op, offset, mask, what); \
  if (Flow f = rendezvous(w, op, mask, wanted, what); f != Flow::next) return f

enum Shuffle { UP, DOWN, BFLY, IDX };
// a: d, p (or none), value, b, c, member mask. Reading a lane that doesn't take part is an error: its value is
// undefined.
template <Shuffle MODE>
Flow shuffle(Warp& w, const Op& op, u32 mask) {
  MEET(op.a[5], "shfl.sync");
  const u32 *a = w.reg<u32>(op.a[2]), *b = w.reg<u32>(op.a[3]), *c = w.reg<u32>(op.a[4]);
  u32 r[32], p = 0;
  for (int lane = 0; lane < 32; lane++) {
    const int seg = (c[lane] >> 8) & 31, clamp = c[lane] & 31, n = b[lane] & 31;
    const int high = (lane & seg) | (clamp & ~seg), low = lane & seg;
    int j;
    bool in;
    switch (MODE) {
      case UP:
        j = lane - n;
        in = j >= high;
        break;
      case DOWN:
        j = lane + n;
        in = j <= high;
        break;
      case BFLY:
        j = lane ^ n;
        in = j <= high;
        break;
      default:
        j = low | (n & ~seg);
        in = j <= high;
    }
    if (!in) j = lane;
    if (((mask >> lane) & 1) && !((mask >> j) & 1))
      fail(DIVERGENCE, w, u32(lane), "shfl.sync reads lane " + std::to_string(j) + ", which takes no part in it",
           op_index(w, op));
    r[lane] = a[j];
    p |= u32(in) << lane;
  }
  put(w, op.a[0], r, mask);
  put_pred(w, op.a[1], p, mask);
  return Flow::next;
}

enum Vote { ALL, ANY, UNI, BALLOT };
template <Vote MODE>
Flow vote(Warp& w, const Op& op, u32 mask) {  // a: d, p, member mask
  MEET(op.a[2], "vote.sync");
  const u32 p = w.pred(op.a[1]) & mask;
  if (MODE == BALLOT) {
    u32 r[32];
    std::fill(r, r + 32, p);
    put(w, op.a[0], r, mask);
    return Flow::next;
  }
  const bool yes = MODE == ALL ? p == mask : MODE == ANY ? p != 0 : p == mask || p == 0;
  put_pred(w, op.a[0], yes ? FULL : 0, mask);
  return Flow::next;
}

template <class T, class F>
Flow reduce(Warp& w, const Op& op, u32 mask) {  // a: d, value, member mask
  MEET(op.a[2], "redux.sync");
  const T* a = w.reg<T>(op.a[1]);
  T total = a[__builtin_ctz(mask)], r[32];
  each(mask & (mask - 1), [&](u32 i) { total = F{}(total, a[i], 0); });
  std::fill(r, r + 32, total);
  put(w, op.a[0], r, mask);
  return Flow::next;
}

template <class T, bool EVERY>
Flow match(Warp& w, const Op& op, u32 mask) {  // a: d, p (or none), value, member mask
  MEET(op.a[3], "match.sync");
  const T* a = w.reg<T>(op.a[2]);
  u32 r[32] = {};
  bool same = true;
  each(mask, [&](u32 i) {
    each(mask, [&](u32 j) { r[i] |= u32(a[i] == a[j]) << j; });
    same &= r[i] == mask;
  });
  if (EVERY) {
    std::fill(r, r + 32, same ? mask : 0);
    put_pred(w, op.a[1], same ? FULL : 0, mask);
  }
  put(w, op.a[0], r, mask);
  return Flow::next;
}

const bool defined = [] {
  def("shfl.up", &shuffle<UP>);
  def("shfl.down", &shuffle<DOWN>);
  def("shfl.bfly", &shuffle<BFLY>);
  def("shfl.idx", &shuffle<IDX>);
  def("vote.all", &vote<ALL>);
  def("vote.any", &vote<ANY>);
  def("vote.uni", &vote<UNI>);
  def("vote.ballot", &vote<BALLOT>);
  def("redux.add.u32", &reduce<u32, FN(u32 a, u32 b, u32) {
    return a + b; })>);
  def("redux.min.u32", &reduce<u32, FN(u32 a, u32 b, u32) {
    return a < b ? a : b; })>);
  def("redux.max.u32", &reduce<u32, FN(u32 a, u32 b, u32) {
    return a > b ? a : b; })>);
  def("redux.min.s32", &reduce<i32, FN(i32 a, i32 b, u32) {
    return a < b ? a : b; })>);
  def("redux.max.s32", &reduce<i32, FN(i32 a, i32 b, u32) {
    return a > b ? a : b; })>);
  def("redux.and.b32", &reduce<u32, FN(u32 a, u32 b, u32) {
    return a & b; })>);
  def("redux.or.b32", &reduce<u32, FN(u32 a, u32 b, u32) {
    return a | b; })>);
  def("redux.xor.b32", &reduce<u32, FN(u32 a, u32 b, u32) {
    return a ^ b; })>);
  def("match.any.b32", &match<u32, false>);
  def("match.any.b64", &match<u64, false>);
  def("match.all.b32", &match<u32, true>);
  def("match.all.b64", &match<u64, true>);
  def(
      "bar.warp.sync", +[](Warp& w, const Op& op, u32 mask) {
        MEET(op.a[0], "bar.warp.sync");
        warp_synced(w);
        return Flow::next;
      });
  def(
      "elect.sync", +[](Warp& w, const Op& op, u32 mask) {  // a: leader's lane (or none), p, member mask
        MEET(op.a[2], "elect.sync");
        const u32 leader = u32(__builtin_ctz(wanted & w.live));
        u32 r[32];
        std::fill(r, r + 32, leader);
        if (op.a[0] != NO_REG) put(w, op.a[0], r, mask);
        put_pred(w, op.a[1], 1u << leader, mask);
        return Flow::next;
      });
  def(
      "activemask", +[](Warp& w, const Op& op, u32 mask) {
        u32 r[32];
        std::fill(r, r + 32, mask);
        put(w, op.a[0], r, mask);
        return Flow::next;
      });
  return true;
}();
}  // namespace
}  // namespace vm
