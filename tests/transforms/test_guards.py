"""What symbolic tracing would guess, fastbn.convert guards or leaves alone: results are those of the model's code."""

import collections
import cProfile
import enum
import functools
import gc
import pstats
import random
import re
import sys
import time
import types

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastbn
from tests.transforms.fused import assert_same, check, inputs, random_state, recorded_calls, step
from tests.transforms.test_fuse import Block, ConvNorm, Inverted, downsample, module_with

X = inputs(4, 3, 5, 5)
FLAG = True
OPTIONS = {"relu": True}


class Options(enum.Flag):
    RELU = enum.auto()
    SILU = enum.auto()


class Kind(enum.Enum):
    PLAIN = 1
    RELU = 2


# --- what happens to modules after they were converted


def relu_after(self, x):
    return self.act(self.bn(self.conv(x)))


def small():
    return module_with(relu_after, act=nn.ReLU())


@pytest.mark.parametrize("name", ["bn", "act"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_hook_runs_and_prevents_fusion(name, register):
    model, calls = random_state(small()), []
    getattr(model.get_submodule(name), register)(lambda *_: calls.append("before"))
    fastbn.convert(model)
    handle = getattr(model.get_submodule(name), register)(lambda *_: calls.append("after"))
    with recorded_calls() as fused:
        step(model, X)
    assert sorted(calls) == ["after", "before"] and fused == [""]
    handle.remove()


def test_hooks_that_are_removed_allow_fusion_again():
    model = random_state(small())
    handle = model.bn.register_forward_hook(lambda module, args, output: output * 2)
    fastbn.convert(model)
    handle.remove()
    with recorded_calls() as fused:
        model(X)
    assert fused == ["relu"]


def test_a_hook_on_a_container_prevents_passing_down():
    model = Inverted(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def change(model):
        model.conv.register_forward_hook(lambda module, args, output: output * 3)

    check(model, X, fused=[""], change=change)


def test_global_hooks_see_every_module():
    model = fastbn.convert(random_state(small()))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(X)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Module"]


def replace(name, module):
    def change(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, random_state(module()))

    return change


@pytest.mark.parametrize(
    "change, fused",
    [
        (replace("act", nn.SiLU), ["silu"]),
        (replace("act", lambda: nn.Softmax(1)), [""]),
        (replace("act", nn.Identity), [""]),
        (replace("bn", nn.Identity), []),
        (replace("bn", lambda: nn.BatchNorm2d(3)), []),  # torch.nn's, until convert is called again
        (replace("bn", lambda: nn.GroupNorm(1, 3)), []),
        (replace("conv", nn.Identity), ["relu"]),
        (lambda model: setattr(model.act, "forward", torch.sigmoid), [""]),
        (lambda model: setattr(model.bn, "forward", torch.sigmoid), []),
    ],
)
def test_modules_that_are_replaced(change, fused):
    check(small(), X, fused=fused, change=change)


def test_an_activation_that_is_replaced_after_an_addition():
    def forward(self, x, r):
        return self.act(self.bn(x) + r)

    model, r = module_with(forward, act=nn.ReLU()), inputs(*X.shape, seed=1)
    check(model, X, r, fused=["add"], change=replace("act", lambda: nn.Softmax(1)))
    check(module_with(forward, act=nn.GELU("tanh")), X, r, fused=["add"])


def test_parameters_of_an_activation_are_read_at_each_call():
    def change(model):
        model.act.negative_slope = 0.5

    check(module_with(relu_after, act=nn.LeakyReLU(0.1)), X, fused=["leaky_relu"], change=change)

    def spoil(model):
        model.act.approximate = "tanh"

    check(module_with(relu_after, act=nn.GELU()), X, fused=[""], change=spoil)


def test_a_module_set_to_none_and_back():
    check(Block(downsample()), X, fused=["", ""], change=lambda model: setattr(model, "downsample", None))
    check(Block(), X, fused=["", ""], change=replace("downsample", downsample))


@pytest.mark.parametrize("value", [False, 1, None])
def test_an_attribute_that_is_changed_after_conversion(value):
    def change(model):
        model.use_res_connect = value

    check(Inverted(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), X, fused=[""], change=change)


def test_sync_batch_norm_and_freezing_after_conversion():
    model = random_state(small())
    twin = random_state(small())
    fastbn.freeze(fastbn.convert(model)), fastbn.freeze(twin)
    with recorded_calls() as fused:
        results = step(model, X)
    assert fused == ["relu"]
    assert_same(results, step(twin, X))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(fastbn.convert(random_state(small())).eval())
    expected = random_state(small()).eval()(X)
    torch.testing.assert_close(synced(X), expected)  # with its activation


def test_a_user_subclass_of_a_layer_is_left_alone():
    class Mine(fastbn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) * 2

    check(nn.Sequential(Mine(3), nn.ReLU()), X, fused=[""])


def test_a_layer_with_an_activation_of_its_own():
    model = random_state(nn.Sequential(fastbn.BatchNorm2d(3, activation="silu"), nn.ReLU()))
    with recorded_calls() as fused:
        y = fastbn.convert(model)(X)
    assert fused == ["silu"]
    torch.testing.assert_close(y, F.relu(model[0](X)))


# --- what is called with other arguments


def test_other_calls_run_the_module_s_own_forward():
    def forward(self, x, scale=None):
        y = F.relu(self.bn(x))
        return y if scale is None else y * scale

    model = random_state(module_with(forward))
    twin = random_state(module_with(forward))
    fastbn.convert(model).eval(), twin.eval()
    for args, kwargs, fused in [
        ((X,), {}, ["relu"]),
        ((X, 2), {}, [""]),
        ((X,), {"scale": 3}, [""]),
        ((), {"x": X}, [""]),
    ]:
        with recorded_calls() as calls:
            y = model(*args, **kwargs)
        torch.testing.assert_close(y, twin(*args, **kwargs))
        assert calls == fused


def test_none_and_lists_run_the_module_s_own_forward():
    def forward(self, x, skip):
        if isinstance(x, list):
            x = torch.cat(x)
        y = self.bn(x)
        if skip is not None:
            y = y + skip
        return F.relu(y)

    check(module_with(forward), X, inputs(*X.shape, seed=1), fused=["add+relu"])
    check(module_with(forward), X, None, fused=[""])
    model, twin = (random_state(module_with(forward)).eval() for _ in range(2))
    torch.testing.assert_close(fastbn.convert(model)([X, X], None), twin([X, X], None))


class Subclass(torch.Tensor):
    pass


def test_a_subclass_of_a_tensor_that_forward_asks_for():
    def forward(self, x):
        y = self.bn(x)
        return y * 2 if isinstance(x, Subclass) else F.relu(y)

    model, twin = (random_state(module_with(forward)).eval() for _ in range(2))
    fastbn.convert(model)
    with recorded_calls() as calls:
        for x in (X, X.as_subclass(Subclass)):
            torch.testing.assert_close(model(x).as_subclass(torch.Tensor), twin(x).as_subclass(torch.Tensor))
    assert calls == ["relu", ""]


class OfList(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, xs):
        return self.bn(torch.cat([xs] if isinstance(xs, torch.Tensor) else xs))


def test_a_tensor_for_what_takes_lists_as_a_rule():
    fastbn.transforms.register(OfList, inputs=list)
    check(Inverted(OfList()), X, fused=[""])


def test_residuals_of_another_shape_or_dtype():
    model = module_with(lambda self, x, r: F.relu(self.bn(x) + r))
    check(model, X, inputs(1, 3, 1, 1), fused=[""])
    check(model, X, inputs(2, 4, 3, 5, 5), fused=[""])
    model = fastbn.convert(random_state(model)).float().eval()
    with recorded_calls() as calls:
        y = model(X.float(), X)
        z = model(X.float(), X.bfloat16())
    assert y.dtype == torch.float64 and z.dtype == torch.float32 and calls == ["", ""]


def test_the_strides_of_a_sum_are_those_of_the_model():
    def first(self, x, r):
        return r + self.bn(x)

    def second(self, x, r):
        return self.bn(x) + r

    r = inputs(*X.shape, seed=1)
    last, rest = torch.channels_last, torch.contiguous_format
    for forward, fused in [(first, ["add", "add", "", "", ""]), (second, ["add"] * 5)]:
        model, twin = (random_state(module_with(forward)).eval() for _ in range(2))
        fastbn.convert(model)
        others = [torch.cat([r, r], 1)[:, 3:], r.to(memory_format=last), r.transpose(2, 3), r[:1].expand(r.shape)]
        for residual, expected in zip([r, *others], fused, strict=True):
            with recorded_calls() as calls:
                y = model(X, residual)
            assert calls == [expected] and y.stride() == twin(X, residual).stride()
        with recorded_calls() as calls:
            model(X.to(memory_format=last), r.to(memory_format=last))
            y = model(X.to(memory_format=last), r)
        assert y.is_contiguous(memory_format=rest if forward is first else last)
        assert calls == (["add", ""] if forward is first else ["add", "add"])


def test_a_residual_that_is_changed_before_backward():
    def forward(self, x):
        r = self.conv(x)
        y = F.silu(self.bn(x) + r)
        r += 1
        return y + r

    check(module_with(forward), X, fused=[""])
    check(module_with(lambda self, x, r: F.silu(self.bn(x) + r), conv=nn.Identity()), X, X, fused=["add+silu"])


def test_a_batch_of_models():
    for forward in (lambda self, x: x + self.bn(x), lambda self, x: F.relu(self.bn(x) + x)):
        model = fastbn.convert(random_state(module_with(forward)).eval())
        ys = torch.func.vmap(model)(torch.stack([X, X * 2]))
        torch.testing.assert_close(ys, torch.stack([model(X), model(X * 2)]))


def test_an_in_place_addition_keeps_its_dtype():
    def forward(self, x, r):
        y = self.bn(x)
        y += r
        return y

    model = fastbn.convert(random_state(module_with(forward))).float().eval()
    with recorded_calls() as calls:
        assert model(X.float(), X.double()).dtype == torch.float32
    assert calls == [""]


def test_autocast_gives_a_residual_of_another_dtype():
    model, twin = random_state(Inverted(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), None
    twin = random_state(Inverted(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).float()
    fastbn.convert(model.float())
    with torch.autocast("cpu", torch.bfloat16), recorded_calls() as calls:
        y, z = model(X.float()), twin(X.float())
        half = model(X.bfloat16())
    assert y.dtype == z.dtype == torch.float32 and half.dtype == torch.bfloat16 and calls == ["", "add"]
    torch.testing.assert_close(y, z, rtol=0.02, atol=0.02)


# --- values that are read elsewhere, or written


READ_ELSEWHERE = [
    (lambda self, x: (lambda y: F.relu(y) + y)(self.bn(x)), [""]),
    (lambda self, x: (lambda y: (F.relu(y), y))(self.bn(x)), [""]),
    (lambda self, x: (lambda y: y + y)(self.bn(x)), [""]),
    (lambda self, x: (lambda y: y.relu_().sum() + y.sum())(self.bn(x)), [""]),
    (lambda self, x: (lambda y: (y + x).relu() + y)(self.bn(x)), [""]),
]


@pytest.mark.parametrize("forward, fused", READ_ELSEWHERE)
def test_an_intermediate_that_is_read_elsewhere(forward, fused):
    check(module_with(forward), X, fused=fused)


def test_an_in_place_addition_onto_the_input():
    def forward(self, x):
        x += self.bn(x)
        return F.relu(x)

    check(module_with(forward), X, fused=[""], backward=False)


def test_an_in_place_addition_onto_what_a_child_may_share():
    def forward(self, x):
        y = self.child(x)
        y += self.bn(self.conv(x))
        return y

    check(module_with(forward, child=nn.Identity()), X, fused=[""], backward=False)
    check(module_with(forward, child=nn.Conv2d(3, 3, 1)), X, fused=["add"])
    # The convolution was replaced: then the addition changes the input, as it always would.
    check(
        module_with(forward, child=nn.Conv2d(3, 3, 1)),
        X,
        fused=[""],
        change=replace("child", nn.Identity),
        backward=False,
    )


def test_the_input_of_a_normalisation_is_changed_in_place_before_the_addition():
    def forward(self, x):
        y = self.bn(x)
        x.mul_(2)
        return y + x

    check(module_with(forward), X, fused=[""], backward=False)

    def through_a_child(self, x):
        y = self.bn(self.identity(x))
        return y + self.act(x)

    check(
        module_with(through_a_child, identity=nn.Identity(), act=nn.ReLU(inplace=True)), X, fused=[""], backward=False
    )

    def of_a_convolution(self, x):
        y = self.bn(self.conv(x))
        return y + self.act(x)

    check(module_with(of_a_convolution, act=nn.ReLU(inplace=True)), X, fused=["add"], backward=False)
    check(
        module_with(of_a_convolution, act=nn.ReLU(inplace=True)),
        X,
        fused=[""],
        change=replace("conv", nn.Identity),
        backward=False,
    )


def test_a_child_may_change_its_input():
    model = Inverted(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    check(model, X, fused=["add"])


def test_random_numbers_are_drawn_in_the_order_of_the_model():
    def forward(self, x):
        y = self.drop(self.bn(self.conv(x)))
        return y + self.between(x)

    def build():
        between = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5))
        return module_with(forward, drop=nn.Dropout(0.3), between=between)

    check(build(), X, fused=[""], modes=[True])
    check(build(), X, fused=["add"], modes=[False])


def test_running_statistics_are_read_in_the_order_of_the_model():
    def forward(self, x, r):
        y = self.bn(self.conv(x))
        mean = self.bn.running_mean * 2
        return y + r, mean

    check(module_with(forward), X, inputs(*X.shape, seed=1), fused=[""])


def test_hooks_run_in_the_order_of_the_model():
    def called(model, seen):
        for name in ("bn1", "bn2", "downsample", "relu"):
            model.get_submodule(name).register_forward_hook(lambda module, *_, name=name: seen.append(name))
        model(X)
        return seen

    stock, fast = (random_state(Block(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid()))) for _ in range(2))
    assert called(fastbn.convert(fast), []) == called(stock, [])
    stock, fast = (random_state(Block(downsample())) for _ in range(2))
    assert called(fastbn.convert(fast), []) == called(stock, [])


def test_what_is_done_after_the_result_is_known():
    def of_an_input(self, x, r):
        y = F.relu(self.bn(x))
        r.mul_(2)
        return y

    def of_a_buffer(self, x):
        y = self.act(self.bn(x))
        self.bn2.running_mean.add_(x.mean())
        return y

    check(module_with(of_an_input), X, inputs(*X.shape, seed=1), fused=["relu"])
    check(module_with(of_a_buffer, act=nn.Identity()), X, fused=[""])
    check(Inverted(module_with(of_a_buffer, act=nn.Identity())), X, fused=[""])


# --- modules that are shared or called twice


def test_a_layer_that_is_called_twice():
    def forward(self, x):
        return F.relu(self.bn(self.conv2(F.relu(self.bn(self.conv(x))))))

    check(module_with(forward), X, fused=["relu", "relu"])


def test_a_layer_that_is_called_again_by_what_lies_between():
    shared = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + self.between(x)

    between = nn.Sequential(shared, nn.Conv2d(3, 3, 1), nn.ReLU())
    check(module_with(forward, bn=shared, between=between), X, fused=["", ""])


def test_shared_modules_and_containers():
    norm, act, block = nn.BatchNorm2d(3), nn.ReLU(), ConvNorm(activation=nn.SiLU())
    check(
        nn.Sequential(norm, act, nn.Conv2d(3, 3, 1), norm, act, block, block), X, fused=["relu", "relu", "silu", "silu"]
    )


# --- decisions of Python


def test_one_branch_for_training_and_another_for_evaluation():
    def forward(self, x):
        y = self.bn(x)
        return F.relu(y) if self.training else F.silu(y)

    check(module_with(forward), X, fused=[""])


def test_arguments_that_are_the_training_flag():
    def forward(self, x):
        return F.dropout(F.relu(self.bn(x)), 0.4, self.training)

    check(module_with(forward), X, fused=["relu"])


def test_a_child_in_another_mode():
    def forward(self, x):
        return F.dropout(F.relu(self.bn(x)), 0.4, self.conv.training)

    check(module_with(forward), X, fused=["relu"])
    model, twin = (random_state(module_with(forward)) for _ in range(2))
    fastbn.convert(model)
    for m in (model, twin):
        m.train().conv.eval()
    with recorded_calls() as calls:
        assert_same(step(model, X), step(twin, X))
    assert calls == [""]


def test_variables_of_the_forward_in_functions_that_it_defines():
    def forward(self, x):
        factor = 2 if self.conv.bias is None else 3
        scaled = [(lambda y: y * factor * i)(x) for i in range(1, 3)]
        return F.relu(self.bn(scaled[1]))

    check(module_with(forward), X, fused=["relu"])


def test_attributes_of_all_kinds():
    def forward(self, x):
        y = self.bn(x)
        if self.kind is Kind.RELU and self.count == 2 and self.names[0] == "relu" and self.sizes == [1, 2]:
            y = self.function(y)
        return y.to(self.dtype) if self.options["cast"] else y

    values = {
        "kind": Kind.RELU,
        "count": 2,
        "names": ("relu", 1.5),
        "sizes": [1, 2],
        "function": F.relu,
        "dtype": torch.float64,
        "options": {"cast": True},
    }
    others = {
        "kind": Kind.PLAIN,
        "count": 3,
        "names": ("silu", 1.5),
        "function": F.silu,
        "dtype": torch.float32,
        "options": {"cast": False},
    }
    check(module_with(forward, **values), X, fused=["relu"])
    for name, value in others.items():
        change = lambda model, name=name, value=value: setattr(model, name, value)  # noqa: E731
        check(module_with(forward, **values), X, fused=[""], change=change, rtol=1e-6, atol=1e-6)
    check(module_with(forward, **values), X, fused=[""], change=lambda model: model.sizes.append(3))
    check(module_with(forward, **values), X, fused=[""], change=lambda model: model.options.update(cast=False))


def test_a_combination_of_flags_is_left_alone():
    def forward(self, x):
        return F.relu(self.bn(x)) if self.options else self.bn(x)

    check(module_with(forward, options=Options.RELU), X, fused=["relu"])
    check(module_with(forward, options=Options.RELU | Options.SILU), X, fused=[""])


def test_a_name_that_is_a_keyword():
    def forward(self, x):
        return F.relu(self.bn(x) * getattr(self, "lambda"))

    check(module_with(forward, **{"lambda": 2}), X, fused=[""])
    check(module_with(lambda self, x: F.relu(self.bn(x * getattr(self, "lambda"))), **{"lambda": 2}), X, fused=["relu"])


def test_a_number_that_becomes_a_tensor():
    def forward(self, x):
        return F.relu(self.bn(x * self.scale))

    def change(model):
        model.scale = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)

    check(module_with(forward, scale=1.5), X, fused=["relu"])
    check(module_with(forward, scale=1.5), X, fused=[""], change=change)


def test_constants_of_a_configuration():
    def change(model):
        model.config.relu = False

    def remove(model):
        del model.config
        model.config = types.SimpleNamespace(relu=True)

    check(module_with(forward_of_a_config, config=Config()), X, fused=["relu"])
    check(module_with(forward_of_a_config, config=Config()), X, fused=[""], change=change)
    check(module_with(forward_of_a_config, config=Config()), X, fused=["relu"], change=remove)


def test_children_that_are_iterated():
    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
        return x

    def layers():
        return {
            "convs": nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)]),
            "norms": nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]),
        }

    def change(model):
        model.convs.append(model.convs[0])
        model.norms.append(model.norms[0])

    check(module_with(forward, **layers()), X, fused=["relu", "relu"])
    check(module_with(forward, **layers()), X, fused=["", "", ""], change=change)


def test_attributes_of_children_and_missing_attributes():
    def forward(self, x):
        y = self.bn(x)
        if hasattr(self, "extra") or self.conv.stride != (1, 1):
            y = y * 2
        return F.relu(y * self.bn2.weight.view(-1, 1, 1) if self.conv.bias is not None else y)

    check(module_with(forward), X, fused=["relu"])
    check(module_with(forward), X, fused=[""], change=lambda model: setattr(model, "extra", 1))

    def stride(model):
        model.conv.stride = (2, 2)

    check(module_with(forward), X, fused=[""], change=stride)


class Named(collections.namedtuple("Named", "y")):
    pass


class Listed(list):
    pass


class Config:
    relu, sizes, calls, last = True, [1, 2], 0, None

    def method(self):
        return True


def forward_of_a_config(self, x):
    return F.relu(self.bn(x)) if self.config.relu else self.bn(x)


def forward_of_a_list_in_a_config(self, x):
    return F.relu(self.bn(x)) if self.config.sizes else self.bn(x)


def forward_that_asks_whether_there_is_a_config(self, x):
    return F.relu(self.bn(x)) if self.config else self.bn(x)


def forward_that_calls_a_config(self, x):
    return F.relu(self.bn(x)) if self.config.method() else self.bn(x)


def forward_with_a_flag(self, x):
    return F.relu(self.bn(x)) if FLAG else self.bn(x)


def forward_with_global_options(self, x):
    return F.relu(self.bn(x)) if OPTIONS["relu"] else self.bn(x)


def forward_that_counts(self, x):
    self.calls = self.calls + 1
    return F.relu(self.bn(x))


def forward_that_appends(self, x):
    self.list.append(1)
    return F.relu(self.bn(x))


def forward_that_counts_in_a_config(self, x):
    self.config.calls += 1
    return F.relu(self.bn(x))


def forward_that_counts_in_its_class(self, x):
    self.__class__.calls = 1
    return F.relu(self.bn(x))


def forward_that_sets_an_attribute_of_a_class(self, x):
    y = F.relu(self.bn(x))
    Config.last = y
    return y


def forward_that_sets_an_attribute_of_a_tensor(self, x):
    y = F.relu(self.bn(x))
    y.tag = 1
    return y


def forward_that_sets_an_attribute_in_another_way(self, x):
    object.__setattr__(self, "calls", self.calls + 1)
    return F.relu(self.bn(x))


def forward_of_a_flag_of_a_function(self, x):
    return F.relu(self.bn(x)) if closure_over.is_on else self.bn(x)


def forward_that_asks_for_a_class(self, x):
    return F.relu(self.bn(x)) if self.conv.__class__ is nn.Conv2d else self.bn(x)


def forward_that_compares_values(self, x):
    y = self.identity(x)
    return F.relu(self.bn(x)) if y is x else self.bn(x)


def forward_that_draws(self, x):
    y = F.relu(self.bn(x))
    return y if random.random() < 2 else x


def forward_that_draws_by_torch(self, x):
    return F.relu(self.bn(x)) + torch.rand(1, dtype=x.dtype)


def forward_that_draws_by_numpy(self, x):
    return F.relu(self.bn(x)) if numpy.random.rand() < 2 else x


def forward_that_tells_the_time(self, x):
    return F.relu(self.bn(x)) if time.time() > 0 else x


def forward_that_makes_a_tensor(self, x):
    return F.relu(self.bn(x)) + torch.zeros(1, dtype=torch.float64)


def forward_that_asks_for_gradients(self, x):
    return F.relu(self.bn(x)) if torch.is_grad_enabled() else self.bn(x)


def forward_that_asks_for_autocast(self, x):
    return self.bn(x) if torch.is_autocast_enabled() else F.relu(self.bn(x))


def forward_without_gradients(self, x):
    with torch.no_grad():
        y = F.relu(self.bn2(x))
    return F.relu(self.bn(x)) + y


def forward_that_prints(self, x):
    print("", end="")
    return F.relu(self.bn(x))


def forward_that_asks_for_a_type(self, x):
    return F.relu(self.bn(x)) if type(self.conv) is nn.Conv2d else self.bn(x)


def forward_that_asks_for_a_type_of_an_intermediate(self, x):
    y = self.bn(x)
    return F.relu(y) if isinstance(y, torch.Tensor) else y


def forward_that_looks_at_data(self, x):
    y = self.bn(x)
    return F.relu(y) if y.sum() > -1e9 else y


def forward_that_catches(self, x):
    try:
        y = F.relu(self.bn(x))
        if torch.is_grad_enabled():
            y = y * 2
    except Exception:
        y = x
    return y


def forward_that_checkpoints(self, x):
    return F.relu(self.bn(checkpoint(self.conv, x, use_reentrant=False)))


def forward_of_any_arguments(self, *args):
    return F.relu(self.bn(args[0]))


def forward_with_a_backend_flag(self, x):
    return F.relu(self.bn(x)) if torch.backends.cudnn.enabled else self.bn(x)


def forward_of_a_closure():
    flags = [True]

    def forward(self, x):
        return F.relu(self.bn(x)) if flags[0] else self.bn(x)

    return forward


def forward_that_calls_a_closure(self, x):
    return F.relu(self.bn(x)) if is_on() else self.bn(x)


def closure_over(value):
    return lambda: value


is_on = closure_over(True)
closure_over.is_on = True


def forward_of_a_flag_of_a_class(self, x):
    return F.relu(self.bn(x)) if Config.relu else self.bn(x)


def forward_that_imports(self, x):
    import tests.transforms.test_guards as here

    return F.relu(self.bn(x)) if here.FLAG else self.bn(x)


def forward_with_a_default_that_may_change(self, x, options=OPTIONS):
    return F.relu(self.bn(x)) if options["relu"] else self.bn(x)


def forward_that_returns_a_tuple_with_names(self, x):
    return Named(F.relu(self.bn(x)))


def forward_that_returns_a_list_of_a_kind(self, x):
    return Listed([F.relu(self.bn(x))])


def forward_that_makes_a_layer(self, x):
    return F.relu(self.bn(x)) + nn.Linear(5, 5, dtype=x.dtype)(x) * 0


LEFT_ALONE = [
    (forward_of_a_closure(), "forward is a closure over values"),
    (forward_that_calls_a_closure, "forward is a closure over values"),
    (forward_of_a_flag_of_a_class, "forward reads the global relu"),
    (forward_that_imports, "forward imports tests.transforms.test_guards"),
    (forward_with_a_default_that_may_change, "a default of forward may change"),
    (forward_that_returns_a_tuple_with_names, "forward makes a Named"),
    (forward_that_returns_a_list_of_a_kind, "forward makes a Listed"),
    (forward_that_makes_a_layer, "forward asks for the type|is passed to a function|forward sets _is_param"),
    (forward_of_a_list_in_a_config, "forward reads config.sizes, a list"),
    (forward_that_asks_whether_there_is_a_config, "forward reads config, a Config"),
    (forward_that_calls_a_config, "forward reads config.method, a method"),
    (forward_with_a_flag, "forward reads the global FLAG"),
    (forward_with_global_options, "forward reads the global OPTIONS"),
    (forward_that_counts, "forward sets calls"),
    (forward_that_appends, "forward changes an attribute in place"),
    (forward_that_counts_in_a_config, "forward sets config.calls"),
    (forward_that_counts_in_its_class, "forward reads __class__"),
    (forward_that_sets_an_attribute_of_a_class, "forward sets the global last"),
    (forward_that_sets_an_attribute_of_a_tensor, "forward sets tag of a tensor"),
    (forward_that_sets_an_attribute_in_another_way, "forward calls object"),
    (forward_of_a_flag_of_a_function, "forward reads the global is_on, a bool"),
    (forward_that_asks_for_a_class, "forward reads __class__"),
    (forward_that_compares_values, "forward compares two values by identity"),
    (forward_that_draws, "forward calls Random.random|forward calls random.random|forward calls _random.random"),
    (forward_that_draws_by_torch, "forward calls torch.rand"),
    (forward_that_draws_by_numpy, "forward reads the global rand"),
    (forward_that_tells_the_time, "forward calls time.time"),
    (forward_that_makes_a_tensor, "forward calls torch.zeros"),
    (forward_that_asks_for_gradients, "forward calls torch.is_grad_enabled"),
    (forward_that_asks_for_autocast, "forward calls torch.is_autocast_enabled"),
    (forward_without_gradients, "forward calls torch"),
    (forward_that_prints, "forward calls print"),
    (forward_that_asks_for_a_type, "forward calls type"),
    (forward_that_asks_for_a_type_of_an_intermediate, "forward asks for the type of an intermediate value"),
    (forward_that_looks_at_data, "TraceError|forward calls torch.fx|Sum|control flow"),
    (forward_that_catches, "forward calls torch.is_grad_enabled"),
    (forward_that_checkpoints, "forward calls torch"),
    (forward_of_any_arguments, r"\*args"),
    (forward_with_a_backend_flag, "forward reads the global enabled"),
]


@pytest.mark.parametrize("forward, reason", LEFT_ALONE, ids=[f.__name__ for f, _ in LEFT_ALONE])
def test_what_would_be_a_guess_is_left_alone(forward, reason):
    def build():
        return module_with(forward, config=Config(), calls=0, list=[1], identity=nn.Identity())

    model = build()
    attributes = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    before = {key: repr(value) for key, value in attributes.items()}
    generator = torch.random.get_rng_state()
    fastbn.convert(model)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert {key: repr(vars(model)[key]) for key in attributes} == before  # tracing has touched nothing
    reasons = {layer.reason for layer in fastbn.transforms.report(model).layers}
    assert any(re.search(reason, text) for text in reasons), reasons
    random.seed(0), numpy.random.seed(0)
    assert type(random_state(model)(X)) is type(build().double()(X))
    random.seed(0), numpy.random.seed(0)
    fused = ["", ""] if forward is forward_without_gradients else [""]
    check(build(), X, fused=fused)


def test_an_ordered_dict_stays_one():
    def forward(self, x):
        y = collections.OrderedDict(out=F.relu(self.bn(x)))
        y["in"] = x
        return y

    model = check(module_with(forward), X, fused=["relu"])
    assert type(model(X)) is collections.OrderedDict and list(model(X)) == ["out", "in"]


def test_a_forward_that_is_decorated():
    def build():
        return module_with(torch.no_grad()(lambda self, x: F.relu(self.bn(x))))

    model = fastbn.convert(random_state(build()))
    with recorded_calls() as calls:
        assert not model(X).requires_grad
    assert calls == [""]


def test_a_forward_that_is_put_in_place_of_the_class_s():
    model = random_state(small())
    fastbn.convert(model)
    cls = type(model).__mro__[1]
    cls.forward = lambda self, x: self.bn(x) * 2
    try:
        with recorded_calls() as calls:
            y = model(X)
        torch.testing.assert_close(y, model.bn(X) * 2)
        assert calls == [""]
    finally:
        cls.forward = relu_after


class WithHelpers(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.child = nn.BatchNorm2d(3), Scaling()

    def by_method(self, y):
        return F.relu(y)

    @staticmethod
    def by_function(y):
        return F.relu(y)

    @classmethod
    def by_class(cls, y):
        return F.relu(y)

    def forward(self, x):
        return self.child.by_method(self.by_method(self.by_function(self.by_class(self.bn(x)))))


class Scaling(nn.Module):
    def by_method(self, y):
        return y * 2

    forward = by_method


class ScalingMore(Scaling):
    def by_method(self, y):
        return y * 3


def test_a_method_that_is_put_in_place_of_another(monkeypatch):
    def silu(self, y):
        return F.silu(y)

    def change(model):
        model.by_method = types.MethodType(silu, model)

    def patched(patch, name, function, model):
        patch.setattr(WithHelpers, name, function)

    check(WithHelpers(), X, fused=["relu"])
    check(WithHelpers(), X, fused=[""], change=change)
    check(WithHelpers(), X, fused=[""], change=lambda model: setattr(model, "child", ScalingMore().double()))
    for name, function in [("by_method", silu), ("by_function", staticmethod(F.silu)), ("by_class", classmethod(silu))]:
        with monkeypatch.context() as patch:
            change = functools.partial(patched, patch, name, function)
            check(WithHelpers(), X, fused=[""], change=change)


RECORDED = [torch.jit.is_tracing, pytest.param(torch.compiler.is_compiling, marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("asks", RECORDED, ids=["trace", "compile"])
def test_a_forward_that_asks_whether_it_is_recorded(asks):
    def forward(self, x):
        y = self.bn(x)
        return y * 2 if asks() else F.relu(y)

    def recorded(model):
        if asks is torch.jit.is_tracing:
            return torch.jit.trace(model, X, check_trace=False)
        return torch.compile(model, backend="eager")

    model = check(module_with(forward), X, fused=["relu"]).eval()
    torch.testing.assert_close(recorded(model)(X), model.bn(X) * 2)


def activated(y):
    return F.relu(y)


def forward_that_calls_a_function(self, x):
    return activated(self.bn(x))


class WithMoreHelpers(WithHelpers):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_function_or_base_method_that_is_put_in_place_of_another(monkeypatch):
    def change_function(model):
        monkeypatch.setitem(globals(), "activated", F.silu)

    def change_base(model):
        monkeypatch.setattr(WithHelpers, "forward", lambda self, x: F.silu(self.bn(x)))

    check(module_with(forward_that_calls_a_function), X, fused=["relu"])
    check(module_with(forward_that_calls_a_function), X, fused=[""], change=change_function)
    check(WithMoreHelpers(), X, fused=["relu"])
    check(WithMoreHelpers(), X, fused=[""], change=change_base)


def test_a_class_of_a_child_that_is_asked_for():
    def forward(self, x):
        y = self.bn(x)
        return self.act(y) if isinstance(self.act, nn.ReLU) else self.act(y) * 2

    check(module_with(forward, act=nn.ReLU()), X, fused=["relu"])
    check(module_with(forward, act=nn.ReLU()), X, fused=[""], change=replace("act", nn.SiLU))


class Chain(nn.Sequential):
    pass


@pytest.mark.parametrize("cls", [Chain, nn.ReLU, nn.Dropout])
def test_another_forward_of_a_class_of_torch(cls, monkeypatch):
    def build():
        return Inverted(Chain(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.0), nn.ReLU(), nn.BatchNorm2d(3)))

    def change(model):
        monkeypatch.setattr(cls, "forward", lambda self, input: input * 2)

    check(build(), X, fused=["relu", "add"])
    check(build(), X, fused=[] if cls is Chain else ["", "add"], change=change)


def test_a_container_with_a_call_of_its_own():
    class Doubled(Chain):
        def __call__(self, input):
            return super().__call__(input) * 2

    check(Inverted(Doubled(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), X, fused=[""])


def test_a_sequential_that_goes_through_its_children_in_another_way():
    class Reversed(nn.Sequential):
        def __iter__(self):
            return iter(list(self._modules.values())[::-1])

    check(Reversed(nn.SiLU(), nn.BatchNorm2d(3), nn.ReLU()), X, fused=["silu"])


def test_a_second_conversion_follows_what_has_changed():
    model = fastbn.convert(random_state(Block()))
    model.downsample = random_state(downsample())
    with recorded_calls() as calls:
        model(X)
        fastbn.convert(model)(X)
    assert calls == ["", "", "relu", "", "add+relu"]


def test_a_forward_of_the_instance():
    model = small()
    model.forward = lambda x: model.bn(x)
    fastbn.convert(random_state(model))
    assert type(model).__mro__[1] is not type(model) and "_fastbn_source" not in vars(type(model))


@pytest.mark.parametrize("forward", [property(lambda self: F.relu), torch.relu], ids=["property", "builtin"])
def test_a_forward_without_a_signature(forward):
    model = type("Odd", (nn.Module,), {"forward": forward})()
    model.bn = nn.BatchNorm2d(3)
    assert torch.equal(fastbn.convert(model).forward(X), F.relu(X))
    assert "forward is a" in fastbn.transforms.report(model).layers[0].reason


class Gained(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.gain = nn.BatchNorm2d(3), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return F.relu(self.bn(x * self.gain))


def test_a_container_whose_parameters_are_parametrised():
    def build():
        model = Gained()
        parametrize.register_parametrization(model, "gain", nn.Softplus())
        return model

    model = check(build(), X, fused=[""])
    parametrize.remove_parametrizations(model, "gain")
    assert type(model) is Gained and isinstance(model.gain, nn.Parameter)


def test_a_random_depth_is_drawn_at_each_call():
    def forward(self, x):
        keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5)
        return F.relu(self.bn(x)) * keep

    check(module_with(forward), X, fused=["relu"])


def test_a_profiler_goes_on_after_conversion():
    def after():
        pass

    with cProfile.Profile() as profiler:
        model = fastbn.convert(small())
        after()
    assert any(entry[2] == "after" for entry in pstats.Stats(profiler).stats)
    called = []
    sys.setprofile(lambda frame, event, argument: called.append(frame.f_code.co_name))
    try:
        fastbn.convert(small())
        after()
    finally:
        sys.setprofile(None)
    assert "after" in called
    with recorded_calls() as calls:
        random_state(model)(X)
    assert calls == ["relu"]


def test_a_collection_of_garbage_does_not_stop_fusion():
    def callback(phase, info):
        phases.append((phase, time.perf_counter()))

    phases = []
    thresholds = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        check(module_with(lambda self, x: torch.relu(self.bn(x))), X, fused=["relu"])
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(callback)
    assert phases and gc.isenabled()


def test_conversion_under_a_default_device():
    with torch.device("cpu"):
        check(module_with(lambda self, x: torch.relu(self.bn(x))), X, fused=["relu"])


def test_a_class_that_registers_its_subclasses():
    class Registered(module_with(relu_after).__class__.__mro__[1]):
        subclasses = []

        def __init_subclass__(cls, **kwargs):
            Registered.subclasses.append(cls)

        def forward(self, x):
            return F.relu(self.bn(x))

    class RegisteredSequential(nn.Sequential):
        subclasses = []

        def __init_subclass__(cls, **kwargs):
            RegisteredSequential.subclasses.append(cls)

    check(Registered(), X, fused=[""])
    check(RegisteredSequential(nn.BatchNorm2d(3), nn.ReLU()), X, fused=[""])
    assert not Registered.subclasses and not RegisteredSequential.subclasses


@pytest.mark.parametrize("own_class", ["type(self)", "self.__class__"])
def test_a_class_whose_methods_take_it_for_the_last_one(own_class):
    source = f"def train(self, mode=True):\n    return super({own_class}, self).train(mode)"

    def build(base, *args):
        scope = {}
        exec(source, scope)
        return type("Old", (base,), scope)(*args)

    check(build(nn.Sequential, nn.BatchNorm2d(3), nn.ReLU()), X, fused=[""])
    check(build(ConvNorm, 3, nn.ReLU()), X, fused=[""])
