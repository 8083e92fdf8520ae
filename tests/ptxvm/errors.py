"""What the machine reports: block, thread, the PTX line and, where the compiler kept it, the source line."""


class PtxError(Exception):
    """Base of everything that a launch can report."""


class Refused(PtxError):
    """The PTX has instructions, modifiers or types that this machine doesn't execute; the message names them."""


class OutOfBounds(PtxError):
    """An access outside every tensor that was passed, or outside the block's shared memory."""


class Misaligned(PtxError):
    """An access whose address is no multiple of its size."""


class Race(PtxError):
    """Two threads touch the same bytes, one of them writes, and no barrier orders them."""


class Deadlock(PtxError):
    """A barrier that not all threads reach."""


class Divergence(PtxError):
    """A warp instruction or aligned barrier that not all of its lanes reach."""


class Uninitialised(PtxError):
    """A read of shared memory that nobody has written."""


class AsyncHazard(PtxError):
    """An access to shared memory while a cp.async to it is in flight."""


class Trap(PtxError):
    """The kernel stopped itself (trap, a failed assertion) or used a resource that doesn't exist."""


class Limit(PtxError):
    """The launch executed more instructions than `max_ops`."""


BY_KIND = {
    1: OutOfBounds,
    2: Misaligned,
    3: Race,
    4: Deadlock,
    5: Divergence,
    6: Uninitialised,
    7: AsyncHazard,
    8: Trap,
    9: Limit,
}
