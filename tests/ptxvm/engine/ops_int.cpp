// Integer arithmetic, logic and bit fields.
#include "lanes.h"

namespace vm {
namespace {
template <class T>
using U = std::make_unsigned_t<T>;
template <class T>
constexpr u32 BITS = sizeof(T) * 8;
template <class T>
struct WideOf {
  using type =
      std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, i32, u32>,
                         std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, i64, u64>,
                                            std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
};
template <class T>
using Wide = typename WideOf<T>::type;
using Name = std::string;
void def(const Name& name, Handler h) { define(name.c_str(), h); }

template <class T>
T shift_left(T a, u32 n) {
  return n >= BITS<T> ? T(0) : T(a << n);
}
template <class T>
T shift_right(T a, u32 n) {
  return n >= BITS<T> ? T(a < 0 ? -1 : 0) : T(a >> n);
}

template <class T>
T field_extract(T x, u32 pos, u32 len) {
  pos &= 255;
  len &= 255;
  if (!len) return 0;
  const U<T> mask = len >= BITS<T> ? ~U<T>(0) : U<T>((U<T>(1) << len) - 1);
  const U<T> fill = std::is_signed_v<T> && x < 0 ? ~U<T>(0) : U<T>(0);
  U<T> v = pos >= BITS<T> ? fill : U<T>(x >> pos);
  v &= mask;
  const u32 top = pos + len - 1 < BITS<T> - 1 ? pos + len - 1 : BITS<T> - 1;
  if (std::is_signed_v<T> && len < BITS<T> && ((U<T>(x) >> top) & 1)) v |= ~mask;
  return T(v);
}
template <class T>
T field_insert(T a, T b, u32 pos, u32 len) {
  pos &= 255;
  len &= 255;
  if (!len || pos >= BITS<T>) return b;
  const T mask = T((len >= BITS<T> ? ~T(0) : T((T(1) << len) - 1)) << pos);
  return (b & ~mask) | (T(a << pos) & mask);
}

// add/sub/mad with the carry flag: a[1] + a[2] (+ carry in), flags CC_IN and CC_OUT.
template <class T, bool SUB>
Flow with_carry(Warp& w, const Op& op, u32 mask) {
  const T *a = w.reg<T>(op.a[1]), *b = w.reg<T>(op.a[2]);
  T r[32];
  u32 out = 0;
  for (int i = 0; i < 32; i++) {
    const T in = op.flags & CC_IN ? (w.carry >> i) & 1 : 0;
    // SASS keeps a borrow as its complement; PTX's CC.CF of sub.cc is the borrow itself.
    const T s = SUB ? T(a[i] - b[i]) : T(a[i] + b[i]);
    r[i] = SUB ? T(s - in) : T(s + in);
    const bool c = SUB ? a[i] < b[i] || s < in : s < a[i] || r[i] < s;
    out |= u32(c) << i;
  }
  put(w, op.a[0], r, mask);
  if (op.flags & CC_OUT) w.carry = (w.carry & ~mask) | (out & mask);
  return Flow::next;
}
template <class T, bool HI>
Flow mad_carry(Warp& w, const Op& op, u32 mask) {
  const T *a = w.reg<T>(op.a[1]), *b = w.reg<T>(op.a[2]);
  const U<T>* c = w.reg<U<T>>(op.a[3]);
  U<T> r[32];
  u32 out = 0;
  for (int i = 0; i < 32; i++) {
    const Wide<T> p = Wide<T>(a[i]) * Wide<T>(b[i]);
    const U<T> m = HI ? U<T>(p >> BITS<T>) : U<T>(p), in = op.flags & CC_IN ? (w.carry >> i) & 1 : 0;
    const U<T> s = m + c[i];
    r[i] = s + in;
    out |= u32(s < m || r[i] < s) << i;
  }
  put(w, op.a[0], r, mask);
  if (op.flags & CC_OUT) w.carry = (w.carry & ~mask) | (out & mask);
  return Flow::next;
}

template <class T>
void arithmetic(const Name& t) {
  using UT = U<T>;
  def("mul.hi." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return T((Wide<T>(a) * Wide<T>(b)) >> BITS<T>); })>);
  def("mad.hi." + t, &map3<T, T, T, T, FN(T a, T b, T c, u32) {
    return T(UT(UT((Wide<T>(a) * Wide<T>(b)) >> BITS<T>) + UT(c))); })>);
  def("div." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(UT(0) - UT(a)) : T(a / b); })>);
  def("rem." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b); })>);
  def("min." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return a < b ? a : b; })>);
  def("max." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return a > b ? a : b; })>);
  def("shr." + t, &map2<T, T, u32, FN(T a, u32 n, u32) {
    return shift_right<T>(a, n); })>);
  def("sad." + t, &map3<UT, T, T, UT, FN(T a, T b, UT c, u32) {
    return UT(c + (a < b ? UT(b) - UT(a) : UT(a) - UT(b))); })>);
  if constexpr (sizeof(T) < 8) {
    def("mul.wide." + t, &map2<Wide<T>, T, T, FN(T a, T b, u32) {
      return Wide<T>(Wide<T>(a) * Wide<T>(b)); })>);
    def("mad.wide." + t, &map3<Wide<T>, T, T, Wide<T>, FN(T a, T b, Wide<T> c, u32) {
      return Wide<T>(U<Wide<T>>(Wide<T>(a) * Wide<T>(b)) + U<Wide<T>>(c)); })>);
  }
  if constexpr (sizeof(T) > 2) {
    def("bfe." + t, &map3<T, T, u32, u32, FN(T a, u32 p, u32 n, u32) {
      return field_extract<T>(a, p, n); })>);
    def("mad.cc.lo." + t, &mad_carry<T, false>);
    def("mad.cc.hi." + t, &mad_carry<T, true>);
    def("bfind." + t, &map1<u32, T, FN(T a, u32) {
      const u64 v = std::is_signed_v<T> && a < 0 ? u64(UT(~a)) : u64(UT(a));
      return v ? u32(63 - __builtin_clzll(v)) : ~0u; })>);
    def("bfind.shiftamt." + t, &map1<u32, T, FN(T a, u32) {
      const u64 v = std::is_signed_v<T> && a < 0 ? u64(UT(~a)) : u64(UT(a));
      return v ? BITS<T> - 1 - u32(63 - __builtin_clzll(v)) : ~0u; })>);
  }
}

template <class T>
void bitwise(const Name& t) {  // T unsigned: same bits for either sign
  using S = std::make_signed_t<T>;
  def("add." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return T(a + b); })>);
  def("sub." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return T(a - b); })>);
  def("mul.lo." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return T(u64(a) * b); })>);
  def("mad.lo." + t, &map3<T, T, T, T, FN(T a, T b, T c, u32) {
    return T(u64(a) * b + c); })>);
  def("and." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return T(a & b); })>);
  def("or." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return T(a | b); })>);
  def("xor." + t, &map2<T, T, T, FN(T a, T b, u32) {
    return T(a ^ b); })>);
  def("not." + t, &map1<T, T, FN(T a, u32) {
    return T(~a); })>);
  def("cnot." + t, &map1<T, T, FN(T a, u32) {
    return T(a == 0); })>);
  def("neg." + t, &map1<T, T, FN(T a, u32) {
    return T(0 - a); })>);
  def("abs." + t, &map1<T, T, FN(T a, u32) {
    return S(a) < 0 ? T(0 - a) : a; })>);
  def("shl." + t, &map2<T, T, u32, FN(T a, u32 n, u32) {
    return shift_left<T>(a, n); })>);
  def("mov." + t, &map1<T, T, FN(T a, u32) {
    return a; })>);
  def(
      "selp." + t, +[](Warp& w, const Op& op, u32 mask) {
        const T *a = w.reg<T>(op.a[1]), *b = w.reg<T>(op.a[2]);
        const u32 p = w.pred(op.a[3]);
        T r[32];
        for (int i = 0; i < 32; i++) r[i] = (p >> i) & 1 ? a[i] : b[i];
        put(w, op.a[0], r, mask);
        return Flow::next;
      });
  if constexpr (sizeof(T) > 2) {
    def("add.cc." + t, &with_carry<T, false>);
    def("sub.cc." + t, &with_carry<T, true>);
    def(
        "bfi." + t, +[](Warp& w, const Op& op, u32 mask) {
          const T *a = w.reg<T>(op.a[1]), *b = w.reg<T>(op.a[2]);
          const u32 *p = w.reg<u32>(op.a[3]), *n = w.reg<u32>(op.a[4]);
          T r[32];
          for (int i = 0; i < 32; i++) r[i] = field_insert<T>(a[i], b[i], p[i], n[i]);
          put(w, op.a[0], r, mask);
          return Flow::next;
        });
    def("popc." + t, &map1<u32, T, FN(T a, u32) {
      return u32(__builtin_popcountll(a)); })>);
    def("clz." + t, &map1<u32, T, FN(T a, u32) {
      return a ? u32(__builtin_clzll(a)) - (64 - BITS<T>) : BITS<T>; })>);
    def("brev." + t, &map1<T, T, FN(T a, u32) {
      T r = 0;
      for (u32 i = 0; i < BITS<T>; i++) r |= T((a >> i) & 1) << (BITS<T> - 1 - i);
      return r; })>);
  }
}

template <class From, class To>
void resize(const Name& from, const Name& to) {
  def("resize." + from + "." + to, &map1<To, From, FN(From a, u32) {
    return To(a); })>);
}

// mov between one register and the vector of its parts, lowest first. A part without a register is dropped.
template <class Part, class All>
void pack(const Name& part, const Name& all) {
  def(
      "pack." + part + "." + all, +[](Warp& w, const Op& op, u32 mask) {
        All r[32] = {};
        for (u32 k = 0; k < sizeof(All) / sizeof(Part); k++) {
          const Part* p = w.reg<Part>(op.a[1 + k]);
          for (int i = 0; i < 32; i++) r[i] |= All(All(p[i]) << (k * BITS<Part>));
        }
        put(w, op.a[0], r, mask);
        return Flow::next;
      });
  def(
      "unpack." + part + "." + all, +[](Warp& w, const Op& op, u32 mask) {
        All x[32];
        std::memcpy(x, w.reg<All>(op.a[0]), sizeof x);
        for (u32 k = 0; k < sizeof(All) / sizeof(Part); k++) {
          if (op.a[1 + k] == NO_REG) continue;
          Part r[32];
          for (int i = 0; i < 32; i++) r[i] = Part(x[i] >> (k * BITS<Part>));
          put(w, op.a[1 + k], r, mask);
        }
        return Flow::next;
      });
}

u32 permute(u32 a, u32 b, u32 selector, u32 mode) {
  const u64 x = (u64(b) << 32) | a;
  const u32 s = selector & 3;
  u32 r = 0;
  for (u32 i = 0; i < 4; i++) {
    u32 c;
    switch (mode) {
      case 0:
        c = (selector >> (4 * i)) & 15;
        break;
      case 1:
        c = s + i;
        break;  // f4e
      case 2:
        c = (s + 8 - i) & 7;
        break;  // b4e
      case 3:
        c = s;
        break;  // rc8
      case 4:
        c = i < s ? s : i;
        break;  // ecl
      case 5:
        c = i > s ? s : i;
        break;  // ecr
      default:
        c = (s & 1) * 2 + (i & 1);  // rc16
    }
    u8 v = u8(x >> ((c & 7) * 8));
    if (c & 8) v = v & 0x80 ? 0xff : 0;
    r |= u32(v) << (8 * i);
  }
  return r;
}
template <u32 MODE>
Flow prmt(Warp& w, const Op& op, u32 mask) {
  return map3 < u32, u32, u32, u32, FN(u32 a, u32 b, u32 s, u32) { return permute(a, b, s, MODE); })>(w, op, mask);
}

Flow lop3(Warp& w, const Op& op, u32 mask) {
  const u32 *a = w.reg<u32>(op.a[1]), *b = w.reg<u32>(op.a[2]), *c = w.reg<u32>(op.a[3]);
  u32 r[32] = {};
  for (u32 t = 0; t < 8; t++) {
    if (!((op.imm[0] >> t) & 1)) continue;
    const u32 na = t & 4 ? 0 : FULL, nb = t & 2 ? 0 : FULL, nc = t & 1 ? 0 : FULL;
    for (int i = 0; i < 32; i++) r[i] |= (a[i] ^ na) & (b[i] ^ nb) & (c[i] ^ nc);
  }
  put(w, op.a[0], r, mask);
  return Flow::next;
}

template <class A, class B>
i32 dot4(u32 a, u32 b) {
  i32 s = 0;
  for (int i = 0; i < 4; i++) s += i32(A(a >> (8 * i))) * i32(B(b >> (8 * i)));
  return s;
}
template <class A, class B>
void dp4a(const Name& t) {
  def("dp4a." + t, &map3<u32, u32, u32, u32, FN(u32 a, u32 b, u32 c, u32) {
    return u32(dot4<A, B>(a, b)) + c; })>);
}

const bool defined = [] {
  arithmetic<u16>("u16");
  arithmetic<i16>("s16");
  arithmetic<u32>("u32");
  arithmetic<i32>("s32");
  arithmetic<u64>("u64");
  arithmetic<i64>("s64");
  bitwise<u16>("b16");
  bitwise<u32>("b32");
  bitwise<u64>("b64");
  resize<u16, u32>("u16", "b32");
  resize<u16, u64>("u16", "b64");
  resize<i16, u32>("s16", "b32");
  resize<i16, u64>("s16", "b64");
  resize<u32, u16>("u32", "b16");
  resize<u32, u64>("u32", "b64");
  resize<i32, u64>("s32", "b64");
  resize<u64, u16>("u64", "b16");
  resize<u64, u32>("u64", "b32");
  resize<u8, u16>("u8", "b16");
  resize<u8, u32>("u8", "b32");
  resize<u8, u64>("u8", "b64");
  resize<i8, u16>("s8", "b16");
  resize<i8, u32>("s8", "b32");
  resize<i8, u64>("s8", "b64");
  resize<u16, u8>("u16", "b8");
  resize<u32, u8>("u32", "b8");
  resize<u64, u8>("u64", "b8");
  def("mov.b8", &map1<u8, u8, FN(u8 a, u32) {
    return a; })>);
  pack<u8, u16>("b8", "b16");
  pack<u8, u32>("b8", "b32");
  pack<u16, u32>("b16", "b32");
  pack<u16, u64>("b16", "b64");
  pack<u32, u64>("b32", "b64");
  def("add.sat.s32", &map2<i32, i32, i32, FN(i32 a, i32 b, u32) {
    const i64 s = i64(a) + b;
    return s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : i32(s); })>);
  def("sub.sat.s32", &map2<i32, i32, i32, FN(i32 a, i32 b, u32) {
    const i64 s = i64(a) - b;
    return s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : i32(s); })>);
  def("mul24.lo.s32", &map2<i32, i32, i32, FN(i32 a, i32 b, u32) {
    return i32(u32(i64(i32(u32(a) << 8) >> 8) * (i32(u32(b) << 8) >> 8))); })>);
  def("mul24.lo.u32", &map2<u32, u32, u32, FN(u32 a, u32 b, u32) {
    return u32(u64(a & 0xffffff) * (b & 0xffffff)); })>);
  def("prmt.b32", &prmt<0>);
  def("prmt.b32.f4e", &prmt<1>);
  def("prmt.b32.b4e", &prmt<2>);
  def("prmt.b32.rc8", &prmt<3>);
  def("prmt.b32.ecl", &prmt<4>);
  def("prmt.b32.ecr", &prmt<5>);
  def("prmt.b32.rc16", &prmt<6>);
  def("lop3.b32", &lop3);
  def("shf.l.clamp.b32", &map3<u32, u32, u32, u32, FN(u32 a, u32 b, u32 n, u32) {
    return u32(((((u64)b << 32) | a) << (n < 32 ? n : 32)) >> 32); })>);
  def("shf.l.wrap.b32", &map3<u32, u32, u32, u32, FN(u32 a, u32 b, u32 n, u32) {
    return u32(((((u64)b << 32) | a) << (n & 31)) >> 32); })>);
  def("shf.r.clamp.b32", &map3<u32, u32, u32, u32, FN(u32 a, u32 b, u32 n, u32) {
    return u32((((u64)b << 32) | a) >> (n < 32 ? n : 32)); })>);
  def("shf.r.wrap.b32", &map3<u32, u32, u32, u32, FN(u32 a, u32 b, u32 n, u32) {
    return u32((((u64)b << 32) | a) >> (n & 31)); })>);
  dp4a<u8, u8>("u32.u32");
  dp4a<u8, i8>("u32.s32");
  dp4a<i8, u8>("s32.u32");
  dp4a<i8, i8>("s32.s32");
  for (auto [name, f] : {std::pair<const char*, Handler>{"and.pred",
                                                         +[](Warp& w, const Op& op, u32 m) {
                                                           put_pred(w, op.a[0], w.pred(op.a[1]) & w.pred(op.a[2]), m);
                                                           return Flow::next;
                                                         }},
                         {"or.pred",
                          +[](Warp& w, const Op& op, u32 m) {
                            put_pred(w, op.a[0], w.pred(op.a[1]) | w.pred(op.a[2]), m);
                            return Flow::next;
                          }},
                         {"xor.pred",
                          +[](Warp& w, const Op& op, u32 m) {
                            put_pred(w, op.a[0], w.pred(op.a[1]) ^ w.pred(op.a[2]), m);
                            return Flow::next;
                          }},
                         {"not.pred",
                          +[](Warp& w, const Op& op, u32 m) {
                            put_pred(w, op.a[0], ~w.pred(op.a[1]), m);
                            return Flow::next;
                          }},
                         {"mov.pred", +[](Warp& w, const Op& op, u32 m) {
                            put_pred(w, op.a[0], w.pred(op.a[1]), m);
                            return Flow::next;
                          }}})
    define(name, f);
  return true;
}();
}  // namespace
}  // namespace vm
