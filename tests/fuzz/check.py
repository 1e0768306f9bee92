"""Runs one case with fastbn and stock torch, compares both with extended precision, and says what is wrong."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbn
from fastbn.ops import dispatch
from fastbn.ops.activations import PIECEWISE_LINEAR
from fastbn.testing import tolerance
from tests.fuzz import exact
from tests.fuzz.case import BUFFERS, OPERANDS, Case, Values
from tests.fuzz.hooks import hooks

MODULES = {2: 1, 3: 1, 4: 2, 5: 3}
# Accepted ulps at the result's scale; and the multiple of the result's ulp at which a bound means cancellation.
ULPS = 8
CANCELLING = 1000
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Fault:
    """A fault. `kind` is the same for faults that probably have one cause."""

    kind: str
    message: str


@dataclass
class Report:
    """The outcome of a case, "agreed" or "refused by both" (without faults), and the faults."""

    outcome: str
    faults: list[Fault] = field(default_factory=list)


class FaultyCase(AssertionError):
    pass


def check(case: Case) -> str:
    """Return the outcome of a case. Raises FaultyCase if there are faults."""
    report = examine(case)
    if report.faults:
        raise FaultyCase("\n".join(f"{fault.kind}: {fault.message}" for fault in report.faults))
    return report.outcome


def examine(case: Case) -> Report:
    threads = torch.get_num_threads()
    try:
        with np.errstate(all="ignore"):
            return _Examination(case).run()
    finally:
        torch.set_num_threads(threads)


def _activate(z: Tensor, activation: str | None, param: float | None) -> Tensor:
    if activation in (None, "none"):
        return z
    return getattr(F, activation)(z, *(() if param is None else (param,)))


def _module(case: Case, tensors: SimpleNamespace, package, **options) -> nn.Module:
    dim = MODULES.get(len(case.shape), 1)
    if case.oddity == "other dimension":
        dim = dim % 3 + 1
    kind = getattr(package, f"BatchNorm{dim}d")
    tracks = case.running is not None
    module = kind(
        case.channels, eps=case.eps, momentum=case.momentum, affine=False, track_running_stats=tracks, **options
    )
    for name in ("weight", "bias"):
        tensor = getattr(tensors, name)
        if tensor is not None:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=tensor.requires_grad)
            setattr(tensors, name, module._parameters[name])
    if tracks:
        for name in BUFFERS:
            module._buffers[name] = getattr(tensors, name)
    return module.train(case.training)


def _fast(case: Case, t: SimpleNamespace) -> Tensor:
    residual = () if t.residual is None else (t.residual,)
    if case.api == "module":
        return _module(case, t, fastbn, activation=case.activation, activation_param=case.activation_param)(
            t.input, *residual
        )
    return fastbn.functional.batch_norm(
        t.input,
        t.running_mean,
        t.running_var,
        t.weight,
        t.bias,
        case.training,
        case.momentum,
        case.eps,
        residual=t.residual,
        activation=case.activation,
        activation_param=case.activation_param,
        num_batches_tracked=t.num_batches_tracked,
        backend=case.backend,
    )


def _stock(case: Case, t: SimpleNamespace) -> Tensor:
    if case.api == "module":
        y = _module(case, t, nn)(t.input)
    else:
        factor = case.momentum
        if factor is None:
            factor = 1.0 / (t.num_batches_tracked.item() + 1) if t.num_batches_tracked is not None else 0.0
        y = F.batch_norm(t.input, t.running_mean, t.running_var, t.weight, t.bias, case.training, factor, case.eps)
        if case.training and t.num_batches_tracked is not None:
            t.num_batches_tracked.add_(1)
    return _activate(y if t.residual is None else y + t.residual, case.activation, case.activation_param)


@dataclass
class _Results:
    """The results of one run. `error` was raised in the stage ("forward", "backward"), after those that are there."""

    tensors: SimpleNamespace
    output: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    again: dict[str, Tensor] = field(default_factory=dict)  # of a second backward over the same graph
    second: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None
    stage: str = "forward"

    def named(self) -> dict[str, Tensor]:
        """Return everything that a user sees, by name."""
        found = {} if self.output is None else {"output": self.output.detach()}
        found |= {name: t.detach() for name in BUFFERS if (t := getattr(self.tensors, name)) is not None}
        found |= {f"gradient of {name}": t.detach() for name, t in self.gradients.items()}
        return found | {f"second derivative in {name}": t for name, t in self.second.items()}


def _bits(t: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.view(integers[t.element_size()])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Return whether values are equal, except for the sign of zeros and the kind of NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\nException raised")[0]


class _Examination:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.activation = case.activation or "none"
        self.values = Values(case)
        self.faults: list[Fault] = []
        self.batch_stats = case.training or (case.api == "module" and case.running is None)

    def fault(self, check: str, what: str, message: str) -> None:
        self.faults.append(Fault(f"{check}: {what}{', with a hook' if self.case.hook else ''}", message))

    def run(self) -> Report:
        case = self.case
        self._analyse()
        fast = self._execute(_fast, case.threads[0], case.hook)
        self._check_operands(fast)
        for name, gradient in fast.again.items():
            if not _same_bits(fast.gradients[name], gradient):
                self.fault("second backward", f"gradient of {name}", "differs from the first")
        self.torchs = self._is_torchs(fast.tensors)
        # torch's sums depend on the number of threads, and its NaNs on strides, which a hook may change.
        threads, hook = (case.threads[0], case.hook) if self.torchs else (1, None)
        stock = self._execute(_stock, threads, hook)
        if self._check_errors(fast, stock):
            return Report("refused by both" if stock.error is not None else "refused", self.faults)
        self._check_metadata(fast, stock)
        self._check_numbers(fast, stock)
        if self.torchs:
            return Report("left to torch", self.faults)
        # The sums of the reference are torch's, which depend on the number of threads.
        threads = case.threads[0 if case.backend == "reference" else 1]
        again = self._execute(_fast, threads, case.hook)
        for name, tensor in fast.named().items():
            other = again.named().get(name)
            if other is None or not _same_bits(tensor, other):
                self.fault("not reproducible", name, f"differs between runs with {case.threads} threads")
        return Report("agreed", self.faults)

    def _residual_is_wrong(self) -> bool:
        return self.values.residual is not None and self.case.oddity in ("residual shape", "residual dtype")

    def _is_torchs(self, t: SimpleNamespace) -> bool:
        """Return whether fastbn leaves the call to torch."""
        counter = t.num_batches_tracked if self.case.training else None
        if self.case.api == "module" and self.case.running is None:
            counter = None
        operands = t.input, None, t.weight, t.bias, t.running_mean, t.running_var, counter
        call = dispatch.Call(*operands, self.case.momentum, self.case.eps, 0, self.batch_stats)
        return dispatch.why_unsupported(call) is not None

    def _analyse(self) -> None:
        """Compute the exact results, if the case has any, and zero grad_out at kinks."""
        case, tensors = self.case, self.values.tensors()
        self.exact = None
        x = tensors.input
        sizes = {t.shape for n in ("weight", "bias", *BUFFERS[:2]) if (t := getattr(tensors, n)) is not None}
        if x.dtype not in DTYPES or x.dim() < 2 or x.shape[1] == 0 or sizes - {(x.shape[1],)}:
            return
        if case.activation == "selu" or self._residual_is_wrong():
            return
        if not self.batch_stats and (tensors.running_mean is None or tensors.running_var is None):
            return
        precision = np.longdouble if x.dtype == torch.float64 else np.float64
        with torch.no_grad():
            self.operands = {
                name: None if (t := getattr(tensors, name)) is None else t.double().numpy().astype(precision)
                for name in (*OPERANDS, *BUFFERS, "grad_out")
            }
        w = self.operands
        running = None if self.batch_stats else (w["running_mean"], w["running_var"])
        self.exact = exact.forward(
            w["input"], w["residual"], w["weight"], w["bias"], running, case.eps, self.activation, case.activation_param
        )
        self.count = max(x.numel() // x.shape[1], 1)
        self._scales(w)
        self._take_out_kinks(tensors)
        self.exact_backward = exact.backward(
            self.operands["grad_out"],
            self.exact,
            w["weight"],
            self.batch_stats,
            self.activation,
            self.case.activation_param,
        )

    def _scales(self, w: dict) -> None:
        """Compute the magnitude in each channel of the terms of z."""
        self.xhat_scale = _largest(self.exact.xhat)
        scale = self.xhat_scale if w["weight"] is None else self.xhat_scale * _magnitude(w["weight"])
        scale = scale if w["bias"] is None else scale + _magnitude(w["bias"])
        self.z_scale = scale if w["residual"] is None else scale + _largest(w["residual"])
        self.steepness = torch.from_numpy(
            np.nan_to_num(np.abs(self.exact.mean * self.exact.inv_std).astype(np.float64), nan=0.0)
        )

    def _take_out_kinks(self, tensors: SimpleNamespace) -> None:
        z = self.exact.z
        near = np.zeros(z.shape, bool)
        dtype = torch.float64 if tensors.input.dtype == torch.float64 else torch.float32
        margin = 4 * tolerance.forward_tolerance(dtype, self.count, self.z_scale, self.steepness)
        margin = exact.wide(z, margin.numpy())
        for kink in exact.kinks(self.activation, self.case.activation_param):
            near |= (np.abs(z - kink) <= margin) & (margin > 1e-300)
        if not near.any():
            return
        self.values.grad_out = torch.where(torch.from_numpy(near), 0.0, tensors.grad_out)
        self.operands["grad_out"] = np.where(near, 0, self.operands["grad_out"])
        if self.case.grad_layout.expanded:
            self.dense_grad = True

    def _execute(self, call, threads: int, hook: str | None) -> _Results:
        case = self.case
        torch.set_num_threads(threads)
        tensors = self.values.tensors()
        if getattr(self, "dense_grad", False):
            tensors.grad_out = self.values.grad_out.clone()
        results = _Results(tensors)
        modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
        wanted = {n: t for n in OPERANDS if (t := getattr(tensors, n)) is not None and t.requires_grad}
        try:
            with hooks(hook), modes.get(case.grad_mode, contextlib.nullcontext)():
                results.output = call(case, tensors)
            wanted = {name: getattr(tensors, name) for name in wanted}  # a module makes parameters of them
            results.stage = "backward"
            if wanted and case.backward != "none" and results.output.requires_grad:
                self._differentiate(results, wanted)
        except Exception as error:
            results.error = error
        return results

    def _differentiate(self, results: _Results, wanted: dict[str, Tensor]) -> None:
        grad_out, operands = results.tensors.grad_out, list(wanted.values())
        create = self.case.backward == "create graph"
        if create:
            grad_out.requires_grad_()
        retain = self.case.backward != "once"
        grads = torch.autograd.grad(results.output, operands, grad_out, retain_graph=retain, create_graph=create)
        results.gradients = dict(zip(wanted, grads, strict=True))
        if self.case.backward == "twice":
            again = torch.autograd.grad(results.output, operands, grad_out)
            results.again = dict(zip(wanted, again, strict=True))
        if create:
            # The coefficients are independent of the gradients, which may be huge.
            value = sum((g * torch.arange(g.numel()).view(g.shape).cos()).sum() for g in grads if g.requires_grad)
            wanted = wanted | {"grad_out": grad_out}
            second = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
            results.second = {n: g for n, g in zip(wanted, second, strict=True) if g is not None}

    def _check_operands(self, fast: _Results) -> None:
        """Check that inputs and the versions of the statistics are unchanged, and after an error all buffers."""
        before = self.values.tensors()
        names = [*OPERANDS, "grad_out"]
        if fast.error is not None and fast.stage == "forward":
            names += BUFFERS
        elif not self.case.training:
            names += BUFFERS
        for name in names:
            a, b = getattr(fast.tensors, name), getattr(before, name)
            if name == "grad_out" and getattr(self, "dense_grad", False):
                b = self.values.grad_out
            if a is not None and not _same_bits(a.detach(), b.detach()):
                self.fault("changed", name, "was changed" + (" and then an error raised" if fast.error else ""))
        for name in (*OPERANDS, "running_mean", "running_var"):
            a = getattr(fast.tensors, name)
            b = getattr(before, name)
            if a is not None and not a.is_inference() and a._version != b._version:
                self.fault("version", name, f"_version moved from {b._version} to {a._version}")

    def _check_errors(self, fast: _Results, stock: _Results) -> bool:
        """Return whether one of the two refused, so that nothing is compared. Both should, in the same words."""
        case, error = self.case, fast.error
        expected = None if stock.error is None else _error_text(stock.error)
        stage, stocks = stock.stage, expected or "\0"
        named = case.backend is not None and case.api == "functional"
        if self._residual_is_wrong():
            expected, stage = f"ValueError: batch_norm: expected residual of {case.oddity.split()[1]} ", "forward"
        if case.activation == "selu":
            expected, stage = "ValueError: activation: expected one of ", "forward"
        if named and error is not None and fast.stage == "forward" and "cannot take this call" in str(error):
            if not self._is_torchs(fast.tensors):
                self.fault("error", "backend", f"refused without a reason: {error}")
            return True
        if error is None and expected is None:
            return False
        if stock.stage == "backward" and case.backward == "create graph" and error is None:
            return True  # torch's double backward fails without a weight, for one
        if error is None:
            self.fault("no error", stage, f"expected {expected}")
        elif expected is None:
            self.fault("error", fast.stage, f"stock raises none, fastbn {_error_text(error)}")
        elif fast.stage != stage:
            self.fault("error", fast.stage, f"expected in {stage} {expected}, got {_error_text(error)}")
        elif stage == "forward" and not _error_text(error).startswith((expected, stocks)):
            self.fault("error text", stage, f"expected {expected}, got {_error_text(error)}")
        elif type(error).__name__ != expected.split(":")[0]:
            self.fault("error type", stage, f"expected {expected}, got {_error_text(error)}")
        return True

    def _check_metadata(self, fast: _Results, stock: _Results) -> None:
        if fast.output.requires_grad != stock.output.requires_grad:
            self.fault("requires_grad", "output", f"got {fast.output.requires_grad}")
        if fast.output.is_inference() != stock.output.is_inference():
            self.fault("is_inference", "output", f"got {fast.output.is_inference()}")
        expected = stock.named()
        for name, tensor in fast.named().items():
            other = expected.pop(name, None)
            if other is None:
                if not name.startswith("second"):  # torch's double backward leaves some out
                    self.fault("extra result", name, "stock has none")
            elif tensor.dtype != other.dtype or tensor.shape != other.shape:
                text = f"expected {other.dtype} {list(other.shape)}, got {tensor.dtype} {list(tensor.shape)}"
                self.fault("dtype or shape", name, text)
            elif name in ("output", "gradient of input"):
                self._check_format(name, tensor, other)
        for name, tensor in expected.items():
            if not name.startswith("second") or tensor.nan_to_num(0.0).any():  # zeros need not be there
                self.fault("missing result", name, "stock has it")

    def _check_format(self, name: str, tensor: Tensor, other: Tensor) -> None:
        """Check that the output has stock's order in memory, and output and gradient the format of the input."""
        input = self.values.tensors().input
        expected = torch._prims_common.suggest_memory_format(input)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
        if last and input.is_contiguous(memory_format=last) != input.is_contiguous():
            # Dense in one format, where torch's suggestion depends on strides of dimensions of size 1.
            expected = torch.contiguous_format if input.is_contiguous() else last
        if not tensor.numel():
            return
        if not (self.torchs or tensor.is_contiguous(memory_format=expected)):
            self.fault("memory format", name, f"expected {expected}, got {tensor.stride()} of {list(tensor.shape)}")
        if name != "output" or self.case.residual is not None or (self.case.oddity or "").startswith("strided"):
            # torch's gradient may be contiguous all the same, its addition has the format of either, and its output is
            # contiguous where a vector is not.
            return
        strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (tensor, other)]
        if strides[0] != strides[1]:
            self.fault("strides", name, f"expected {other.stride()}, got {tensor.stride()} of {list(tensor.shape)}")

    def _check_numbers(self, fast: _Results, stock: _Results) -> None:
        actual, rival = fast.named(), stock.named()
        # torch's own kernels take some strided vectors for contiguous ones, and read beside them.
        if self.torchs and (self.case.oddity or "").startswith("strided"):
            return
        if self.exact is None:
            for name, tensor in actual.items():
                if name in rival and not tensor.is_complex() and not _same_values(tensor, rival[name]):
                    self.fault("differs from stock", name, "where fastbn leaves the call to it")
            return
        expected = self._expected()
        for name, tensor in actual.items():
            if name not in rival or tensor.shape != rival[name].shape:
                continue
            if name == "num_batches_tracked":
                if not torch.equal(tensor, rival[name]):
                    self.fault("value", name, f"expected {rival[name]}, got {tensor}")
            elif name.startswith("second"):
                self._compare_second(name, tensor, rival[name])
            else:
                self._compare(name, tensor, rival[name], *expected[name])

    def _expected(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the exact results by name, each with its tolerance (broadcast)."""
        dtype, count, w = self.case.torch_dtype, self.count, self.operands
        fwd, bwd = self.exact, self.exact_backward
        expected = {}
        at_zero = float(abs(exact.activate(np.longdouble(0), self.activation, self.case.activation_param)))
        allowed = tolerance.forward_tolerance(dtype, count, self.z_scale, self.steepness, at_zero)
        expected["output"] = fwd.output, exact.wide(fwd.output, allowed.numpy())
        expected |= self._expected_buffers()

        largest = _largest(bwd.residual)
        element = tolerance.activation_tolerance(
            dtype, _largest(w["grad_out"]), self.z_scale if self.activation != "none" else torch.zeros(1)
        )
        # The rounding of the mean in float64, where |mean| is much larger than the standard deviation.
        rounding = 4 * torch.finfo(torch.float64).eps * self.steepness
        if self.activation != "none":
            element = element + rounding * _largest(w["grad_out"])
        grad_sum = torch.from_numpy(exact.channel_sum(np.abs(bwd.residual)).astype(np.float64))
        product_sum = torch.from_numpy(exact.channel_sum(np.abs(bwd.residual * fwd.xhat)).astype(np.float64))
        sum_off = tolerance.bias_gradient_tolerance(dtype, count, grad_sum, element)
        product_off = rounding * grad_sum + tolerance.weight_gradient_tolerance(
            dtype, count, grad_sum, product_sum, self.xhat_scale, element
        )
        slope = torch.from_numpy(fwd.inv_std.astype(np.float64)).abs()
        if w["weight"] is not None:
            slope = slope * _magnitude(w["weight"])
        terms = tolerance.input_gradient_terms(largest, self.xhat_scale, self.batch_stats)
        # The largest term in channels without inf and NaN.
        self.largest_term = max(t.nan_to_num(posinf=0.0).max().item() for t in (terms * slope, grad_sum, product_sum))
        computed = rounding * terms * slope + tolerance.input_gradient_tolerance(
            dtype, count, terms, slope, self.xhat_scale, element, self.batch_stats
        )
        # Subnormal terms are rounded by half of the smallest number each and then scaled.
        info = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        smallest = info.smallest_normal * info.eps
        rounded = tolerance.ELEMENT_ROUNDINGS / 2 * smallest
        computed = computed + rounded * slope.nan_to_num(posinf=1.0).clamp(min=1)
        if self.activation != "none":  # so are those of the parameters' gradients, of which x-hat scales one
            xhat_sum = torch.from_numpy(exact.channel_sum(np.abs(fwd.xhat)).astype(np.float64))
            sum_off, product_off = sum_off + rounded * count, product_off + rounded * xhat_sum.nan_to_num(posinf=0.0)
        if self.batch_stats:  # and so is the coefficient of x - mean
            deviation = self.xhat_scale / torch.from_numpy(fwd.inv_std.astype(np.float64)).abs()
            computed = computed + smallest / 2 * deviation.nan_to_num(posinf=0.0)
        input_off = computed + tolerance.ulp(dtype, _largest(bwd.input))
        if dtype == torch.float64 and self.batch_stats:
            # The coefficient of x - mean has one more factor inv_std than the gradient, and float64 has no wider type.
            coefficient = slope * torch.from_numpy(fwd.inv_std.astype(np.float64)).abs() * product_sum / count
            lost = (coefficient < info.smallest_normal) & (product_sum > 0)
            input_off = torch.where(lost, 2 * terms * slope, input_off)
        residual_off = element + tolerance.ulp(dtype, 1.5 * largest)
        for name, off in (("input", input_off), ("residual", residual_off)):
            gradient = getattr(bwd, name)
            expected[f"gradient of {name}"] = gradient, exact.wide(gradient, off.numpy())
        for name, off in (("weight", product_off), ("bias", sum_off)):
            gradient = getattr(bwd, name)
            off = off + tolerance.ulp(self.values.param_dtype, _magnitude(gradient))
            expected[f"gradient of {name}"] = gradient, off.numpy()
        return expected

    def _expected_buffers(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        case, w, fwd, count = self.case, self.operands, self.exact, self.count
        if not case.training or w["input"].size == 0:
            return {name: (w[name], np.zeros(1)) for name in BUFFERS[:2] if w[name] is not None}
        factor = case.momentum or 0.0
        if case.momentum is None and w["num_batches_tracked"] is not None:
            factor = 1 / (w["num_batches_tracked"] + 1)
        bessel = fwd.var.dtype.type(count) / (count - 1) if count > 1 else np.nan
        mean, var = (_magnitude(t) for t in (fwd.mean, fwd.var))
        deviation = _largest(w["input"] - exact.wide(w["input"], fwd.mean))
        allowed = (
            tolerance.mean_tolerance(case.torch_dtype, count, deviation, mean),
            tolerance.variance_tolerance(case.torch_dtype, count, var, mean) * float(bessel),
        )
        expected = {}
        for name, batch, off in zip(BUFFERS, (fwd.mean, fwd.var * bessel), allowed):
            if w[name] is None:
                continue
            value = (1 - factor) * w[name] + factor * batch
            off = abs(float(factor)) * off + tolerance.ulp(self.values.param_dtype, _magnitude(value))
            terms = _magnitude(np.abs((1 - factor) * w[name]) + np.abs(factor * batch))
            expected[name] = value, (off + 2 * tolerance.ulp(torch.float64, terms)).numpy()
        return expected

    def _compare(self, name: str, actual: Tensor, stock: Tensor, right: np.ndarray, allowed: np.ndarray) -> None:
        """Check that the error is within `allowed`, or at most stock's largest in the channel."""
        info = torch.finfo(actual.dtype)
        a, s = (t.double().numpy() for t in (actual, stock))
        error, stock_error = (np.abs(t - right) for t in (a, s))
        finite, stock_finite, exact_finite = np.isfinite(a), np.isfinite(s), np.isfinite(right)
        excuse = np.where(stock_finite & exact_finite, stock_error, 0)
        if excuse.ndim > 1 and excuse.size:
            others = tuple(d for d in range(excuse.ndim) if d != 1)
            excuse = excuse.max(axis=others, keepdims=True)
        allowed = np.where(np.isnan(allowed), np.inf, allowed)
        if actual.dtype == torch.bfloat16:  # an instruction of AVX-512 BF16 rounds subnormal numbers to 0
            allowed = allowed + info.tiny
        limit = np.broadcast_to(np.maximum(allowed, excuse), right.shape)
        if self.torchs:
            limit = 16 * limit  # its sums depend on the number of threads
        overflows = exact_finite & (np.abs(right) + limit >= float(info.max))
        wrong = finite & exact_finite & ~(error <= limit)
        if wrong.any():
            at = np.unravel_index(np.argmax(np.where(wrong, error / limit, 0)), right.shape)
            self.fault(
                "inexact",
                name,
                f"at {[int(i) for i in at]}: got {a[at]:.9g}, exact {right[at]:.17g}, stock {s[at]:.9g}, "
                f"error {error[at]:.3g}, allowed {limit[at]:.3g}",
            )
        self._compare_with_stock(name, actual.dtype, error, stock_error, right, allowed)
        lost = ~finite & exact_finite & stock_finite & ~overflows & ~self._terms_overflow(name)
        invented = finite & ~exact_finite & ~stock_finite
        both = ~finite & ~stock_finite & ~exact_finite
        # The kind of value that is not finite, where stock and exact arithmetic agree.
        kind = both & (_kind(s) == _kind(right)) & (_kind(a) != _kind(s))
        for check, places in (("not finite", lost), ("finite", invented), ("inf or NaN", kind)):
            # Only outputs have to match in the kind.
            if places.any() and (check != "inf or NaN" or name == "output"):
                at = np.unravel_index(np.argmax(places), right.shape)
                text = f"at {[int(i) for i in at]}: got {a[at]}, stock {s[at]}, exact {right[at]:.9g}"
                self.fault(check, name, f"{text}, and {int(places.sum())} of {places.size} like it")

    def _terms_overflow(self, name: str) -> bool:
        """Return whether a gradient has terms beyond the type that elements are computed in, though it is finite
        itself.
        """
        if not name.startswith("gradient"):
            return False
        info = torch.finfo(torch.float64 if self.case.torch_dtype == torch.float64 else torch.float32)
        return self.largest_term > info.max / 4

    def _compare_with_stock(self, name: str, dtype: torch.dtype, error, stock_error, right, allowed) -> None:
        """Check the acceptance criterion over the tensor: an error of at most stock's, or ULPS at the result's scale.

        It does not apply where terms cancel so far that their bound is many times the result's spacing: which of two
        computations comes closer is then chance. In float64 the rounding of the mean is |mean| / std spacings of xhat,
        which is chance too.
        """
        known = np.isfinite(right) & np.isfinite(error) & np.isfinite(stock_error)
        if self.torchs or not known.any():
            return
        scale = np.abs(right[known]).max()
        if dtype == torch.bfloat16 and scale < 256 * torch.finfo(dtype).tiny:
            return  # terms are rounded to 0, as above
        spacing = float(tolerance.ulp(dtype, float(scale)))
        if not np.broadcast_to(allowed, right.shape)[known].max() <= CANCELLING * spacing:
            return
        ours, theirs = error[known].max() / spacing, stock_error[known].max() / spacing
        if ours > max(theirs, ULPS + (2 * self.steepness.max().item() if dtype == torch.float64 else 0)):
            self.fault("worse than stock", name, f"error {ours:.3g} ulp at {scale:.3g}, stock's {theirs:.3g} ulp")

    def _compare_second(self, name: str, actual: Tensor, stock: Tensor) -> None:
        """Compare finite second derivatives, relative to the tensor's largest, since each order multiplies terms that
        cancel.
        """
        tame = {"normal", "integers"}  # about a far mean, what cancels is many times the result
        case = self.case
        kinds = {*case.data, case.grad_out, *([case.residual] if case.residual else [])}
        if (
            "nan" in (case.weight, case.bias)
            or not kinds <= tame
            or case.eps < 1e-6
            or self.count < 4
            or case.running not in (None, "near", "initial")
        ):
            return
        scale = stock.abs().max().item() if stock.numel() else 0.0
        if not np.isfinite(scale):
            return
        # torch's leaves out the gradient of bias in that of the output's, which an activation's curvature leads to z.
        reaches = name.endswith("grad_out") or case.activation not in {None, "none", *PIECEWISE_LINEAR}
        if reaches and "bias" in case.requires and (case.weight is None or "weight" not in case.requires):
            return
        error = (actual - stock).abs().max().item() if stock.numel() else 0.0
        if not error <= 1e-6 * scale + 1e-9:
            self.fault("second derivative", name, f"differs from stock's by {error:.3g} of {scale:.3g}")


def _largest(x: np.ndarray) -> Tensor:
    """Return the largest finite magnitude in each channel, float64 [C]."""
    if x.size == 0:
        return torch.zeros(x.shape[1], dtype=torch.float64)
    finite = np.where(np.isfinite(x), np.abs(x), 0).astype(np.float64)
    return torch.from_numpy(np.moveaxis(finite, 1, 0).reshape(x.shape[1], -1).max(axis=1))


def _magnitude(vector: np.ndarray) -> Tensor:
    return torch.from_numpy(np.where(np.isfinite(vector), np.abs(vector), 0).astype(np.float64))


def _kind(x: np.ndarray) -> np.ndarray:
    """Return NaN, inf or -inf as small integers."""
    return np.where(np.isnan(x), 2, np.sign(np.where(np.isnan(x), 0, x))).astype(np.int8)
