"""The interpreter's operations: bfloat16 as rounded float32, and every access told to the launch's memory."""

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

FLOATS = (tl.bfloat16, tl.float16, tl.float32, tl.float64)


def widen(bits):
    """bfloat16, which numpy holds as uint16, as float32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow(values, to_zero=False):
    """float32 rounded to bfloat16, to nearest even unless to zero; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    if not to_zero:
        bits = bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)
    return np.where(np.isnan(values), np.uint16(0x7FFF), (bits >> 16).astype(np.uint16))


def _is_bfloat16(value):
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _wide(value):
    return TensorHandle(widen(value.data), tl.float32) if _is_bfloat16(value) else value


def _narrow(handle):
    """The result of an operation on widened operands: truth values stay as they are."""
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(narrow(handle.data), tl.bfloat16)


def _in_float32(name):
    """An operation of the interpreter, computed in float32 wherever an operand is bfloat16."""
    plain = getattr(InterpreterBuilder, name)

    def operation(self, *operands, **options):
        if not any(_is_bfloat16(o) for o in operands):
            return plain(self, *operands, **options)
        return _narrow(plain(self, *(_wide(o) for o in operands), **options))

    return operation


def reduced(plain):
    """`apply_impl` of a reduction or scan, which looks at raw data: bfloat16 goes in as float32, comes out rounded."""

    def typed(tensor, handle, dtype):
        shape = list(handle.data.shape)
        return tl.core.tensor(handle, tl.block_type(dtype, shape) if tensor.type.is_block() and shape else dtype)

    def apply_impl(self, tensors):
        half = [_is_bfloat16(t.handle) for t in tensors]
        if not any(half):
            return plain(self, tensors)
        wide = tuple(typed(t, _wide(t.handle), tl.float32) if h else t for t, h in zip(tensors, half, strict=True))
        results = plain(self, wide)
        results = results if isinstance(results, (tuple, list)) else (results,)
        return tuple(typed(t, _narrow(t.handle), tl.bfloat16) if t.dtype == tl.float32 else t for t in results)

    return apply_impl


class Builder(InterpreterBuilder):
    """Triton's own builder takes this class for as long as `interpreted` lasts; `memory` is the current launch's."""

    memory = None

    unary_op = _in_float32("unary_op")
    binary_op = _in_float32("binary_op")
    create_erf = _in_float32("create_erf")
    create_rsqrt = _in_float32("create_rsqrt")

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not _is_bfloat16(other):
            return super().ternary_op(lhs, rhs, other, op)
        return _narrow(super().ternary_op(_wide(lhs), _wide(rhs), _wide(other), op))

    def create_fma(self, x, y, z):
        """x y + z with one rounding, up to float32's double rounding through float64."""
        if z.dtype.scalar == tl.float64:
            return TensorHandle(x.data * y.data + z.data, tl.float64)
        exact = (_wide(t).data.astype(np.float64) for t in (x, y, z))
        product, addend = next(exact) * next(exact), next(exact)
        result = TensorHandle((product + addend).astype(np.float32), tl.float32)
        return self.cast_impl(result, z.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return super().create_dot(_wide(a), _wide(b), d, input_precision, max_num_imprecise_acc)

    def get_bf16(self, value):
        return TensorHandle(narrow(np.array([value])), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return TensorHandle(src.data, target)
        if target == tl.bfloat16:
            return TensorHandle(narrow(_wide(src).data.astype(np.float32)), target)
        return super().cast_impl(_wide(src), dst_type) if target != tl.float32 else self._to_float32(src)

    def _to_float32(self, src):
        return TensorHandle(_wide(src).data.astype(np.float32), tl.float32)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        source, target = src.dtype.scalar, dst_type.scalar
        if source not in FLOATS or target not in FLOATS:
            raise NotImplementedError(f"conversion of {source} to {target} in the interpreter")
        if rounding_mode in (None, ir.ROUNDING_MODE.RTNE):
            return self.cast_impl(src, dst_type)
        if (source, target) != (tl.float32, tl.bfloat16):
            raise NotImplementedError(f"rounding of {source} to {target} towards zero in the interpreter")
        return TensorHandle(narrow(src.data, to_zero=True), target)

    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(x, y, z)
        self.memory.enter((x, y, z))

    def create_barrier(self):
        self.memory.barrier()

    def create_masked_load(self, ptrs, mask, other, *policy):
        self.memory.load(ptrs.data, mask.data, _bytes(ptrs))
        return super().create_masked_load(ptrs, mask, other, *policy)

    def create_masked_store(self, ptrs, value, mask, *policy):
        self.memory.store(ptrs.data, mask.data, _bytes(ptrs))
        return super().create_masked_store(ptrs, value, mask, *policy)

    def create_atomic_rmw(self, operation, ptrs, value, mask, sem, scope):
        counts = operation == ir.ATOMIC_OP.ADD and value.dtype == tl.int32 and value.data.size == 1
        if not counts or sem != ir.MEM_SEMANTIC.ACQUIRE_RELEASE or scope != ir.MEM_SYNC_SCOPE.GPU:
            self._refuse()
        self.memory.arrive(ptrs.data, mask.data, _bytes(ptrs))
        return super().create_atomic_rmw(operation, ptrs, value, mask, sem, scope)

    def _refuse(self, *_):
        raise NotImplementedError(
            "no atomic operation is interpreted but the count of programs that arrive, one int32 with acq_rel: the "
            "order of programs must not matter"
        )

    create_atomic_cas = create_atomic_load = create_atomic_store = create_atomic_poll = _refuse


def _bytes(ptrs):
    """The size of an element that a block of pointers points to."""
    return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
