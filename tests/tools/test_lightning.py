"""Lightning's Trainer(sync_batchnorm=True) on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.packages import needs


def test_the_plugin_of_the_page_is_the_one_that_is_tested():
    root = Path(__file__).resolve().parents[2]
    tested = (root / "tests" / "tools" / "lightning_model.py").read_text()
    start = tested.index("class FastSyncBatchNorm")
    assert tested[start : tested.index("\n\n\n", start)] in (root / "docs" / "tools.md").read_text()


@pytest.mark.slow
@needs("lightning")
@pytest.mark.filterwarnings("ignore")
def test_sync_batchnorm_on_a_cpu(tmp_path):
    """Two processes train as one with all samples, to rounding: both compute in float64 on numbers of about 1."""
    from lightning.pytorch import Trainer

    from tests.tools.lightning_model import STEPS, FastSyncBatchNorm, Model, samples

    model, alone = Model(), Model()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        sync_batchnorm=True,
        plugins=[FastSyncBatchNorm()],
        max_epochs=STEPS,
        default_root_dir=tmp_path,
        use_distributed_sampler=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    optimiser = alone.configure_optimizers()
    for _ in range(STEPS):
        optimiser.zero_grad()
        alone.loss(*samples()).backward()
        optimiser.step()
    for (name, ours), theirs in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
