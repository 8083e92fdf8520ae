"""The adapter methods that the demo can train: name -> PEFT's configuration of a rank, put `where` it is told.

`where` holds PEFT's target_modules and modules_to_save. A method is added by one function and one entry.
"""


def hra(rank, where):
    from peft import HRAConfig

    return HRAConfig(r=rank, **where)


METHODS = {"hra": hra}
