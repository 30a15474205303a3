"""The reference's solver, as a sampler of the host."""

from __future__ import annotations

from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy.samplers import KSAMPLER
from torch import Tensor
from tqdm.auto import trange

BELOW_ONE = 1 - 1e-6  # the solver works with log((1 - sigma) / sigma); diffusers moves a first sigma of 1 as little


class UniPC(KSAMPLER):
    """UniPC of order 2 that tells the network integer timesteps. ImportError without diffusers."""

    def __init__(self):
        solver_class()  # say what is missing now, not after a minute of loading
        super().__init__(sample_unipc)

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
        # the reference starts from pure noise, the host from the first sigma's share of it
        if latent_image is None or not latent_image.count_nonzero():
            noise = noise / sigmas[0]
        return super().sample(model_wrap, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)


def solver_class() -> type:
    try:
        from diffusers import UniPCMultistepScheduler
    except ImportError as error:
        raise ImportError("Lyra2UniPC needs the diffusers library: pip install diffusers") from error
    return UniPCMultistepScheduler


def solver(sigmas: Tensor):
    """The solver of the diffusers library, set to exactly these sigmas instead of its own."""
    scheduler = solver_class()(
        solver_order=2, solver_type="bh2", predict_x0=True, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas.cpu().clamp(max=BELOW_ONE)
    scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
    scheduler.set_begin_index(0)
    return scheduler


def sample_unipc(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
    """The host's contract of a sampler: model(x, sigma) is the denoised x; sigmas descend."""
    extra_args = {**extra_args, "model_options": with_integer_timesteps(extra_args["model_options"])}
    scheduler = solver(sigmas)
    for i in trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        velocity = (x - denoised) / scheduler.sigmas[i].to(x)
        x = scheduler.step(velocity, scheduler.timesteps[i], x, return_dict=False)[0]
    return x


def with_integer_timesteps(model_options: dict) -> dict:
    """The same options, and a wish that Lyra2Base.process_timestep fulfils; other models don't know it."""

    def wish(executor, *args, **kwargs):
        return executor(*args, **kwargs, integer_timesteps=True)

    options = create_model_options_clone(model_options)
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, "lyra2", wish, options, is_model_options=True)
    return options
