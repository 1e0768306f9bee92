"""What `fastbn.convert` knows of classes that are not torch.nn's: by type, or by name, so that nothing is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastbn.nn import epilogue, torch_activations
from fastbn.transforms.checkpoint import class_without_checkpoint_safety
from fastbn.transforms.fuse.layers import LAYERS, Layer
from fastbn.transforms.fuse.trace import LEAF_FUNCTIONS

# Facts by "module.qualified name", until a model has a module of that type.
_named: dict[str, dict[str, Any]] = {}
# The type of the inputs that forward takes, where it is not Tensor.
INPUT_TYPES: dict[type, type] = {}


def register(
    cls: type | str,
    *,
    activation: str | Callable[[Any], tuple[str, float | None] | None] | None = None,
    identity: Callable[[Any], bool] | None = None,
    layer: Callable[[Any, Tensor], Mapping[str, Any] | None] | None = None,
    steps: Callable[[Any], tuple[nn.Module, ...]] | None = None,
    inputs: type | None = None,
    leaf: bool = False,
) -> None:
    """Tell `fastbn.convert` what modules of exactly this class are.

    cls: the class, or its "module.qualified name", which imports nothing.
    activation: the name of an activation that fastbn fuses, or a function of the module that returns (name, parameter
    or None), or None where the module is none of them.
    identity: a function of the module that returns whether it returns its input as it is now (an idle DropPath).
    layer: for a normalisation: a function of the module and its input that returns the keyword arguments of
    `fastbn.functional.batch_norm` (running_mean, running_var, weight, bias, training, momentum, eps,
    num_batches_tracked), or None where the module's own forward has to run. steps: a function of such a module that
    returns the modules that its forward calls on the result (dropout, activation).
    inputs: `list`, if that is what its forward is given instead of tensors.
    leaf: that it is not a class but the name of a function, which a forward calls and tracing must not look into, since
    it decides by the shape of its input.

    All are asked at each call. Raises TypeError for a class that is neither a type nor a string, and ValueError if
    nothing is told of it.
    """
    if not isinstance(cls, (type, str)):
        raise TypeError(f"register: expected a class or its name, got {type(cls).__name__}")
    facts = {"activation": activation, "identity": identity, "layer": layer, "steps": steps, "inputs": inputs}
    if leaf and isinstance(cls, str):
        LEAF_FUNCTIONS.add(cls)
        return
    if all(value is None for value in facts.values()):
        raise ValueError("register: expected activation, identity, layer or inputs of a class, got none of them")
    if isinstance(cls, str):
        _named[cls] = facts
    else:
        _enter(cls, facts)


def _enter(cls: type, facts: dict[str, Any]) -> None:
    activation, layer, steps = facts["activation"], facts["layer"], facts["steps"]
    if activation is not None:
        name = activation
        torch_activations.ACTIVATIONS[cls] = activation if callable(activation) else lambda module: (name, None)
    if facts["identity"] is not None:
        epilogue.IDENTITIES[cls] = facts["identity"]
    if cls in torch_activations.ACTIVATIONS or cls in epilogue.IDENTITIES:
        epilogue.FORWARDS.setdefault(cls, getattr(cls, "forward", None))
    if layer is not None:
        LAYERS[cls] = Layer(layer, steps or (lambda module: ()))
    if facts["inputs"] is not None:
        INPUT_TYPES[cls] = facts["inputs"]


def resolve(model: nn.Module) -> None:
    """Enter what is known by name of the types of a model's modules."""
    for cls in {class_without_checkpoint_safety(type(module)) for module in model.modules()}:
        facts = _named.get(f"{cls.__module__}.{cls.__qualname__}")
        if facts is not None:
            _enter(cls, facts)


def _trained(module: Any, input: Tensor) -> Mapping[str, Any] | None:
    """Return the arguments of a subclass of torch.nn.BatchNorm2d that keeps their meaning."""
    if input.dim() != 4:
        return None
    has_stats = not module.training or module.track_running_stats
    return {
        "running_mean": module.running_mean if has_stats else None,
        "running_var": module.running_var if has_stats else None,
        "weight": module.weight,
        "bias": module.bias,
        "training": module.training or (module.running_mean is None and module.running_var is None),
        "momentum": module.momentum,
        "eps": module.eps,
        "num_batches_tracked": module.num_batches_tracked if module.training and has_stats else None,
    }


def _frozen(module: Any, input: Tensor) -> Mapping[str, Any] | None:
    """Return the arguments of a layer whose buffers are constants and promote the input."""
    eps = getattr(module, "eps", 1e-5)
    if input.dim() != 4 or input.dtype != module.weight.dtype or not eps > 0:
        return None
    return {
        "running_mean": module.running_mean,
        "running_var": module.running_var,
        "weight": module.weight,
        "bias": module.bias,
        "eps": eps,
    }


def _drop_and_act(module: Any) -> tuple[nn.Module, ...]:
    return (module.drop, module.act)


register("timm.layers.norm_act.BatchNormAct2d", layer=_trained, steps=_drop_and_act)
register("timm.layers.norm_act.FrozenBatchNormAct2d", layer=_frozen, steps=_drop_and_act)
for _name in (
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
    "transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d",
    "transformers.models.rt_detr.modeling_rt_detr_resnet.RTDetrFrozenBatchNorm2d",
):
    register(_name, layer=_frozen)
register("torchvision.models.densenet._DenseLayer", inputs=list)
register("timm.models.dla.DlaRoot", inputs=list)
for _version in ("mobilenet_v1", "mobilenet_v2"):
    register(f"transformers.models.{_version}.modeling_{_version}.apply_tf_padding", leaf=True)

_NAMES = {
    "timm.layers.activations": {
        "Swish": "silu",
        "Mish": "mish",
        "Sigmoid": "sigmoid",
        "Tanh": "tanh",
        "HardSwish": "hardswish",
        "HardSigmoid": "hardsigmoid",
        "GELU": "gelu",
    },
    "timm.layers.activations_me": {
        "SwishMe": "silu",
        "MishMe": "mish",
        "HardSwishMe": "hardswish",
        "HardSigmoidMe": "hardsigmoid",
    },
    "transformers.activations": {"SiLUActivation": "silu", "GELUActivation": "gelu", "MishActivation": "mish"},
}
for _module, _classes in _NAMES.items():
    for _class, _activation in _classes.items():
        register(f"{_module}.{_class}", activation=_activation)
register("transformers.activations.LinearActivation", identity=lambda module: True)
register(
    "timm.layers.drop.DropPath",
    identity=lambda module: not module.training or module.drop_prob is None or module.drop_prob == 0,
)
register("timm.layers.drop.DropBlock2d", identity=lambda module: not module.training or not module.drop_prob)
register(
    "torchvision.ops.stochastic_depth.StochasticDepth", identity=lambda module: not module.training or module.p == 0
)
