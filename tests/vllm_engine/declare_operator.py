"""Put into the virtual environment of `make test-vllm`: see `install.sh`."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _Declare(MetaPathFinder):
    """Declares torchvision's operators before torchvision is imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torchvision":
            import torch  # not at every start of Python

            sys.meta_path.remove(self)
            self.kept = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                self.kept.define(
                    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            torch._torchvision_operators = self  # type: ignore[attr-defined]


sys.meta_path.insert(0, _Declare())
