// One warp-wide memory access: addresses in, checks and counts on the way, host pointers out.
#pragma once
#include "lanes.h"

namespace vm {
enum class Kind { read, write, atomic, intent };

struct Access {
  u32 mask, bytes, align;  // per lane
  Space space;
  u64 addr[32];  // global: host address; shared, local, param: offset
  u8* host[32];
};

// The address operand: a[0] (32 or 64 bits, or none) plus imm[0].
constexpr u32 ADDRESS_32 = 8;
void addresses(Warp& w, const Op& op, u32 mask, u64 (&addr)[32]);

// Bounds, alignment, counters, shadow; fills host. A write is checked lane by lane in store(), where its data is known.
void open(Warp& w, const Op& op, Access& a, Kind kind);
void store(Warp& w, const Op& op, Access& a, const u8* data);  // data: 32 x bytes

// Calls f(access) for each space among the lanes of a generic access, or once.
template <class F>
void by_space(Warp& w, const Op& op, u32 mask, u32 bytes, F f) {
  Access a;
  a.bytes = a.align = bytes;
  a.mask = mask;
  addresses(w, op, mask, a.addr);
  const Space space = Space(op.shape & 7);
  if (space != GENERIC) {
    a.space = space;
    f(a);
    return;
  }
  u32 in[4] = {};
  each(mask, [&](u32 i) {
    const u64 x = a.addr[i];
    const Space s = x & SHARED_WINDOW ? SHARED : x & LOCAL_WINDOW ? LOCAL : x & PARAM_WINDOW ? PARAM : GLOBAL;
    if (s != GLOBAL) a.addr[i] = x & WINDOW_BITS;
    in[s] |= 1u << i;
  });
  for (u32 s = 0; s < 4; s++)
    if (in[s]) {
      a.space = Space(s);
      a.mask = in[s];
      f(a);
    }
}

// shadow.cpp
void check_shared_state(Warp& w, const Op& op, u32 lane, u32 offset, u32 bytes, bool reads);
void note(Warp& w, const Op& op, u32 lane, const Access& a, Kind kind, bool same_value);
void note_shared(Warp& w, u32 op, u32 lane, u32 offset, u32 bytes, Kind kind, bool same_value, u32 flags);
}  // namespace vm
