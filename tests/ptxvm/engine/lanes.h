// Handlers made from a function of one lane: operand a[0] is the result, a[1].. the sources.
#pragma once
#include "vm.h"

namespace vm {
template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class T>
inline void put(Warp& w, u32 offset, const T (&r)[32], u32 mask) {
  T* d = w.reg<T>(offset);
  if (mask == FULL) {
    std::memcpy(d, r, sizeof r);
    return;
  }
  for (int i = 0; i < 32; i++) d[i] = (mask >> i) & 1 ? r[i] : d[i];
}

inline void put_pred(Warp& w, u32 offset, u32 value, u32 mask) {
  if (offset != NO_REG) w.pred(offset) = (w.pred(offset) & ~mask) | (value & mask);
}

template <class F>
inline void each(u32 mask, F f) {
  for (u32 m = mask; m; m &= m - 1) f(u32(__builtin_ctz(m)));
}

// F: a captureless lambda (a, [b, [c,]] flags).
template <class D, class A, class F>
Flow map1(Warp& w, const Op& op, u32 mask) {
  const A* a = w.reg<A>(op.a[1]);
  D r[32];
  const u32 flags = op.flags;
  for (int i = 0; i < 32; i++) r[i] = F{}(a[i], flags);
  put(w, op.a[0], r, mask);
  return Flow::next;
}
template <class D, class A, class B, class F>
Flow map2(Warp& w, const Op& op, u32 mask) {
  const A* a = w.reg<A>(op.a[1]);
  const B* b = w.reg<B>(op.a[2]);
  D r[32];
  const u32 flags = op.flags;
  for (int i = 0; i < 32; i++) r[i] = F{}(a[i], b[i], flags);
  put(w, op.a[0], r, mask);
  return Flow::next;
}
template <class D, class A, class B, class C, class F>
Flow map3(Warp& w, const Op& op, u32 mask) {
  const A* a = w.reg<A>(op.a[1]);
  const B* b = w.reg<B>(op.a[2]);
  const C* c = w.reg<C>(op.a[3]);
  D r[32];
  const u32 flags = op.flags;
  for (int i = 0; i < 32; i++) r[i] = F{}(a[i], b[i], c[i], flags);
  put(w, op.a[0], r, mask);
  return Flow::next;
}

// The plain form without flags is compiled apart, so that it becomes vector code.
template <Handler Plain, Handler Flagged>
Flow pick(Warp& w, const Op& op, u32 mask) {
  return op.flags ? Flagged(w, op, mask) : Plain(w, op, mask);
}
}  // namespace vm

#define VM_CAT2(a, b) a##b
#define VM_CAT(a, b) VM_CAT2(a, b)
#define DEFINE(name, ...) static ::vm::Define VM_CAT(define_, __COUNTER__)(name, __VA_ARGS__)
#define FN(...) decltype([](__VA_ARGS__)
