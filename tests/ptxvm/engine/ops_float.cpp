// fp32 and fp64 arithmetic, comparison and the approximate functions. NaN results are the canonical NaN, as on the
// device.
#include "number.h"

namespace vm {
namespace {
void def(const std::string& name, Handler h) { define(name.c_str(), h); }

inline float in(float x, u32 flags) { return flags & FTZ ? flush(x) : x; }
inline float out(float r, u32 flags) {
  r = canonical(r);
  if (flags & FTZ) r = flush(r);
  return flags & SAT ? saturate(r) : r;
}
// An exact-or-odd double sum rounded as the flags say; an exact zero of unlike signs is -0 when rounding down.
inline float round32(double x, bool exact_zero, u32 flags) {
  if (x == 0 && exact_zero && (flags & RM)) return -0.f;
  return flags & (RZ | RM | RP) ? float(round_to(x, F32, flags)) : float(x);
}

template <class T, bool MAX>
T select(T a, T b, u32 flags) {
  if (flags & NAN_WINS && (a != a || b != b)) return canonical(T(NAN));
  if (a != a) return canonical(b);
  if (b != b) return a;
  if (a == b) return std::signbit(a) == MAX ? b : a;
  return (a < b) != MAX ? a : b;
}
template <bool MAX>
float select32(float a, float b, u32 flags) {
  a = in(a, flags);
  b = in(b, flags);
  if (!(flags & XORSIGN)) return select<float, MAX>(a, b, flags);
  const u32 sign = (bits<u32>(a) ^ bits<u32>(b)) & 0x80000000u;
  return bits<float>((bits<u32>(select<float, MAX>(std::fabs(a), std::fabs(b), flags)) & 0x7fffffffu) | sign);
}

void arithmetic32() {
  def(
      "add.f32", &pick < &map2 < float, float, float, FN(float a, float b, u32) { return canonical(a + b); }) >,
      &map2 < float, float, float, FN(float a, float b, u32 f) {
    a = in(a, f);
    b = in(b, f);
    return out(f & (RM | RP | RZ) ? round32(add_odd(a, b), !(a == 0 && b == 0 && std::signbit(a) == std::signbit(b)), f)
                                  : a + b,
               f);
  })>>);
  def(
      "sub.f32", &pick < &map2 < float, float, float, FN(float a, float b, u32) { return canonical(a - b); }) >,
      &map2 < float, float, float, FN(float a, float b, u32 f) {
    a = in(a, f);
    b = -in(b, f);
    return out(f & (RM | RP | RZ) ? round32(add_odd(a, b), !(a == 0 && b == 0 && std::signbit(a) == std::signbit(b)), f)
                                  : a + b,
               f);
  })>>);
  def(
      "mul.f32", &pick < &map2 < float, float, float, FN(float a, float b, u32) { return canonical(a * b); }) >,
      &map2 < float, float, float, FN(float a, float b, u32 f) {
    a = in(a, f);
    b = in(b, f);
    return out(round32(double(a) * b, false, f), f);
  })>>);
  def(
      "fma.f32", &pick < &map3 < float, float, float, float,
      FN(float a, float b, float c, u32) { return canonical(std::fma(a, b, c)); }) >,
      &map3 < float, float, float, float, FN(float a, float b, float c, u32 f) {
    a = in(a, f);
    b = in(b, f);
    c = in(c, f);
    return out(f & (RM | RP | RZ) ? round32(fma_odd(a, b, c), false, f) : std::fma(a, b, c), f);
  })>>);
  def("div.f32", &map2<float, float, float, FN(float a, float b, u32 f) {
    return out(in(a, f) / in(b, f), f); })>);
  def("min.f32", &map2<float, float, float, FN(float a, float b, u32 f) {
    return select32<false>(a, b, f); })>);
  def("max.f32", &map2<float, float, float, FN(float a, float b, u32 f) {
    return select32<true>(a, b, f); })>);
  def("neg.f32", &map1<float, float, FN(float a, u32 f) {
    return -in(a, f); })>);
  def("abs.f32", &map1<float, float, FN(float a, u32 f) {
    return std::fabs(in(a, f)); })>);
  def("copysign.f32", &map2<float, float, float, FN(float a, float b, u32) {
    return std::copysign(b, a); })>);
  def("rcp.f32", &map1<float, float, FN(float a, u32 f) {
    return out(1.f / in(a, f), f); })>);
  def("sqrt.f32", &map1<float, float, FN(float a, u32 f) {
    return out(std::sqrt(in(a, f)), f); })>);
  // Approximate functions: correctly rounded or nearly so here, two units in the last place on the device.
  def("rsqrt.f32", &map1<float, float, FN(float a, u32 f) {
    return out(float(1.0 / std::sqrt(double(in(a, f)))), f); })>);
  def("ex2.f32", &map1<float, float, FN(float a, u32 f) {
    return out(std::exp2(in(a, f)), f); })>);
  def("lg2.f32", &map1<float, float, FN(float a, u32 f) {
    return out(std::log2(in(a, f)), f); })>);
  def("sin.f32", &map1<float, float, FN(float a, u32 f) {
    return out(std::sin(in(a, f)), f); })>);
  def("cos.f32", &map1<float, float, FN(float a, u32 f) {
    return out(std::cos(in(a, f)), f); })>);
  def("tanh.f32", &map1<float, float, FN(float a, u32 f) {
    return out(std::tanh(in(a, f)), f); })>);
}

void arithmetic64() {
  def("add.f64", &map2<double, double, double, FN(double a, double b, u32) {
    return canonical(a + b); })>);
  def("sub.f64", &map2<double, double, double, FN(double a, double b, u32) {
    return canonical(a - b); })>);
  def("mul.f64", &map2<double, double, double, FN(double a, double b, u32) {
    return canonical(a * b); })>);
  def("fma.f64", &map3<double, double, double, double, FN(double a, double b, double c, u32) {
    return canonical(std::fma(a, b, c)); })>);
  def("div.f64", &map2<double, double, double, FN(double a, double b, u32) {
    return canonical(a / b); })>);
  def("min.f64", &map2<double, double, double, FN(double a, double b, u32 f) {
    return select<double, false>(a, b, f); })>);
  def("max.f64", &map2<double, double, double, FN(double a, double b, u32 f) {
    return select<double, true>(a, b, f); })>);
  def("neg.f64", &map1<double, double, FN(double a, u32) {
    return -a; })>);
  def("abs.f64", &map1<double, double, FN(double a, u32) {
    return std::fabs(a); })>);
  def("copysign.f64", &map2<double, double, double, FN(double a, double b, u32) {
    return std::copysign(b, a); })>);
  def("rcp.f64", &map1<double, double, FN(double a, u32) {
    return canonical(1.0 / a); })>);
  def("sqrt.f64", &map1<double, double, FN(double a, u32) {
    return canonical(std::sqrt(a)); })>);
  // The approximate fp64 reciprocals keep the upper word of the input and of the result only.
  def("rcp.approx.f64", &map1<double, double, FN(double a, u32) {
    a = bits<double>(bits<u64>(a) & ~0xffffffffull);
    if (std::fpclassify(a) == FP_SUBNORMAL) a = std::copysign(0.0, a);
    return bits<double>(bits<u64>(canonical(1.0 / a)) & ~0xffffffffull); })>);
  def("rsqrt.approx.f64", &map1<double, double, FN(double a, u32) {
    return canonical(1.0 / std::sqrt(a)); })>);
}

// testp: classes of numbers.
template <class T>
void classes(const std::string& t) {
  auto test = [&](const char* name, auto f) {
    using F = decltype(f);
    def(
        std::string("testp.") + name + "." + t, +[](Warp& w, const Op& op, u32 mask) {
          const T* a = w.reg<T>(op.a[1]);
          u32 r = 0;
          for (int i = 0; i < 32; i++) r |= u32(F{}(a[i])) << i;
          put_pred(w, op.a[0], r, mask);
          return Flow::next;
        });
  };
  test("finite", [](T x) { return bool(std::isfinite(x)); });
  test("infinite", [](T x) { return bool(std::isinf(x)); });
  test("number", [](T x) { return !std::isnan(x); });
  test("notanumber", [](T x) { return bool(std::isnan(x)); });
  test("normal", [](T x) { return bool(std::isnormal(x)); });
  test("subnormal", [](T x) { return std::fpclassify(x) == FP_SUBNORMAL; });
}

const bool defined = (arithmetic32(), arithmetic64(), classes<float>("f32"), classes<double>("f64"), true);
}  // namespace
}  // namespace vm
