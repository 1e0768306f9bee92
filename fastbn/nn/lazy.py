"""LazyBatchNorm1d, 2d and 3d take the number of channels from their first input and become fastbn's layers."""

from __future__ import annotations

from torch import Tensor, nn

from fastbn.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, FastBatchNorm


class _LazyBatchNorm(FastBatchNorm):
    """Common base of the three."""

    def initialize_parameters(self, input: Tensor, residual: Tensor | None = None) -> None:
        # torch's reads num_features, which a layer with an activation lets nobody do.
        activation = vars(self).pop("activation", None)
        try:
            super().initialize_parameters(input)  # type: ignore[misc]
        finally:
            if activation is not None:
                self.activation = activation


_DOC = """torch.nn.Lazy{name}: a fastbn.{name} without num_features, which its first input gives it.

    The other arguments are those of fastbn.{name}. The first call makes the layer a fastbn.{name}, as loading a
    state_dict and then calling it does.
    """


class LazyBatchNorm1d(_LazyBatchNorm, nn.LazyBatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d")
    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, nn.LazyBatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d")
    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, nn.LazyBatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d")
    cls_to_become = BatchNorm3d


# Until its first input a lazy layer has a hook, so that `fastbn.nn.epilogue.run` hands it nothing.
for _class in (LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d):
    _class._epilogue_owner = _class
