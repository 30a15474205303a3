"""The model files that the workflows need: `python tools/comfy.py models [--get NAME]`.

Without --get it lists them and touches no network. With it, it shows the licence and, once that is accepted, downloads
one into the host's models folder, resumably and checked against the hub's checksum; what the stock loaders can't read is
downloaded to the launcher's cache folder and converted. `hf_hub_download` itself throws an interrupted file away, so only
its transfer is used.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType

HUB = "https://huggingface.co"
WAN = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
WAN22 = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
LYRA = "nvidia/Lyra-2.0"
# Older names of the host's folders, which it still searches.
LEGACY = {"text_encoders": "clip", "diffusion_models": "unet"}


@dataclass(frozen=True)
class Licence:
    title: str
    short: str  # for the list
    allows: str  # one plain sentence
    url: str


LICENCES = {
    "nvidia": Licence(
        "NVIDIA Internal Scientific Research and Development Model License",
        "NVIDIA, research only",
        "You may use the files for your own research and development, but not commercially or in production, and you "
        "may not pass them on.",
        "https://www.nvidia.com/en-us/agreements/enterprise-software/"
        "nvidia-internal-scientific-research-and-development-model-license/",
    ),
    "apache": Licence(
        "Apache License 2.0",
        "Apache-2.0",
        "You may use, change and share the files, also commercially, if you keep the licence and its notices.",
        "https://www.apache.org/licenses/LICENSE-2.0",
    ),
    "cc-by-nc": Licence(
        "Creative Commons Attribution-NonCommercial 4.0",
        "CC BY-NC 4.0",
        "You may use, change and share the files with attribution, but not commercially.",
        "https://creativecommons.org/licenses/by-nc/4.0/",
    ),
    "mit": Licence(
        "MIT License",
        "MIT",
        "You may use, change and share the files, also commercially, if you keep the copyright notice.",
        "https://github.com/microsoft/MoGe/blob/main/LICENSE",
    ),
}


@dataclass(frozen=True)
class ModelFile:
    """One file of the host's models folder and where it comes from."""

    name: str
    purpose: str
    folder: str  # of the host's models folder
    target: str  # file name in it
    repo: str  # on the hub
    source: str  # a file of the repository, or a folder if it ends with /
    licence: str  # a key of LICENCES
    size: int | None = None  # bytes of the target; None is asked when it is downloaded
    convert: bool = False  # the source is no file that the stock loaders take
    note: str = ""

    @property
    def url(self) -> str:
        return f"{HUB}/{self.repo}/resolve/main/{self.source}"


# Where this table comes from:
# - The repository nvidia/Lyra-2.0 and its folder checkpoints/ are named by NVIDIA's own README; the paths below it by
#   its inference code and by users' install notes (checkpoints/model/model/.metadata, 64 GB of shards; recon 13 GB).
#   Nobody here could list the repository itself, hence "layout not verified".
# - da3-giant: the reference's default model name; model.safetensors is what the hub's own saving calls it.
# - Comfy-Org's repositories and paths: the workflow templates that ship with ComfyUI 0.30.0, except Depth Anything 3
#   metric, which docs.comfy.org names.
# - Sizes: users' download lists, of which several agree to the byte, but for moge, da3-metric and qwen3-vl-8b, which rest on
#   one. That of lyra2 is counted from its 1435 weights. The hub's own numbers are checked at download.
MODELS = (
    ModelFile(
        name="lyra2",
        purpose="the Lyra 2 transformer, for Load Diffusion Model",
        folder="diffusion_models",
        target="lyra2.safetensors",
        repo=LYRA,
        source="checkpoints/model/",
        licence="nvidia",
        size=34_059_742_848,
        convert=True,
        note="layout not verified; users report 64 GB to download, which go when they are converted",
    ),
    ModelFile(
        name="lyra2-dmd",
        purpose="4 steps instead of 35 or 50, strength 1.0, CFG 1",
        folder="loras",
        target="lyra2_dmd_distillation.safetensors",
        repo=LYRA,
        source="checkpoints/lora/dmd_distillation.safetensors",
        licence="nvidia",
        convert=True,
        note="layout not verified",
    ),
    ModelFile(
        name="lyra2-realism",
        purpose="the zoom's LoRA realism boost, strength 0.4",
        folder="loras",
        target="lyra2_realism_boost.safetensors",
        repo=LYRA,
        source="checkpoints/lora/realism_boost.safetensors",
        licence="nvidia",
        convert=True,
        note="layout not verified",
    ),
    ModelFile(
        name="lyra2-detail",
        purpose="the zoom's LoRA detail enhancer, strength 0.4",
        folder="loras",
        target="lyra2_detail_enhancer.safetensors",
        repo=LYRA,
        source="checkpoints/lora/detail_enhancer.safetensors",
        licence="nvidia",
        convert=True,
        note="layout not verified",
    ),
    ModelFile(
        name="lyra2-reconstruction",
        purpose="Depth Anything 3 tuned for splats, for Lyra 2 Load Reconstructor",
        folder="geometry_estimation",
        target="lyra2_reconstruction.pt",
        repo=LYRA,
        source="checkpoints/recon/model.pt",
        licence="nvidia",
        note="layout not verified; users report 13 GB; as released, the host's own nodes don't take it",
    ),
    ModelFile(
        name="da3-giant",
        purpose="splats without Lyra 2's tuning, or its base if that is only a part; for Lyra 2 Load Reconstructor",
        folder="geometry_estimation",
        target="da3nested_giant_large_1.1.safetensors",
        repo="depth-anything/DA3NESTED-GIANT-LARGE-1.1",
        source="model.safetensors",
        licence="cc-by-nc",
        note="name of the file in the repository not verified",
    ),
    ModelFile(
        name="wan-vae",
        purpose="frames to latents and back",
        folder="vae",
        target="wan_2.1_vae.safetensors",
        repo=WAN,
        source="split_files/vae/wan_2.1_vae.safetensors",
        licence="apache",
        size=253_815_318,
    ),
    ModelFile(
        name="vace-1.3b",
        purpose="Wan 2.1 VACE, the generator for 8 GB cards, for Load Diffusion Model",
        folder="diffusion_models",
        target="wan2.1_vace_1.3B_fp16.safetensors",
        repo=WAN,
        source="split_files/diffusion_models/wan2.1_vace_1.3B_fp16.safetensors",
        licence="apache",
        note="about 4.3 GB",
    ),
    ModelFile(
        name="vace-14b",
        purpose="Wan 2.1 VACE, large; weight_dtype fp8 halves it in memory",
        folder="diffusion_models",
        target="wan2.1_vace_14B_fp16.safetensors",
        repo=WAN,
        source="split_files/diffusion_models/wan2.1_vace_14B_fp16.safetensors",
        licence="apache",
        note="about 34.7 GB",
    ),
    ModelFile(
        name="vace-fun-high",
        purpose="Wan 2.2 VACE Fun, the high noise expert; needs vace-fun-low",
        folder="diffusion_models",
        target="wan2.2_fun_vace_high_noise_14B_fp8_scaled.safetensors",
        repo=WAN22,
        source="split_files/diffusion_models/wan2.2_fun_vace_high_noise_14B_fp8_scaled.safetensors",
        licence="apache",
        note="about 17.4 GB; licence by derived cards",
    ),
    ModelFile(
        name="vace-fun-low",
        purpose="Wan 2.2 VACE Fun, the low noise expert; needs vace-fun-high",
        folder="diffusion_models",
        target="wan2.2_fun_vace_low_noise_14B_fp8_scaled.safetensors",
        repo=WAN22,
        source="split_files/diffusion_models/wan2.2_fun_vace_low_noise_14B_fp8_scaled.safetensors",
        licence="apache",
        note="about 17.4 GB; licence by derived cards",
    ),
    ModelFile(
        name="umt5-fp8",
        purpose="prompts; or umt5-fp16",
        folder="text_encoders",
        target="umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        repo=WAN,
        source="split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        licence="apache",
        size=6_735_906_897,
    ),
    ModelFile(
        name="umt5-fp16",
        purpose="prompts; the exacter alternative to umt5-fp8",
        folder="text_encoders",
        target="umt5_xxl_fp16.safetensors",
        repo=WAN,
        source="split_files/text_encoders/umt5_xxl_fp16.safetensors",
        licence="apache",
        size=11_366_399_385,
    ),
    ModelFile(
        name="clip-vision",
        purpose="what the transformer sees of the photo",
        folder="clip_vision",
        target="clip_vision_h.safetensors",
        repo=WAN,
        source="split_files/clip_vision/clip_vision_h.safetensors",
        licence="apache",
        size=1_264_219_396,
    ),
    ModelFile(
        name="moge",
        purpose="depth in metres and field of view, for the host's MoGe nodes",
        folder="geometry_estimation",
        target="moge_2_vitl_normal_fp16.safetensors",
        repo="Comfy-Org/MoGe",
        source="geometry_estimation/moge_2_vitl_normal_fp16.safetensors",
        licence="mit",
        size=661_859_924,
    ),
    ModelFile(
        name="da3-small",
        purpose="depth up to scale, for the host's Depth Anything 3 nodes; what the demo fetches",
        folder="geometry_estimation",
        target="depth_anything_3_small.safetensors",
        repo="Comfy-Org/Depth-Anything-3",
        source="geometry_estimation/depth_anything_3_small.safetensors",
        licence="apache",
    ),
    ModelFile(
        name="da3-mono",
        purpose="depth up to scale, sky marked, for the host's Depth Anything 3 nodes",
        folder="geometry_estimation",
        target="depth_anything_3_mono_large.safetensors",
        repo="Comfy-Org/Depth-Anything-3",
        source="geometry_estimation/depth_anything_3_mono_large.safetensors",
        licence="apache",
        size=1_336_748_056,
    ),
    ModelFile(
        name="da3-metric",
        purpose="the same in metres",
        folder="geometry_estimation",
        target="depth_anything_3_metric_large.safetensors",
        repo="Comfy-Org/Depth-Anything-3",
        source="geometry_estimation/depth_anything_3_metric_large.safetensors",
        licence="apache",
        size=1_336_748_056,
    ),
    ModelFile(
        name="qwen3-vl",
        purpose="captions, for the host's Generate Text; or qwen3-vl-8b",
        folder="text_encoders",
        target="qwen3vl_4b_fp8_scaled.safetensors",
        repo="Comfy-Org/Qwen3-VL",
        source="text_encoders/qwen3vl_4b_fp8_scaled.safetensors",
        licence="apache",
        size=5_242_467_968,
    ),
    ModelFile(
        name="qwen3-vl-8b",
        purpose="captions; the larger alternative to qwen3-vl",
        folder="text_encoders",
        target="qwen3vl_8b_fp8_scaled.safetensors",
        repo="Comfy-Org/Qwen3-VL",
        source="text_encoders/qwen3vl_8b_fp8_scaled.safetensors",
        licence="apache",
        size=10_588_637_512,
    ),
)


class Refused(Exception):
    """Why a file could not be had, and what to do."""


def find(name: str) -> ModelFile:
    for model in MODELS:
        if model.name == name:
            return model
    raise Refused(f"there is no model {name!r}; there are {', '.join(model.name for model in MODELS)}")


def template_entries(names: Iterable[str]) -> list[dict[str, str]]:
    """What the host's missing-model dialog wants of a node; nothing for files that have to be converted or renamed."""
    found = [find(name) for name in names]
    return [
        {"name": model.target, "url": model.url, "directory": model.folder}
        for model in found
        if not model.convert and PurePosixPath(model.source).name == model.target
    ]


# ------------------------------------------------------------------------------------------------------ on this disk


def launcher() -> ModuleType:
    """tools/comfy.py, whether or not its folder is on a path."""
    if "lyra_comfy" not in sys.modules:
        spec = importlib.util.spec_from_file_location("lyra_comfy", Path(__file__).with_name("comfy.py"))
        sys.modules["lyra_comfy"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["lyra_comfy"])
    return sys.modules["lyra_comfy"]


def models_folder() -> Path:
    """The folder that the launcher's server takes models from, as in start_server."""
    own = launcher().find_host() / "models"
    return own if own.is_dir() else launcher().home() / "base" / "models"


def search_folders(folder: str) -> list[Path]:
    """All places where the host looks for such files, with those that its extra_model_paths.yaml adds."""
    names = [folder, *filter(None, [LEGACY.get(folder)])]
    found = [models_folder() / name for name in names]
    extra = launcher().find_host() / "extra_model_paths.yaml"
    if extra.is_file():
        import yaml

        for section in (yaml.safe_load(extra.read_text(encoding="utf-8")) or {}).values():
            section = section or {}
            base = extra.parent / os.path.expandvars(os.path.expanduser(section.get("base_path", "")))
            found += [base / line for name in names for line in section.get(name, "").split("\n") if line]
    return found


def installed(model: ModelFile) -> Path | None:
    """Where the host finds it; subfolders count."""
    for folder in search_folders(model.folder):
        for place, _, files in os.walk(folder, followlinks=True):
            if model.target in files:
                return Path(place) / model.target
    return None


def download_folder(model: ModelFile) -> Path:
    """Where what has to be converted waits for it."""
    return launcher().home() / "downloads" / model.name


def state(model: ModelFile) -> str:
    if installed(model):
        return "there"
    begun = any((models_folder() / model.folder).glob(glob.escape(model.target) + ".*part"))
    return "begun" if begun or (model.convert and download_folder(model).exists()) else "missing"


def readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def listing() -> str:
    rows = [
        (
            model.name,
            state(model),
            f"{model.folder}/{model.target}",
            readable(model.size) if model.size else "size asked at download",
            LICENCES[model.licence].short,
            model.purpose + (f" ({model.note})" if model.note else ""),
        )
        for model in MODELS
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            f"Model files in {models_folder()}; the geometry preview needs none of them.",
            *lines,
            "Nothing is downloaded by itself: python tools/comfy.py models --get NAME shows the licence and asks.",
        ]
    )


# -------------------------------------------------------------------------------------------------------- on the hub


@dataclass(frozen=True)
class Remote:
    """One file of one version of a repository."""

    path: str
    url: str
    size: int  # bytes
    sha256: str | None  # of large files
    blob: str  # tells versions of the file apart: git's SHA-1 of small files, of large ones of what stands in for them there


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def remote_files(model: ModelFile) -> list[Remote]:
    from huggingface_hub import HfApi, hf_hub_url

    from lyra_core import files

    known = HfApi(endpoint=endpoint()).model_info(model.repo, files_metadata=True)
    wanted = [
        file
        for file in known.siblings
        if file.rfilename == model.source or (model.source.endswith("/") and file.rfilename.startswith(model.source))
    ]
    for file in wanted:
        if not files.stays_inside(file.rfilename):
            raise Refused(f"{endpoint()}/{model.repo} names a file {file.rfilename!r}, which would lie elsewhere; nothing is downloaded")
        if not re.fullmatch("[0-9a-f]{40}", file.blob_id or "") or type(file.size) is not int or file.size < 0:
            raise Refused(f"{endpoint()}/{model.repo} says neither size nor SHA-1 of {file.rfilename}; nothing is downloaded")
    if not wanted:
        names = "\n".join(sorted(file.rfilename for file in known.siblings)[:40])
        raise Refused(f"{endpoint()}/{model.repo} has no {model.source}; it was reorganised. It has:\n{names}")
    return [
        Remote(
            file.rfilename,
            hf_hub_url(model.repo, file.rfilename, revision=known.sha, endpoint=endpoint()),
            file.size,
            file.lfs and file.lfs.sha256,
            file.blob_id,
        )
        for file in wanted
    ]


class Watched:
    """A file that tells after every write how long it is."""

    def __init__(self, handle, on_size: Callable[[int], None]):
        self.handle, self.on_size = handle, on_size

    def write(self, chunk: bytes) -> int:
        written = self.handle.write(chunk)
        self.on_size(self.handle.tell())
        return written

    def __getattr__(self, name: str):
        return getattr(self.handle, name)


def part_of(remote: Remote, target: Path) -> Path:
    return target.with_name(f"{target.name}.{remote.blob[:12]}.part")


def missing(remote: Remote, target: Path) -> int:
    """Bytes still to download."""
    part = part_of(remote, target)
    return 0 if target.exists() else remote.size - (part.stat().st_size if part.exists() else 0)


def download(remote: Remote, target: Path, on_size: Callable[[int], None]) -> None:
    """Fetch one file, going on where an earlier attempt ended; `on_size` gets the bytes that are there.

    The target appears only when all of it is there and its checksum is right.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    from lyra_core import files

    if target.exists():
        return on_size(remote.size)
    part = part_of(remote, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for other in target.parent.glob(glob.escape(target.name) + ".*.part"):
        if other != part:
            other.unlink()  # of another version of the file
    files.check_part(part)
    with open(part, "ab") as handle:
        if handle.tell() > remote.size:
            handle.truncate(0)
        done = handle.seek(0, os.SEEK_END)
        on_size(done)
        if done < remote.size:
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            http_get(remote.url, Watched(handle, on_size), resume_size=done, headers=headers, expected_size=remote.size)
        handle.flush()
        os.fsync(handle.fileno())
    right = remote.sha256 or remote.blob
    found = digest_of(part, hashlib.sha256()) if remote.sha256 else digest_of(part, hashlib.sha1(b"blob %d\0" % part.stat().st_size))
    if found != right:
        part.unlink()
        raise Refused(f"{part} does not have the hub's checksum ({found} instead of {right}) and was removed; run the command again")
    os.replace(part, target)


def digest_of(file: Path, digest) -> str:
    with open(file, "rb") as handle:
        while piece := handle.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def check_space(needs: Iterable[tuple[Path, int]]) -> None:
    """Refused unless there is room for so many bytes in each of these folders, even if they are on one disk."""
    wanted: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        disk = existing.stat().st_dev
        wanted[disk] = (existing, wanted.get(disk, (existing, 0))[1] + size)
    for folder, size in wanted.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise Refused(f"{folder} needs {readable(size)} more, but its disk has {readable(free)} free")


# ------------------------------------------------------------------------------------------------------- the command


def accepted(model: ModelFile, unattended: bool) -> bool:
    licence = LICENCES[model.licence]
    print(f"{model.name}: {model.purpose}, from {endpoint()}/{model.repo}")
    print(f"Licence: {licence.title}\n{licence.allows}\n{licence.url}", flush=True)
    if unattended:
        return True
    with contextlib.suppress(EOFError):
        return input("Type yes to accept it and download: ").strip().lower() == "yes"
    return False


def get(model: ModelFile, unattended: bool = False, keep: bool = False) -> Path:
    """The file in the host's models folder, downloaded and converted if it is not there and its licence is accepted."""
    if there := installed(model):
        print(f"{model.name} is there already: {there}")
        return there
    if not accepted(model, unattended):
        raise Refused("the licence was not accepted, so nothing was downloaded; --accept-licence accepts it unasked")
    target = models_folder() / model.folder / model.target
    waiting = download_folder(model)
    remotes = remote_files(model)
    targets = [waiting / remote.path if model.convert else target for remote in remotes]
    total = sum(remote.size for remote in remotes)
    needs = [(targets[0].parent, sum(map(missing, remotes, targets)))]
    if model.convert:
        begun = target.with_name(target.name + ".part")  # of an interrupted conversion
        needs.append((target.parent, (model.size or total) - (begun.stat().st_size if begun.exists() else 0)))
    check_space(needs)

    label, before = {"class_type": f"{model.name}, MB"}, 0
    for remote, place in zip(remotes, targets, strict=True):

        def on_size(size: int, before: int = before) -> None:
            launcher().progress_bar(label, (before + size) // 10**6, total // 10**6)

        download(remote, place, on_size)
        before += remote.size
    if model.convert:
        if launcher().convert(waiting / model.source, target):
            raise Refused(f"the download is kept in {waiting}; running the command again converts it again")
        if not keep:
            shutil.rmtree(waiting)
    print(f"wrote {target} ({readable(target.stat().st_size)})")
    return target


def explained(problem: Exception, model: ModelFile) -> str:
    """An error of the hub or of the way there, as something to do."""
    page = f"{endpoint()}/{model.repo}"
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status in (401, 403):
        command = Path(sys.executable).with_name("hf")
        return (
            f"{page} refused the download ({status}). Accept the terms on that page with your account, then log in: "
            f"{command} auth login, or set HF_TOKEN to a token that may read it"
        )
    if status == 404:
        return f"{page} does not exist (404), or not for you"
    return f"{page}: {problem}\nWhat has arrived is kept; the same command goes on from there"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="comfy.py models", description=__doc__.partition("\n")[0])
    parser.add_argument("--get", metavar="NAME", help="download this one, once its licence is accepted")
    parser.add_argument("--accept-licence", action="store_true", help="accept the licence without being asked")
    parser.add_argument(
        "--keep-download", action="store_true", help="keep the released files after they were converted"
    )
    options = parser.parse_args(arguments)
    if not options.get:
        print(listing())
        return 0
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # there is one for all files of a model
    transport_error = HfHubHTTPError.__bases__[0]  # of requests, httpx or httpx2, by the hub's version
    try:
        model = find(options.get)
        try:
            get(model, options.accept_licence, options.keep_download)
        except (OSError, ValueError, transport_error) as problem:
            raise Refused(explained(problem, model)) from problem
    except Refused as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes it on a second time
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # lyra_core
    sys.exit(main(sys.argv[1:]))
