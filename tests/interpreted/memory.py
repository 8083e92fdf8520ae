"""Which bytes a launch may touch, and which program touched them."""

import sys

import numpy as np

NOBODY, SEVERAL = -1, -2
OWN_MODULES = ("interpreted", "interpreted.builder", "interpreted.memory")


class InterpreterFault(AssertionError):
    """A kernel did what no launch may do; the message names kernel, program and source line."""


class OutOfBounds(InterpreterFault):
    """An access outside the tensors of the launch."""


class Race(InterpreterFault):
    """Two accesses to one element, one of them a store, that nothing orders."""


class Region:
    """A storage: which of its bytes belong to a tensor of the launch, and who read and wrote them."""

    def __init__(self, storage):
        self.begin, size = storage.data_ptr(), storage.nbytes()
        self.end = self.begin + size
        self.valid = np.zeros(size, bool)
        self.reader = np.full(size, NOBODY, np.int32)
        self.writer = np.full(size, NOBODY, np.int32)
        # The barriers that the writer had passed when it wrote.
        self.phase = np.zeros(size, np.int32)

    def add(self, tensor):
        offsets = np.zeros((), np.int64) + tensor.storage_offset()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = offsets[..., None] + np.arange(length) * stride
        item = tensor.element_size()
        for byte in range(item):
            self.valid[offsets.ravel() * item + byte] = True


def _tensors(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif hasattr(value, "block_shape"):
            yield value.base
        elif hasattr(value, "untyped_storage"):
            yield value


class Memory:
    """The memory of one launch."""

    def __init__(self, kernel, arguments):
        self.kernel = kernel
        self.program, self.index, self.barriers = None, NOBODY, 0
        # Who has arrived at each counter, with all that they had seen; what this program has seen; when it last stored.
        self.arrived, self.seen, self.stored = {}, frozenset(), None
        regions = {}
        for tensor in _tensors(arguments):
            if tensor.numel():
                storage = tensor.untyped_storage()
                regions.setdefault(storage.data_ptr(), Region(storage)).add(tensor)
        self.regions = list(regions.values())

    def enter(self, program):
        """A program begins; they run one after the other."""
        self.program, self.index, self.barriers = program, self.index + 1, 0
        self.seen, self.stored = frozenset(), None

    def barrier(self):
        self.barriers += 1

    def arrive(self, addresses, mask, size):
        """The program counts itself: what it has stored is released, what those before have stored is acquired."""
        for _, _ in self._located("count", addresses, mask, size):
            pass
        if self.stored == self.barriers:
            raise Race(self._say("counts itself after a store, with no tl.debug_barrier() between"))
        address = int(addresses.ravel()[0])
        self.seen |= self.arrived.get(address, frozenset())
        self.arrived[address] = self.seen | {self.index}

    def _unordered(self, programs):
        """Which of these programs are others, or several, whose accesses nothing orders before this."""
        others = (programs != NOBODY) & (programs != self.index)
        return others & ~np.isin(programs, list(self.seen)) if self.seen else others

    def load(self, addresses, mask, size):
        for region, offsets in self._located("load", addresses, mask, size):
            self._refuse_written(region, offsets, "loads")
            before = region.reader[offsets]
            region.reader[offsets] = np.where((before == NOBODY) | (before == self.index), self.index, SEVERAL)

    def store(self, addresses, mask, size):
        for region, offsets in self._located("store", addresses, mask, size):
            if len(np.unique(offsets)) != len(offsets):
                raise Race(self._say("stores one element twice at once"))
            readers, writers = region.reader[offsets], region.writer[offsets]
            if self._unordered(readers).any():
                raise Race(self._say("stores what another program loads"))
            if self._unordered(writers).any():
                raise Race(self._say("stores what another program stores"))
            self.stored = self.barriers
            region.writer[offsets], region.phase[offsets] = self.index, self.barriers

    def _refuse_written(self, region, offsets, verb):
        writers = region.writer[offsets]
        if self._unordered(writers).any():
            raise Race(self._say(f"{verb} what another program stores"))
        if ((writers == self.index) & (region.phase[offsets] == self.barriers)).any():
            raise Race(self._say(f"{verb} what it stored, with no tl.debug_barrier() between"))

    def _located(self, verb, addresses, mask, size):
        """Pairs of a region and the offsets of all bytes of an access in it."""
        addresses, mask = np.broadcast_arrays(addresses, mask)
        left = addresses[mask].astype(np.int64)
        for region in self.regions:
            inside = (left >= region.begin) & (left + size <= region.end)
            if inside.any():
                offsets = (left[inside, None] - region.begin + np.arange(size)).ravel()
                if not region.valid[offsets].all():
                    raise OutOfBounds(self._say(f"{verb}s outside the tensors of the launch, within their storage"))
                left = left[~inside]
                yield region, offsets
        if len(left):
            raise OutOfBounds(self._say(f"{verb}s outside the tensors of the launch: {len(left)} elements"))

    def _say(self, what):
        return f"{self.kernel}: program {self.program} {what}{_place()}"


def _place():
    """Where the kernel stands: the innermost frame that is neither Triton's nor this package's."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("triton.") and module not in OWN_MODULES:
            return f" ({frame.f_code.co_filename}:{frame.f_lineno})"
        frame = frame.f_back
    return ""
