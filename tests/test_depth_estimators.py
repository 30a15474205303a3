"""The host's depth models behind our contract, tiny and with random weights, loaded as the host loads them."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.memory.depth_alignment import Estimate, in_scene_units

SIZE = (64, 96)
FRAMES = 3


def moving(frames=FRAMES, size=SIZE):
    cameras = pinhole(size, 80.0, frames)
    w2c = cameras.w2c.clone()
    w2c[:, 0, 3] = -0.3 * torch.arange(frames)
    w2c[:, 2, 3] = 0.1 * torch.arange(frames) ** 2
    return replace(cameras, w2c=w2c)


def pictures(frames=FRAMES, size=SIZE):
    return torch.rand(frames, *size, 3, generator=torch.Generator().manual_seed(0))


def flat(value=4.0, frames=FRAMES):
    return torch.full((frames, *SIZE), value)


def randomize(network):
    """Weights with which every part of the network has a say."""
    random = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim < 2:
            values = torch.randn(weight.shape, generator=random) * 0.1
            scale = "norm" in name and name.endswith("weight") or "lambda" in name or "gamma" in name
            weight.data = values + float(scale)
        else:
            weight.data = torch.randn(weight.shape, generator=random) / math.sqrt(weight[0].numel())
    return {name: weight.detach().clone() for name, weight in network.state_dict().items()}


def da3_weights(multiview: bool):
    """A state dict that the host recognises as Depth Anything 3: Small's backbone under a tiny head."""
    import comfy.ops
    from comfy.ldm.depth_anything_3.model import DepthAnything3Net

    network = DepthAnything3Net(
        "vits",
        (5, 7, 9, 11),
        *(4 if multiview else -1,) * 3,
        cat_token=multiview,
        head_type="dualdpt" if multiview else "dpt",
        head_dim_in=768 if multiview else 384,
        head_output_dim=2 if multiview else 1,
        head_features=8,
        head_out_channels=(8, 8, 8, 8),
        head_use_sky_head=not multiview,
        has_cam_enc=multiview,
        has_cam_dec=multiview,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    return randomize(network)


@pytest.fixture(scope="module")
def estimators(comfy_host):
    return importlib.import_module("lyra_core.models.depth_estimators")


@pytest.fixture(scope="module")
def da3(comfy_host, tmp_path_factory):
    """As LoadDA3Model: a file through the host's own loader, once with cameras and once without."""
    import comfy.sd
    import comfy.utils

    models = {}
    for multiview in (True, False):
        file = str(tmp_path_factory.mktemp("da3") / "model.safetensors")
        comfy.utils.save_torch_file(da3_weights(multiview), file)
        models[multiview] = comfy.sd.load_diffusion_model(file, model_options={"dtype": torch.float32})
    return models


@pytest.fixture(scope="module")
def moge(comfy_host):
    """As LoadMoGeModel. In float32, because what MoGe needs isn't there for half precision on a CPU."""
    import comfy.ops
    from comfy.cli_args import args
    from comfy.ldm.moge.model import MoGeModel, MoGeModelV1

    before, args.fp32_text_enc = args.fp32_text_enc, True
    backbone = {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 4,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
    }
    network = MoGeModelV1(backbone, [8, 8, 8], dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    weights = randomize(network)
    weights["image_mean"], weights["image_std"] = network.image_mean, network.image_std
    # a mask that is true nearly everywhere, as of a room
    weights["head.output_block.1.2.bias"] = torch.full((1,), 3.0)
    yield MoGeModel(weights)
    args.fp32_text_enc = before


class Watched:
    """What the host's memory management was asked to load, in order."""

    def __init__(self, monkeypatch):
        import comfy.model_management as management

        self.loaded, original = [], management.load_models_gpu

        def load(models, *args, **kwargs):
            self.loaded += [(model, kwargs.get("memory_required", 0)) for model in models]
            return original(models, *args, **kwargs)

        monkeypatch.setattr(management, "load_models_gpu", load)


@pytest.fixture
def watched(comfy_host, monkeypatch):
    return Watched(monkeypatch)


@pytest.fixture
def seen(da3, monkeypatch):
    """What the networks were given: pictures and conditions, per call."""
    calls = []
    for model in da3.values():
        network = model.model.diffusion_model
        original = network.forward

        def forward(image, *args, _original=original, **kwargs):
            calls.append((image, kwargs))
            return _original(image, *args, **kwargs)

        monkeypatch.setattr(network, "forward", forward)
    return calls


# Depth Anything 3


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (48, 112)])
@pytest.mark.parametrize("multiview", [True, False])
def test_depth_has_the_size_of_the_frames_and_is_usable(estimators, da3, multiview, size):
    cameras = moving(size=size)
    found = estimators.Da3Estimator(da3[multiview])(pictures(size=size), cameras, torch.zeros(FRAMES, *size))
    assert found.depth.shape == (FRAMES, *size) and found.depth.dtype == torch.float32
    assert torch.isfinite(found.depth).all() and (found.depth >= 0).all()
    assert not found.depth.requires_grad and not found.scaled
    assert (found.cameras is not None) == multiview
    if multiview:
        assert len(found.cameras) == FRAMES and found.cameras.size == size
        assert torch.isfinite(found.cameras.w2c).all() and (found.cameras.K[:, 0, 0] > 0).all()


def test_views_are_seen_together_and_single_ones_alone(estimators, da3, seen):
    for multiview in (True, False):
        estimators.Da3Estimator(da3[multiview])(pictures(), moving(), flat())
    assert [tuple(image.shape[:2]) for image, _ in seen] == [(1, FRAMES), (1, 1), (1, 1), (1, 1)]


def test_the_model_looks_at_the_frames_own_size_or_at_the_one_asked_for(estimators, da3, seen):
    for resolution, expected in ((0, (70, 98)), (140, (98, 140)), (42, (28, 42))):
        estimators.Da3Estimator(da3[True], resolution)(pictures(), moving(), flat())
        assert tuple(seen[-1][0].shape[-2:]) == expected
    assert estimators.longest_side((480, 832)) == 832


def test_the_depth_is_the_networks_own_stretched_to_the_frames(estimators, da3, monkeypatch):
    from comfy.ldm.depth_anything_3.preprocess import preprocess_image
    from comfy_extras.nodes_depth_anything_3 import DA3Inference

    monkeypatch.setattr(estimators, "prepared", preprocess_image)  # theirs are resampled in another way than ours
    mode = {"mode": "multiview", "ref_view_strategy": "saddle_balanced", "pose_method": "cam_dec"}
    with torch.no_grad():
        theirs = DA3Inference.execute(da3[True], pictures(), 96, "upper_bound_resize", mode).args[0]
    ours = estimators.Da3Estimator(da3[True], conditioned=False)(pictures(), moving(), flat())
    assert_close(ours.depth, theirs["depth"])
    assert_close(ours.cameras.w2c[:, :3], theirs["extrinsics"][0])
    # theirs are of 98x70 pixels, whose corner is at the origin; ours of 96x64, with the first pixel's centre there
    K = theirs["intrinsics"][0]
    assert_close(ours.cameras.K[:, 0, 0], K[:, 0, 0] * 96 / 98)
    assert_close(ours.cameras.K[:, 1, 1], K[:, 1, 1] * 64 / 70)
    assert_close(ours.cameras.K[:, :2, 2], torch.tensor([[47.5, 31.5]]).expand(FRAMES, 2))


def test_a_camera_encoder_is_told_the_cameras_as_it_was_trained_with(estimators, da3, seen):
    cameras = moving()
    turned = replace(cameras, w2c=cameras.w2c @ torch.linalg.inv(moving().w2c[2]))  # the first stands anywhere
    for given in (cameras, turned):
        estimators.Da3Estimator(da3[True])(pictures(), given, flat())
    (image, first), (_, second) = seen
    w2c, K = first["extrinsics"][0], first["intrinsics"][0]
    assert_close(w2c[0], torch.eye(4))
    centers = Cameras(w2c, K, SIZE).centers
    assert_close(centers.norm(dim=1).median(), torch.tensor(1.0))
    directions = (cameras.centers - cameras.centers[0])[1:]
    assert_close(
        centers[1:] / directions,
        torch.full((2, 1), float(1 / directions[0].norm())).expand(2, 3).where(directions != 0, torch.tensor(math.nan)),
        equal_nan=True,
    )
    assert_close(second["extrinsics"], first["extrinsics"], atol=1e-5, rtol=0)
    height, width = image.shape[-2:]
    assert_close(K[:, 0, 0], cameras.K[:, 0, 0] * width / SIZE[1])
    assert_close(K[:, 1, 1], cameras.K[:, 1, 1] * height / SIZE[0])


def test_cameras_that_stand_still_are_told_too(estimators, da3, seen):
    still = replace(moving(), w2c=torch.eye(4).repeat(FRAMES, 1, 1))
    found = estimators.Da3Estimator(da3[True])(pictures(), still, flat())
    told = seen[-1][1]["extrinsics"]
    assert torch.isfinite(found.depth).all()
    assert_close(told[0], still.w2c)
    nearly = replace(still, w2c=still.w2c + 1e-3 * (moving().w2c - still.w2c))
    estimators.Da3Estimator(da3[True])(pictures(), nearly, flat())
    assert_close(Cameras(seen[-1][1]["extrinsics"][0], nearly.K, SIZE).centers, 10 * nearly.centers)  # a tenth at least


def test_cameras_matter_only_where_they_are_told(estimators, da3, seen):
    other = replace(moving(), K=moving().K * torch.tensor([[2.0], [2.0], [1.0]]))
    found = {
        conditioned: [
            estimators.Da3Estimator(da3[True], 0, conditioned)(pictures(), c, flat()) for c in (moving(), other)
        ]
        for conditioned in (True, False)
    }
    assert not torch.equal(found[True][0].depth, found[True][1].depth)
    assert torch.equal(found[False][0].depth, found[False][1].depth)
    assert [set(conditions) for _, conditions in seen] == [{"extrinsics", "intrinsics"}] * 2 + [set()] * 2


def test_the_camera_encoder_attends_with_the_heads_it_was_trained_with(estimators, da3, seen, monkeypatch):
    network = da3[True].model.diffusion_model
    heads, original = [], network.cam_enc.forward

    def forward(*args):
        heads.append([block.attn.num_heads for block in network.cam_enc.trunk])
        return original(*args)

    monkeypatch.setattr(network.cam_enc, "forward", forward)
    estimators.Da3Estimator(da3[True])(pictures(), moving(), flat())
    assert heads == [[16] * 4]
    import comfy.model_management as management

    management.load_models_gpu([da3[True]])  # whoever uses the host's own model next finds it unchanged
    assert [block.attn.num_heads for block in network.cam_enc.trunk] == [6] * 4


def test_one_frame_has_depth_and_no_camera(estimators, da3):
    found = estimators.Da3Estimator(da3[True])(pictures(1), moving(1), flat(frames=1))
    assert found.depth.shape == (1, *SIZE) and found.cameras is None


def test_cameras_that_the_network_can_not_decode_are_none(estimators, da3, caplog):
    broken = {"extrinsics": torch.full((1, 2, 3, 4), math.nan), "intrinsics": torch.eye(3).expand(1, 2, 3, 3)}
    assert estimators.predicted_cameras(broken, (70, 98), SIZE) is None
    assert "no cameras for these 2 frames" in caplog.text


def test_frames_seen_alone_are_brought_to_what_is_known(estimators, da3):
    loose = estimators.Da3Estimator(da3[False], sky="far")(pictures(), moving(), torch.zeros(FRAMES, *SIZE)).depth
    factors = torch.tensor([2.0, 5.0, 0.5])
    known = loose * factors[:, None, None]
    found = estimators.Da3Estimator(da3[False], sky="far")(pictures(), moving(), known).depth
    assert_close(found, known, rtol=1e-3, atol=0)
    depth, how = in_scene_units(Estimate(found), moving(), known)
    assert "scale 1 from the memory" in how
    assert_close(depth, known, rtol=1e-3, atol=0)


def test_sky_is_unknown_or_where_the_reference_puts_it(estimators, da3, monkeypatch):
    depth = 1 + torch.rand(2, 40, 50, generator=torch.Generator().manual_seed(0))
    sky = torch.zeros(2, 40, 50)
    sky[0, :10], sky[0, 10:12] = 0.3, 0.29
    unknown = estimators._without_sky(depth, sky, "unknown")
    assert (
        not unknown[0, :10].any() and torch.equal(unknown[0, 10:], depth[0, 10:]) and torch.equal(unknown[1], depth[1])
    )
    far = estimators._without_sky(depth, sky, "far")
    ground = torch.cat([depth[0, 10:].flatten(), depth[1].flatten()])
    assert_close(far[0, :10], torch.full((10, 50), float(ground.quantile(0.99))))
    assert_close(estimators._without_sky(depth * 1000, sky, "far")[0, :10], torch.full((10, 50), 200.0))
    assert not estimators._without_sky(depth, torch.ones_like(sky), "far").any()
    with pytest.raises(ValueError, match="sky 'blue': expected 'unknown' or 'far'"):
        estimators.Da3Estimator(da3[False], sky="blue")
    network = da3[False].model.diffusion_model
    answer = {"depth": torch.full((1, 70, 98), 3.0), "sky": torch.ones(1, 70, 98)}
    answer["sky"][:, 35:] = 0
    monkeypatch.setattr(network, "forward", lambda image, **_: answer)
    found = estimators.Da3Estimator(da3[False])(pictures(), moving(), torch.zeros(FRAMES, *SIZE)).depth
    assert not found[:, :30].any() and (found[:, 34:] == 3).all()


def test_the_hosts_memory_management_is_asked_for_the_model_and_room_to_run(estimators, da3, moge, watched):
    estimators.Da3Estimator(da3[True])(pictures(), moving(), flat())
    ((model, needed),) = watched.loaded
    assert model.is_clone(da3[True])
    assert needed == FRAMES * 70 * 98 * 384 * 4
    watched.loaded.clear()
    estimators.Da3Estimator(da3[False])(pictures(), moving(), flat())
    assert watched.loaded == [(da3[False], 70 * 98 * 384 * 4)]
    watched.loaded.clear()
    estimators.MogeEstimator(moge, 0)(pictures(1), moving(1), flat(frames=1))
    assert [model for model, _ in watched.loaded] == [moge.patcher]


# MoGe


def test_moge_gives_finite_depth_of_the_frames_size(estimators, moge):
    found = estimators.MogeEstimator(moge, 0)(pictures(2), moving(2), torch.zeros(2, *SIZE))
    assert found.depth.shape == (2, *SIZE) and torch.isfinite(found.depth).all() and (found.depth >= 0).all()
    assert (found.depth > 0).any() and not found.depth.requires_grad
    assert found.cameras is None and not found.scaled


def test_moge_in_a_precision_that_the_device_lacks_says_what_to_do(estimators):
    class Halved:
        def infer(self, *_args, **_options):
            raise NotImplementedError("not implemented for 'Half'")

    with pytest.raises(ValueError, match="--fp32-text-enc.*'Half'"):
        estimators.MogeEstimator(Halved())(pictures(), moving(), flat())


class FakeMoge:
    """Says what it was asked, and a plane at the scale of its own, with a hole."""

    def __init__(self):
        self.asked = []

    def infer(self, image, resolution_level, fov_x):
        self.asked.append((image, resolution_level, fov_x))
        depth = torch.full((1, *image.shape[-2:]), 2.0 * len(self.asked))
        depth[:, :5] = math.inf
        depth[:, 5:8] = -1
        return {"depth": depth}


def test_moge_is_asked_for_each_frame_with_the_field_of_view_it_was_made_for(estimators):
    model, cameras, frames = FakeMoge(), moving(), pictures()
    cameras.K[2, 0, 0] *= 2
    estimators.MogeEstimator(model, 7)(frames, cameras, flat())
    assert [level for _, level, _ in model.asked] == [7, 7, 7]
    assert_close(torch.stack([image[0] for image, _, _ in model.asked]), frames.movedim(-1, 1))
    expected = [2 * math.degrees(math.atan(48 / f)) for f in (80, 80, 160)]
    assert [fov for _, _, fov in model.asked] == pytest.approx(expected)


def test_moges_frames_come_to_the_scale_of_what_is_known_and_its_holes_are_unknown(estimators):
    known = flat(4.0)
    known[1] = 0
    found = estimators.MogeEstimator(FakeMoge())(pictures(), moving(), known).depth
    assert not found[:, :8].any()
    assert_close(found[0, 8:], flat(4.0)[0, 8:])
    assert_close(found[2, 8:], flat(4.0)[2, 8:])
    # nothing is known of the second frame: the middle of factors 2 and 4/6
    assert_close(found[1, 8:], flat(4 * math.sqrt(2 * 4 / 6))[1, 8:])
    lost = estimators.MogeEstimator(FakeMoge())(pictures(), moving(), torch.zeros(FRAMES, *SIZE)).depth
    assert lost[:, 20, 20].tolist() == [2, 4, 6]


def test_the_hosts_moge_takes_the_field_of_view_as_horizontal(comfy_host, moge):
    with torch.no_grad():
        found = moge.infer(pictures(1).movedim(-1, 1), resolution_level=0, fov_x=60.0)
    assert 2 * math.atan(0.5 / float(found["intrinsics"][0, 0, 0])) == pytest.approx(math.radians(60), rel=1e-3)


# memory


def test_memory_keeps_what_is_known_and_fills_the_rest_from_around_it(estimators):
    known = flat(3.0)
    known[:, :, 48:] = 6.0
    holed = known.clone()
    holed[0, 20:30, 10:20] = 0  # in the near half
    holed[1, :, 44:52] = 0  # across the edge: what is farther continues
    holed[2] = 0
    found = estimators.MemoryEstimator()(pictures(), moving(), holed)
    assert found.scaled and found.cameras is None
    assert torch.equal(found.depth[holed > 0], holed[holed > 0])
    assert_close(found.depth[0, 20:30, 10:20], torch.full((10, 10), 3.0), rtol=0.02, atol=0)
    assert (found.depth[1, :, 44:52] > 4.5).all() and (found.depth[1] <= 6.0 + 1e-4).all()
    assert torch.equal(found.depth[2], torch.full(SIZE, 6.0))  # it looks away from all that is known
    assert in_scene_units(found, moving(), holed)[0] is not None


def test_memory_gives_what_is_known_as_it_is_and_leaves_its_input_alone(estimators):
    known = flat()
    before = known.clone()
    assert torch.equal(estimators.MemoryEstimator()(pictures(), moving(), known).depth, known)
    known[0, 3, 3] = before[0, 3, 3] = 0
    found = estimators.MemoryEstimator()(pictures(), moving(), known).depth
    assert torch.equal(known, before) and found is not known and (found > 0).all()


def test_memory_that_knows_nothing_is_refused(estimators):
    with pytest.raises(ValueError, match="knows nothing of these 3 frames; use a depth model"):
        estimators.MemoryEstimator()(pictures(), moving(), torch.zeros(FRAMES, *SIZE))


# progress and interrupts


@pytest.fixture
def all_four(estimators, da3):
    return {
        "views together": (estimators.Da3Estimator(da3[True]), [(0, 1), (1, 1)]),
        "views alone": (estimators.Da3Estimator(da3[False]), [(i, 3) for i in range(4)]),
        "moge": (estimators.MogeEstimator(FakeMoge()), [(i, 3) for i in range(4)]),
        "memory": (estimators.MemoryEstimator(), [(i, 3) for i in range(4)]),
    }


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["views together", "views alone", "moge", "memory"])
def test_progress_is_told_and_can_stop(all_four, name):
    estimator, expected = all_four[name]
    steps = []
    estimator(pictures(), moving(), flat(), lambda *step: steps.append(step))
    assert steps == expected

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        estimator(pictures(), moving(), flat(), stop)


@pytest.mark.parametrize("name", ["views together", "views alone", "moge", "memory"])
def test_the_hosts_interrupt_stops_an_estimate(all_four, name):
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        all_four[name][0](pictures(), moving(), flat())
    all_four[name][0](pictures(), moving(), flat())  # and only once


# nodes


@pytest.fixture(scope="module")
def nodes(pack):
    return importlib.import_module("lyra_pack.nodes.depth_estimator")


def test_the_nodes_give_estimators_of_their_inputs(nodes):
    model = object()
    da3 = nodes.Da3Estimator.execute(model, 140, False, "far").args[0]
    assert (da3.model, da3.resolution, da3.conditioned, da3.sky) == (model, 140, False, "far")
    assert nodes.Da3Estimator.execute(model).args[0] == nodes.Da3Estimator.execute(model, 0, True, "unknown").args[0]
    moge = nodes.MogeEstimator.execute(model, 3).args[0]
    assert (moge.model, moge.detail) == (model, 3)
    assert callable(nodes.MemoryEstimator.execute().args[0])


def test_the_nodes_fit_the_hosts_loaders_and_explain_every_input(nodes):
    from comfy_extras.nodes_depth_anything_3 import LoadDA3Model
    from comfy_extras.nodes_moge import LoadMoGeModel

    schemas = [node.GET_SCHEMA() for node in nodes.NODES]
    assert [s.node_id for s in schemas] == ["Lyra2DA3Estimator", "Lyra2MoGeEstimator", "Lyra2MemoryEstimator"]
    assert all([o.io_type for o in s.outputs] == ["LYRA2_DEPTH_ESTIMATOR"] for s in schemas)
    assert all(s.description and all(i.tooltip for i in s.inputs) for s in schemas)
    for schema, loader in zip(schemas, (LoadDA3Model, LoadMoGeModel), strict=False):
        assert schema.inputs[0].io_type == loader.GET_SCHEMA().outputs[0].io_type
    for node, schema in zip(nodes.NODES, schemas, strict=True):
        defaults = {i.id: i.default for i in schema.inputs if hasattr(i, "default") and i.default is not None}
        model = {i.id: None for i in schema.inputs if i.id not in defaults}
        assert node.execute(**model, **defaults).args[0] == node.execute(*model.values()).args[0]
