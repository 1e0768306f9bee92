"""examples/resnet.py runs from end to end, and its checks can fail."""

import pytest
import torch

from examples import resnet
from tests.packages import needs

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@needs("torchvision", "onnx", "onnxscript")
def test_all_steps(capsys):
    resnet.main(["--model", "resnet18", "--size", "64", "--backend", "aot_eager"])
    printed = capsys.readouterr().out
    assert "20 layers: 17 fused, 3 converted, 0 left" in printed
    for step in (
        "a training step",
        "one graph",
        "checkpoints",
        "0 layers left",
        "scripted",
        "ONNX",
        "int8",
        "reverted",
    ):
        assert step in printed


def test_a_step_that_differs_ends_the_program():
    with pytest.raises(ValueError, match="a step: expected an error of at most 0.001, got 0.5"):
        resnet.check("a step", torch.tensor([2.0, 1.0]), torch.tensor([2.0, 2.0]))
