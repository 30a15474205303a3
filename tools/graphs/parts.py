"""What several graphs share: notes, the photo, the models, the results."""

from __future__ import annotations

from .describe import Column, Graph, Group, Node, Subgraph

SIZE = {"width": 832, "height": 480}
ROOM = {
    "source": "room box",
    "source.vanishing_y": 0.55,
    "source.wall_left": 0.2,
    "source.wall_top": 0.1,
    "source.wall_right": 0.8,
    "source.wall_bottom": 0.72,
}
COLOURS = {"models": "#8fb3c2", "photo": "#88bb88", "path": "#d0a85a", "walk": "#7fa6e0", "results": "#c98fb5"}
PROMPT = "A quiet, sunlit room. The camera moves slowly and steadily; nothing in the scene moves. Describe your photo here."
NEGATIVE = (
    "blurry, low quality, jpeg artifacts, overexposed, static noise, watermark, text, people, moving objects, deformed"
)
DMD_LORA = "lyra2_dmd_distillation.safetensors"
RECONSTRUCTOR = "lyra2_reconstruction.pt"
SHIPPED_PATH, SHIPPED_CAPTIONS = "shipped: walk.json", "shipped: captions.json"  # of Lyra 2 Load Trajectory
VIEWS = 3  # cameras of a chunk that frames are retrieved for: `bench views` finds no more with 5 or 8
NOTE = "MarkdownNote"  # its text is its only widget


# ------------------------------------------------------------------------------------------------------------- groups


def note(text: str) -> Group:
    return Group("", "", ({"note": Node(NOTE, {"": text}, title="What this needs and makes")},))


def models(*columns: Column) -> Group:
    return Group("Models", COLOURS["models"], columns)


def photo(*columns: Column, title: str = "1 Photo and depth") -> Group:
    return Group(title, COLOURS["photo"], columns)


def path(*columns: Column, title: str = "2 Path") -> Group:
    return Group(title, COLOURS["path"], columns)


def walk(*columns: Column, title: str = "3 Walk") -> Group:
    return Group(title, COLOURS["walk"], columns)


def results(*columns: Column, title: str = "4 Results") -> Group:
    return Group(title, COLOURS["results"], columns)


def from_left_to_right(*bands: Group | tuple[Group, ...]) -> Graph:
    return Graph(tuple((band,) if isinstance(band, Group) else band for band in bands))


# -------------------------------------------------------------------------------------------------------------- nodes


def loaded_photo() -> Column:
    return {
        "photo": Node("LoadImage", {"image": "example.png"}),
        "scaled": Node(
            "ImageScale", {"upscale_method": "lanczos", **SIZE, "crop": "center"}, {"image": ("photo", 0)}
        ),
    }


def laid_out_depth(layout: dict, **more: tuple[str, int]) -> Column:
    """Depth of the photo without any model, and how it looks."""
    return {
        "depth": Node("Lyra2Depth", layout, {"image": ("scaled", 0), **more}),
        "see depth": Node("PreviewImage", {}, {"images": ("depth", 1)}),
    }


def estimated_depth(da3: tuple[str, int] = ("models", 4), **more: tuple[str, int]) -> Column:
    """Depth of the photo by Depth Anything 3, and how it looks."""
    sources = {"image": ("scaled", 0), "source.da3_geometry": ("geometry", 0), **more}
    return {
        "geometry": Node("DA3Inference", {}, {"da3_model": da3, "image": ("scaled", 0)}),
        "depth": Node("Lyra2Depth", {"source": "Depth Anything 3"}, sources),
        "see depth": Node("PreviewImage", {}, {"images": ("depth", 1)}),
    }


def folder_of_worlds(name: str) -> str:
    """Where a graph saves: each photo, at each size, in a folder of its own."""
    return f"worlds/{name}_%photo%"


def begun(**more: tuple[str, int]) -> Column:
    return {"begin": Node("Lyra2BeginWorld", {}, {"image": ("scaled", 0), "depth": ("depth", 0), **more})}


def drawn(cameras: str) -> Column:
    return {
        "draw": Node("Lyra2DrawTrajectory", {}, {"cameras": (cameras, 0), "world": ("begin", 0)}),
        "see path": Node("PreviewImage", {}, {"images": ("draw", 0)}),
    }


def video(world: str, name: str) -> Column:
    """What a walk looks like, and how well it holds together."""
    return {
        "video": Node("Lyra2WorldVideo", {}, {"world": (world, 0)}),
        "save video": Node("SaveVideo", {"filename_prefix": f"lyra2/{name}"}, {"video": ("video", 0)}),
        **scored(world),
    }


def scored(world: str) -> Column:
    return {"score": Node("Lyra2Consistency", {}, {"world": (world, 0)})}


def there_and_away(name_in: str, name_out: str, name: str) -> tuple[Column, Column]:
    """One video of two walks from the same photo: out of it backwards, then into it, and the photo once. The first is scored."""
    return (
        {
            "video out": Node("Lyra2WorldVideo", {"backwards": True}, {"world": (name_out, 0)}),
            "video": Node("Lyra2WorldVideo", {"first": 1}, {"world": (name_in, 0), "before": ("video out", 0)}),
        },
        {
            "save video": Node("SaveVideo", {"filename_prefix": f"lyra2/{name}"}, {"video": ("video", 0)}),
            **scored(name_out),
        },
    )


def splat_and_mesh(world: str, name: str) -> tuple[Column, Column]:
    prefix = {"filename_prefix": f"lyra2/{name}"}
    return (
        {
            "gaussians": Node("Lyra2WorldGaussians", {"stride": 1}, {"world": (world, 0)}),
            "ply": Node("SplatToFile3D", {"format": "ply"}, {"splat": ("gaussians", 0)}),
            "surface": Node("Lyra2WorldMesh", {}, {"world": (world, 0)}),
        },
        {
            "save splat": Node("SaveGaussianSplat", prefix, {"model_3d": ("ply", 0)}),
            "save mesh": Node("SaveGLB", prefix, {"mesh": ("surface", 0)}),
        },
    )


def saved_cameras(cameras: tuple[str, int], name: str) -> Node:
    return Node("Lyra2SaveTrajectory", {"filename_prefix": f"lyra2/{name}_cameras"}, {"cameras": cameras})


def pruned_mesh(views: str) -> Column:
    """A lighter splat of a reconstruction, and the mesh of what it looked at."""
    seen = {"images": (views, 2), "cameras": (views, 3), "depth": (views, 4)}
    return {
        "prune": Node("Lyra2PruneSplat", {}, {"splat": (views, 0)}),
        "surface": Node("Lyra2WorldMesh", {}, seen),
    }


def exported(name: str, sources: dict[str, tuple[str, int]], geometry_model: str = "not stated") -> Column:
    values = {"folder": f"exports/{name}", "geometry_model": geometry_model}
    return {
        "export": Node("Lyra2ExportWorld", values, sources),
        "see splat": Node("PreviewGaussianSplat", {}, {"model_3d": ("export", 2)}),
    }


# ---------------------------------------------------------------------------------------------------------- subgraphs

LOAD_MODELS = Subgraph(
    name="Load the Lyra 2 models",
    category="Lyra 2",
    description="The transformer, its text and image encoders, the VAE, and a depth model for the photo and for what is painted.",
    columns=(
        {
            "transformer": Node("UNETLoader", {"unet_name": "lyra2.safetensors"}),
            "text encoder": Node(
                "CLIPLoader", {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"}
            ),
            "image encoder": Node("CLIPVisionLoader", {"clip_name": "clip_vision_h.safetensors"}),
            "vae": Node("VAELoader", {"vae_name": "wan_2.1_vae.safetensors"}),
            "depth model": Node("LoadDA3Model", {"model_name": "depth_anything_3_mono_large.safetensors"}),
        },
        {"estimator": Node("Lyra2DA3Estimator", {}, {"da3_model": ("depth model", 0)})},
    ),
    inputs={},
    widgets={
        "transformer": (("transformer", "unet_name"),),
        "text_encoder": (("text encoder", "clip_name"),),
        "image_encoder": (("image encoder", "clip_name"),),
        "vae": (("vae", "vae_name"),),
        "depth_model": (("depth model", "model_name"),),
    },
    outputs={
        "model": ("transformer", 0),
        "clip": ("text encoder", 0),
        "clip_vision": ("image encoder", 0),
        "vae": ("vae", 0),
        "da3_model": ("depth model", 0),
        "depth_estimator": ("estimator", 0),
    },
)

SAVE_EVERYTHING = Subgraph(
    name="Save everything of a Lyra 2 world",
    category="Lyra 2",
    description="One folder with a world's splat, mesh, collision mesh, USD scene, cameras, pictures and video, made of the world's own "
    "frames and depth; no model is needed.",
    columns=(
        {
            "gaussians": Node("Lyra2WorldGaussians"),
            "surface": Node("Lyra2WorldMesh"),
        },
        {"prune": Node("Lyra2PruneSplat", {}, {"splat": ("gaussians", 0)})},
        {
            "export": Node(
                "Lyra2ExportWorld",
                {"geometry_model": "Depth Anything 3 small, base, metric, mono"},
                {"splat": ("prune", 0), "mesh": ("surface", 0)},
            )
        },
    ),
    inputs={"world": (("gaussians", "world"), ("surface", "world"), ("export", "world"))},
    widgets={
        "folder": (("export", "folder"),),
        "geometry_model": (("export", "geometry_model"),),
        "at_most": (("prune", "at_most"),),
    },
    outputs={"folder": ("export", 0), "report": ("export", 1), "splat_file": ("export", 2), "mesh_file": ("export", 3)},
)

SUBGRAPHS = (LOAD_MODELS, SAVE_EVERYTHING)


def loaded_models() -> Column:
    return {"models": Node(LOAD_MODELS.name)}


def everything(world: str, name: str, **more: str) -> Column:
    return {"everything": Node(SAVE_EVERYTHING.name, {"folder": f"exports/{name}", **more}, {"world": (world, 0)})}
