"""Where the supported versions of torch, 2.11.0 to 2.15.0, differ in what bnext needs."""

from typing import Any

import torch
from torch.nn import init
from torch.nn.modules.batchnorm import _NormBase
from torch.torch_version import TorchVersion


class NormBase(_NormBase):
    """``_NormBase`` with ``bias=False``, of which that of torch 2.11 knows nothing."""

    def __init__(self, *args: Any, bias: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


# Before, dynamo took every compilation for an export.
_DYNAMO_TELLS_EXPORTS = TorchVersion(torch.__version__) >= "2.14"


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing; before torch 2.14 not with ``strict=True``."""
    return torch.compiler.is_exporting() and (
        _DYNAMO_TELLS_EXPORTS or not torch.compiler.is_dynamo_compiling()
    )
