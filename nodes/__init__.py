"""The nodes: a schema and one call each."""

from __future__ import annotations

import os

from comfy_api.latest import ComfyExtension, io

from ..lyra_core.models import da3_gaussians, lyra2_host
from . import (
    caption,
    checkpoint,
    consistency,
    control,
    depth,
    depth_estimator,
    explorer,
    export,
    generation,
    load3d,
    mesh,
    optimize,
    panorama,
    photos,
    planner,
    reconstruct,
    routes,
    sampling,
    splat,
    splat_views,
    training,
    trajectory,
    types,
    video,
    world,
)


class LyraExtension(ComfyExtension):
    async def on_load(self) -> None:
        lyra2_host.register()
        da3_gaussians.register()
        if "LYRA2_RANK" in os.environ:  # one of several processes that make a world together: see the module
            from ..lyra_core.models import token_split

            token_split.join()
        routes.register(types.running_server())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            trajectory.PresetTrajectory,
            trajectory.ZoomTrajectory,
            trajectory.LoadTrajectory,
            trajectory.SaveTrajectory,
            trajectory.EditTrajectory,
            trajectory.DrawTrajectory,
            load3d.CamerasFromLoad3D,
            load3d.CamerasToLoad3D,
            depth.Depth,
            depth.LoadDepth,
            *photos.NODES,
            panorama.Panorama,
            splat_views.SplatViews,
            world.BeginWorld,
            world.RetrieveHistory,
            world.PreviewChunks,
            world.SaveWorld,
            world.LoadWorld,
            world.RewindWorld,
            world.WorldFrames,
            video.WorldVideo,
            consistency.Consistency,
            explorer.Explorer,
            planner.Planner,
            sampling.Sigmas,
            sampling.UniPCSampler,
            sampling.Noise,
            checkpoint.ConvertCheckpoint,
            *depth_estimator.NODES,
            caption.CaptionPrompt,
            *control.NODES,
            generation.FramePack,
            generation.ChunkConditioning,
            generation.SampleChunk,
            generation.AppendChunk,
            generation.Explore,
            generation.ExploreChunk,
            reconstruct.LoadReconstructor,
            reconstruct.Reconstruct,
            splat.WorldGaussians,
            splat.RenderSplat,
            splat.PruneSplat,
            optimize.OptimizeSplat,
            mesh.WorldMesh,
            export.ExportWorld,
            *training.NODES,
        ]
