"""fastbn.testing.assert_parity: torch's and fastbn's BatchNorm pass on the table of cases; each mistake is named."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbn
from fastbn.testing import PARITY_CASES, ParityCase, assert_parity, extended, parity, parity_cases
from tests.stock import FAST, STOCK

ROOT = Path(__file__).resolve().parents[2]
# The fast tier has one case of this number, which has no factor in common with the periods of the table.
SAMPLE = 13
DIMS = {"bn1d": 1, "bn2d": 2, "bn3d": 3}


def sampled(cases):
    marked = enumerate(cases)
    return [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (i % SAMPLE != 0)) for i, case in marked]


def dim_of(case):
    (tag,) = case.tags & DIMS.keys()
    return DIMS[tag]


@pytest.mark.parametrize("case", sampled(PARITY_CASES))
def test_torch_and_fastbn_pass(case):
    if reason := parity.why_not_measurable(case):
        pytest.skip(reason)
    for subject in (F.batch_norm, STOCK[dim_of(case)], fastbn.functional.batch_norm, FAST[dim_of(case)]):
        assert_parity(subject, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", sampled(PARITY_CASES))
def test_torch_and_fastbn_pass_on_a_gpu(case):
    assert_parity(FAST[dim_of(case)], case, "cuda")
    if "unaligned" not in case.tags:  # which cuDNN reads as if it were aligned
        assert_parity(STOCK[dim_of(case)], case, "cuda")


def test_names_and_tags():
    assert len({str(case) for case in PARITY_CASES}) == len(PARITY_CASES) > 500
    assert str(PARITY_CASES[0]) == "prime-7x13-f32-train"
    chosen = parity_cases("small", "half", "channels_last", "bn2d", without=("eval", "no_affine"))
    assert chosen and all(case.dtype.itemsize == 2 and case.layout.endswith("channels_last") for case in chosen)
    assert all(case.training and case.affine and len(case.shape) == 4 for case in chosen)
    assert {case.data for case in parity_cases("numerics")} == {"offset", "constant"}
    assert {case.data for case in parity_cases("nonfinite")} == {"inf", "nan"}
    assert all(0 in case.shape for case in parity_cases("empty"))
    assert {case.momentum for case in parity_cases("momentum")} == {None, 1.0}
    assert all(case.parameter_dtype == torch.bfloat16 for case in parity_cases("half_parameters"))
    assert all(parity_cases(tag) for tag in parity.TAGS)


def test_the_page_names_every_tag_and_the_numbers_of_cases():
    page = (ROOT / "docs" / "parity.md").read_text()
    assert [tag for tag in parity.TAGS if f"`{tag}`" not in page] == []
    assert f"from {len(PARITY_CASES)} cases" in page
    assert f"passes its {len(parity_cases('small', 'bn2d'))} cases" in page
    of_float64 = len(parity_cases("float64"))
    assert f"{len(PARITY_CASES) - of_float64} cases of float32" in page and f"the {of_float64} of float64" in page


@pytest.mark.parametrize(
    "tags, message",
    [
        (("tiny",), "parity_cases: expected tags of bfloat16, .*, got 'tiny'"),
        (("train", "eval"), "parity_cases: expected tags that some case has"),
    ],
    ids=["unknown", "none"],
)
def test_tags_that_no_case_has(tags, message):
    with pytest.raises(ValueError, match=message):
        parity_cases(*tags)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shape": (4, 3), "dtype": torch.int32}, "expected a dtype of torch.float32"),
        ({"shape": (4, 3), "layout": "blocked"}, "expected a layout of contiguous, .*, got 'blocked'"),
        ({"shape": (4, 3), "data": "zeros"}, "expected a data of normal, .*, got 'zeros'"),
        ({"shape": (1, 3)}, "expected more than one value per channel in training"),
    ],
    ids=["dtype", "layout", "data", "one_value"],
)
def test_cases_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ParityCase(**options)


def _last_element_off(output):
    grown = output.clone()
    with torch.no_grad():
        grown.flatten()[-1] += 0.125
    return grown


def _of_output(change):
    return lambda *args: change(F.batch_norm(*args))


def _unmoved(x, mean, var, *rest):
    return F.batch_norm(x, mean.clone(), var.clone(), *rest)


def _biased(x, mean, var, weight, bias, training, momentum, eps):
    before, count = var.clone(), x.numel() // x.shape[1]
    output = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    var.data.copy_((1 - momentum) * before + (var - (1 - momentum) * before) * (count - 1) / count)
    return output


def _constant_statistics(x, mean, var, weight, bias, training, momentum, eps):
    """Forget that the statistics depend on the input."""
    F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        batch_var, batch_mean = torch.var_mean(x, [0, 2, 3], correction=0)
    return F.batch_norm(x, batch_mean, batch_var, weight, bias, False, momentum, eps)


def _one_sweep(x, mean, var, weight, bias, training, momentum, eps):
    F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    batch_mean, square = x.mean([0, 2, 3]), (x * x).mean([0, 2, 3])
    wide = (1, -1, 1, 1)
    inv_std = ((square - batch_mean**2).clamp(min=0) + eps).rsqrt()
    return (x - batch_mean.view(wide)) * (inv_std * weight).view(wide) + bias.view(wide)


def _doubled_weight_gradient(x, mean, var, weight, bias, *rest):
    return F.batch_norm(x, mean, var, 2 * weight - weight.detach(), bias, *rest)


def _changes_input(x, *rest):
    output = F.batch_norm(x, *rest)
    x.data[0, 0] = 0  # as a kernel does, without a word to autograd
    return output


class _Contiguous(torch.autograd.Function):
    """The identity, whose gradient is contiguous."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


CASE = ParityCase((6, 5, 4, 3))
CHANNELS_LAST = ParityCase((6, 5, 4, 3), layout="channels_last")
INFINITE, NOT_A_NUMBER = (ParityCase((3, 5, 4, 4), data=data, training=False) for data in ("inf", "nan"))
STEEP = ParityCase((4, 7, 9, 9), data="offset")
MISTAKES = {
    "output": (_of_output(_last_element_off), CASE, r"output at \(5, 4, 3, 2\): expected an error of at most "),
    "scale": (_of_output(lambda y: y * (1 + 2**-18)), CASE, r"output at .*\n  grad_input at .*\n  grad_weight at "),
    "nan": (_of_output(lambda y: torch.where(y == y.max(), torch.nan, y)), CASE, "output at .* got inf: got nan, "),
    "shape": (_of_output(lambda y: y[1:]), CASE, r"output: expected shape \[6, 5, 4, 3\], got \[5, 5, 4, 3\]"),
    "dtype": (_of_output(lambda y: y.double()), CASE, "output: expected torch.float32, got torch.float64"),
    "unmoved": (_unmoved, CASE, r"running_mean at \(\d,\): .*\n  running_var at "),
    "biased": (_biased, CASE, r"cpu:\n  running_var at \(\d,\): expected .* exact [\d.]+, an ulp is [\d.e-]+$"),
    "gradient": (_constant_statistics, CASE, r"cpu:\n  grad_input at \(\d, \d, \d, \d\)"),
    "weight": (_doubled_weight_gradient, CASE, r"cpu:\n  grad_weight at \(\d,\): "),
    "one_sweep": (_one_sweep, STEEP, r"output at .*expected an error of at most .* got \d\.\d+e\+07: "),
    "input": (_changes_input, CASE, "input: expected to be left as it was"),
    "output_format": (_of_output(torch.Tensor.contiguous), CHANNELS_LAST, r"output: expected torch.channels_last, got"),
    "grad_format": (lambda x, *rest: F.batch_norm(_Contiguous.apply(x), *rest), CHANNELS_LAST,
                    r"grad_input: expected torch.channels_last, got strides \(60, 12, 3, 1\)"),
    "no_grad_bias": (lambda x, m, v, w, b, *rest: F.batch_norm(x, m, v, w, b.detach(), *rest), CASE,
                     "grad_bias: expected a gradient, got none"),
    "nan_for_inf": (_of_output(lambda y: torch.where(y.isinf(), torch.nan, y)), INFINITE, "output at .* got inf: "),
    "sign_of_inf": (_of_output(lambda y: torch.where(y.isinf(), -y, y)), INFINITE, "output at .* got inf: "),
    "inf_for_nan": (_of_output(lambda y: torch.where(y.isnan(), torch.inf, y)), NOT_A_NUMBER, "output at .* got inf: "),
}  # fmt: skip


def _with_names(function):
    """Give a function of a table the signature by which functions are known."""

    def planted(input, running_mean, running_var, weight, bias, training, momentum, eps):
        return function(input, running_mean, running_var, weight, bias, training, momentum, eps)

    return planted


@pytest.mark.filterwarnings("ignore:.*lerp.*")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    function, case, message = MISTAKES[mistake]
    with pytest.raises(AssertionError, match=message) as failure:
        assert_parity(_with_names(function), case)
    if " at " in message or "running_var" in message:
        assert f"planted on {case}, cpu:" in str(failure.value)


@pytest.mark.parametrize("case", sampled(parity_cases("numerics")))
@pytest.mark.parametrize("change", [lambda y: y + 1000, lambda y: y * 0], ids=["shifted", "zero"])
def test_what_torch_errs_by_in_a_hard_channel_is_not_allowed_in_others(case, change):
    if reason := parity.why_not_measurable(case):
        pytest.skip(reason)
    with pytest.raises(AssertionError, match=r"\n  output at "):
        assert_parity(_with_names(_of_output(change)), case)


def test_the_channel_that_exceeds_its_own_bound_is_named():
    """Torch is right in the channel of zeros, and off by up to 1e8 ulp in that of 1e7."""
    flat = ParityCase((3, 8, 5, 5), data="constant")
    wrong = _of_output(lambda y: y + 0.01 * torch.eye(8)[1].view(1, -1, 1, 1))
    with pytest.raises(AssertionError, match=r"output at \(0, 1, 0, 0\): expected an error of at most 4.00 ulp"):
        assert_parity(_with_names(wrong), flat)


def test_nothing_is_left_to_assert_statements():
    """python -O removes them."""
    tree = ast.parse(Path(parity.__file__).read_text())
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


def test_one_sweep_is_right_where_the_mean_is_small():
    """The mistake is one of numerics, so that the case which finds it is what the table is for."""
    assert_parity(_with_names(_one_sweep), CASE)


class _Uncounted(nn.BatchNorm2d):
    def forward(self, input):
        output = super().forward(input)
        if self.training:
            self.num_batches_tracked -= 1
        return output


def test_a_counter_that_stands_still():
    with pytest.raises(AssertionError, match="_Uncounted on case.*\n  num_batches_tracked: expected 3, got 2$"):
        assert_parity(_Uncounted, CASE)
    assert_parity(_Uncounted, ParityCase((6, 5, 4, 3), training=False))


def test_what_a_subject_may_be():
    class WithoutCounter(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    assert_parity(WithoutCounter, CASE, counter=False)
    with pytest.raises(AssertionError, match="num_batches_tracked: expected one beside running statistics, unless"):
        assert_parity(WithoutCounter, CASE)
    assert_parity(lambda channels: nn.BatchNorm2d(channels), CASE)
    assert_parity(functools.partial(fastbn.BatchNorm2d, activation=None), CASE)
    with pytest.raises(TypeError, match="expected what makes a layer, or a function .* which returned a Tensor"):
        assert_parity(torch.ones, CASE)
    with pytest.raises(TypeError, match="expected what makes a layer, or a function .*, got 3"):
        assert_parity(3, CASE)
    with pytest.raises(AssertionError, match="weight: expected tensor"):
        assert_parity(functools.partial(nn.BatchNorm2d, affine=False), CASE)


def test_a_kernel_without_backward():
    with torch.no_grad():
        with pytest.raises(AssertionError, match="output: expected one with a gradient, unless gradients=False"):
            assert_parity(F.batch_norm, CASE)
        assert_parity(F.batch_norm, CASE, gradients=False)


@pytest.mark.parametrize("case", sampled([case for case in PARITY_CASES if case.dtype != torch.float64]))
def test_fastbn_passes_by_itself(case):
    """In float64 it does not in all cases, whose gradients would need a mean with more digits than float64 has."""
    assert_parity(fastbn.functional.batch_norm, case, beside_torch=False)


def test_torch_does_not_pass_by_itself():
    message = "output at .*: expected an error of at most 4.00 ulp, got [\\d.e+]+: "
    with pytest.raises(AssertionError, match=message):
        assert_parity(F.batch_norm, STEEP, beside_torch=False)
    with pytest.raises(AssertionError, match=r"output at \(0, 7, 0, 0\): expected an error of at most 4.00 ulp, got "):
        assert_parity(F.batch_norm, ParityCase((3, 8, 5, 5), data="constant"), beside_torch=False)


def test_float64_needs_a_longer_type(monkeypatch):
    monkeypatch.setattr(extended, "why_unavailable", lambda: "numpy is not installed")
    assert_parity(F.batch_norm, CASE)
    with pytest.raises(RuntimeError, match="cannot measure case-6x5x4x3-f64-train: numpy is not installed"):
        assert_parity(F.batch_norm, ParityCase((6, 5, 4, 3), torch.float64))


_FILE = """
import pytest, torch
from fastbn.testing import parity_cases

pytest_plugins = ["fastbn.testing.fixtures"]

def test_all(bn_case, assert_bn_parity):
    assert "small" in bn_case.tags
    assert_bn_parity(torch.nn.functional.batch_norm, bn_case)

@pytest.mark.parametrize("bn_case", parity_cases("half_parameters", "bn1d"), ids=str)
def test_some(bn_case, bn_device):
    assert bn_device.type == ("cuda" if torch.cuda.is_available() else "cpu")
"""


def test_fixtures(tmp_path):
    """The file has only fastbn and pytest to go by."""
    (tmp_path / "test_mine.py").write_text(_FILE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", "-k"]
    path = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "some or prime-7x13"], cwd=tmp_path, env=path, capture_output=True, text=True)
    selected = len([case for case in parity_cases("small") if str(case).startswith("prime-7x13-")])
    some = len(parity_cases("half_parameters", "bn1d"))
    left_out = len(parity_cases("small")) - selected
    assert f"{selected + some} passed, {left_out} deselected" in run.stdout, run.stdout
