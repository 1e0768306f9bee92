"""The plan that fastbn's planner chooses for a case on an H200, which need not be here."""

from __future__ import annotations

from bench.model.measurements import Case

# What the model needs to know of a plan, as _C.plan names it; of a stream plan it needs all of them.
KEYS = ("kernel", "groups", "splits", "channels_per_tile", "tensor_reads", "tensor_writes")
STREAM_KEYS = ("tiles", "ahead", "chunks", "chunk_bytes", "chunks_per_tile", "tensors")
DEVICE = "h200"


def is_stream(plan: dict[str, object]) -> bool:
    return str(plan["kernel"]).startswith("stream")


def planned(case: Case) -> dict[str, object]:
    """Return the planner's choice. Raises KeyError if this build of fastbn does not tell what the model needs."""
    import torch

    from fastbn import _C
    from fastbn.ops import activations, contract

    sizes = [case.outer, case.channels] + ([case.inner] if case.inner > 1 else [])
    tensor = torch.empty(sizes, dtype=getattr(torch, case.dtype), device="meta")
    plan = _C.plan(
        sizes=sizes,
        strides=list(tensor.stride()),
        dtype=contract.DTYPES.index(tensor.dtype),
        direction=case.direction,
        activation=activations.index(None if case.epilogue == "none" else "relu"),
        residual=case.epilogue == "add_relu",
        aligned=True,
        limits=_C.named_device(DEVICE),
    )
    missing = [key for key in KEYS + (STREAM_KEYS if is_stream(plan) else ()) if key not in plan]
    if missing:
        raise KeyError(f"_C.plan: expected {', '.join(missing)} of a plan of {plan['kernel']}")
    return plan
