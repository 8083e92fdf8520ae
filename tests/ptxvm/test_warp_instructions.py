"""Instructions of a whole warp or block, in PTX text against numpy."""

import numpy as np
import pytest
import torch

from . import AsyncHazard, Divergence, Race, Refused, Trap, Uninitialised
from .parser import parse
from .program import translate
from .snippets import module, run_text

LANES = np.arange(32)
STORE = "mad.wide.u32 %a, %t, 4, %p1; st.global.b32 [%a], %d;"
REGISTERS = ".reg .b32 %i, %d, %x<64>; .reg .b64 %a, %b; .reg .pred %q<4>; .shared .align 128 .b8 buffer[4096];"
LOAD = "mad.wide.u32 %b, %t, 4, %p0; ld.global.b32 %i, [%b];"


def lanes_of(body, values=LANES, **options):
    """The words that each of 32 lanes stores, from the words that it loads into %i."""
    source, result = np.array(values).astype(np.uint32), np.zeros(32, np.uint32)
    run_text(module(LOAD + body + STORE, REGISTERS), [source, result], **options)
    return result


@pytest.mark.parametrize(
    "text, source",
    [
        ("shfl.sync.bfly.b32 %d, %i, 5, 31, -1;", LANES ^ 5),
        ("shfl.sync.down.b32 %d, %i, 3, 31, -1;", np.where(LANES + 3 < 32, LANES + 3, LANES)),
        ("shfl.sync.up.b32 %d, %i, 3, 0, -1;", np.where(LANES >= 3, LANES - 3, LANES)),
        ("shfl.sync.idx.b32 %d, %i, 9, 31, -1;", np.full(32, 9)),
        ("shfl.sync.down.b32 %d, %i, 3, 0x181f, -1;", np.where(LANES % 8 + 3 < 8, LANES + 3, LANES)),  # segments of 8
        ("shfl.sync.up.b32 %d, %i, 3, 0x1800, -1;", np.where(LANES % 8 >= 3, LANES - 3, LANES)),
        ("shfl.sync.idx.b32 %d, %i, 9, 0x181f, -1;", LANES // 8 * 8 + 1),
    ],
)
def test_shuffles(text, source):
    assert lanes_of(text, LANES * 7).tolist() == (source * 7).tolist()


def test_shuffle_says_whether_its_source_is_in_range():
    got = lanes_of("shfl.sync.down.b32 %d|%q0, %i, 3, 31, -1; selp.b32 %d, 1, 0, %q0;")
    assert got.tolist() == (LANES + 3 < 32).astype(int).tolist()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("setp.gt.u32 %q0, %i, 20; vote.sync.ballot.b32 %d, %q0, -1;", 0xFFE00000),
        ("setp.gt.u32 %q0, %i, 20; vote.sync.any.pred %q1, %q0, -1; selp.b32 %d, 1, 0, %q1;", 1),
        ("setp.gt.u32 %q0, %i, 20; vote.sync.all.pred %q1, %q0, -1; selp.b32 %d, 1, 0, %q1;", 0),
        ("setp.gt.u32 %q0, %i, 20; vote.sync.all.pred %q1, !%q0, -1; selp.b32 %d, 1, 0, %q1;", 0),
        ("setp.gt.u32 %q0, %i, 99; vote.sync.uni.pred %q1, %q0, -1; selp.b32 %d, 1, 0, %q1;", 1),
        ("redux.sync.add.s32 %d, %i, -1;", 496),
        ("sub.s32 %x0, %i, 5; redux.sync.min.s32 %d, %x0, -1;", 2**32 - 5),
        ("sub.s32 %x0, %i, 5; redux.sync.min.u32 %d, %x0, -1;", 0),
        ("redux.sync.xor.b32 %d, %i, -1;", 0),
        ("activemask.b32 %d;", 2**32 - 1),
        ("elect.sync %d|%q0, -1;", 0),
    ],
)
def test_votes_and_reductions(text, expected):
    assert lanes_of(text).tolist() == [expected] * 32


def test_match():
    got = lanes_of("match.any.sync.b32 %d, %i, -1;", LANES % 3)
    assert got.tolist() == [sum(1 << j for j in range(32) if j % 3 == i % 3) for i in range(32)]


def test_lanes_that_part_meet_again():
    # Odd lanes go through a longer way; the shuffle afterwards needs all 32.
    body = """and.b32 %x0, %i, 1; setp.eq.u32 %q0, %x0, 0; mov.b32 %d, %i; @%q0 bra meet;
    mov.u32 %x1, 0; again: add.u32 %d, %d, 100; add.u32 %x1, %x1, 1; setp.lt.u32 %q1, %x1, %i; @%q1 bra again;
    meet: shfl.sync.bfly.b32 %d, %d, 1, 31, -1;"""
    want = np.where(LANES % 2, LANES + 100 * LANES, LANES)
    assert lanes_of(body).tolist() == want[LANES ^ 1].tolist()


def test_lanes_that_wait_at_different_collectives_are_reported():
    body = """setp.lt.u32 %q0, %i, 16; @%q0 bra low; shfl.sync.bfly.b32 %d, %i, 1, 31, -1; bra.uni done;
    low: shfl.sync.bfly.b32 %d, %i, 2, 31, -1; done:"""
    with pytest.raises(Divergence, match=r"(?s)lanes 0-15 waits for the other lanes.*lanes 16-31 waits") as caught:
        lanes_of(body)
    assert "shfl.sync.bfly.b32 %d, %i, 1" in str(caught.value) and "block (0, 0, 0)" in str(caught.value)


def test_a_lane_outside_its_member_mask_is_reported():
    with pytest.raises(Divergence, match=r"thread \(16, 0, 0\): vote.sync by a lane outside"):
        lanes_of("vote.sync.ballot.b32 %d, 1, 0xffff;")


def matrix(values, dtype):
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(trans):
    tile = np.arange(4 * 64, dtype=np.uint16)
    result = np.zeros(32 * 4, np.uint32)
    body = f"""mad.wide.u32 %a, %t, 16, %p0; mov.u32 %x0, buffer; mad.lo.u32 %x0, %t, 16, %x0;
    ld.global.v4.b32 {{%x1, %x2, %x3, %x4}}, [%a]; st.shared.v4.b32 [%x0], {{%x1, %x2, %x3, %x4}}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4{".trans" * trans}.shared.b16 {{%x1, %x2, %x3, %x4}}, [%x0];
    mad.wide.u32 %a, %t, 16, %p1; st.global.v4.b32 [%a], {{%x1, %x2, %x3, %x4}};"""
    run_text(module(body, REGISTERS), [tile, result])
    eights = tile.reshape(4, 8, 8)
    want = (eights.transpose(0, 2, 1) if trans else eights).reshape(4, 32, 2)
    assert (result.view(np.uint16).reshape(32, 4, 2).transpose(1, 0, 2) == want).all()


MMA = [
    ("m16n8k8", "f32.bf16.bf16.f32", torch.bfloat16, 8),
    ("m16n8k16", "f32.bf16.bf16.f32", torch.bfloat16, 16),
    ("m16n8k8", "f32.f16.f16.f32", torch.float16, 8),
    ("m16n8k16", "f32.f16.f16.f32", torch.float16, 16),
    ("m16n8k16", "f16.f16.f16.f16", torch.float16, 16),
    ("m16n8k4", "f32.tf32.tf32.f32", torch.float32, 4),
    ("m16n8k8", "f32.tf32.tf32.f32", torch.float32, 8),
    ("m16n8k16", "s32.s8.s8.s32", torch.int8, 16),
    ("m16n8k32", "s32.s8.s8.s32", torch.int8, 32),
    ("m16n8k32", "s32.u8.s8.s32", torch.uint8, 32),
    ("m16n8k32", "f32.e4m3.e4m3.f32", torch.float8_e4m3fn, 32),
    ("m16n8k32", "f32.e5m2.e4m3.f32", torch.float8_e5m2, 32),
]


@pytest.mark.parametrize("shape, types, dtype, k", MMA, ids=[f"{m[0]}.{m[1]}" for m in MMA])
def test_mma_multiplies_matrices(shape, types, dtype, k):
    """Fragments are dealt out here as the manual draws them: a row of A per lane group, a column of B."""
    second = {"s8": torch.int8, "e4m3": torch.float8_e4m3fn}.get(types.split(".")[2], dtype)
    a = torch.randint(0 if dtype == torch.uint8 else -8, 8, (16, k)).to(dtype)
    b = torch.randint(-8, 8, (k, 8)).to(second)
    per = 4 // a.element_size()
    whole, half16 = types.startswith("s32"), types.startswith("f16")
    c = torch.randint(-100, 100, (16, 8)).to(torch.int32 if whole else torch.float16 if half16 else torch.float32)
    lane = torch.arange(32)
    row, column = lane // 4, lane % 4

    def words(x):
        return x.contiguous().view(torch.uint8).reshape(-1).view(torch.int32)

    fa = [a[row + 8 * (i % 2)][lane, :].reshape(32, -1, per)[lane, i // 2 * 4 + column] for i in range(k // per // 2)]
    fb = [b.T[row].reshape(32, -1, per)[lane, i * 4 + column] for i in range(k // per // 4)]
    fc = [c[row + 8 * (i // 2), 2 * column + i % 2] for i in range(4)]
    if half16:
        fc = [torch.stack(fc[:2], 1), torch.stack(fc[2:], 1)]
    source = torch.stack([words(f) for f in (*fa, *fb, *fc)]).numpy()
    n, na, nb = len(source), len(fa), len(fb)
    loads = "".join(f"ld.global.b32 %x{i}, [%b+{128 * i}];" for i in range(n))

    def registers(start, count):
        return "{" + ", ".join(f"%x{start + i}" for i in range(count)) + "}"

    result = np.zeros((len(fc), 32), np.uint32)
    operands = ", ".join([registers(40, len(fc)), registers(0, na), registers(na, nb), registers(na + nb, len(fc))])
    stores = "".join(f"st.global.b32 [%a+{128 * i}], %x{40 + i};" for i in range(len(fc)))
    body = f"mad.wide.u32 %b, %t, 4, %p0; mad.wide.u32 %a, %t, 4, %p1; {loads}"
    body += f"mma.sync.aligned.{shape}.row.col.{types} {operands}; {stores}"
    launch = run_text(module(body, REGISTERS), [source, result])
    got = torch.from_numpy(result.view(np.int32).copy())
    got = got if whole else got.view(torch.float16 if half16 else torch.float32).double()
    want = a.double() @ b.double() + c.double()
    if half16:
        got = got.reshape(2, 32, 2).permute(0, 2, 1).reshape(4, 32)
    for i in range(4):
        assert torch.equal(got[i].double(), want[row + 8 * (i // 2), 2 * column + i % 2])
    assert sum(launch.counts.flops.values()) == 2 * 16 * 8 * k


def test_tf32_ignores_the_low_13_bits_and_fp32_sums_are_cut():
    def product(a, b, c):
        source = np.stack([np.full(32, v, np.float32).view(np.uint32) for v in (a, a, b, c, c, c, c)])
        result = np.zeros(32, np.uint32)
        loads = "".join(f"ld.global.b32 %x{i}, [%b+{128 * i}];" for i in range(7))
        body = f"mad.wide.u32 %b, %t, 4, %p0; {loads} mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 "
        body += "{%x10, %x11, %x12, %x13}, {%x0, %x1}, {%x2}, {%x3, %x4, %x5, %x6}; mov.b32 %d, %x10;" + STORE
        run_text(module(body, REGISTERS), [source, result])
        return result.view(np.float32)[0]

    assert product(1 + 2.0**-11, 1.0, 0.0) == 4.0
    assert product(1 + 2.0**-10, 1.0, 0.0) == 4 + 2.0**-8
    assert product(1.0, 0.25, 2.0**25 - 1) == 2.0**25  # exactly representable
    assert product(3 * 2.0**-2, 2.0**-26, 1.0) == 1.0  # 1 + 3/4 of a unit would round up


def test_fp64_mma():
    a, b, c = np.random.randn(8, 4), np.random.randn(4, 8), np.random.randn(8, 8)
    g, t = LANES // 4, LANES % 4
    source = np.stack([a[g, t], b[t, g], c[g, 2 * t], c[g, 2 * t + 1]])
    result = np.zeros((2, 32))
    registers = ".reg .f64 %f<8>; .reg .b64 %a, %b;"
    body = """mad.wide.u32 %b, %t, 8, %p0; mad.wide.u32 %a, %t, 8, %p1;
    ld.global.f64 %f0, [%b]; ld.global.f64 %f1, [%b+256];
    ld.global.f64 %f2, [%b+512]; ld.global.f64 %f3, [%b+768];
    mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%f4, %f5}, {%f0}, {%f1}, {%f2, %f3};
    st.global.f64 [%a], %f4; st.global.f64 [%a+256], %f5;"""
    run_text(module(body, registers), [source, result])
    want = a @ b + c
    np.testing.assert_allclose(result, np.stack([want[g, 2 * t], want[g, 2 * t + 1]]), rtol=1e-14, atol=1e-14)


def test_asynchronous_copy_fills_with_zeros_and_honours_its_predicate():
    source, result = np.arange(1, 129, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """mad.wide.u32 %a, %t, 16, %p0; mov.u32 %x0, buffer; mad.lo.u32 %x0, %t, 16, %x0;
    and.b32 %x1, %t, 1; mul.lo.u32 %x1, %x1, 8; add.u32 %x1, %x1, 8;
    cp.async.ca.shared.global [%x0], [%a], 16, %x1; cp.async.wait_all;
    setp.lt.u32 %q0, %t, 4; @%q0 cp.async.cg.shared.global [%x0+512], [%a], 16;
    cp.async.commit_group; cp.async.wait_group 0; ld.shared.v4.b32 {%x2, %x3, %x4, %x5}, [%x0];
    mad.wide.u32 %b, %t, 16, %p1; st.global.v4.b32 [%b], {%x2, %x3, %x4, %x5};
    @%q0 ld.shared.b32 %x6, [%x0+512];"""
    for late in (True, False):
        result[:] = 0
        run_text(module(body, REGISTERS), [source, result], late_copies=late)
        want = source.reshape(32, 4).copy()
        want[::2, 2:] = 0
        assert (result.reshape(32, 4) == want).all()


def test_reading_the_destination_of_a_copy_in_flight_is_reported():
    body = """mad.wide.u32 %a, %t, 16, %p0; mov.u32 %x0, buffer; mad.lo.u32 %x0, %t, 16, %x0;
    cp.async.cg.shared.global [%x0], [%a], 16; cp.async.commit_group; ld.shared.b32 %d, [%x0];"""
    for late in (True, False):
        with pytest.raises(AsyncHazard, match=r"while a cp.async to it is in flight(?s:.*)the other is line"):
            run_text(
                module(body + STORE, REGISTERS), [np.zeros(128, np.uint32), np.zeros(32, np.uint32)], late_copies=late
            )


@pytest.mark.parametrize(
    "operation, start, expected",
    [
        ("add.u32", 0, 496),
        ("max.s32", 0, 31),
        ("min.s32", 50, 0),
        ("or.b32", 0, 31),
        ("xor.b32", 0, 0),
        ("inc.u32", 0, 32),
    ],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_atomics_of_a_warp_on_one_word(operation, start, expected, seed):
    word = np.full(1, start, np.uint32)
    source = np.full(32, 99, np.uint32) if operation == "inc.u32" else LANES.astype(np.uint32)
    body = LOAD + f"red.global.{operation} [%p1], %i;"
    run_text(module(body, REGISTERS), [source, word], seed=seed)
    assert word[0] == expected


def test_compare_and_swap_lets_one_lane_win():
    word, result = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    body = """add.u32 %x0, %t, 1; atom.global.cas.b32 %d, [%p0], 0, %x0;"""
    run_text(module(body + STORE, REGISTERS), [word, result])
    assert word[0] == 1 and result.tolist() == [0] + [1] * 31


@pytest.mark.parametrize("reduction, expected", [("popc.u32", 40), ("or.pred", 1), ("and.pred", 0)])
def test_barrier_reduction(reduction, expected):
    out = "%d" if "popc" in reduction else "%q1"
    body = f"setp.lt.u32 %q0, %t, 40; bar.red.{reduction} {out}, 0, %q0;"
    body += "" if "popc" in reduction else "selp.b32 %d, 1, 0, %q1;"
    result = np.zeros(64, np.uint32)
    run_text(module(body + STORE, REGISTERS), [np.zeros(1, np.uint32), result], block=64)
    assert result.tolist() == [expected] * 64


def named_barriers(first: str) -> str:
    """Warp 0 writes and arrives at barrier 1 of 64 threads; warp 1 waits there and reads; warp 2 takes no part."""
    return f"""mov.u32 %x0, buffer; and.b32 %x1, %t, 31; mad.lo.u32 %x0, %x1, 4, %x0; mov.b32 %d, 0;
    setp.lt.u32 %q0, %t, 32; setp.ge.u32 %q1, %t, 64; @%q1 bra end; @!%q0 bra second;
    st.shared.b32 [%x0], %t; {first} bra.uni end;
    second: bar.sync 1, 64; ld.shared.b32 %d, [%x0]; end:"""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_named_barriers_with_counts(seed):
    result = np.zeros(96, np.uint32)
    text = module(named_barriers("bar.arrive 1, 64;") + STORE, REGISTERS)
    run_text(text, [np.zeros(1, np.uint32), result], block=96, seed=seed)
    assert result.tolist() == [0] * 32 + list(range(32)) + [0] * 32


def test_a_named_barrier_before_the_write_orders_nothing():
    text = module(
        named_barriers("").replace("st.shared.b32 [%x0], %t;", "bar.arrive 1, 64; st.shared.b32 [%x0], %t;") + STORE,
        REGISTERS,
    )
    with pytest.raises((Race, Uninitialised)):
        run_text(text, [np.zeros(1, np.uint32), np.zeros(96, np.uint32)], block=96)


def test_traps_are_reported():
    with pytest.raises(Trap, match=r"thread \(7, 0, 0\): trap\n  at line \d+: @%q0 trap"):
        lanes_of("setp.eq.u32 %q0, %i, 7; @%q0 trap;")


REFUSED = [
    ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned: unknown instruction"),
    ("mbarrier.init.shared.b64 [%x0], 1;", "mbarrier.init.shared.b64: unknown instruction"),
    ("cp.async.bulk.commit_group;", r"unknown .bulk"),
    ("barrier.cluster.arrive.aligned;", "barrier.cluster.arrive.aligned: .*cluster"),
    ("fence.proxy.async;", "fence.proxy.async"),
    ("max.f32.xorsign %d, %i, %i;", "max.f32.xorsign"),
    ("add.rn.relu.f32 %d, %i, %i;", "unknown .relu"),
    ("fma.rn.oob.f16x2 %d, %i, %i, %i;", "unknown .oob"),
    ("mov.u32 %d, %clock;", "operand %clock"),
    ("ld.shared::cluster.b32 %d, [%p0];", "unknown .shared::cluster"),
    ("mma.sync.aligned.m16n8k32.row.row.s32.s8.s8.s32 "
     "{%x0,%x1,%x2,%x3}, {%x0,%x1,%x2,%x3}, {%x0,%x1}, {%x0,%x1,%x2,%x3};", "needs one of .col"),
    ("atom.global.add.v2.f32 {%d, %i}, [%p0], {%i, %i};", "atom.global.add.v2.f32"),
    ("cvt.rn.f32.s32.sat2 %d, %i;", "cvt.rn.f32.s32.sat2"),
    ("div.rz.f32 %d, %i, %i;", "div.rz.f32: needs one of"),
    ("add.u64 %d, %i, %i;", "has 4 bytes where 8 are wanted"),
]  # fmt: skip


@pytest.mark.parametrize("text, words", REFUSED, ids=[r[0].split()[0] for r in REFUSED])
def test_what_is_unknown_is_refused_by_name(text, words):
    with pytest.raises(Refused, match=words) as caught:
        translate(parse(module(text, REGISTERS)), "k")
    assert text.split()[0].rstrip(";") in str(caught.value)


def test_all_that_is_refused_is_named_at_once():
    with pytest.raises(Refused, match=r"(?s)wgmma.fence.*mbarrier.init"):
        translate(parse(module(REFUSED[0][0] + REFUSED[1][0], REGISTERS)), "k")
