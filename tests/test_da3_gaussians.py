"""Depth Anything 3 with a Gaussian head: published files, the host's loader and memory, our nodes; tiny and random."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from lyra_core.cameras.camera import pinhole, rescaled_as_reference
from lyra_core.cameras.presets import preset
from lyra_core.splats.splat_files import load_ply, save_ply

FRAMES, SIZE = 5, (56, 84)


@pytest.fixture(scope="module")
def da3(comfy_host):
    return importlib.import_module("lyra_core.models.da3_gaussians")


@pytest.fixture(scope="module")
def files(comfy_host):
    return importlib.import_module("lyra_core.models.da3_files")


@pytest.fixture(scope="module")
def weights(comfy_host, tiny_models):
    """By the host's names."""
    return tiny_models.da3_gaussians_weights()


@pytest.fixture(scope="module")
def published(tiny_models, weights):
    """By the published names, without any prefix."""
    return tiny_models.published(weights)


@pytest.fixture(scope="module")
def patcher(files, tiny_models, tmp_path_factory):
    file = tiny_models.write_da3_gaussians(tmp_path_factory.mktemp("da3") / "nested.safetensors")
    return files.load(file, dtype=torch.float32)


@pytest.fixture(scope="module")
def network(patcher):
    return patcher.model.diffusion_model


def prefixed(weights, prefix):
    return {prefix + name: weight for name, weight in weights.items()}


def pictures(frames=FRAMES, size=SIZE):
    """Normalised, (1, F, 3, H, W)."""
    return torch.randn(1, frames, 3, *size, generator=torch.Generator().manual_seed(0))


def path(frames=FRAMES, size=SIZE):
    return preset("spiral", pinhole(size, 70.0), frames, 2.0)


def assert_loaded(found, weights):
    assert set(found) == set(weights)
    for name, weight in weights.items():
        assert_close(found[name], weight, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("prefix", ["model.da3.", "da3.", "model.", "module.model.da3.", ""])
def test_every_published_layout_is_the_same_network(files, weights, published, tmp_path, prefix):
    file = tmp_path / "model.safetensors"
    rest = {"model.da3_metric.head.scratch.output_conv1.bias": torch.ones(3)} if "da3" in prefix else {}
    save_file({**prefixed(published, prefix), **rest, "optimizer.step": torch.ones(1)}, file)
    assert_loaded(files.released_weights(file), weights)


@pytest.mark.parametrize("key", ["module", "model", "state_dict", None])
def test_a_pt_file_is_read_without_running_anything_in_it(da3, files, weights, published, tmp_path, key):
    file = tmp_path / "model.pt"
    state = prefixed(published, "model.da3.")
    torch.save({key: state, "step": 7} if key else state, file)
    assert_loaded(files.released_weights(file), weights)


def test_a_file_in_the_host_s_layout_is_taken_too(files, weights, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    assert_loaded(files.released_weights(file), weights)


def test_a_tuned_part_is_completed_by_its_base(da3, files, weights, published, tmp_path):
    part, base = tmp_path / "part.safetensors", tmp_path / "base.safetensors"
    tuned = {name: weight + 1 for name, weight in published.items() if name.startswith(("gs_head.", "head."))}
    save_file(prefixed(tuned, "model.da3."), part)
    save_file(prefixed(published, "da3."), base)
    steps = []
    found = files.released_weights(part, base, on_step=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] == sum(weight.nbytes for weight in published.values())
    assert_loaded(found, {name: w + 1 if name.startswith(("gs_head.", "head.")) else w for name, w in weights.items()})


def test_the_backbone_is_converted_and_the_heads_stay_exact(files, published, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({name: weight.half() for name, weight in published.items()}, file)
    found = files.released_weights(file, dtype=torch.bfloat16)
    for name, weight in found.items():
        assert weight.dtype == (torch.bfloat16 if name.startswith("backbone.") else torch.float32), name


def test_progress_ends_with_all_bytes(files, published, tmp_path):
    file, steps = tmp_path / "model.safetensors", []
    save_file(published, file)
    files.released_weights(file, on_step=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] == sum(weight.nbytes for weight in published.values())


def bad_files():
    def without(name):
        return lambda published: {key: w for key, w in published.items() if not key.startswith(name)}

    yield "no Gaussian head", without("gs_head.images_merger"), "has no Gaussian head"
    yield "a part", without("cam_enc.trunk.2"), r"not complete.*name the base(.|\n)*missing: cam_enc.trunk.2"
    yield "no camera token", without("backbone.pretrained.camera_token"), "camera_token"
    yield "fewer blocks", without("backbone.pretrained.blocks.11."), "11 blocks"
    yield "no backbone", without("backbone."), "0 blocks.*name its base"
    yield "another width", lambda p: {**p, "cam_dec.fc_t.weight": torch.zeros(3, 5)}, r"cam_dec.fc_t.weight is \(3, 5\)"
    yield "nothing", lambda p: {"conv.weight": torch.zeros(3)}, "0 tensors of Depth Anything 3"


@pytest.mark.parametrize(("change", "message"), [pytest.param(*rest, id=name) for name, *rest in bad_files()])
def test_files_of_other_models_or_with_missing_weights_are_refused(files, published, tmp_path, change, message):
    file = tmp_path / "model.safetensors"
    save_file(change(published), file)
    with pytest.raises(ValueError, match=message) as error:
        files.released_weights(file)
    assert str(file) in str(error.value)


def test_a_base_that_does_not_complete_the_part_is_named(files, published, tmp_path):
    part, base = tmp_path / "part.safetensors", tmp_path / "base.safetensors"
    save_file({name: w for name, w in published.items() if name.startswith("gs_head.")}, part)
    save_file({name: w for name, w in published.items() if not name.startswith(("gs_head.", "cam_dec."))}, base)
    with pytest.raises(ValueError, match="base.safetensors is not its base"):
        files.released_weights(part, base)


# --------------------------------------------------------------------------------------------------------- the host


def test_the_host_s_own_loader_takes_it_and_a_plain_depth_anything_stays_the_host_s(
    da3, weights, tmp_path, tiny_models
):
    import comfy.sd
    from comfy.ldm.depth_anything_3.model import DepthAnything3Net

    file = tmp_path / "host.safetensors"
    save_file(weights, file)
    assert isinstance(comfy.sd.load_diffusion_model(str(file)).model.diffusion_model, da3.Da3Gaussians)
    plain = tiny_models.write_da3(tmp_path / "mono.safetensors")
    assert isinstance(comfy.sd.load_diffusion_model(str(plain)).model.diffusion_model, DepthAnything3Net)


def test_registering_twice_leaves_one_entry(da3):
    import comfy.supported_models

    before = list(comfy.supported_models.models)
    da3.register()
    assert comfy.supported_models.models == before
    assert [model.__name__ for model in before].count("Da3WithGaussians") == 1


@pytest.mark.parametrize("told", [False, True])
def test_depth_and_cameras_are_those_of_the_host_s_network(da3, network, weights, told):
    import comfy.ops
    from comfy.ldm.depth_anything_3.model import DepthAnything3Net

    theirs = DepthAnything3Net(
        "vits", (5, 7, 9, 11), 4, 4, 4, True, "dualdpt", 768, 2, 16, (16,) * 4, has_cam_enc=True, has_cam_dec=True,
        dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    theirs.backbone = network.backbone  # the host's presets have no SwiGLU at this width
    missing, _ = theirs.load_state_dict(
        {k: w for k, w in weights.items() if not k.startswith("gs_head.")}, strict=False
    )
    assert not missing
    for block in theirs.cam_enc.trunk:
        block.attn.num_heads = 16  # as it was trained, whatever the width
    cameras = {"extrinsics": path().w2c[None], "intrinsics": path().K[None]} if told else {}
    with torch.no_grad():
        found, expected = network(pictures(), **cameras), theirs(pictures(), **cameras)
    for name in ("depth", "depth_conf", "extrinsics", "intrinsics"):
        assert_close(found[name], expected[name], msg=name)


def test_telling_the_network_of_cameras_changes_what_it_says(network):
    with torch.no_grad():
        plain = network(pictures())
        told = network(pictures(), path().w2c[None], path().K[None])
        assert_close(network(pictures(), path().w2c[None])["depth"], plain["depth"])  # a camera without a lens is none
    assert (plain["depth"] - told["depth"]).abs().max() > 1e-3


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_the_heads_say_the_same_however_many_frames_they_look_at(da3, network, monkeypatch, at_once):
    with torch.no_grad():
        expected = network(pictures(), down_ratio=2)
        monkeypatch.setattr(da3, "HEAD_FRAMES", at_once)
        steps = []
        found = network(pictures(), down_ratio=2, on_step=lambda done, total: steps.append((done, total)))
    for name, value in expected.items():
        assert_close(found[name], value, msg=name)
    groups = -(-FRAMES // at_once)
    assert steps == [(done, groups) for done in range(groups + 1)]


def test_feed_forward_layers_say_the_same_in_pieces(da3, network, monkeypatch):
    layer = network.backbone.encoder.layer[0].mlp
    tokens = torch.randn(2, 37, 384, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = da3.SwiGLUFFN.forward(layer, tokens)
        monkeypatch.setattr(da3, "FFN_TOKENS", 5)
        widest = []
        layer.weights_in.register_forward_hook(lambda module, args, result: widest.append(len(args[0])))
        assert_close(layer(tokens), expected)
    assert max(widest) == 5 and sum(widest) == 74


@pytest.mark.parametrize(("ratio", "grid"), [(1, (56, 84)), (2, (28, 42)), (3, (18, 28))])
def test_the_grid_of_gaussians_is_as_coarse_as_asked(network, ratio, grid):
    with torch.no_grad():
        found = network(pictures(2), down_ratio=ratio)
    assert found["raw"].shape == (2, *grid, 37) and found["density"].shape == (2, *grid)
    assert found["density"].min() >= 0 and found["density"].max() <= 1


def test_the_gaussian_head_is_the_host_s_with_the_whole_picture_added(network, monkeypatch):
    from comfy.ldm.depth_anything_3.dpt import DPT

    head, seen = network.gs_head, []
    random = torch.Generator().manual_seed(4)
    features = [torch.randn(2, 24, 768, generator=random) for _ in range(4)]
    monkeypatch.setattr(head, "down_ratio", 2)
    hook = head.scratch.output_conv2.register_forward_hook(lambda module, args, answer: seen.append((args[0], answer)))
    with torch.no_grad():
        raw, density = head(features, pictures(2)[0], 2)
        with contextlib.suppress(RuntimeError):  # in the end it wants one number a pixel
            DPT.forward(head, [(level[None],) for level in features], *SIZE)
        looked = torch.nn.functional.adaptive_avg_pool2d(head.images_merger(pictures(2)[0]), (28, 42))
    hook.remove()
    (ours, answer), (theirs, _) = seen
    assert_close(ours, theirs + looked)
    assert_close(torch.cat([raw, density[..., None].logit()], -1), answer.movedim(1, -1), rtol=1e-4, atol=1e-4)


def test_in_half_precision_only_the_backbone_is_half(files, published, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(published, file)
    network = files.load(file, dtype=torch.bfloat16).model.diffusion_model
    assert network.backbone.encoder.layer[0].mlp.weights_in.weight.dtype == torch.bfloat16
    assert network.gs_head.projects[0].weight.dtype == network.cam_enc.pose_branch.fc1.weight.dtype == torch.float32
    with torch.no_grad():
        found = network(pictures(3).bfloat16(), path(3).w2c[None], path(3).K[None], down_ratio=2)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in found.values())


def test_what_the_device_is_best_at_is_the_default_and_widths_that_the_host_does_not_know_are_refused(
    da3, files, weights, tmp_path, monkeypatch
):
    file, asked = tmp_path / "model.safetensors", []
    save_file(weights, file)
    monkeypatch.setattr(da3.management, "should_use_bf16", lambda device: True)
    monkeypatch.setattr(
        da3.comfy.sd,
        "load_diffusion_model_state_dict",
        lambda *args, model_options: asked.append(model_options["dtype"]),
    )
    with pytest.raises(ValueError, match="no Depth Anything 3 of width 384"):
        files.load(file)
    assert asked == [torch.bfloat16]


def test_memory_grows_with_the_views_and_heads_by_groups(network):
    some, more, most = (network.memory(views, 476, 826) for views in (32, 64, 128))
    assert most - more == pytest.approx(2 * (more - some), rel=0.01)  # the heads' share is the same for all of them
    assert network.memory(128, 476, 826, down_ratio=0) < most


# --------------------------------------------------------------------------------------------- our side of the contract


@pytest.fixture(scope="module")
def reconstructor(comfy_host):
    return importlib.import_module("lyra_core.models.reconstructor")


def frames(count=FRAMES, size=(60, 90)):
    return torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(2))


def test_views_come_with_cameras_for_the_size_of_the_frames(reconstructor, patcher):
    views = reconstructor.Reconstructor(patcher)(frames(), None, True)
    assert views.depth.shape == (FRAMES, 56, 84) and views.raw.shape == (FRAMES, 28, 42, 37)
    assert views.cameras.size == (60, 90)
    # the network's principal point is the middle
    assert_close(views.cameras.K[:, :2, 2], torch.tensor([[44.5, 29.5]]).expand(FRAMES, 2))


def test_without_gaussians_their_head_stays_silent(reconstructor, patcher):
    views = reconstructor.Reconstructor(patcher)(frames(), None, False)
    assert views.raw is None and views.density is None


def test_the_host_is_asked_for_the_model_and_room_to_run(reconstructor, patcher, monkeypatch):
    asked = []
    monkeypatch.setattr(
        reconstructor.management, "load_models_gpu", lambda *args, **kwargs: asked.append((args, kwargs))
    )
    reconstructor.Reconstructor(patcher)(frames(), None, True)
    ((models,), kwargs) = asked[0]
    assert models == [patcher] and kwargs["memory_required"] > 1 << 20


def test_groups_of_frames_are_reported_and_an_interrupt_ends_it_between_them(reconstructor, patcher, monkeypatch):
    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    steps = []
    look = reconstructor.Reconstructor(patcher, on_step=lambda done, total: steps.append((done, total)))
    look(frames(2), None, False)
    assert steps == [(0, 1), (1, 1)]
    monkeypatch.setattr(reconstructor.management, "load_models_gpu", lambda *args, **kwargs: None)
    monkeypatch.setattr(reconstructor.management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(Stopped):
        look(frames(2), None, False)
    assert len(steps) == 2


def test_another_depth_anything_is_refused(reconstructor, tiny_models, tmp_path):
    import comfy.sd

    plain = comfy.sd.load_diffusion_model(str(tiny_models.write_da3(tmp_path / "mono.safetensors")))
    with pytest.raises(ValueError, match="no Gaussian head"):
        reconstructor.Reconstructor(plain)
    with pytest.raises(ValueError, match="no metres"):
        reconstructor.metres(reconstructor_of(tmp_path, tiny_models))


def reconstructor_of(folder, tiny_models):
    module = importlib.import_module("lyra_core.models.da3_files")
    return module.load(tiny_models.write_da3_gaussians(folder / "giant.safetensors"), dtype=torch.float32)


@pytest.fixture(scope="module")
def metric(comfy_host, tiny_models, tmp_path_factory):
    """A network for single frames that sees sky, as the metric one; its random sky is everywhere, so none is."""
    import comfy.sd

    file = tiny_models.write_da3(tmp_path_factory.mktemp("metric") / "mono.safetensors")
    model = comfy.sd.load_diffusion_model(str(file))
    network = model.model.diffusion_model
    network.register_forward_hook(lambda module, args, found: {**found, "sky": 0 * found["sky"]})
    return model


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (33, 50)])  # the last one is another size when fitted twice
def test_metres_are_those_of_a_second_network_that_sees_each_frame_alone(reconstructor, patcher, metric, size):
    pictures = frames(3, size)
    views = reconstructor.Reconstructor(patcher)(pictures, None, False)
    moved = reconstructor.metres(metric)(pictures, views)
    scale = float(moved.depth.median() / views.depth.median())
    assert_close(moved.depth, scale * views.depth)
    assert_close(moved.cameras.centers, scale * views.cameras.centers)
    assert_close(moved.cameras.K, views.cameras.K)
    assert moved.cameras.size == size
    longest = max(views.depth.shape[1:])
    pixels = reconstructor.prepared(pictures, longest)
    with torch.no_grad():
        alone = torch.cat([metric.model.diffusion_model(picture[None, None])["depth"] for picture in pixels])
    focal = views.cameras.resized(tuple(pixels.shape[2:])).K.diagonal(dim1=1, dim2=2)[:, :2].mean(1)
    expected = (alone * focal[:, None, None] / 300).mean() / views.depth.mean()
    assert scale == pytest.approx(float(expected), rel=0.1)  # both depths are nearly the same everywhere


def test_an_interrupt_ends_metres_between_frames(reconstructor, patcher, metric, monkeypatch):
    views = reconstructor.Reconstructor(patcher)(frames(3), None, False)
    seen, loaded = [], []

    def stop():
        seen.append(1)
        if len(seen) == 2:
            raise InterruptedError

    monkeypatch.setattr(reconstructor.management, "load_models_gpu", loaded.append)
    monkeypatch.setattr(reconstructor.management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(InterruptedError):
        reconstructor.metres(metric)(frames(3), views)
    assert loaded == [[metric]]


def test_the_longest_side_is_as_asked_and_the_gaussians_are_as_coarse_as_asked(reconstructor, patcher):
    views = reconstructor.Reconstructor(patcher, 1, 42)(frames(2), None, True)
    assert views.depth.shape == (2, 28, 42) and views.raw.shape == (2, 28, 42, 37)
    assert views.cameras.size == (60, 90)
    with pytest.raises(ValueError, match="every 0 pixels"):
        reconstructor.Reconstructor(patcher, 0)


def test_the_network_is_told_of_cameras_in_the_pixels_that_it_sees(reconstructor, patcher, monkeypatch):
    told = []
    forward = patcher.model.diffusion_model.forward
    monkeypatch.setattr(
        patcher.model.diffusion_model,
        "forward",
        lambda *args, **kwargs: told.append(kwargs) or forward(*args, **kwargs),
    )
    reconstructor.Reconstructor(patcher)(frames(3, (90, 60)), path(3, (90, 60)), False)
    K = rescaled_as_reference(path(3, (90, 60)), (84, 56)).K
    assert_close(told[0]["intrinsics"], K[None])
    assert told[0]["extrinsics"].shape == (1, 3, 4, 4) and told[0]["down_ratio"] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("depth", "depth is not finite.*bf16 or fp32"), ("extrinsics", "no cameras for these 3 frames")],
)
def test_numbers_that_overflowed_are_refused(reconstructor, patcher, monkeypatch, name, message):
    forward = patcher.model.diffusion_model.forward

    def broken(*args, **kwargs):
        found = forward(*args, **kwargs)
        return {**found, name: found[name] * float("nan")}

    monkeypatch.setattr(patcher.model.diffusion_model, "forward", broken)
    with pytest.raises(ValueError, match=message):
        reconstructor.Reconstructor(patcher)(frames(3), None, False)


def test_it_estimates_depth_for_the_loop(patcher, comfy_host):
    estimators = importlib.import_module("lyra_core.models.depth_estimators")
    cameras = path(3, (60, 90))
    estimate = estimators.Da3Estimator(patcher)(frames(3), cameras, torch.ones(3, 60, 90))
    assert estimate.depth.shape == (3, 60, 90) and (estimate.depth > 0).all()
    assert len(estimate.cameras) == 3


# --------------------------------------------------------------------------------------------------------- the nodes


@pytest.fixture(scope="module")
def nodes(pack, comfy_host, tiny_models):
    """The pack's own classes in the host's list, and a file in its folder of models."""
    import folder_paths

    folder = comfy_host / "models" / "geometry_estimation"
    tiny_models.write_da3_gaussians(folder / "nested.safetensors")
    folder_paths.folder_names_and_paths["geometry_estimation"][0][:] = [str(folder)]
    ours = importlib.import_module("lyra_pack.lyra_core.models.da3_gaussians")
    ours.register()
    yield pack.reconstruct
    importlib.import_module("lyra_core.models.da3_gaussians").register()


@pytest.fixture(scope="module")
def model(nodes):
    return nodes.LoadReconstructor.execute("nested.safetensors", weight_dtype="fp32")[0]


def video(count=12):
    return frames(count, (56, 84))


def test_a_video_without_cameras_becomes_a_splat_with_cameras_of_every_frame(nodes, model):
    splat, cameras, views, view_cameras, depth, report = nodes.Reconstruct.execute(model, images=video(), views=6).args
    assert len(cameras) == 12 and len(view_cameras) == len(depth) == len(views) == 6
    assert_close(views, video()[[0, 2, 4, 6, 8, 11]])
    assert splat.positions.shape == (1, 6 * 28 * (42 - 2), 3) or splat.positions.shape[1] <= 6 * 28 * 42
    assert depth[3].size == (56, 84) and depth[3].source == "frame 6"
    assert f"{splat.positions.shape[1]:,} gaussians" in report


def test_the_faintest_are_pruned_and_the_rest_can_be_saved(nodes, model, tmp_path):
    whole = nodes.Reconstruct.execute(model, images=video(4)).args[0]
    pruned = nodes.Reconstruct.execute(model, images=video(4), prune=0.75).args[0]
    count = whole.positions.shape[1]
    assert pruned.positions.shape[1] == pytest.approx(count / 4, abs=2)
    assert pruned.opacities.min() >= whole.opacities.flatten().sort().values[int(0.75 * count) - 1]
    splat = importlib.import_module("lyra_pack.nodes.splat").from_splat(pruned)
    save_ply(splat, tmp_path / "splat.ply")
    assert len(load_ply(tmp_path / "splat.ply")) == len(splat)


@pytest.mark.parametrize("spacing", [1, 3, 5])
def test_any_spacing_of_gaussians_works(nodes, model, spacing):
    splat = nodes.Reconstruct.execute(model, images=video(2), spacing=spacing, trim_border=False).args[0]
    assert splat.positions.shape[1] == 2 * (56 // spacing) * (84 // spacing)


def test_long_videos_come_in_chunks(nodes, model):
    report = nodes.Reconstruct.execute(model, images=video(12), views=8, chunks=2, overlap=4).args[-1]
    assert "frames 4 to 11: joined" in report and "in 2 chunks" in report


def grown(turn, depth=5.0, size=(48, 64)):
    """A previewed world of 9 frames, whose cameras turn without moving; its second photo shows something else."""
    rooms = {"camera": "cameras", "preview": "world", "world": "world"}
    core = {name: importlib.import_module(f"lyra_pack.lyra_core.{room}.{name}") for name, room in rooms.items()}
    camera = core["camera"].pinhole(size, 60.0)
    photo = torch.rand(*size, 3, generator=torch.Generator().manual_seed(3))
    other = (0.5 * photo, torch.full(size, 77.0), camera)
    begun = core["world"].begin(photo, torch.full(size, depth), camera, [other])
    angles = torch.linspace(0, turn, 9)
    w2c = torch.eye(4).repeat(9, 1, 1)
    w2c[:, 0, 0], w2c[:, 0, 2], w2c[:, 2, 0], w2c[:, 2, 2] = angles.cos(), -angles.sin(), angles.sin(), angles.cos()
    trajectory = core["camera"].Cameras(w2c, camera.K.repeat(9, 1, 1), size)
    return core["preview"].explore(begun, trajectory, chunk_frames=8, count=0)


@pytest.mark.parametrize("size", [(48, 64), (64, 48)])
def test_the_known_depth_of_a_world_gives_the_scale_where_its_cameras_stand_still(nodes, model, size):
    small, large = (grown(0.1, depth, size) for depth in (5.0, 10.0))
    splat, cameras, views, view_cameras, depth, report = nodes.Reconstruct.execute(
        model, world=small, poses="given", views=5
    ).args
    assert "scale from depth" in report
    assert [each.source for each in depth] == ["frame 0", "frame 2", "frame 4", "frame 6", "frame 8"]
    assert_close(views, torch.stack([small.frame(frame).float() / 255 for frame in (0, 2, 4, 6, 8)]))
    known = {keyframe.frame: keyframe.depth for keyframe in small.memory.keyframes}
    ratios = torch.cat([(depth[i].depth / known[frame]).flatten() for i, frame in ((0, 0), (4, 8))])
    assert ratios.median() == pytest.approx(1, rel=0.03)
    assert cameras.size == view_cameras.size == depth[0].size == size and len(cameras) == 9
    assert_close(view_cameras.K, small.cameras.K[:5])
    assert_close(depth[0].K, small.cameras.K[0], rtol=1e-5, atol=1e-4)
    again = nodes.Reconstruct.execute(model, world=large, poses="given", views=5).args[0]
    assert again.positions.abs().median() == pytest.approx(2 * float(splat.positions.abs().median()), rel=0.02)


def test_options_reach_the_network_and_the_gaussians(nodes, model):
    world = grown(0.1)
    plain, fine, all_of_them, wide, followed = (
        nodes.Reconstruct.execute(model, world=world, poses="given", views=2, **options).args
        for options in (
            {},
            {"spacing": 1, "resolution": 42, "trim_border": False},
            {"trim_border": False, "harmonics": True},
            {"largest": 2.0, "trim_border": False},
            {"follow": "given", "alignment": "orientation"},
        )
    )
    assert plain[0].positions.shape[1] == 2 * 21 * (35 - 2)
    assert fine[0].positions.shape[1] == 2 * 28 * 42
    assert all_of_them[0].positions.shape[1] == 2 * 21 * 35
    assert plain[0].sh.shape[2] == 1 and all_of_them[0].sh.shape[2] == 9
    assert_close(wide[0].scales, 2 * all_of_them[0].scales, rtol=1e-3, atol=1e-6)
    assert_close(followed[3].w2c, world.cameras[[0, 8]].w2c)
    assert not torch.allclose(plain[3].w2c, world.cameras[[0, 8]].w2c, atol=1e-4)


def test_a_metric_model_gives_the_size_and_a_model_without_metres_is_refused(nodes, model, metric):
    def positions(times):
        """All of them, by a metric network that says everything is so far away."""
        hook = metric.model.diffusion_model.register_forward_hook(
            lambda module, args, found: {**found, "depth": times * found["depth"]}
        )
        splat = nodes.Reconstruct.execute(model, images=frames(3, (33, 50)), metric_model=metric).args[0]
        hook.remove()
        return splat.positions

    near = positions(50)  # the network does not tell paths apart that are longer than a tenth of a unit
    assert_close(positions(200), 4 * near, rtol=1e-3, atol=1e-3 * float(near.abs().max()))
    with pytest.raises(ValueError, match="no metres"):
        nodes.Reconstruct.execute(model, images=frames(3, (33, 50)), metric_model=model)


def test_cameras_may_be_more_exact_than_the_network(nodes, model):
    double = path(4)
    double = type(double)(double.w2c.double(), double.K.double(), double.size)
    plain, exact = (
        nodes.Reconstruct.execute(model, images=video(4), cameras=cameras, poses="given", follow="given").args[0]
        for cameras in (path(4), double)
    )
    assert_close(exact.positions, plain.positions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either a world or the images"),
        ({"images": video(1)}, "no second camera"),
        ({"images": video(4), "cameras": path(5)}, "4 images and 5 cameras"),
        ({"images": video(4), "cameras": path(4, (60, 90))}, r"\(60, 90\), the images are \(56, 84\)"),
        ({"images": video(4), "poses": "given"}, "no cameras to follow"),
        ({"images": torch.rand(4, 56, 84, 2)}, "1, 3 or 4 channels"),
        ({"images": torch.full((4, 56, 84, 3), torch.nan)}, "NaN or infinite pixels"),
        ({"images": video(4), "world": ...}, "either a world or the images"),
        ({"world": ..., "cameras": path(9)}, "a world has cameras of its own"),
        ({"images": video(4), "cameras": path(4), "alignment": "icp"}, "input 'alignment' is 'icp'; allowed: one of orientation, centers"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(nodes, model, inputs, message):
    if "world" in inputs:
        inputs = {**inputs, "world": grown(0.1)}
    with pytest.raises(ValueError, match=message):
        nodes.Reconstruct.execute(model, **inputs)


def test_pictures_with_transparency_are_taken_without_it(nodes, model):
    pictures = video(3)
    clear = torch.cat([pictures, torch.rand(3, 56, 84, 1)], 3)
    plain, found = (nodes.Reconstruct.execute(model, images=images).args for images in (pictures, clear))
    assert_close(found[0].positions, plain[0].positions)
    assert_close(found[2], pictures)
