"""Makes torchvision importable beside a CPU build of torch.

torchvision's wheels on the package registry are compiled against a CUDA torch. Beside a CPU-only torch their
native library cannot be loaded (it needs libc10_cuda.so); torchvision tolerates that, but then registers shape rules
for two of the library's operators, `nms` and `qnms`, which were never defined, and the import ends in
"operator torchvision::nms does not exist". timm imports torchvision, so without help neither can be used.

In exactly that case the two operators are declared here, without an implementation. Transforms, models and every
operator written in Python then work; `nms` and torchvision's native image decoders stay unavailable, and nothing in
this project uses them. With a matching pair of builds this module does nothing.
"""

import importlib.util
import warnings
from pathlib import Path

import torch

# Operators live as long as the library object that declared them.
_declared: list[torch.library.Library] = []


def make_torchvision_importable() -> None:
    """Declares torchvision's missing operators if its native library cannot be loaded; safe to call repeatedly."""
    if _declared or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for native_library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(native_library))
        except OSError:
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    with warnings.catch_warnings():
        # It warns that its image decoders cannot be loaded; we decode with Pillow.
        warnings.simplefilter("ignore")
        importlib.import_module("torchvision")
