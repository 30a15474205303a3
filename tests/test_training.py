"""Learning: windows, what training does to them, histories that the network spoils, the loss and its steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from learners import ENCODERS, LAYOUT, SMALL, Means, Painter, exactly, generator, look, tell, wall
from torch.testing import assert_close

from lyra_core.cameras.camera import join
from lyra_core.conditioning.correspondence import canonical_history, on_latents, ray_maps, warped_correspondences
from lyra_core.conditioning.framepack import FramePackLayout
from lyra_core.training import losses, optimisation
from lyra_core.training.contracts import Encoders, stack
from lyra_core.training.examples import (
    candidate_keyframes,
    corrupted,
    drawn,
    evaluating,
    example,
    prepared,
    retrieved_frames,
    warped_views,
)
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import Window, mirrored
from lyra_core.training.self_augmentation import kind_of, one_step, spoil, training_example

CHUNK, STILL = SMALL.chunk, SMALL.still


@pytest.fixture(scope="module")
def sample():
    return prepared(wall(), ENCODERS.codec, SMALL)


@pytest.fixture(scope="module")
def windows(sample):
    return sample.windows(CHUNK, 13)


# ------------------------------------------------------------------------------------------------------- windows


def test_windows_are_the_chunks_of_a_walk(sample, windows):
    assert windows == [Window(i, 1 + 8 * i, 8) for i in range(5)]
    assert len(sample.windows(CHUNK, 3)) == 3
    with pytest.raises(ValueError, match="wall: 41 frames are too few, a chunk takes 80"):
        sample.windows(80, 13)


def test_a_short_walk_is_gone_there_and_back(sample):
    short = prepared(wall(9), ENCODERS.codec, SMALL)
    walk = mirrored(short, 30)
    assert mirrored(walk, 30) is walk and mirrored(sample, 30) is sample
    for frame, its in enumerate([*range(9), *range(7, 0, -1), *range(9), *range(7, 2, -1)]):
        assert torch.equal(walk.frames[frame], short.frames[its]) and torch.equal(walk.cameras.w2c[frame], short.cameras.w2c[its])
        assert (frame in walk.depths) is (its in short.depths)
        assert frame not in walk.depths or walk.depths[frame] is short.depths[its]
    again = prepared(walk, ENCODERS.codec, SMALL)
    assert_close(again.latents.stream[:, : short.latents.stream.shape[1]], short.latents.stream)
    assert len(again.windows(CHUNK, 13)) == 3 and prepared(again, ENCODERS.codec, SMALL) is again
    assert prepared(replace(short, latents=again.latents), ENCODERS.codec, SMALL).latents is again.latents


def test_history_and_target_are_consecutive_latents_of_one_video(sample, windows):
    shown = example(sample, windows[2], ENCODERS, exactly(), generator())
    video = torch.cat([sample.picture(0).expand(25, *sample.size, 3), sample.pictures(range(1, 41))])
    stream = Means().encode(video)
    assert_close(shown.target, stream[:, 7 + 4 : 7 + 6])
    temporal = shown.condition.history[:, LAYOUT.positions("temporal")]
    assert_close(temporal, stream[:, [0, 6, 7, 8, 9, 10]])


def test_retrieved_frames_are_encoded_alone_the_best_one_last_after_the_first_frame(sample, windows):
    recipe = exactly()
    chosen = retrieved_frames(sample, windows[2], recipe, generator(3))
    shown = example(sample, windows[2], ENCODERS, recipe, generator(3))
    spatial = shown.condition.history[:, LAYOUT.positions("spatial")]
    frames = [0] * (3 - len(chosen)) + chosen
    assert_close(spatial, torch.stack([Means().encode(sample.picture(f)[None])[:, 0] for f in frames], 1))


def test_guides_are_those_of_a_walk(sample, windows):
    recipe, window = exactly(), windows[2]
    chosen = retrieved_frames(sample, window, recipe, generator(3))
    shown = example(sample, window, ENCODERS, recipe, generator(3)).condition
    keyframes, target = [sample.keyframe(f) for f in chosen], sample.cameras_of(window)
    made = torch.cat([canonical_history(LAYOUT, sample.size), warped_correspondences(LAYOUT, keyframes, target)], 1)
    assert_close(shown.correspondences, made)
    spatial = [0] * (3 - len(chosen)) + chosen
    order = [0, *spatial, *[0, 4, 8, 12, 16]]  # the last frame of each slot's latent
    slots = join(*(sample.cameras[f : f + 1] for f in [*order, *window.frames[3::4]]))
    assert_close(shown.rays, on_latents(ray_maps(slots, sample.cameras[16:17])))


def test_memory_is_of_past_and_future_but_not_near_the_chunk(sample, windows):
    known = [keyframe.frame for keyframe in candidate_keyframes(sample, windows[2], exactly(apart=4))]
    assert known == [4, 8, 12, 32, 36, 40]  # not 0, not 16 which is warped, none within 4 frames of 17 .. 24
    walked = [keyframe.frame for keyframe in candidate_keyframes(sample, windows[2], evaluating(SMALL))]
    assert walked == [0, 4, 8, 12, 16]


def test_frames_are_drawn_by_what_they_see():
    seen = {10: 100, 20: 300, 30: 0}
    first = [drawn(seen, 2, 0.02, generator(seed))[-1] for seed in range(2000)]
    shares = [first.count(frame) / 2000 for frame in seen]
    expected = torch.tensor([106.0, 306.0, 6.0])
    assert_close(torch.tensor(shares), expected / expected.sum(), atol=0.03, rtol=0)
    assert drawn({5: 0}, 2, 0.02, generator()) == []
    assert sorted(drawn(seen, 9, 0.02, generator())) == [10, 20, 30]


def test_some_retrieved_frames_are_dropped_in_a_share_of_the_steps(sample, windows):
    whole = [retrieved_frames(sample, windows[3], exactly(), generator(s)) for s in range(24)]
    assert {len(frames) for frames in whole} == {3}
    some = [retrieved_frames(sample, windows[3], exactly(memory_drop=0.5), generator(s)) for s in range(24)]
    assert {len(frames) for frames in some} == {0, 1, 2, 3}
    assert 6 < sum(len(frames) < 3 for frames in some) < 18


def test_corruption_is_noise_of_a_strength_per_slot_and_only_on_retrieved_frames(sample, windows):
    clean = torch.zeros(16, 4000, 3, 4)
    sigmas = corrupted(clean, SMALL, generator()).std((0, 2, 3)).log()
    assert abs(sigmas.mean() + 3) < 0.15 and abs(sigmas.std() - 2) < 0.1
    noisy = example(sample, windows[2], ENCODERS, exactly(corruption=(-1.0, 0.5)), generator(3)).condition.history
    same = example(sample, windows[2], ENCODERS, exactly(), generator(3)).condition.history
    differs = (noisy != same).flatten(2).any(2).any(0)
    assert differs.nonzero()[:, 0].tolist() == LAYOUT.positions("spatial")


def test_captions_hold_from_their_frame_on_and_are_dropped(sample, windows):
    told = [example(sample, w, ENCODERS, exactly(), generator()).condition.text for w in windows[:2]]
    assert_close(told[0], tell("a wall"))
    assert_close(told[1], tell("the same wall"))
    dropped = [example(sample, windows[0], ENCODERS, exactly(text_drop=1.0), generator()).condition.text]
    assert_close(dropped[0], tell(""))


def test_the_newest_frame_is_warped_with_its_own_depth_and_looked_at(sample, windows):
    window = windows[4]
    pictures, seen = warped_views(sample, window, exactly())
    truth = sample.pictures(window.frames)
    assert 0.8 < seen.float().mean() < 1
    assert 5 * (pictures - truth)[seen].abs().mean() < (sample.picture(32) - truth).abs().mean()
    assert (pictures[~seen] == -1).all()
    shown = example(sample, window, ENCODERS, exactly(), generator()).condition
    assert_close(shown.warped, Means().encode(torch.cat([pictures[:1], pictures]))[:, 1:])
    assert_close(shown.image, look(sample.picture(32)))


def test_what_is_remembered_is_what_memory_shows_and_the_warp_does_not(sample):
    # the camera comes back to where it began: frame 40 looks like frame 0, its chunk is warped from frame 32
    recipe, window = exactly(draw=False), Window(4, 33, 8)
    shown = example(sample, window, ENCODERS, recipe, generator())
    _pictures, seen = warped_views(sample, window, recipe)
    unseen = ~seen[3::4]
    share = unseen.unflatten(2, (6, 8)).unflatten(1, (4, 8)).float().mean((2, 4))
    assert (shown.remembered <= share + 1e-6).all()
    assert shown.remembered.sum() > 0.5 * share.sum() > 0
    assert not example(sample, window, ENCODERS, replace(recipe, correspondences=False), generator()).remembered.any()


# ----------------------------------------------------------------------------------------------- what an ablation leaves out


def test_without_correspondences_the_frames_are_shown_but_not_where_they_land(sample, windows):
    full, without = (
        example(sample, windows[2], ENCODERS, exactly(correspondences=on), generator(3)).condition for on in (True, False)
    )
    assert_close(without.correspondences[:, 3:], warped_correspondences(LAYOUT, [], sample.cameras_of(windows[2])))
    assert not torch.equal(full.correspondences, without.correspondences)
    for name in ("history", "warped", "rays", "text", "image"):
        assert_close(getattr(full, name), getattr(without, name))


def test_a_global_cloud_is_warped_instead_of_retrieving(sample):
    window, recipe = Window(4, 33, 8), exactly(draw=False, memory="cloud")
    shown = example(sample, window, ENCODERS, recipe, generator())
    alone = Means().encode(sample.picture(0)[None])[:, 0]
    assert_close(shown.condition.history[:, LAYOUT.positions("spatial")], torch.stack([alone] * 3, 1))
    _one, seen = warped_views(sample, window, exactly(draw=False))
    pictures, more = warped_views(sample, window, recipe)
    assert more.sum() > seen.sum()
    assert (pictures - sample.pictures(window.frames))[more].abs().mean() < 0.1


def test_without_framepack_only_the_newest_latent_is_history(sample, windows):
    shown = example(sample, windows[2], ENCODERS, exactly(history="newest"), generator()).condition
    temporal = shown.history[:, LAYOUT.positions("temporal")]
    assert_close(temporal, sample.latents.stream[:, 10:11].expand_as(temporal))


def test_another_layout_is_followed(sample, windows):
    layout = FramePackLayout.parse("f1s1f1k1_g2")
    shown = example(sample, windows[2], ENCODERS, exactly(layout=layout), generator()).condition
    assert shown.history.shape[1] == 2 and shown.correspondences.shape[:2] == (256, 3)


def test_a_dropped_warp_leaves_black_and_more_that_is_remembered(sample):
    window = Window(4, 33, 8)
    kept, dropped = (
        example(sample, window, ENCODERS, exactly(draw=False, warp_drop=share), generator()) for share in (0.0, 1.0)
    )
    black = Means().encode(torch.full((9, *sample.size, 3), -1.0))[:, 1:]
    assert_close(dropped.condition.warped, black)
    assert dropped.remembered.mean() > 2 * kept.remembered.mean()


# --------------------------------------------------------------------------------------------------- spoilt histories


def test_stage_a_is_x_minus_sigma_v(sample, windows):
    shown, noise = example(sample, windows[1], ENCODERS, exactly(), generator()), torch.randn(16, 2, 4, 6, generator=generator(9))
    painter, timestep = Painter(), losses.nearest_timestep(417.3)
    guess = one_step(painter, shown, timestep, noise)
    noisy, told, _condition = painter.calls[0]
    sigma = timestep / 1000
    assert_close(noisy[0], (1 - sigma) * shown.target + sigma * noise)
    assert told.item() == math.floor(timestep)
    assert torch.equal(guess, noisy[0] - sigma * painter(noisy, told, stack([shown.condition]))[0])


def test_a_chunk_is_spoilt_at_low_noise_and_its_history_goes_through_the_codec(sample, windows):
    times = []
    for seed in range(20):
        painter = Painter().requires_grad_(False)
        spoil(sample, windows[0], painter, ENCODERS, SMALL, generator(seed))
        times.append(painter.calls[0][1].item())
    assert 400 < max(times) <= 500 and min(times) > 0
    painter = Painter().requires_grad_(False)
    spoilt, history = spoil(sample, windows[1], painter, ENCODERS, exactly(), generator())
    assert sorted(spoilt.spoilt) == list(range(17))  # the chunk 9 .. 16, the 6 latents before it, and the photo
    assert_close(history[:, :9], sample.latents.stream[:, :9])
    frames = torch.stack([spoilt.picture(f) for f in range(9, 17)])
    assert_close(history[:, 9:], Means().encode(frames, frames))
    only, _history = spoil(sample, windows[1], painter, ENCODERS, exactly(copy_history=False), generator())
    assert sorted(only.spoilt) == list(range(9, 17))


def test_after_a_spoilt_chunk_pictures_are_spoilt_and_geometry_and_target_are_true(sample, windows):
    recipe = exactly(draw=False)
    spoilt, history = spoil(sample, windows[1], Painter().requires_grad_(False), ENCODERS, recipe, generator())
    shown = example(spoilt, windows[2], ENCODERS, recipe, generator(), history=history)
    plain = example(sample, windows[2], ENCODERS, recipe, generator())
    assert_close(shown.target, plain.target)
    assert_close(shown.condition.rays, plain.condition.rays)
    assert_close(shown.condition.correspondences, plain.condition.correspondences)
    for name in ("history", "warped", "image"):
        assert not torch.equal(getattr(shown.condition, name), getattr(plain.condition, name)), name
    assert_close(shown.condition.image, look(spoilt.spoilt[16]))


def test_half_of_the_steps_are_plain_and_the_others_spoilt_or_from_the_photo():
    draw = generator()
    kinds = [kind_of(step, SMALL, draw) for step in range(2000)]
    assert set(kinds[1::2]) == {"plain"}
    assert 0.66 < kinds[::2].count("spoilt") / 1000 < 0.74 and set(kinds[::2]) == {"spoilt", "photo"}


def test_each_kind_of_step_shows_what_it_says(sample):
    seeds = {kind_of(0, SMALL, generator(seed)): seed for seed in range(20)}
    spoiling, beginning, plain = Painter().requires_grad_(False), Painter(), Painter()
    spoilt = training_example(sample, spoiling, ENCODERS, exactly(), generator(seeds["spoilt"]), 0)
    assert len(spoiling.calls) == 1
    assert all((spoilt.condition.image - look(sample.picture(8 * i))).abs().max() > 1e-3 for i in range(5))
    first = training_example(sample, beginning, ENCODERS, exactly(), generator(seeds["photo"]), 0)
    assert torch.equal(first.target, sample.latents.stream[:, 7:9])
    assert_close(first.condition.history, sample.latents.stream[:, :1].expand_as(first.condition.history))
    training_example(sample, plain, ENCODERS, exactly(), generator(), 1)
    assert not beginning.calls and not plain.calls


def test_without_self_augmentation_nothing_is_spoilt(sample):
    painter = Painter()
    for step in range(0, 6, 2):
        training_example(sample, painter, ENCODERS, exactly(self_augmented=0.0), generator(step), step)
    assert not painter.calls


def test_a_video_of_one_chunk_cannot_be_spoilt_and_says_so():
    with pytest.raises(ValueError, match="9 frames are too few, 17 are needed"):
        training_example(wall(9), Painter(), ENCODERS, exactly(photo_only=0.0), generator(), 0)


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("timestep, expected", [(1000, 0.0), (900, 0.63), (500, 2.08), (100, 0.64), (5, 0.03)])
def test_weights_are_the_references(timestep, expected):
    assert losses.weight_of(losses.nearest_timestep(timestep)) == pytest.approx(expected, abs=0.01)
    assert losses.weight_table().sum() == pytest.approx(1000, rel=1e-4)


def test_noise_levels_are_drawn_from_the_logistic_of_a_normal_number():
    draw = generator()
    times = torch.tensor([losses.draw_timestep(5.0, draw) for _ in range(4000)])
    share = torch.sigmoid(torch.randn(4000, generator=generator(1)))
    expected = 5 * share / (1 + 4 * share) * 1000
    assert_close(times.sort()[0][200::400], expected.sort()[0][200::400], atol=30, rtol=0.05)


def test_the_loss_is_the_formula(sample, windows):
    shown, painter = [example(sample, w, ENCODERS, exactly(), generator()) for w in windows[:2]], Painter()
    recipe, time = exactly(remembered_weight=3.0), losses.nearest_timestep(700)
    loss = losses.flow_loss(painter, shown, recipe, generator(5), time)
    clean = torch.stack([one.target for one in shown])
    noise = torch.randn(clean.shape, generator=generator(5))
    sigma = time / 1000
    velocity = painter(sigma * noise + (1 - sigma) * clean, torch.tensor([time] * 2), stack([one.condition for one in shown]))
    weights = 1 + 2 * torch.stack([one.remembered for one in shown])[:, None]
    assert_close(loss, losses.weight_of(time) * (weights * (velocity - (noise - clean)) ** 2).mean())
    bells = torch.exp(-2 * ((losses.timestep_table().double() - 500) / 1000) ** 2) - math.exp(-0.5)
    bell = math.exp(-2 * ((time - 500) / 1000) ** 2) - math.exp(-0.5)
    assert losses.weight_of(time) == pytest.approx(1000 * bell / float(bells.sum()), rel=1e-3)


def test_a_step_repeats_bit_by_bit(sample):
    def step():
        painter, draw = Painter(), generator(11)
        shown = training_example(sample, painter, ENCODERS, SMALL, draw, 0)
        loss = losses.flow_loss(painter, [shown], SMALL, draw)
        loss.backward()
        return [loss, *(weight.grad for weight in painter.parameters())]

    assert all(torch.equal(one, two) for one, two in zip(step(), step(), strict=True))


def test_overfitting_one_chunk_brings_the_loss_under_a_tenth(sample, windows):
    shown, painter = example(sample, windows[1], ENCODERS, exactly(), generator()), Painter()
    weights = optimisation.trained(painter, optimisation.everything)
    adam, time = optimisation.optimiser(weights.values(), 3e-2), losses.nearest_timestep(850)
    history = []
    for step in range(200):
        loss = losses.flow_loss(painter, [shown], exactly(), generator(step), time)
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append(loss.item())
    assert sum(history[-10:]) / 10 < history[0] / 10


# ---------------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "name, learned",
    [
        ("blocks.3.self_attn.q.weight", True),
        ("blocks.3.self_attn.norm_k.weight", True),
        ("blocks.11.cam_encoder.weight", True),
        ("blocks.0.buffer_encoder.1.weight", True),
        ("clean_patch_embeddings.4.bias", True),
        ("patch_embedding.weight", True),
        ("blocks.3.cross_attn.q.weight", False),
        ("blocks.3.ffn.0.weight", False),
        ("blocks.3.modulation", False),
        ("head.head.weight", False),
        ("time_embedding.0.weight", False),
        ("self_attn_of_nothing.weight", False),
    ],
)
def test_what_is_trained_is_what_the_reference_trains(name, learned):
    assert optimisation.of_lyra2(name) is learned


def test_gradients_are_only_where_the_filter_says(sample, windows):
    painter = Painter()
    weights = optimisation.trained(painter, optimisation.of_lyra2)
    assert set(weights) == {"patch_embedding.weight", "patch_embedding.bias"}
    losses.flow_loss(painter, [example(sample, windows[0], ENCODERS, exactly(), generator())], SMALL, generator(), 500.0).backward()
    assert {name for name, weight in painter.named_parameters() if weight.grad is not None} == set(weights)
    with pytest.raises(ValueError, match="nothing would be learned"):
        optimisation.trained(painter, optimisation.matching("self_attn, ffn"))
    with pytest.raises(ValueError, match="no weights are named"):
        optimisation.matching(" , ")


def test_the_learning_rate_rises_then_falls_in_lines():
    assert optimisation.rate_factor(0) == pytest.approx(1e-6)
    assert optimisation.rate_factor(50) == pytest.approx(0.495, abs=1e-3)
    assert optimisation.rate_factor(100) == pytest.approx(0.99, abs=2e-3)
    assert optimisation.rate_factor(200_000) == pytest.approx(0.695, abs=1e-3)
    assert optimisation.rate_factor(400_000) == optimisation.rate_factor(500_000) == pytest.approx(0.4)


def test_gradients_lose_what_is_no_number_and_are_clipped_together():
    one, two = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    one.grad, two.grad = torch.tensor([math.nan, math.inf, 3.0]), torch.tensor([-math.inf, 0.0, 4.0])
    assert optimisation.tame([one, two], 0.1) == pytest.approx(5.0)
    assert_close(one.grad, torch.tensor([0.0, 0.0, 0.06]), atol=1e-5, rtol=0)
    assert_close(two.grad, torch.tensor([0.0, 0.0, 0.08]), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------------- bad input


def test_what_can_not_be_learned_from_is_refused_by_name(sample, windows):
    with pytest.raises(ValueError, match="wall: 41 frames of 48x32, but 40 cameras"):
        replace(sample, cameras=sample.cameras[:40])
    with pytest.raises(ValueError, match="wall: 40x32; both sides must be multiples of 16"):
        replace(sample, frames=sample.frames[:, :, :40], cameras=replace(sample.cameras, size=(32, 40)), depths={})
    with pytest.raises(ValueError, match="wall: the depth of frame 4 is"):
        replace(sample, depths={4: torch.ones(3, 3)})
    with pytest.raises(ValueError, match="wall: frame 8 has no depth"):
        example(replace(sample, depths={0: sample.depths[0]}), windows[1], ENCODERS, exactly(), generator())
    with pytest.raises(ValueError, match="6 still latents"):
        Recipe(layout=LAYOUT, still=6)
    with pytest.raises(ValueError, match="text_drop is a share"):
        replace(SMALL, text_drop=1.2)
    with pytest.raises(ValueError, match="a batch needs history of one shape"):
        stack([example(s, Window(0, 1, 8), ENCODERS, SMALL, generator()).condition for s in (sample, wall(9, (32, 64)))])


def test_encoders_are_asked_for_nothing_that_is_known(sample, windows):
    class Counting(Means):
        asked = 0

        def encode(self, frames, before=None):
            self.asked += len(frames)
            return super().encode(frames, before)

    codec = Counting()
    example(sample, windows[2], Encoders(codec, look, tell), exactly(), generator())
    assert codec.asked == 9  # the warped views, which every step sees anew
