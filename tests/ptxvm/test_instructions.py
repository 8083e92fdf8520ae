"""Single instructions against values worked out by hand or by numpy, edge cases above all."""

import math

import numpy as np
import pytest

from .snippets import evaluate

NAN, INF = math.nan, math.inf
DENORMAL = 1e-40
MAX = float(np.finfo(np.float32).max)
ALL = 0xFFFFFFFF

# instruction, result type, source types, one row of sources per lane, expected results
INTEGER = [
    ("add.s32 {d}, {a}, {b}", "s32", "s32 s32", [(2**31 - 1, 1), (-1, -1)], [-(2**31), -2]),
    ("add.sat.s32 {d}, {a}, {b}", "s32", "s32 s32", [(2**31 - 1, 1), (-(2**31), -1)], [2**31 - 1, -(2**31)]),
    ("sub.u16 {d}, {a}, {b}", "u16", "u16 u16", [(0, 1)], [65535]),
    ("mul.lo.s64 {d}, {a}, {b}", "s64", "s64 s64", [(2**62, 6), (-3, 5)], [-(2**63), -15]),
    ("mul.hi.s32 {d}, {a}, {b}", "s32", "s32 s32", [(-1, 1), (2**30, 12)], [-1, 3]),
    ("mul.hi.u32 {d}, {a}, {b}", "u32", "u32 u32", [(ALL, ALL)], [ALL - 1]),
    ("mul.hi.u64 {d}, {a}, {b}", "u64", "u64 u64", [(2**64 - 1, 2**64 - 1), (2**63, 6)], [2**64 - 2, 3]),
    ("mul.hi.s64 {d}, {a}, {b}", "s64", "s64 s64", [(-1, 1), (2**62, 12)], [-1, 3]),
    ("mul.wide.s32 {d}, {a}, {b}", "s64", "s32 s32", [(-(2**31), 2), (ALL, 7)], [-(2**32), -7]),
    ("mul.wide.u16 {d}, {a}, {b}", "u32", "u16 u16", [(65535, 65535)], [65535**2]),
    ("mad.lo.s32 {d}, {a}, {b}, {c}", "s32", "s32 s32 s32", [(3, -4, 5)], [-7]),
    ("mad.hi.u32 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(ALL, ALL, 5)], [3]),
    ("mad.wide.u32 {d}, {a}, {b}, {c}", "u64", "u32 u32 u64", [(ALL, ALL, 2**33)], [1]),
    ("mul24.lo.u32 {d}, {a}, {b}", "u32", "u32 u32", [(0xFF000002, 3)], [6]),
    ("mul24.lo.s32 {d}, {a}, {b}", "s32", "s32 s32", [(0x00FFFFFF, 3)], [-3]),
    ("div.s32 {d}, {a}, {b}", "s32", "s32 s32", [(-7, 2), (-(2**31), -1)], [-3, -(2**31)]),
    ("rem.s32 {d}, {a}, {b}", "s32", "s32 s32", [(-7, 2), (-(2**31), -1)], [-1, 0]),
    ("rem.u64 {d}, {a}, {b}", "u64", "u64 u64", [(2**64 - 1, 10)], [5]),
    ("min.s32 {d}, {a}, {b}", "s32", "s32 s32", [(-1, 1)], [-1]),
    ("min.u32 {d}, {a}, {b}", "u32", "u32 u32", [(-1, 1)], [1]),
    ("abs.s32 {d}, {a}", "s32", "s32", [(-5,), (-(2**31),)], [5, -(2**31)]),
    ("neg.s16 {d}, {a}", "s16", "s16", [(5,)], [-5]),
    ("sad.s32 {d}, {a}, {b}, {c}", "u32", "s32 s32 u32", [(-5, 7, 1)], [13]),
    ("cnot.b32 {d}, {a}", "u32", "u32", [(0,), (7,)], [1, 0]),
    ("popc.b64 {d}, {a}", "u32", "u64", [(2**64 - 1,), (0,)], [64, 0]),
    ("clz.b32 {d}, {a}", "u32", "u32", [(0,), (1,), (ALL,)], [32, 31, 0]),
    ("brev.b32 {d}, {a}", "u32", "u32", [(1,), (6,)], [2**31, 0x60000000]),
    ("bfind.u32 {d}, {a}", "u32", "u32", [(0,), (9,)], [ALL, 3]),
    ("bfind.s32 {d}, {a}", "u32", "s32", [(-1,), (-10,)], [ALL, 3]),
    ("bfind.shiftamt.u32 {d}, {a}", "u32", "u32", [(9,)], [28]),
    ("dp4a.s32.u32 {d}, {a}, {b}, {c}", "s32", "u32 u32 s32", [(0xFF01FF02, 0x01020304, 10)], [10 + 8 - 3 + 2 - 1]),
]
BITS = [
    ("shl.b32 {d}, {a}, {b}", "u32", "u32 u32", [(1, 31), (1, 32), (1, 2**31)], [2**31, 0, 0]),
    ("shr.u32 {d}, {a}, {b}", "u32", "u32 u32", [(ALL, 31), (ALL, 32)], [1, 0]),
    ("shr.s32 {d}, {a}, {b}", "s32", "s32 u32", [(-8, 1), (-8, 40), (8, 40)], [-4, -1, 0]),
    ("shr.b64 {d}, {a}, {b}", "u64", "u64 u32", [(2**63, 63), (2**63, 64)], [1, 0]),
    ("shf.l.wrap.b32 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(0x80000000, 1, 1), (5, 7, 32)], [3, 7]),
    ("shf.l.clamp.b32 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(5, 7, 32), (5, 7, 99)], [5, 5]),
    ("shf.r.wrap.b32 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(2, 1, 1), (5, 7, 32)], [0x80000001, 5]),
    ("shf.r.clamp.b32 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(5, 7, 32), (5, 7, 99)], [7, 7]),
    ("bfe.u32 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(0xABCD, 4, 8), (ALL, 28, 8), (5, 0, 0), (ALL, 40, 4)],
     [0xBC, 15, 0, 0]),
    ("bfe.s32 {d}, {a}, {b}, {c}", "s32", "s32 u32 u32", [(0x80, 4, 4), (-1, 28, 8), (0x70, 4, 4), (-1, 40, 4)],
     [-8, -1, 7, -1]),
    ("bfe.s64 {d}, {a}, {b}, {c}", "s64", "s64 u32 u32", [(-(2**63), 60, 4), (2**62, 60, 4)], [-8, 4]),
    ("bfi.b32 {d}, {a}, {b}, {c}, {e}", "u32", "u32 u32 u32 u32",
     [(0xF, 0, 4, 4), (0, ALL, 8, 8), (ALL, 0, 28, 8), (ALL, 3, 32, 4), (ALL, 3, 0, 0)],
     [0xF0, 0xFFFF00FF, 0xF0000000, 3, 3]),
    ("bfi.b64 {d}, {a}, {b}, {c}, {e}", "u64", "u64 u64 u32 u32", [(5, 7, 32, 32)], [(5 << 32) | 7]),
    ("prmt.b32 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32",
     [(0x33221100, 0x77665544, 0x7531), (0x33221180, 0x77665544, 0x8888), (0x33221100, 0x77665544, 0x0123)],
     [0x77553311, ALL, 0x00112233]),
    ("prmt.b32.f4e {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(0x33221100, 0x77665544, 1)], [0x44332211]),
    ("prmt.b32.b4e {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(0x33221100, 0x77665544, 0)], [0x55667700]),
    ("prmt.b32.rc8 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(0x33221100, 0, 2)], [0x22222222]),
    ("prmt.b32.ecl {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(0x33221100, 0, 2)], [0x33222222]),
    ("prmt.b32.ecr {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(0x33221100, 0, 1)], [0x11111100]),
    ("prmt.b32.rc16 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(0x33221100, 0, 1)], [0x33223322]),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0x96", "u32", "u32 u32 u32", [(0xF0, 0xCC, 0xAA)], [0xF0 ^ 0xCC ^ 0xAA]),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0xCA", "u32", "u32 u32 u32", [(0xF0, 0xCC, 0xAA)],
     [0xF0 & 0xCC | ~0xF0 & 0xAA & 0xFF]),
    ("selp.b32 {d}, {a}, {b}, {c}", "u32", "u32 u32 pred", [(1, 2, 1), (1, 2, 0)], [1, 2]),
    ("slct.u32.s32 {d}, {a}, {b}, {c}", "u32", "u32 u32 s32", [(1, 2, 0), (1, 2, -1)], [1, 2]),
    ("mov.b32 {d}, {{{a}, {b}}}", "u32", "u16 u16", [(0x1234, 0xABCD)], [0xABCD1234]),
    ("mov.b64 {d}, {{{a}, {b}}}", "u64", "u32 u32", [(1, 2)], [(2 << 32) | 1]),
    ("{{ .reg .b32 x; mov.b64 {{x, {d}}}, {a}; }}", "u32", "u64", [((5 << 32) | 9,)], [5]),
]  # fmt: skip
CARRY = [
    ("{{ .reg .b32 x; add.cc.u32 x, {a}, {b}; addc.u32 {d}, 0, 0; }}", "u32", "u32 u32", [(ALL, 1), (ALL, 0)],
     [1, 0]),
    ("{{ .reg .b32 x; add.cc.u32 x, {a}, {b}; addc.cc.u32 x, {a}, {b}; addc.u32 {d}, 0, 0; }}", "u32", "u32 u32",
     [(ALL, 0), (ALL, ALL), (ALL, 1)], [0, 1, 1]),
    ("{{ .reg .b32 x; sub.cc.u32 x, {a}, {b}; subc.u32 {d}, 10, 0; }}", "u32", "u32 u32", [(0, 1), (1, 1)], [9, 10]),
    ("{{ .reg .b32 x; mad.lo.cc.u32 x, {a}, {b}, 1; madc.hi.u32 {d}, {a}, {b}, 0; }}", "u32", "u32 u32",
     [(ALL, ALL), (0x10000, 0x10000), (ALL, 1)], [ALL - 1, 1, 1]),
]  # fmt: skip
FLOAT = [
    ("add.f32 {d}, {a}, {b}", "f32", "f32 f32", [(1.0, 2.0**-24), (INF, -INF), (DENORMAL, 0.0)],
     [1.0, NAN, float(np.float32(DENORMAL))]),
    ("add.ftz.f32 {d}, {a}, {b}", "f32", "f32 f32", [(DENORMAL, -0.0), (1.0, 1.0)], [0.0, 2.0]),
    ("add.rz.f32 {d}, {a}, {b}", "f32", "f32 f32", [(1.0, -(2.0**-30)), (MAX, MAX)], [1 - 2.0**-24, MAX]),
    ("add.rp.f32 {d}, {a}, {b}", "f32", "f32 f32", [(1.0, 2.0**-60)], [1 + 2.0**-23]),
    ("add.rm.f32 {d}, {a}, {b}", "f32", "f32 f32", [(1.0, 2.0**-60), (1.0, -1.0), (-1.0, -(2.0**-60))],
     [1.0, -0.0, -1 - 2.0**-23]),
    ("add.sat.f32 {d}, {a}, {b}", "f32", "f32 f32", [(1.0, 2.0), (-1.0, 0.0), (NAN, 0.0)], [1.0, 0.0, 0.0]),
    ("mul.rz.f32 {d}, {a}, {b}", "f32", "f32 f32", [(1 + 2.0**-23, 1 + 2.0**-23)], [1 + 2.0**-22]),
    ("mul.rp.f32 {d}, {a}, {b}", "f32", "f32 f32", [(1 + 2.0**-23, 1 + 2.0**-23)], [1 + 2.0**-22 + 2.0**-23]),
    ("fma.rn.f32 {d}, {a}, {b}, {c}", "f32", "f32 f32 f32", [(1 + 2.0**-23, 1 - 2.0**-23, -1.0)], [-(2.0**-46)]),
    ("fma.rz.f32 {d}, {a}, {b}, {c}", "f32", "f32 f32 f32", [(1.0, 1.0, -(2.0**-70))], [1 - 2.0**-24]),
    ("fma.rn.f64 {d}, {a}, {b}, {c}", "f64", "f64 f64 f64", [(1 + 2.0**-52, 1 - 2.0**-52, -1.0)], [-(2.0**-104)]),
    ("min.f32 {d}, {a}, {b}", "f32", "f32 f32", [(NAN, 3.0), (3.0, NAN), (0.0, -0.0), (NAN, NAN)],
     [3.0, 3.0, -0.0, NAN]),
    ("max.f32 {d}, {a}, {b}", "f32", "f32 f32", [(NAN, 3.0), (-0.0, 0.0), (0.0, -0.0)], [3.0, 0.0, 0.0]),
    ("max.NaN.f32 {d}, {a}, {b}", "f32", "f32 f32", [(NAN, 3.0), (2.0, 3.0)], [NAN, 3.0]),
    ("min.xorsign.abs.f32 {d}, {a}, {b}", "f32", "f32 f32", [(-1.0, 2.0), (-3.0, -2.0)], [-1.0, 2.0]),
    ("max.NaN.xorsign.abs.f32 {d}, {a}, {b}", "f32", "f32 f32", [(-1.0, 2.0)], [-2.0]),
    ("neg.ftz.f32 {d}, {a}", "f32", "f32", [(DENORMAL,), (1.0,)], [-0.0, -1.0]),
    ("abs.f32 {d}, {a}", "f32", "f32", [(-0.0,), (-INF,)], [0.0, INF]),
    ("copysign.f32 {d}, {a}, {b}", "f32", "f32 f32", [(-1.0, 5.0), (1.0, -5.0)], [-5.0, 5.0]),
    ("div.rn.f32 {d}, {a}, {b}", "f32", "f32 f32", [(1.0, 3.0), (1.0, 0.0), (0.0, 0.0)],
     [float(np.float32(1 / 3)), INF, NAN]),
    ("div.full.ftz.f32 {d}, {a}, {b}", "f32", "f32 f32", [(1.0, DENORMAL)], [INF]),
    ("rcp.approx.ftz.f32 {d}, {a}", "f32", "f32", [(4.0,), (-0.0,), (DENORMAL,)], [0.25, -INF, INF]),
    ("rsqrt.approx.f32 {d}, {a}", "f32", "f32", [(4.0,), (0.0,), (-1.0,)], [0.5, INF, NAN]),
    ("sqrt.rn.f64 {d}, {a}", "f64", "f64", [(2.0,), (-1.0,)], [math.sqrt(2), NAN]),
    ("ex2.approx.ftz.f32 {d}, {a}", "f32", "f32", [(3.0,), (-INF,), (200.0,), (DENORMAL,), (-140.0,)],
     [8.0, 0.0, INF, 1.0, 0.0]),
    ("ex2.approx.f32 {d}, {a}", "f32", "f32", [(-140.0,)], [2.0**-140]),
    ("lg2.approx.f32 {d}, {a}", "f32", "f32", [(8.0,), (0.0,), (-1.0,)], [3.0, -INF, NAN]),
    ("tanh.approx.f32 {d}, {a}", "f32", "f32", [(0.0,), (INF,)], [0.0, 1.0]),
    ("setp.ne.f32 {d}, {a}, {b}", "pred", "f32 f32", [(1.0, 2.0), (NAN, 2.0)], [1, 0]),
    ("setp.neu.f32 {d}, {a}, {b}", "pred", "f32 f32", [(1.0, 1.0), (NAN, 2.0)], [0, 1]),
    ("setp.equ.f32 {d}, {a}, {b}", "pred", "f32 f32", [(1.0, 1.0), (NAN, 2.0), (1.0, 2.0)], [1, 1, 0]),
    ("setp.geu.f32 {d}, {a}, {b}", "pred", "f32 f32", [(1.0, 2.0), (NAN, 2.0), (2.0, 2.0)], [0, 1, 1]),
    ("setp.num.f32 {d}, {a}, {b}", "pred", "f32 f32", [(1.0, NAN), (1.0, 2.0)], [0, 1]),
    ("setp.gt.ftz.f32 {d}, {a}, {b}", "pred", "f32 f32", [(DENORMAL, 0.0)], [0]),
    ("setp.gt.f32 {d}, {a}, {b}", "pred", "f32 f32", [(DENORMAL, 0.0)], [1]),
    ("setp.hi.u32 {d}, {a}, {b}", "pred", "u32 u32", [(-1, 1)], [1]),
    ("setp.gt.s32 {d}, {a}, {b}", "pred", "s32 s32", [(-1, 1)], [0]),
    ("setp.lt.and.s32 {d}, {a}, {b}, {c}", "pred", "s32 s32 pred", [(1, 2, 1), (1, 2, 0), (2, 1, 1)], [1, 0, 0]),
    ("setp.lt.and.s32 {d}, {a}, {b}, !{c}", "pred", "s32 s32 pred", [(1, 2, 1), (1, 2, 0)], [0, 1]),
    ("{{ .reg .pred x; setp.lt.or.s32 x|{d}, {a}, {b}, {c}; }}", "pred", "s32 s32 pred",
     [(1, 2, 0), (2, 1, 0), (1, 2, 1)], [0, 1, 1]),
    ("set.lt.u32.f32 {d}, {a}, {b}", "u32", "f32 f32", [(1.0, 2.0), (2.0, 1.0)], [ALL, 0]),
    ("testp.subnormal.f32 {d}, {a}", "pred", "f32", [(DENORMAL,), (0.0,)], [1, 0]),
]  # fmt: skip
HALF = [
    ("add.f16 {d}, {a}, {b}", "f16", "f16 f16", [(2048.0, 1.0), (2048.0, 3.0), (65504.0, 65504.0)],
     [2048.0, 2052.0, INF]),
    ("mul.sat.f16 {d}, {a}, {b}", "f16", "f16 f16", [(4.0, 4.0), (-1.0, 1.0)], [1.0, 0.0]),
    # The product ends in half a unit and the addend is below fp32's last bit: rounded twice, it would be a tie.
    ("fma.rn.f16 {d}, {a}, {b}, {c}", "f16", "f16 f16 f16",
     [(1 + 2.0**-5, 1 + 2.0**-6, 2.0**-24), (1 + 2.0**-5, 1 + 2.0**-6, 0.0)],
     [1 + 2.0**-5 + 2.0**-6 + 2.0**-10, 1 + 2.0**-5 + 2.0**-6]),
    ("fma.rn.relu.f16 {d}, {a}, {b}, {c}", "f16", "f16 f16 f16", [(-1.0, 1.0, 0.5), (1.0, 1.0, 0.5)], [0.0, 1.5]),
    ("min.f16 {d}, {a}, {b}", "f16", "f16 f16", [(NAN, 1.0), (0.0, -0.0)], [1.0, -0.0]),
    ("max.NaN.f16 {d}, {a}, {b}", "f16", "f16 f16", [(NAN, 1.0)], [NAN]),
    ("fma.rn.bf16 {d}, {a}, {b}, {c}", "u16", "u16 u16 u16",
     [(0x3F80, 0x3F80, 0x3B80), (0x3F80, 0x3F80, 0x3B81), (0x3F81, 0x3F81, 0xBF80)], [0x3F80, 0x3F81, 0x3C80]),
    ("fma.rn.bf16x2 {d}, {a}, {b}, {c}", "u32", "u32 u32 u32", [(0x3F804000, 0x40003F80, 0x00003F80)], [0x40004040]),
    ("max.bf16x2 {d}, {a}, {b}", "u32", "u32 u32", [(0x3F80BF80, 0x40007FFF)], [0x4000BF80]),
    ("neg.bf16x2 {d}, {a}", "u32", "u32", [(0x3F80BF80,)], [0xBF803F80]),
    ("ex2.approx.ftz.bf16 {d}, {a}", "u16", "u16", [(0x4040,)], [0x4100]),
    ("setp.lt.f16 {d}, {a}, {b}", "pred", "f16 f16", [(1.0, 2.0), (NAN, 2.0)], [1, 0]),
]  # fmt: skip
CONVERT = [
    ("cvt.rzi.s32.f32 {d}, {a}", "s32", "f32", [(-1.9,), (3e9,), (-3e9,), (NAN,), (INF,)],
     [-1, 2**31 - 1, -(2**31), 0, 2**31 - 1]),
    ("cvt.rni.s32.f32 {d}, {a}", "s32", "f32", [(0.5,), (1.5,), (2.5,), (-0.5,)], [0, 2, 2, 0]),
    ("cvt.rmi.s32.f32 {d}, {a}", "s32", "f32", [(-0.5,), (1.9,)], [-1, 1]),
    ("cvt.rpi.u32.f32 {d}, {a}", "u32", "f32", [(0.1,), (-5.0,), (5e9,)], [1, 0, ALL]),
    ("cvt.rzi.u64.f32 {d}, {a}", "u64", "f32", [(1e30,), (NAN,)], [2**64 - 1, 2**63]),
    ("cvt.rni.f32.f32 {d}, {a}", "f32", "f32", [(2.5,), (-0.5,)], [2.0, -0.0]),
    ("cvt.sat.f32.f32 {d}, {a}", "f32", "f32", [(2.5,), (-0.5,), (NAN,)], [1.0, 0.0, 0.0]),
    ("cvt.rn.f32.s32 {d}, {a}", "f32", "s32", [(2**24 + 1,), (-3,)], [2.0**24, -3.0]),
    ("cvt.rz.f32.u32 {d}, {a}", "f32", "u32", [(ALL,)], [2.0**32 - 2.0**8]),
    ("cvt.rp.f32.u32 {d}, {a}", "f32", "u32", [(2**24 + 1,)], [2.0**24 + 2]),
    ("cvt.rn.f32.u64 {d}, {a}", "f32", "u64", [(2**63 + 2**39 + 1,), (2**64 - 1,)], [2.0**63 + 2.0**40, 2.0**64]),
    ("cvt.rn.f64.s64 {d}, {a}", "f64", "s64", [(2**53 + 1,)], [2.0**53]),
    ("cvt.rz.f64.u64 {d}, {a}", "f64", "u64", [(2**53 + 3,)], [2.0**53 + 2]),
    ("cvt.rn.f32.f64 {d}, {a}", "f32", "f64", [(1 + 2.0**-24,), (1e300,)], [1.0, INF]),
    ("cvt.rz.f32.f64 {d}, {a}", "f32", "f64", [(1e300,), (-1 - 2.0**-30,)], [MAX, -1.0]),
    ("cvt.f64.f32 {d}, {a}", "f64", "f32", [(1.5,)], [1.5]),
    ("cvt.rn.f16.f32 {d}, {a}", "f16", "f32", [(1 + 2.0**-11,), (1 + 3 * 2.0**-11,), (65520.0,), (2.0**-25,)],
     [1.0, 1 + 2.0**-9, INF, 0.0]),
    ("cvt.rz.f16.f32 {d}, {a}", "f16", "f32", [(65535.0,), (-(1 + 2.0**-11),)], [65504.0, -1.0]),
    ("cvt.f32.f16 {d}, {a}", "f32", "f16", [(2.0**-24,), (-INF,)], [2.0**-24, -INF]),
    ("cvt.rn.bf16.f32 {d}, {a}", "u16", "u32", [(0x3F808000,), (0x3F818000,), (0x7F7FFFFF,), (0x7F800001,)],
     [0x3F80, 0x3F82, 0x7F80, 0x7FFF]),
    ("cvt.rz.bf16.f32 {d}, {a}", "u16", "u32", [(0x3F80FFFF,), (0x7F7FFFFF,)], [0x3F80, 0x7F7F]),
    ("cvt.rn.relu.bf16.f32 {d}, {a}", "u16", "f32", [(-1.0,), (1.0,)], [0, 0x3F80]),
    ("cvt.rn.bf16x2.f32 {d}, {a}, {b}", "u32", "f32 f32", [(1.0, 2.0)], [0x3F804000]),
    ("cvt.rn.relu.f16x2.f32 {d}, {a}, {b}", "u32", "f32 f32", [(1.0, -2.0)], [0x3C000000]),
    ("cvt.rna.tf32.f32 {d}, {a}", "u32", "u32", [(0x3F801000,), (0x3F800FFF,), (0xBF801000,)],
     [0x3F802000, 0x3F800000, 0xBF802000]),
    ("cvt.rn.satfinite.e4m3x2.f32 {d}, {a}, {b}", "u16", "f32 f32",
     [(1.0, 1000.0), (0.0625, -448.0), (2.0**-9, 2.0**-11)], [0x387E, 0x18FE, 0x0100]),
    ("cvt.rn.satfinite.e5m2x2.f32 {d}, {a}, {b}", "u16", "f32 f32", [(1.0, 1e9), (1.125, 1.375)], [0x3C7B, 0x3C3E]),
    ("cvt.rn.f16x2.e4m3x2 {d}, {a}", "u32", "u16", [(0x3801,), (0x7FFE,)], [0x3C001800, 0x7FFFDF00]),
    ("cvt.u16.u32 {d}, {a}", "u16", "u32", [(0x12345,)], [0x2345]),
    ("cvt.sat.u16.s32 {d}, {a}", "u16", "s32", [(-5,), (70000,)], [0, 65535]),
    ("cvt.sat.s8.s32 {d}, {a}", "s16", "s32", [(-500,), (500,), (5,)], [-128, 127, 5]),
    ("cvt.s64.s32 {d}, {a}", "s64", "s32", [(-5,)], [-5]),
    ("cvt.u64.u32 {d}, {a}", "u64", "u32", [(-5,)], [2**32 - 5]),
    ("cvt.u32.u8 {d}, {a}", "u32", "u32", [(0x1FF,)], [0xFF]),
    ("cvt.s32.s8 {d}, {a}", "s32", "u16", [(0x1FF,)], [-1]),
    ("cvt.rn.f16.s32 {d}, {a}", "f16", "s32", [(2049,)], [2048.0]),
    ("cvt.rzi.s32.f16 {d}, {a}", "s32", "f16", [(-2.5,)], [-2]),
]  # fmt: skip


@pytest.mark.parametrize(
    "instruction, out, ins, rows, expected",
    [pytest.param(*row, id=row[0][:40]) for row in [*INTEGER, *BITS, *CARRY, *FLOAT, *HALF, *CONVERT]],
)
def test_instruction_gives_the_values_of_the_manual(instruction, out, ins, rows, expected):
    got = evaluate(instruction, out, ins, *zip(*rows, strict=True))
    as_text = [[repr(x) for x in values] for values in (got, expected)]  # tells -0.0 from 0.0 and shows NaN
    assert as_text[0] == as_text[1]


@pytest.mark.parametrize("type_, numpy", [("f32", np.float32), ("f64", np.float64), ("f16", np.float16)])
@pytest.mark.parametrize("name, function", [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_random_arithmetic_is_ieee(type_, numpy, name, function):
    rng = np.random.default_rng(0)
    a, b = ((rng.standard_normal(1024) * 10.0 ** rng.integers(-3, 3, 1024)).astype(numpy) for _ in range(2))
    got = np.array(evaluate(f"{name}.{type_} {{d}}, {{a}}, {{b}}", type_, f"{type_} {type_}", a, b), numpy)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, function(a, b))


def test_random_bf16_rounding_is_to_nearest_even():
    import torch

    x = torch.randn(1024) * torch.logspace(-40, 38, 1024)
    got = evaluate("cvt.rn.bf16.f32 {d}, {a}", "u16", "f32", x.numpy())
    np.testing.assert_array_equal(np.array(got, np.uint16), x.bfloat16().view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("type_, dtype", [("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2")])
def test_random_fp8_rounding_agrees_with_torch(type_, dtype):
    import torch

    x = torch.randn(1024).clamp(-4, 4) * torch.logspace(-9, 1.5, 1024, base=2)
    got = evaluate(f"cvt.rn.satfinite.{type_}x2.f32 {{d}}, {{a}}, {{b}}", "u16", "f32 f32", x.numpy() * 0, x.numpy())
    np.testing.assert_array_equal(np.array(got) & 255, x.to(getattr(torch, dtype)).view(torch.uint8).numpy())


@pytest.mark.parametrize(
    "name, function",
    [("ex2", np.exp2), ("lg2", np.log2), ("sin", np.sin), ("tanh", np.tanh), ("rsqrt", lambda x: 1 / np.sqrt(x))],
)
def test_approximate_functions_are_within_two_units(name, function):
    x = np.linspace(0.1, 3.0, 512, dtype=np.float32)
    got = np.array(evaluate(f"{name}.approx.f32 {{d}}, {{a}}", "f32", "f32", x))
    want = function(x.astype(np.float64))
    assert (np.abs(got - want) <= 2 * np.spacing(np.abs(want).astype(np.float32))).all()
