"""The host's own cameras and ours: proven by the host's own functions and by its splat renderer."""

import importlib
import math

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole, project, quaternion_to_rotation
from lyra_core.cameras.load3d import FOVS, from_load3d, to_load3d

SIZE = (128, 192)


@pytest.fixture(scope="module")
def host(comfy_host):
    return importlib.import_module("comfy_extras.nodes_gaussian_splat")


def turned(frames=7, size=SIZE, focal=150.0):
    """Cameras all around, at all angles, rolled too."""
    generator = torch.Generator().manual_seed(2)
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, :3, :3] = quaternion_to_rotation(torch.randn(frames, 4, generator=generator))
    w2c[:, :3, 3] = torch.randn(frames, 3, generator=generator) + torch.tensor([0.0, 0, 4])
    return Cameras(w2c, pinhole(size, focal, frames).K, size)


def drawn_at(host, points, camera_info, size):
    """The pixel (x, y) where the host's Render Splat draws each point (N, 3), as a small gaussian of its own."""
    from comfy_api.latest import Types

    found = []
    for point in points:
        splat = Types.SPLAT(point[None, None], torch.full((1, 1, 3), 0.02), torch.tensor([[[1.0, 0, 0, 0]]]),
                            torch.ones(1, 1, 1), torch.full((1, 1, 1, 3), 1.0))
        settings = dict(frames=1, splat_scale=1.0, sharpen=1.0, headlight_shading=0.0, opacity_threshold=0.0, background="#000000",
                        render_style="color", camera_info=camera_info)
        mask = host.RenderSplat.execute(splat, size[1], size[0], **settings).args[1][0]
        assert mask.max() > 0.5
        y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
        found.append(torch.stack([(x * mask).sum(), (y * mask).sum()]) / mask.sum())
    return torch.stack(found)


def seen(camera, generator, count=3):
    """World points that a camera sees well inside its picture."""
    height, width = camera.size
    pixels = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.7, height * 0.7]) + torch.tensor([width, height]) * 0.15
    rays = torch.cat([pixels, torch.ones(count, 1)], 1) @ camera.K_inverse[0].T
    local = rays * (2 + 2 * torch.rand(count, 1, generator=generator))
    return local @ camera.c2w[0, :3, :3].T + camera.centers[0]


@pytest.mark.parametrize("size, fov_of", [((128, 192), "vertical"), ((128, 192), "shorter side"), ((192, 128), "shorter side")])
def test_the_host_draws_a_gaussian_at_the_pixel_that_project_says(host, size, fov_of):
    generator, cameras = torch.Generator().manual_seed(1), turned(4, size)
    for i, info in enumerate(to_load3d(cameras, fov_of=fov_of)):
        points = seen(cameras[i], generator)
        expected = project(points, cameras[i])[0][0]
        # the host's renderer has the middle of a picture at width / 2, half a pixel from where its own viewers have it
        assert_close(drawn_at(host, points, info, size), expected + 0.5, atol=0.25, rtol=0)


def test_ours_see_what_the_host_s_orbit_and_look_at_cameras_see(host):
    generator = torch.Generator().manual_seed(4)
    infos = [host._lookat_camera_info([2.0, 1.5, 3.0], [0.1, 0.2, 0.0], 40.0, "cpu"),
             host._orbit_camera_info(35.0, 30.0, 4.0, 35.0, torch.zeros(3), "cpu"),
             host._lookat_camera_info([1.0, 0.5, -3.0], [0.0, 0.0, 0.0], 30.0, "cpu", zoom=1.5, roll=25.0)]
    infos.append({k: v for k, v in infos[0].items() if k != "quaternion"})     # by its target alone
    cameras = from_load3d(infos, SIZE)
    for i, info in enumerate(infos):
        points = seen(cameras[i], generator, 2)
        assert_close(drawn_at(host, points, info, SIZE), project(points, cameras[i])[0][0] + 0.5, atol=0.25, rtol=0)


@pytest.mark.parametrize("fov_of", FOVS)
@pytest.mark.parametrize("size", [(480, 832), (832, 480), (64, 64)])
def test_there_and_back_nothing_changes(size, fov_of):
    cameras = turned(5, size)
    K = cameras.K.clone()
    K[1] += torch.tensor([[40.0, 0, 12], [0, 0, -9], [0, 0, 0]])
    cameras = Cameras(cameras.w2c, K, size)
    infos = to_load3d(cameras, 2.5, fov_of)
    again = from_load3d(infos, size, fov_of)
    assert_close(again.w2c, cameras.w2c, atol=1e-5, rtol=0)
    assert_close(again.K, cameras.K, atol=1e-3, rtol=0)
    assert [sorted({"pixel_aspect", "shift"} & info.keys()) for info in infos[:2]] == [[], ["pixel_aspect", "shift"]]
    for info, center in zip(infos, cameras.centers.tolist(), strict=True):
        ahead = [info["target"][k] - info["position"][k] for k in "xyz"]
        assert math.hypot(*ahead) == pytest.approx(2.5, rel=1e-5)
        assert [info["position"][k] for k in "xyz"] == pytest.approx([center[0], -center[1], -center[2]], abs=1e-5)


def test_one_camera_many_and_lists_of_lists_are_all_taken():
    one = to_load3d(turned(1))[0]
    assert len(from_load3d(one, SIZE)) == 1 and len(from_load3d([one, [one, one]], SIZE)) == 3
    plain = {"position": {"x": 0, "y": 0, "z": 3}, "target": {"x": 0, "y": 0, "z": 0}, "zoom": 1, "cameraType": "perspective"}
    camera = from_load3d(plain, SIZE)
    assert_close(camera.centers[0], torch.tensor([0.0, 0, -3]))
    assert float(camera.fov.rad2deg()) == pytest.approx(35)     # the host's own where it isn't said
    assert_close(camera.w2c[0, :3, :3], torch.eye(3))


@pytest.mark.parametrize("change, says", [
    (dict(cameraType="orthographic"), "camera 1 is orthographic"), (dict(fov=180), "fov must be between"),
    (dict(fov=0.2), "field of view"), (dict(quaternion=dict(x=0, y=0, z=0, w=0)), "zero quaternion"),
    (dict(position=dict(x="a")), "camera 1: position"), (dict(zoom=-1), "zoom positive"),
    (dict(quaternion=None, target=None, position=None), "stands at its target")])
def test_what_is_no_pinhole_is_refused(change, says):
    one = to_load3d(turned(1))[0]
    with pytest.raises(ValueError, match=says):
        from_load3d([one, one | change], SIZE)


@pytest.mark.parametrize("nothing", [None, [], [[]], "a camera"])
def test_no_camera_is_said(nothing):
    with pytest.raises(ValueError, match="no camera|found a str"):
        from_load3d(nothing, SIZE)


def test_the_nodes_take_and_give_one_many_and_batches(pack):
    nodes, cameras = pack.load3d, turned(7)
    out = nodes.CamerasToLoad3D.execute(cameras, 2, 3, 1.0, "vertical")
    one_by_one, batch, report = out.args
    assert len(one_by_one) == len(batch) == 3 and "3 of 7 cameras" in report
    assert nodes.CamerasToLoad3D.define_schema().outputs[0].is_output_list
    for given in ([batch], one_by_one, [tuple(batch)]):
        again = nodes.CamerasFromLoad3D.execute(given, [SIZE[1]], [SIZE[0]], ["vertical"]).args[0]
        assert_close(again.w2c, cameras[2:5].w2c, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="there are 7 cameras; there is none from 7 on"):
        nodes.CamerasToLoad3D.execute(cameras, 7, 1, 1.0, "vertical")
    K = cameras.K.clone()
    K[:, 0, 2] += 20
    assert "beside the middle" in nodes.CamerasToLoad3D.execute(Cameras(cameras.w2c, K, SIZE), 0, 0, 1.0, "vertical").args[2]
    K[:, 0, 1] = 5
    with pytest.raises(ValueError, match="no place for a skew of 5"):
        nodes.CamerasToLoad3D.execute(Cameras(cameras.w2c, K, SIZE), 0, 0, 1.0, "vertical")
