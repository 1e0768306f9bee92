"""The schemas of csrc/bindings/schemas.cpp are the only source of the contract: what repeats them is held to them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from fastbn.backends import reference
from fastbn.ops import contract

DESIGN = Path(__file__).resolve().parents[2] / "docs" / "design.md"


def _schema(op: str) -> torch._C.FunctionSchema:
    return getattr(torch.ops.fastbn, op).default._schema


@pytest.mark.parametrize("op", contract.OPS)
def test_the_reference_takes_what_the_schema_names(op):
    expected = [argument.name for argument in _schema(op).arguments]
    assert list(inspect.signature(getattr(reference, op)).parameters) == expected


def test_the_design_shows_the_schemas():
    blocks = re.findall(r"^```\n(batch_norm_train\(.*?)^```", DESIGN.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    shown = re.findall(r"^\w+\(.*?(?=^\w|\Z)", blocks[0], re.MULTILINE | re.DOTALL)
    source = (DESIGN.parents[1] / "csrc" / "bindings" / "schemas.cpp").read_text()
    defined = ["".join(re.findall(r'"(.*?)"', text)) for text in re.findall(r"m\.def\((.*?)\);", source, re.DOTALL)]
    assert [" ".join(schema.split()) for schema in shown] == defined


def test_every_op_of_the_library_is_listed():
    source = (DESIGN.parents[1] / "csrc" / "bindings" / "schemas.cpp").read_text()
    assert tuple(re.findall(r'm\.def\(\s*"(\w+)\(', source)) == contract.OPS


def test_a_fake_binds_arguments_by_name():
    x = torch.empty(2, 3, 4, device="meta")
    stats = torch.empty(3, dtype=torch.float64, device="meta")
    weight = torch.empty(3, device="meta", dtype=torch.float32)
    options = dict(residual=None, mask=None, bias=None, batch_stats=True, activation=1)
    needs = dict(need_input=False, need_weight=True, need_bias=False, need_residual=True)
    given = dict(grad_out=x, input=x, weight=weight, mean=stats, inv_std=stats, **options, **needs)
    grads = torch.ops.fastbn.batch_norm_backward(**dict(reversed(given.items())))
    assert [tuple(grad.shape) for grad in grads] == [(0,), (3,), (0,), (2, 3, 4)]


def test_a_result_without_a_fake_is_an_error():
    library = torch.library.Library("fastbn_test_schemas", "DEF")
    library.define("odd(Tensor input) -> Tensor surprise")
    with pytest.raises(KeyError, match="surprise"):
        contract._fake_of(torch.ops.fastbn_test_schemas.odd.default)
