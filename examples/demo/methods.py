"""The adapter methods that the demo can train: name -> PEFT's configuration of a rank, put `where` it is told.

`where` holds PEFT's target_modules and modules_to_save. A method is added by one function and one entry.
"""


def hra(rank, where):
    from peft import HRAConfig

    return HRAConfig(r=rank, **where)


def oft(rank, where):
    """Blocks of 4 x rank: PEFT's default of 32 at the demo's default rank of 8."""
    from peft import OFTConfig

    return OFTConfig(oft_block_size=4 * rank, **where)


def boft(rank, where):
    """Blocks of the rank, one factor: all that plain PEFT has without its CUDA extension."""
    from peft import BOFTConfig
    from peft.tuners.boft import layer

    # PEFT would try to compile the extension once per layer, and go on without.
    layer._FBD_CUDA = False
    return BOFTConfig(boft_block_size=rank, **where)


METHODS = {"hra": hra, "oft": oft, "boft": boft}
