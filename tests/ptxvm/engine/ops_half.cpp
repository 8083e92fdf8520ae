// fp16 and bf16 arithmetic, alone and in pairs: computed wide enough that the one rounding to 16 bits is the only one.
#include "number.h"

namespace vm {
namespace {
void def(const std::string& name, Handler h) { define(name.c_str(), h); }

struct Half {
  static constexpr u16 EXPONENT = 0x7c00;
  static float value(u16 h) { return half_value(h); }
  static u16 narrow(double x) { return half_bits(x); }
  static u16 narrow(float x) { return x != x ? NAN16 : bits<u16>(_Float16(x)); }
};
struct Brain {
  static constexpr u16 EXPONENT = 0x7f80;
  static float value(u16 h) { return bf16_value(h); }
  static u16 narrow(double x) { return bf16_bits(x); }
  static u16 narrow(float x) { return bf16_of_float(x); }
};

template <class H>
u16 flush16(u16 h, u32 flags) {
  return flags & FTZ && !(h & H::EXPONENT) ? h & 0x8000 : h;
}
template <class H>
float in(u16 h, u32 flags) {
  return H::value(flush16<H>(h, flags));
}
template <class H>
u16 out(u16 h, u32 flags) {
  h = flush16<H>(h, flags);
  const float x = H::value(h);
  if (flags & SAT) return H::narrow(saturate(x));
  if (flags & RELU) return x != x ? NAN16 : x > 0 ? h : u16(0);
  return h;
}
template <class H, bool MAX>
u16 select(u16 a, u16 b, u32 flags) {
  a = flush16<H>(a, flags);
  b = flush16<H>(b, flags);
  const u16 sign = flags & XORSIGN ? (a ^ b) & 0x8000 : 0;
  if (flags & XORSIGN) {
    a &= 0x7fff;
    b &= 0x7fff;
  }
  const float x = H::value(a), y = H::value(b);
  u16 r;
  if (x != x || y != y)
    r = (flags & NAN_WINS) || (x != x && y != y) ? NAN16 : x != x ? b : a;
  else if (x == y)
    r = bool(a & 0x8000) == MAX ? b : a;
  else
    r = (x < y) != MAX ? a : b;
  return u16((flags & XORSIGN ? r & 0x7fff : r) | sign);
}

template <class H, class F>
void unary(const std::string& name, const std::string& t, F) {
  def(name + "." + t, &map1<u16, u16, decltype([](u16 a, u32 f) { return F{}(a, f); })>);
  def(name + "." + t + "x2",
      &map1<u32, u32, decltype([](u32 a, u32 f) { return u32(F{}(u16(a), f)) | u32(F{}(u16(a >> 16), f)) << 16; })>);
}
template <class H, class F>
void binary(const std::string& name, const std::string& t, F) {
  def(name + "." + t, &map2<u16, u16, u16, decltype([](u16 a, u16 b, u32 f) { return F{}(a, b, f); })>);
  def(name + "." + t + "x2", &map2<u32, u32, u32, decltype([](u32 a, u32 b, u32 f) {
                                     return u32(F{}(u16(a), u16(b), f)) | u32(F{}(u16(a >> 16), u16(b >> 16), f)) << 16;
                                   })>);
}
template <class H, class F>
void ternary(const std::string& name, const std::string& t, F) {
  def(name + "." + t, &map3<u16, u16, u16, u16, decltype([](u16 a, u16 b, u16 c, u32 f) { return F{}(a, b, c, f); })>);
  def(name + "." + t + "x2", &map3<u32, u32, u32, u32, decltype([](u32 a, u32 b, u32 c, u32 f) {
                                     return u32(F{}(u16(a), u16(b), u16(c), f)) |
                                            u32(F{}(u16(a >> 16), u16(b >> 16), u16(c >> 16), f)) << 16;
                                   })>);
}

template <class H>
void arithmetic(const std::string& t) {
  binary<H>("add", t, [](u16 a, u16 b, u32 f) { return out<H>(H::narrow(in<H>(a, f) + in<H>(b, f)), f); });
  binary<H>("sub", t, [](u16 a, u16 b, u32 f) { return out<H>(H::narrow(in<H>(a, f) - in<H>(b, f)), f); });
  binary<H>("mul", t, [](u16 a, u16 b, u32 f) { return out<H>(H::narrow(in<H>(a, f) * in<H>(b, f)), f); });
  ternary<H>("fma", t, [](u16 a, u16 b, u16 c, u32 f) {
    return out<H>(H::narrow(fma_odd(in<H>(a, f), in<H>(b, f), in<H>(c, f))), f);
  });
  binary<H>("min", t, [](u16 a, u16 b, u32 f) { return select<H, false>(a, b, f); });
  binary<H>("max", t, [](u16 a, u16 b, u32 f) { return select<H, true>(a, b, f); });
  unary<H>("neg", t, [](u16 a, u32 f) { return u16(flush16<H>(a, f) ^ 0x8000); });
  unary<H>("abs", t, [](u16 a, u32 f) { return u16(flush16<H>(a, f) & 0x7fff); });
  unary<H>("ex2", t, [](u16 a, u32 f) { return out<H>(H::narrow(std::exp2(double(in<H>(a, f)))), f); });
  unary<H>("tanh", t, [](u16 a, u32 f) { return out<H>(H::narrow(std::tanh(double(in<H>(a, f)))), f); });
}
const bool defined = (arithmetic<Half>("f16"), arithmetic<Brain>("bf16"), true);
}  // namespace
}  // namespace vm
