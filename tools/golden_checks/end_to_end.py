"""Whole runs of the generation loop with tiny networks: every stage from the reference's inputs, then all in a row."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lyra_core.cameras.camera import Cameras
from lyra_core.conditioning import schedules
from lyra_core.conditioning.framepack import LYRA2
from lyra_core.memory.depth_alignment import Estimate
from lyra_core.memory.retrieval import Keyframe, SpatialMemory
from lyra_core.models import generation, lyra2_host, streaming_vae
from lyra_core.models.sampling import UniPC
from lyra_core.world.world import CHUNK_FRAMES, Chunk, Latents, World, as_bits, begin, plan, warped_views

from . import Check, Golden, furthest

STAGE_LIMIT = 1e-4  # absolute; one stage, from the reference's inputs
RUN_LIMIT = 1e-3  # absolute; all stages in a row
FLIPPED = 1e-4  # share of guide values that may flip between hole and value
HALF_STEP = 0.5 / 255 + RUN_LIMIT  # of frames that are stored as bytes
WEIGHT_LIMIT = 1e-3  # relative; sums of the made-up weights
CLIP_TOKENS, CLIP_PATCH, CLIP_WIDTH = 257, 14, 1280


def recipe(shapes: dict[str, list], seed: int) -> dict[str, Tensor]:
    """Weights as g_weight_manifest describes them."""
    weights = {}
    for name, (shape, *_sums) in shapes.items():
        random = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
        values = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
            values = 1 + 0.1 * values
        elif len(shape) == 1:
            values = 0.02 * values
        else:
            values = values / np.float32(np.sqrt(prod(shape[1:])))
        weights[name] = values
    return weights


def wrong_sums(weights: dict[str, Tensor], manifest: dict[str, list]) -> float:
    """Largest relative error of a weight's absolute sum."""
    return max(
        abs(float(w.double().abs().sum()) / manifest[name][2] - 1) for name, w in weights.items() if manifest[name][2]
    )


class PooledClip:
    """What stands for CLIP in the reference's runs: the prepared picture, pooled over its patches and on the whole."""

    def __init__(self):
        module = torch.nn.Linear(1, 1)
        self.load_device = torch.device("cpu")
        self.patcher = comfy.model_patcher.ModelPatcher(module, self.load_device, self.load_device)
        self.widen = torch.from_numpy(np.random.RandomState(7).randn(3, CLIP_WIDTH).astype(np.float32) * 0.5)

    def model(self, pixel_values: Tensor, intermediate_output: int):
        return None, self.tokens(pixel_values) @ self.widen

    @staticmethod
    def tokens(picture: Tensor) -> Tensor:
        """(1, 257, 3)."""
        patches = F.avg_pool2d(picture, CLIP_PATCH).flatten(2).mT
        return torch.cat([picture.mean((2, 3))[:, None], patches], 1)


@dataclass(frozen=True)
class Run:
    """One golden run and what it needs."""

    golden: Golden

    @cached_property
    def record(self) -> dict:
        return self.golden.json

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        return self.golden.arrays

    @cached_property
    def manifest(self) -> dict:
        return self.golden.beside("g_weight_manifest").json

    @cached_property
    def vae(self) -> comfy.sd.VAE:
        return comfy.sd.VAE(sd=recipe(self.manifest["vae"], self.record["vae_recipe_seed"]))

    @cached_property
    def model(self) -> comfy.model_patcher.ModelPatcher:
        lyra2_host.register()
        weights = recipe(self.manifest["net"], self.record["net_recipe_seed"])
        # only the run with UniPC tells how wide a head is, by its rotary angles
        angles = self.golden.beside("g_e2e_unipc").arrays["c2_tok_freqs"].shape[1]
        stored = {"framepack": str(LYRA2), "num_heads": weights["head.modulation"].shape[-1] // (2 * angles)}
        weights[lyra2_host.CONFIG_KEY] = lyra2_host.pack_config(stored)
        return comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": torch.float32})

    @cached_property
    def cameras(self) -> Cameras:
        w2c = self.arrays["w2c"]
        return Cameras(w2c, self.arrays["K"].expand(len(w2c), 3, 3), (self.record["H"], self.record["W"]))

    def target(self, chunk: int) -> Cameras:
        return self.cameras[1 + chunk * CHUNK_FRAMES : 1 + (chunk + 1) * CHUNK_FRAMES]

    def normalised(self, latents: Tensor) -> Tensor:
        """The host's VAE scale as the network's, in which the golden latents are."""
        return self.model.model.process_latent_in(latents[None])[0]

    def in_vae_scale(self, latents: Tensor) -> Tensor:
        return self.model.model.process_latent_out(latents[None])[0]

    @property
    def chunks(self) -> int:
        return len(self.record["chunks"])

    def begin(self) -> World:
        photo = self.arrays["rgb_first"].movedim(0, -1)
        world = begin(photo * 0.5 + 0.5, self.arrays["depth_first"], self.cameras[0])
        return World(replace(world.first, newest=photo), (), world.memory)

    def world(self, chunks: int) -> World:
        """The reference's world after some chunks, from its own numbers."""
        first, sofar = self.begin(), self.arrays["video_out_every8"].movedim(0, -1)
        history, keyframes, made = self.arrays["history_latents_final"], list(first.memory.keyframes), []
        ids = self.record["cache_frame_ids_final"]
        streaming_vae.load(self.vae, (self.record["H"] // 8, self.record["W"] // 8))
        for chunk in range(chunks):
            start, new = generation.STILL + chunk * LYRA2.new_latents, LYRA2.new_latents
            shape = (CHUNK_FRAMES, *self.cameras.size)
            latents = Latents(
                self.in_vae_scale(self.arrays[f"c{chunk}_gen_latents"]),
                self.in_vae_scale(history[:, start : start + new]),
            )
            frames = torch.zeros(*shape, 3, dtype=torch.uint8)
            newest = sofar[(chunk + 1) * CHUNK_FRAMES // 8]
            seen, settings = torch.zeros(shape, dtype=torch.bool), {"chunk": chunk}
            made.append(Chunk(frames, as_bits(seen), self.target(chunk), "", settings, newest, latents))
            for frame in range(1 + chunk * CHUNK_FRAMES, 1 + (chunk + 1) * CHUNK_FRAMES):
                if frame % 8 == 0 and frame in ids:
                    depth = self.arrays["cache_depth_fullres"][ids.index(frame)]
                    latent = streaming_vae.encode_alone(self.vae, sofar[frame // 8][None])[0]
                    keyframes.append(Keyframe(frame, depth, self.cameras[frame], latent=latent))
        return World(first.first, tuple(made), SpatialMemory(tuple(keyframes)))

    def estimator(self, chunk: int):
        """Says what the reference's stand-in for DA3 said after this chunk."""

        def estimate(frames: Tensor, cameras: Cameras, known: Tensor, on_step=None) -> Estimate:
            count = len(frames)
            native = self.arrays["da3_depth_native"][chunk * count : (chunk + 1) * count]
            if not len(native):  # the reference needs no depth after its last chunk
                native = torch.ones(count, *self.arrays["da3_depth_native"].shape[1:])
            depth = F.interpolate(native[:, None], cameras.size, mode="bilinear", align_corners=False)[:, 0]
            return Estimate(depth, scaled=True)

        return estimate

    def prompts(self, chunk: int, world: World, history) -> tuple[list, list]:
        image = generation.look(PooledClip(), world)
        entries = {**lyra2_host.conditioning(history), "clip_vision_output": image}
        texts = self.arrays["text_pos"][:, min(chunk, self.arrays["text_pos"].shape[1] - 1)], self.arrays["text_neg"]
        return tuple([[text, dict(entries)]] for text in texts)

    def noise(self, chunk: int, history) -> Tensor:
        return schedules.initial_noise((1, *history.warped.shape), self.record["seed"] + chunk)

    def sample(self, chunk: int, world: World, history) -> Tensor:
        """The chunk's latents in VAE scale, by the host's own sampling."""
        positive, negative = self.prompts(chunk, world, history)
        noise = self.noise(chunk, history)
        if self.record["dmd"]:
            slots = LYRA2.slots()
            renoise = (noise.movedim(0, 1)[None, :, slots:] for noise in self.arrays[f"c{chunk}_renoise"])
            sampler = comfy.samplers.ksampler("lcm", {"noise_sampler": lambda *_sigmas: next(renoise)})
            sigmas, cfg = schedules.dmd(), 1.0
        else:
            sampler, cfg = UniPC(), self.record["guidance"]
            sigmas = schedules.full(self.record["steps"], self.record["shift"])
        empty = torch.zeros_like(noise)
        args = (self.model, noise, cfg, sampler, sigmas, positive, negative, empty)
        return comfy.sample.sample_custom(*args, disable_pbar=True)[0]

    def first_velocities(self, chunk: int, world: World, history) -> list[Tensor]:
        """What the network says of the noise, with each prompt."""
        conditions = dict(zip(("positive", "negative"), self.prompts(chunk, world, history), strict=True))
        noise = self.noise(chunk, history)
        sigma = torch.tensor([self.record["chunks"][chunk]["timesteps"][0] / 1000])
        comfy.model_management.load_models_gpu([self.model])
        conditions = {name: comfy.sampler_helpers.convert_cond(value) for name, value in conditions.items()}
        ready = comfy.samplers.process_conds(self.model.model, noise, conditions, noise.device)
        self.model.pre_run()
        denoised = comfy.samplers.calc_cond_batch(
            self.model.model, list(ready.values()), noise, sigma, {"transformer_options": {}}
        )
        return [((noise - part) / sigma)[0] for part in denoised]


@torch.inference_mode()
def check_run(golden: Golden) -> Iterator[Check]:
    run = Run(golden)
    for kind in ("vae", "net"):
        weights = recipe(run.manifest[kind], run.record[f"{kind}_recipe_seed"])
        yield Check("weights", kind, wrong_sums(weights, run.manifest[kind]), WEIGHT_LIMIT)
    for chunk in range(run.chunks):
        yield from check_stages(run, chunk)
    yield from check_free_run(run)


def check_stages(run: Run, chunk: int) -> Iterator[Check]:
    """Every stage of one chunk, each from the reference's own inputs."""
    name, arrays = f"c{chunk}", run.arrays
    world = run.world(chunk)
    planned = plan(world, run.target(chunk), views=run.record["num_retrieval_views"])
    expected = run.record["chunks"][chunk]["retrieved_frame_ids"]
    yield Check(name, "wrong_ids", float(list(planned.retrieved) != expected), 0)

    def compare(what: str, found: Tensor, key: str | None = None) -> Iterator[Check]:
        if f"{name}_{key or what}" in arrays:
            yield Check(name, what, furthest(found, arrays[f"{name}_{key or what}"]), STAGE_LIMIT)

    views = warped_views(world, planned.target)[0].movedim(-1, 0) * 2 - 1
    yield from compare("warp_rgb_last", views[:, -1])
    yield from compare("warp_rgb_every4", views[:, 3::4])
    yield from compare("last_hist_frame", world.exact(len(world) - 1).movedim(-1, 0))
    history = generation.pack(world, planned, run.vae)
    latents, warped = run.normalised(history.latents), run.normalised(history.warped)
    yield from compare("history_window", latents)
    yield from compare("cond16", torch.cat([latents, warped], 1))
    yield from check_guides(run, name, history)
    image = generation.look(PooledClip(), world)["penultimate_hidden_states"]
    tokens = image @ torch.linalg.pinv(PooledClip().widen.double()).float()
    yield from compare("clip_tokens3_cond", tokens[0])
    conditional, unconditional = run.first_velocities(chunk, world, history)
    yield from compare("net_out_first", conditional)
    yield from compare("net_out_first_uncond", unconditional)
    yield from compare("gen_latents", run.normalised(run.sample(chunk, world, history)))
    yield from check_decoding(run, chunk, world)


def check_guides(run: Run, name: str, history) -> Iterator[Check]:
    made, arrays = history.guides(), run.arrays
    spatial, slot = LYRA2.slots("spatial"), made.correspondences.shape[0] // LYRA2.slots("spatial")
    if f"{name}_plucker384" in arrays:
        yield Check(name, "plucker384", furthest(made.rays, arrays[f"{name}_plucker384"]), STAGE_LIMIT)
    if f"{name}_buffer_gen" in arrays:
        difference = (made.correspondences[:, spatial:] - arrays[f"{name}_buffer_gen"]).abs()
        yield Check(name, "buffer_gen", float((difference > STAGE_LIMIT).float().mean()), FLIPPED)
    key = f"{name}_buffer_hist_s_positions_slot0_slot1"
    if key in arrays:
        found = made.correspondences[: 2 * slot, :spatial]
        yield Check(name, "buffer_hist", furthest(found, arrays[key]), STAGE_LIMIT)
    if f"{name}_tok_x" in arrays:
        yield from check_first_tokens(run, name, history, made)


def check_first_tokens(run: Run, name: str, history, made) -> Iterator[Check]:
    network, arrays = run.model.model.diffusion_model, run.arrays
    latents = run.normalised(history.latents)[None]
    maps = lyra2_host.HistoryMaps(
        torch.cat([latents, torch.ones_like(latents[:, :4]), latents], 1), *(guide[None] for guide in made)
    )
    encoded = network.encode(maps)
    count = encoded.tokens.shape[1]
    yield Check(name, "tok_x", furthest(encoded.tokens[0], arrays[f"{name}_tok_x"][:count]), STAGE_LIMIT)
    angles, cameras = arrays[f"{name}_tok_freqs"], arrays[f"{name}_tok_cam_hist"]
    rotations = torch.stack([angles.cos(), angles.sin()], -1)
    yield Check(name, "tok_freqs", furthest(encoded.rope[0, :, 0, :, :, 0], rotations), STAGE_LIMIT)
    yield Check(name, "tok_cam_hist", furthest(encoded.rays[0, : len(cameras)], cameras), STAGE_LIMIT)


def check_decoding(run: Run, chunk: int, world: World) -> Iterator[Check]:
    """The reference's own latents become its frames, and those its history."""
    sampled = run.in_vae_scale(run.arrays[f"c{chunk}_gen_latents"])
    frames: list[Tensor] = []
    stream = generation.take_stream(world, run.vae)
    remembered = streaming_vae.advance(run.vae, sampled, stream, frames.extend)
    start = 1 + chunk * CHUNK_FRAMES
    shown = [frame for frame in range(start, start + CHUNK_FRAMES) if frame % 8 == 0]
    found = torch.stack([frames[frame - start] for frame in shown], 1 - 1).movedim(-1, 0)
    expected = run.arrays["video_out_every8"][:, [frame // 8 for frame in shown]]
    yield Check(f"c{chunk}", "video", furthest(found, expected), STAGE_LIMIT)
    first = generation.STILL + chunk * LYRA2.new_latents
    expected = run.arrays["history_latents_final"][:, first : first + LYRA2.new_latents]
    yield Check(f"c{chunk}", "history", furthest(run.normalised(remembered), expected), STAGE_LIMIT)


def check_free_run(run: Run) -> Iterator[Check]:
    """All chunks in a row, from nothing but the photo, the path and the prompts."""
    world = run.begin()
    for chunk in range(run.chunks):
        planned = plan(world, run.target(chunk), views=run.record["num_retrieval_views"])
        expected = run.record["chunks"][chunk]["retrieved_frame_ids"]
        yield Check("run", f"c{chunk}_wrong_ids", float(list(planned.retrieved) != expected), 0)
        history = generation.pack(world, planned, run.vae)
        latents = run.sample(chunk, world, history)
        error = furthest(run.normalised(latents), run.arrays[f"c{chunk}_gen_latents"])
        yield Check("run", f"c{chunk}_gen_latents", error, RUN_LIMIT)
        world, _ = generation.grow(world, planned, latents, run.vae, run.estimator(chunk), "none")
    remembered = generation.recent_latents(world, run.vae, generation.STILL, "history")
    expected = run.arrays["history_latents_final"][:, generation.STILL :]
    yield Check("run", "history", furthest(run.normalised(remembered), expected), RUN_LIMIT)
    video = run.arrays["video_out_every8"].movedim(0, -1) * 0.5 + 0.5
    frames = torch.stack([world.frame(8 * i) for i in range(len(video))])
    yield Check("run", "video", furthest(frames / 255, video.clamp(0, 1)), HALF_STEP)
    ids = run.record["cache_frame_ids_final"]
    depths = torch.stack([world.memory[frame].depth for frame in ids])
    yield Check("run", "depths", furthest(depths, run.arrays["cache_depth_fullres"]), RUN_LIMIT)
