// cvt and setp: every source is read into a wide type (double, i64 or u64), every result written from one.
#include "number.h"

namespace vm {
namespace {
void def(const std::string& name, Handler h) { define(name.c_str(), h); }

struct F16Bits {
  u16 v;
};
struct BF16Bits {
  u16 v;
};
template <class T>
auto widen(T x) {
  if constexpr (std::is_same_v<T, F16Bits>)
    return double(half_value(x.v));
  else if constexpr (std::is_same_v<T, BF16Bits>)
    return double(bf16_value(x.v));
  else if constexpr (std::is_floating_point_v<T>)
    return double(x);
  else if constexpr (std::is_signed_v<T>)
    return i64(x);
  else
    return u64(x);
}
// An integer as a double that is exact or rounded to odd.
inline double to_double(i64 x) { return add_odd(double(x >> 32) * 4294967296.0, double(u32(x))); }
inline double to_double(u64 x) { return add_odd(double(x >> 32) * 4294967296.0, double(u32(x))); }

inline double integral(double x, u32 flags) {
  return flags & RNI ? std::nearbyint(x) : flags & RZ ? std::trunc(x) : flags & RM ? std::floor(x) : std::ceil(x);
}
// Float to integer saturates. A NaN becomes 0, or the lowest bit pattern where a 64-bit type takes part.
template <class I>
I to_integer(double x, u32 flags, bool wide_source) {
  using L = std::numeric_limits<I>;
  if (x != x) return wide_source || sizeof(I) == 8 ? I(u64(1) << (sizeof(I) * 8 - 1)) : I(0);
  x = integral(x, flags);
  if (x <= double(L::min())) return L::min();
  if (x >= std::ldexp(1.0, int(sizeof(I)) * 8 - std::is_signed_v<I>)) return L::max();
  return I(x);
}
template <class I, class W>
I clamp_integer(W x) {
  using L = std::numeric_limits<I>;
  if constexpr (std::is_signed_v<W>) {
    if (x < 0) return std::is_signed_v<I> && x > i64(L::min()) ? I(x) : L::min();
    return u64(x) > u64(L::max()) ? L::max() : I(x);
  } else {
    return x > u64(L::max()) ? L::max() : I(x);
  }
}

template <class D, class S>
D convert(S s, u32 flags) {
  auto x = widen(s);
  constexpr bool float_in = std::is_same_v<decltype(x), double>;
  constexpr bool float_out = std::is_floating_point_v<D> || std::is_same_v<D, F16Bits> || std::is_same_v<D, BF16Bits>;
  if constexpr (float_in) {
    if (flags & FTZ && std::is_same_v<S, float>) x = flush(float(x));
  }
  if constexpr (!float_out) {
    if constexpr (float_in)
      return to_integer<D>(x, flags, std::is_same_v<S, double>);
    else
      return flags & SAT ? clamp_integer<D>(x) : D(x);
  } else {
    double y;
    if constexpr (float_in)
      y = flags & TO_INTEGRAL ? integral(x, flags) : x;
    else
      y = to_double(x);
    if (flags & SAT) y = y > 0 ? (y < 1 ? y : 1) : 0;
    if constexpr (std::is_same_v<D, F16Bits>)
      return {half_bits(y, flags & TO_INTEGRAL ? 0 : flags)};
    else if constexpr (std::is_same_v<D, BF16Bits>)
      return {bf16_bits(y, flags & TO_INTEGRAL ? 0 : flags)};
    else if constexpr (std::is_same_v<D, float>) {
      if (y != y) return bits<float>(NAN32);
      const float r = flags & (RZ | RM | RP) && !(flags & TO_INTEGRAL) ? float(round_to(y, F32, flags)) : float(y);
      return flags & FTZ ? flush(r) : r;
    } else if constexpr (std::is_same_v<S, i64> || std::is_same_v<S, u64>) {
      if (!(flags & (RZ | RM | RP))) return double(s);
      const double r = double(s);  // toward the wanted side of the nearest
      const __int128 diff = __int128(s) - __int128(r);
      if (diff == 0) return r;
      const bool up = flags & RP ? diff > 0 : flags & RM ? false : diff > 0 && s < S(0);
      const bool down = flags & RM ? diff < 0 : flags & RP ? false : diff < 0 && !(s < S(0));
      return up ? std::nextafter(r, INFINITY) : down ? std::nextafter(r, -INFINITY) : r;
    } else {
      return canonical(y);
    }
  }
}

template <class D, class S>
void pair(const std::string& d, const std::string& s) {
  def("cvt." + d + "." + s, &map1<D, S, decltype([](S x, u32 f) { return convert<D, S>(x, f); })>);
}
template <class S>
void from(const std::string& s) {
  pair<u8, S>("u8", s);
  pair<i8, S>("s8", s);
  pair<u16, S>("u16", s);
  pair<i16, S>("s16", s);
  pair<u32, S>("u32", s);
  pair<i32, S>("s32", s);
  pair<u64, S>("u64", s);
  pair<i64, S>("s64", s);
  pair<F16Bits, S>("f16", s);
  pair<BF16Bits, S>("bf16", s);
  pair<float, S>("f32", s);
  pair<double, S>("f64", s);
}

template <class F>
Flow pack2(Warp& w, const Op& op, u32 mask) {  // {first -> upper, second -> lower}
  return map2 < u32, float, float, FN(float hi, float lo, u32 f) { return u32(F{}(lo, f)) | u32(F{}(hi, f)) << 16; })>(w, op, mask);
}
template <bool E4>
void fp8(const std::string& t) {
  def("cvt." + t + "x2.f32", &map2<u16, float, float, FN(float hi, float lo, u32 f) {
    return u16(fp8_bits<E4>(lo, f) | fp8_bits<E4>(hi, f) << 8); })>);
  def("cvt." + t + "x2.f16x2", &map1<u16, u32, FN(u32 h, u32 f) {
    return u16(fp8_bits<E4>(half_value(u16(h)), f) | fp8_bits<E4>(half_value(u16(h >> 16)), f) << 8); })>);
  def("cvt.f16x2." + t + "x2", &map1<u32, u16, FN(u16 q, u32 f) {
    return u32(half_bits(fp8_value<E4>(u8(q)), f)) | u32(half_bits(fp8_value<E4>(u8(q >> 8)), f)) << 16; })>);
}

// setp: shape is the comparison; a[0] and a[1] the results, a[4] a predicate combined by imm[0] (0 none, 1 and, 2 or, 3
// xor).
enum Cmp : u32 { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };
template <class T>
u32 compare(const T* a, const T* b, u32 cmp) {
  u32 r = 0;
#define LANES(e)                 \
  for (int i = 0; i < 32; i++) { \
    const T x = a[i], y = b[i];  \
    r |= u32(e) << i;            \
  }                              \
  return r
  switch (cmp) {
    case EQ:
      LANES(x == y);
    case NE:
      LANES(x < y || x > y);
    case LT:
      LANES(x < y);
    case LE:
      LANES(x <= y);
    case GT:
      LANES(x > y);
    case GE:
      LANES(x >= y);
    case EQU:
      LANES(!(x < y || x > y));
    case NEU:
      LANES(!(x == y));
    case LTU:
      LANES(!(x >= y));
    case LEU:
      LANES(!(x > y));
    case GTU:
      LANES(!(x <= y));
    case GEU:
      LANES(!(x < y));
    case NUM:
      LANES(x == x && y == y);
    default:
      LANES(x != x || y != y);
  }
#undef LANES
}
template <class T, class V, class F>
u32 compare_at(Warp& w, const Op& op, F value) {
  const T *a = w.reg<T>(op.a[2]), *b = w.reg<T>(op.a[3]);
  V x[32], y[32];
  for (int i = 0; i < 32; i++) {
    x[i] = value(a[i], op.flags);
    y[i] = value(b[i], op.flags);
  }
  return compare<V>(x, y, op.shape);
}
u32 combine(Warp& w, const Op& op, u32 r) {
  const u32 p = op.imm[0] ? w.pred(op.a[4]) : 0;
  return op.imm[0] == 1 ? r & p : op.imm[0] == 2 ? r | p : op.imm[0] == 3 ? r ^ p : r;
}
template <class T, class V, class F>
void setp(const std::string& t, F) {
  def(
      "setp." + t, +[](Warp& w, const Op& op, u32 mask) {
        const u32 r = compare_at<T, V>(w, op, F{});
        const u32 first = combine(w, op, r), second = combine(w, op, ~r);
        put_pred(w, op.a[0], first, mask);
        put_pred(w, op.a[1], second, mask);
        return Flow::next;
      });
}
// Of a pair, a[0] is the lower half's predicate and a[1] the upper's.
template <class F>
void setp2(const std::string& t, F) {
  def(
      "setp." + t, +[](Warp& w, const Op& op, u32 mask) {
        const u32 lo = compare_at<u32, float>(w, op, [](u32 x, u32 f) { return F{}(u16(x), f); });
        const u32 hi = compare_at<u32, float>(w, op, [](u32 x, u32 f) { return F{}(u16(x >> 16), f); });
        put_pred(w, op.a[0], combine(w, op, lo), mask);
        put_pred(w, op.a[1], combine(w, op, hi), mask);
        return Flow::next;
      });
}
template <class T>
void setp_plain(const std::string& t) {
  setp<T, T>(t, [](T x, u32) { return x; });
}

const bool defined = [] {
  from<u8>("u8");
  from<i8>("s8");
  from<u16>("u16");
  from<i16>("s16");
  from<u32>("u32");
  from<i32>("s32");
  from<u64>("u64");
  from<i64>("s64");
  from<F16Bits>("f16");
  from<BF16Bits>("bf16");
  from<float>("f32");
  from<double>("f64");
  def("cvt.fast.f32.s32", &map1<float, i32, FN(i32 x, u32) {
    return float(x); })>);
  def("cvt.fast.f32.f16", &map1<float, u16, FN(u16 x, u32) {
    return canonical(half_value(x)); })>);
  def("cvt.fast.f16.f32", &map1<u16, float, FN(float x, u32) {
    return x != x ? NAN16 : bits<u16>(_Float16(x)); })>);
  def("cvt.fast.bf16.f32", &map1<u16, float, FN(float x, u32) {
    return bf16_of_float(x); })>);
  def("cvt.fast.f16x2.f32", &pack2<FN(float x, u32) {
    return x != x ? NAN16 : bits<u16>(_Float16(x)); })>);
  def("cvt.fast.bf16x2.f32", &pack2<FN(float x, u32) {
    return bf16_of_float(x); })>);
  def("cvt.f16x2.f32", &pack2<FN(float x, u32 f) {
    return half_bits(x, f); })>);
  def("cvt.bf16x2.f32", &pack2<FN(float x, u32 f) {
    return bf16_bits(x, f); })>);
  def("cvt.tf32.f32", &map1<u32, float, FN(float x, u32 f) {
    if (f & RELU) x = x > 0 || x != x ? x : 0;
    return x != x ? NAN32 : bits<u32>(float(round_to(x, TF32, f))); })>);
  fp8<true>("e4m3");
  fp8<false>("e5m2");
  setp_plain<u16>("u16");
  setp_plain<i16>("s16");
  setp_plain<u32>("u32");
  setp_plain<i32>("s32");
  setp_plain<u64>("u64");
  setp_plain<i64>("s64");
  setp_plain<double>("f64");
  setp<float, float>("f32", [](float x, u32 f) { return f & FTZ ? flush(x) : x; });
  setp<u16, float>("f16", [](u16 h, u32 f) { return half_value(f & FTZ && !(h & 0x7c00) ? h & 0x8000 : h); });
  setp<u16, float>("bf16", [](u16 h, u32) { return bf16_value(h); });
  setp2("f16x2", [](u16 h, u32 f) { return half_value(f & FTZ && !(h & 0x7c00) ? h & 0x8000 : h); });
  setp2("bf16x2", [](u16 h, u32) { return bf16_value(h); });
  return true;
}();
}  // namespace
}  // namespace vm
