"""Lets the host import torchvision and torchaudio beside a torch that has no CUDA build.

The released wheels of both are linked against CUDA torch and refuse to load next to a CPU one. Nothing numerical is
faked: torchvision only needs two operator schemas to exist at import, torchaudio only needs to hear that its compiled
extension is absent; whatever really needs native code still raises the library's own error. No installed file changes.
Active only for processes that have this folder on PYTHONPATH (tools/comfy.py puts it there).
"""
import sys
import types


def _torch_has_gpu_build() -> bool:
    import torch
    return torch.version.cuda is not None or getattr(torch.version, "hip", None) is not None


def _declare_torchvision_schemas() -> None:
    import torch
    if _torch_has_gpu_build():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declare_torchvision_schemas.library = library          # the schemas live as long as this object


def _declare_torchaudio_without_extension() -> None:
    if _torch_has_gpu_build():
        return
    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension._IS_ALIGN_AVAILABLE = False
    extension._check_cuda_version = lambda: None
    extension._load_lib = lambda *_: False

    def fail_if_no_align(function):
        def refuse(*_args, **_kwargs):
            raise RuntimeError("this torchaudio has no compiled forced-alignment extension")
        return refuse

    extension.fail_if_no_align = fail_if_no_align
    sys.modules["torchaudio._extension"] = extension


class _BeforeFirstImport:
    """A finder that finds nothing: it runs one preparation just before a module is imported for the first time."""

    def __init__(self, preparations):
        self.preparations = preparations

    def find_spec(self, name, path=None, target=None):
        prepare = self.preparations.pop(name, None)
        if prepare is not None:
            prepare()
        return None


sys.meta_path.insert(0, _BeforeFirstImport({
    "torchvision": _declare_torchvision_schemas,
    "torchaudio": _declare_torchaudio_without_extension,
}))
