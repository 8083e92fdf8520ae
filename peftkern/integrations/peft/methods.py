"""The methods that the drop-in knows, each a module of this folder, and what they share in being swapped.

A method's module holds METHOD and NAME; PeftModel (PEFT's tuner) and PeftLayer (the base of PEFT's layers); ACCELERATED
(PEFT's class -> ours); why_not, served, prepare, release, complete, check_merge, warn; peft_ignores and DEVIATION.
"""

from peft.tuners.tuners_utils import BaseTunerLayer

from peftkern.integrations.peft import boft, hra, oft
from peftkern.integrations.peft.layer import Accelerated
from peftkern.integrations.peft.report import Layer

METHODS = (hra, oft, boft)
ACCELERATED = {peft_class: ours for method in METHODS for peft_class, ours in method.ACCELERATED.items()}


def of(layer):
    """The method of a tuner layer of PEFT, or None."""
    return next((method for method in METHODS if isinstance(layer, method.PeftLayer)), None)


def accelerated_layers(model):
    """(name, layer) of every accelerated layer of a model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Accelerated)]


def why_not(layer):
    """Why a tuner layer of PEFT stays PEFT's, or None if it can be (or is) accelerated."""
    if isinstance(layer, Accelerated):
        return None
    method = of(layer)
    if method is None:
        return f"{type(layer).__module__.split('.')[-2]}.{type(layer).__name__} is not covered"
    if type(layer) not in ACCELERATED:
        return f"its class, {type(layer).__name__}, is not PEFT's own (accelerate before wrapping)"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (accelerate before attaching hooks or offloading)"
    if isinstance(layer.base_layer, BaseTunerLayer):
        return f"it wraps another adapter layer ({type(layer.base_layer).__name__})"
    return method.why_not(layer)


def swap(layer, precision, compat=None):
    """Make a layer that `why_not` accepts an accelerated one, or change the settings of one that is."""
    if type(layer) in ACCELERATED:
        layer.__class__ = ACCELERATED[type(layer)]
        of(layer).prepare(layer)
    layer.peftkern_precision = precision
    layer.peftkern_compat = compat


def swap_back(layer):
    """Give a layer PEFT's class again; False if it is of another class than `swap` gives."""
    if type(layer) not in ACCELERATED.values():
        return False
    peft_class = layer._peft_class
    if not of(layer).release(layer):
        return False
    layer.__class__ = peft_class
    for name in [name for name in layer.__dict__ if name.startswith("peftkern_")]:
        del layer.__dict__[name]
    return True


def warn(layers, adapter_name=None):
    """The warnings of every method for its own layers, a list of (name, layer)."""
    for method in METHODS:
        method.warn([(name, layer) for name, layer in layers if of(layer) is method], adapter_name)


def read_configs(layers, configs):
    """Tell layers what PEFT keeps in the configurations (adapter name -> config) and not in the layers."""
    for _, layer in layers:
        layer.read_configs(configs)


def describe(layer):
    """The report's line of an accelerated layer."""
    return Layer(type(layer).__name__, tuple(layer._adapters), *of(layer).served(layer))
