"""Lets the host import torchvision and torchaudio beside a torch that has no CUDA build.

The released wheels of both are linked against CUDA torch and refuse to load next to a CPU one. Nothing numerical is
faked: torchvision only needs two operator schemas to exist at import, torchaudio only needs to hear that its compiled
extension is absent; whatever really needs native code still raises the library's own error. No installed file changes.
There, too, a VAE's convolutions and norms take the faster of two ways that torch has for them, the same but for rounding.
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


def _hasten_one_thread() -> None:
    """Run what a VAE does most of the time by kernels of torch that it does not choose itself for a CPU without gradients.

    conv3d in one thread is 1.3 to 3.6 times faster by oneDNN, which torch takes for two threads and more; a norm over
    channels as a sum of squares is 5 to 30 times faster than by torch's norm, which reads memory across its order.
    """
    import torch
    if _torch_has_gpu_build():
        return
    functional = torch.nn.functional
    conv3d, normalize = functional.conv3d, functional.normalize

    def is_plain(*tensors) -> bool:
        plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        return plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def each_way(values) -> list:
        return [values] * 3 if isinstance(values, int) else list(values)

    def faster_conv3d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        is_slow = input.ndim == 5 and not isinstance(padding, str) and torch.get_num_threads() == 1
        # what embeds patches is a transformer's, whose numbers shall be the same where it is trained
        is_patches = tuple(weight.shape[2:]) == tuple(each_way(stride))
        if not is_slow or is_patches or not is_plain(input, weight):
            return conv3d(input, weight, bias, stride, padding, dilation, groups)
        return torch.mkldnn_convolution(input, weight, bias, *map(each_way, (padding, stride, dilation)), groups)

    def faster_normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
        if p != 2 or dim != 1 or out is not None or input.ndim < 3 or not is_plain(input):
            return normalize(input, p, dim, eps, out)
        return input / input.square().sum(1, keepdim=True).sqrt_().clamp_min_(eps)

    functional.conv3d, functional.normalize = faster_conv3d, faster_normalize


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
    "comfy.ops": _hasten_one_thread,
}))
