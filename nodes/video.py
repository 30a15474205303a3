"""A world as the host's VIDEO: every frame leaves the world when it is encoded, and none before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from itertools import chain, islice

import av
import numpy as np
import torch
from comfy_api.latest import Input, InputImpl, Types, io

from ..lyra_core import files
from ..lyra_core.world.world import World, frame_ids, to_float, to_uint8
from . import types
from .node import Node


def encode(
    target: str | BytesIO,
    frames: Iterable[torch.Tensor],
    rate: Fraction,
    *,
    crf: float | None = None,
    bit_depth: int = 8,
    metadata: dict | None = None,
    on_frame: Callable[[torch.Tensor], None] = lambda frame: None,
) -> int:
    """Writes uint8 frames (H, W, 3) as H.264 in an mp4, one after the other, and returns how many; all or nothing of a file.

    An mp4 on disk starts to play before all of it has come; an odd last row or column is left out, as it must be.
    """
    count, stream, pixels = 0, None, "yuv420p10le" if bit_depth >= 10 else "yuv420p"
    on_disk = not hasattr(target, "write")
    with ExitStack() as stack:
        place = str(stack.enter_context(files.replacing(target))) if on_disk else target
        flags = "use_metadata_tags+faststart" if on_disk else "use_metadata_tags"  # faststart opens the file by its name
        container = stack.enter_context(av.open(place, "w", format="mp4", options={"movflags": flags}))
        for key, value in (metadata or {}).items():
            container.metadata[key] = json.dumps(value)
        for frame in frames:
            if stream is None:
                stream = container.add_stream("h264", rate=rate)
                stream.height, stream.width = (side // 2 * 2 for side in frame.shape[:2])
                stream.pix_fmt, stream.options = pixels, {} if crf is None else {"crf": str(crf)}
            picture = frame[: stream.height, : stream.width].cpu().contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pixels)))
            on_frame(frame)
            count += 1
        if stream is None:
            raise ValueError("there is no frame to make a video of")
        container.mux(stream.encode(None))
    return count


def frames_of(video: Input.Video) -> Iterator[torch.Tensor]:
    """The frames of any VIDEO as uint8 (H, W, 3), one after the other; a file is read as it goes."""
    if isinstance(video, StreamedWorld):
        yield from video.frames()
    elif isinstance(video, InputImpl.VideoFromFile):
        yield from _decoded(video)
    else:
        yield from (to_uint8(image[..., :3]) for image in video.get_components().images)


def _decoded(video: InputImpl.VideoFromFile) -> Iterator[torch.Tensor]:
    start, duration = video.get_active_trim_window()
    with av.open(video.get_stream_source()) as container:
        stream = container.streams.video[0]
        first, last = (int(seconds / stream.time_base) for seconds in (start, start + duration))
        if first:
            container.seek(first, stream=stream)
        for frame in container.decode(stream):
            if duration and frame.pts >= last:
                return
            if frame.pts >= first:
                upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation // 90))
                yield torch.from_numpy(upright.copy())


def frame_count(video: Input.Video) -> int:
    """How many frames `frames_of` gives."""
    if video.get_active_trim_window() == (0, 0):
        return video.get_frame_count()
    return round(video.get_duration() * video.get_frame_rate())  # the host counts a trimmed file to its untrimmed end


@dataclass(frozen=True, eq=False)
class StreamedWorld(Input.Video):
    """Frames of a world, after those of another video, as the host's VIDEO.

    Floats of all frames are made only for whoever asks for the components.
    """

    world: World
    ids: range  # which frames, in the order that they are shown
    rate: Fraction  # frames a second
    before: Input.Video | None = None
    window: tuple[int, int | None] = (0, None)  # which frames of all this are left: first, and one past the last

    def frames(self) -> Iterator[torch.Tensor]:
        earlier = iter(()) if self.before is None else frames_of(self.before)
        return islice(chain(earlier, (self.world.frame(i) for i in self.ids)), *self.window)

    def get_components(self) -> Types.VideoComponents:
        (width, height), count = self.get_dimensions(), self.get_frame_count()
        types.afford(count * height * width * 24, f"{count} frames of {width}x{height} as pictures")
        return Types.VideoComponents(torch.stack([to_float(f) for f in self.frames()]), self.rate)

    def save_to(
        self,
        path: str | BytesIO,
        format: Types.VideoContainer = Types.VideoContainer.AUTO,
        codec: Types.VideoCodec = Types.VideoCodec.AUTO,
        metadata: dict | None = None,
        bit_depth: int | None = None,
        crf: float | None = None,
    ) -> None:
        Types.VideoContainer(format), Types.VideoCodec(codec)  # mp4 and h264, or a ValueError that names the other
        on_step, total = types.progress(), self.get_frame_count()
        done = iter(range(1, total + 1))
        encode(
            path, self.frames(), self.rate, crf=crf, bit_depth=bit_depth or 8, metadata=metadata,
            on_frame=lambda frame: on_step(next(done, total), total),
        )  # fmt: skip

    def as_trimmed(
        self, start_time: float | None = None, duration: float | None = None, strict_duration: bool = False
    ) -> StreamedWorld | None:
        total = self.get_frame_count()
        start = round((start_time or 0) * self.rate)
        start = max(0, total + start) if start < 0 else start
        wanted = max(1, round(duration * self.rate)) if duration else total
        stop = min(total, start + wanted)
        if start >= total or (strict_duration and duration and stop - start < wanted):
            return None
        return replace(self, window=(self.window[0] + start, self.window[0] + stop))

    def get_dimensions(self) -> tuple[int, int]:
        return self.world.size[1], self.world.size[0]

    def get_frame_count(self) -> int:
        earlier = 0 if self.before is None else frame_count(self.before)
        return len(range(earlier + len(self.ids))[slice(*self.window)])

    def get_frame_rate(self) -> Fraction:
        return self.rate

    def get_duration(self) -> float:
        return float(self.get_frame_count() / self.rate)

    def get_container_format(self) -> str:
        return "mov,mp4,m4a,3gp,3g2,mj2"  # what FFmpeg calls the mp4 that `save_to` writes


def check_before(before: Input.Video, size: tuple[int, int], rate: Fraction) -> None:
    """ValueError if one video can't be shown before another of this size (height, width) and rate; reads one frame of it."""
    frame = next(frames_of(before), None)
    if frame is None:
        raise ValueError("`before`: this video has no frame")
    if tuple(frame.shape[:2]) != tuple(size):
        raise ValueError(
            f"`before` is {frame.shape[1]}x{frame.shape[0]} and the world {size[1]}x{size[0]}; resize that video to the world's size"
        )
    found = before.get_frame_rate()
    if abs(found - rate) > Fraction(1, 100):
        raise ValueError(
            f"`before` has {float(found):.6g} frames a second and this video {float(rate):.6g}; set `fps` to {float(found):.6g}"
        )


class WorldVideo(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2WorldVideo",
            display_name="Lyra 2 World Video",
            category=types.CATEGORY,
            search_aliases=["create video", "save world as video"],
            description="The frames of a world as a video for Save Video. They are read from the world one by one while it is saved, so a "
            "long world takes no more memory than a short one.",
            inputs=[
                types.World.Input("world"),
                io.Int.Input("first", default=0, min=0, max=1000000, tooltip="First frame; 0 is the photo."),
                io.Int.Input("count", default=0, min=0, max=1000000, tooltip="How many frames; 0: all that follow."),
                io.Boolean.Input("backwards", default=False, tooltip="In reverse order."),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=240.0,
                    step=0.001,
                    tooltip="Frames per second; more: a faster walk. Lyra 2 was trained at 16.",
                ),
                io.Video.Input(
                    "before",
                    optional=True,
                    tooltip="A video of the same size and fps that is shown before this one, such as another walk from the same "
                    "photo. Its sound is left out.",
                ),
            ],
            outputs=[io.Video.Output(display_name="video")],
        )

    @classmethod
    def execute(cls, world, first, count, backwards, fps, before=None) -> io.NodeOutput:
        ids = frame_ids(world, first, count, backwards)
        rate = Fraction(round(fps * 1000), 1000)
        if before is not None:
            check_before(before, world.size, rate)
        return io.NodeOutput(StreamedWorld(world, ids, rate, before))
