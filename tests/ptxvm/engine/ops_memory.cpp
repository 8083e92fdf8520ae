// ld, st, atom, red, ldmatrix, stmatrix, fences. Operand a[0] is the address, a[1].. the data.
#include <algorithm>

#include "memory.h"
#include "number.h"

namespace vm {
namespace {
void def(const std::string& name, Handler h) { define(name.c_str(), h); }

void ordering(Warp& w, const Op& op, const Access& a, bool reads, bool writes) {
  const Config& c = *w.block->launch->config;
  if (!(op.flags & STRONG) || !(c.check_races || c.check_global_races) || (a.space != GLOBAL && a.space != SHARED))
    return;
  auto& map = a.space == SHARED ? w.block->sync : w.block->launch->sync;
  each(a.mask, [&](u32 i) { synchronise(w, map, a.addr[i], op.flags, reads, writes); });
}

template <class E, class R>
Flow load(Warp& w, const Op& op, u32 mask) {
  by_space(w, op, mask, op.n * sizeof(E), [&](Access& a) {
    open(w, op, a, Kind::read);
    for (u32 k = 0; k < op.n; k++) {
      if (op.a[1 + k] == NO_REG) continue;
      R* d = w.reg<R>(op.a[1 + k]);
      each(a.mask, [&](u32 i) {
        E e;
        std::memcpy(&e, a.host[i] + k * sizeof(E), sizeof e);
        d[i] = R(e);
      });
    }
    ordering(w, op, a, true, false);
  });
  return Flow::next;
}
template <class R, class E>
Flow save(Warp& w, const Op& op, u32 mask) {
  by_space(w, op, mask, op.n * sizeof(E), [&](Access& a) {
    ordering(w, op, a, false, true);
    open(w, op, a, Kind::write);
    u8 data[32 * 32];
    for (u32 k = 0; k < op.n; k++) {
      const R* s = w.reg<R>(op.a[1 + k]);
      for (u32 i = 0; i < 32; i++) {
        const E e = E(s[i]);
        std::memcpy(data + i * a.bytes + k * sizeof(E), &e, sizeof e);
      }
    }
    store(w, op, a, data);
  });
  return Flow::next;
}

// a[1] old value, a[2] operand, a[3] second operand of cas.
template <class T, class F>
Flow atomic(Warp& w, const Op& op, u32 mask) {
  by_space(w, op, mask, sizeof(T), [&](Access& a) {
    ordering(w, op, a, !(op.flags & NO_RETURN), true);
    open(w, op, a, Kind::atomic);
    u32 order[32], n = 0;
    each(a.mask, [&](u32 i) { order[n++] = i; });
    Launch& l = *w.block->launch;
    if (l.config->seed) std::shuffle(order, order + n, l.random);
    const T* b = w.reg<T>(op.a[2]);
    const T* c = w.reg<T>(op.a[3] == NO_REG ? op.a[2] : op.a[3]);
    T results[32];
    for (u32 k = 0; k < n; k++) {
      const u32 i = order[k];
      T old;
      std::memcpy(&old, a.host[i], sizeof old);
      const T next = F{}(old, b[i], c[i]);
      std::memcpy(a.host[i], &next, sizeof next);
      results[i] = old;
    }
    if (!(op.flags & NO_RETURN)) put(w, op.a[1], results, a.mask);
  });
  return Flow::next;
}
template <class T>
void integer_atomics(const std::string& t) {
  def("atom.add." + t, &atomic<T, FN(T o, T b, T) {
    return T(o + b); })>);
  def("atom.min." + t, &atomic<T, FN(T o, T b, T) {
    return b < o ? b : o; })>);
  def("atom.max." + t, &atomic<T, FN(T o, T b, T) {
    return b > o ? b : o; })>);
}
template <class T>
void bit_atomics(const std::string& t) {
  def("atom.exch." + t, &atomic<T, FN(T, T b, T) {
    return b; })>);
  def("atom.cas." + t, &atomic<T, FN(T o, T b, T c) {
    return o == b ? c : o; })>);
  def("atom.and." + t, &atomic<T, FN(T o, T b, T) {
    return T(o & b); })>);
  def("atom.or." + t, &atomic<T, FN(T o, T b, T) {
    return T(o | b); })>);
  def("atom.xor." + t, &atomic<T, FN(T o, T b, T) {
    return T(o ^ b); })>);
}
u16 add_half(u16 x, u16 y) { return half_bits(half_value(x) + half_value(y)); }
u16 add_bf16(u16 x, u16 y) { return bf16_of_float(bf16_value(x) + bf16_value(y)); }

void matrix_access(Warp& w, const Op& op, Access& a) {
  const u32 lanes = op.n == 4 ? FULL : (1u << (8 * op.n)) - 1;
  a.bytes = a.align = 16;
  a.mask = lanes;
  a.space = SHARED;
  addresses(w, op, lanes, a.addr);
}
Flow load_matrix(Warp& w, const Op& op, u32 mask) {
  if (Flow f = whole_warp(w, op, mask, "ldmatrix"); f != Flow::next) return f;
  Access a;
  matrix_access(w, op, a);
  open(w, op, a, Kind::read);
  for (u32 m = 0; m < op.n; m++) {
    u16 rows[8][8];
    u32 r[32];
    for (u32 i = 0; i < 8; i++) std::memcpy(rows[i], a.host[m * 8 + i], 16);
    for (u32 l = 0; l < 32; l++) {
      const u32 i = l / 4, j = l % 4 * 2;
      r[l] = op.flags & TRANS ? rows[j][i] | u32(rows[j + 1][i]) << 16 : rows[i][j] | u32(rows[i][j + 1]) << 16;
    }
    put(w, op.a[1 + m], r, FULL);
  }
  return Flow::next;
}
Flow store_matrix(Warp& w, const Op& op, u32 mask) {
  if (Flow f = whole_warp(w, op, mask, "stmatrix"); f != Flow::next) return f;
  Access a;
  matrix_access(w, op, a);
  open(w, op, a, Kind::write);
  u8 data[32 * 16] = {};
  for (u32 m = 0; m < op.n; m++) {
    u16 rows[8][8];
    const u32* s = w.reg<u32>(op.a[1 + m]);
    for (u32 l = 0; l < 32; l++) {
      const u32 i = l / 4, j = l % 4 * 2;
      if (op.flags & TRANS) {
        rows[j][i] = u16(s[l]);
        rows[j + 1][i] = u16(s[l] >> 16);
      } else {
        rows[i][j] = u16(s[l]);
        rows[i][j + 1] = u16(s[l] >> 16);
      }
    }
    std::memcpy(data + m * 8 * 16, rows, sizeof rows);
  }
  store(w, op, a, data);
  return Flow::next;
}

const bool defined = [] {
  def("ld.u8.b16", &load<u8, u16>);
  def("ld.u8.b32", &load<u8, u32>);
  def("ld.u8.b64", &load<u8, u64>);
  def("ld.s8.b16", &load<i8, u16>);
  def("ld.s8.b32", &load<i8, u32>);
  def("ld.s8.b64", &load<i8, u64>);
  def("ld.u16.b16", &load<u16, u16>);
  def("ld.u16.b32", &load<u16, u32>);
  def("ld.u16.b64", &load<u16, u64>);
  def("ld.s16.b16", &load<i16, u16>);
  def("ld.s16.b32", &load<i16, u32>);
  def("ld.s16.b64", &load<i16, u64>);
  def("ld.u32.b32", &load<u32, u32>);
  def("ld.u32.b64", &load<u32, u64>);
  def("ld.s32.b32", &load<i32, u32>);
  def("ld.s32.b64", &load<i32, u64>);
  def("ld.u64.b64", &load<u64, u64>);
  def("st.b16.u8", &save<u16, u8>);
  def("st.b32.u8", &save<u32, u8>);
  def("st.b64.u8", &save<u64, u8>);
  def("st.b16.u16", &save<u16, u16>);
  def("st.b32.u16", &save<u32, u16>);
  def("st.b64.u16", &save<u64, u16>);
  def("st.b32.u32", &save<u32, u32>);
  def("st.b64.u32", &save<u64, u32>);
  def("st.b64.u64", &save<u64, u64>);
  integer_atomics<u32>("u32");
  integer_atomics<i32>("s32");
  integer_atomics<u64>("u64");
  integer_atomics<i64>("s64");
  bit_atomics<u16>("b16");
  bit_atomics<u32>("b32");
  bit_atomics<u64>("b64");
  def("atom.inc.u32", &atomic<u32, FN(u32 o, u32 b, u32) {
    return o >= b ? 0u : o + 1; })>);
  def("atom.dec.u32", &atomic<u32, FN(u32 o, u32 b, u32) {
    return o == 0 || o > b ? b : o - 1; })>);
  def("atom.add.f32", &atomic<float, FN(float o, float b, float) {
    return canonical(o + b); })>);
  def("atom.add.f64", &atomic<double, FN(double o, double b, double) {
    return canonical(o + b); })>);
  def("atom.add.f16", &atomic<u16, FN(u16 o, u16 b, u16) {
    return add_half(o, b); })>);
  def("atom.add.bf16", &atomic<u16, FN(u16 o, u16 b, u16) {
    return add_bf16(o, b); })>);
  def("atom.add.f16x2", &atomic<u32, FN(u32 o, u32 b, u32) {
    return u32(add_half(u16(o), u16(b))) | u32(add_half(u16(o >> 16), u16(b >> 16))) << 16; })>);
  def("atom.add.bf16x2", &atomic<u32, FN(u32 o, u32 b, u32) {
    return u32(add_bf16(u16(o), u16(b))) | u32(add_bf16(u16(o >> 16), u16(b >> 16))) << 16; })>);
  def("ldmatrix", &load_matrix);
  def("stmatrix", &store_matrix);
  def(
      "fence", +[](Warp& w, const Op&, u32) {
        fence(w);
        return Flow::next;
      });
  def("nop", +[](Warp&, const Op&, u32) { return Flow::next; });
  def(
      "isspacep", +[](Warp& w, const Op& op, u32 mask) {
        const u64* a = w.reg<u64>(op.a[1]);
        u32 r = 0;
        for (int i = 0; i < 32; i++) {
          const u64 top = a[i] & (SHARED_WINDOW | LOCAL_WINDOW | PARAM_WINDOW);
          r |= u32(top == u64(op.imm[0])) << i;
        }
        put_pred(w, op.a[0], r, mask);
        return Flow::next;
      });
  return true;
}();
}  // namespace
}  // namespace vm
