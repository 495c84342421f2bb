"""Train the embedded pipeline's parts, in this order:

    python -m benchmarks.embedded.train autoencoder --out DIR
    python -m benchmarks.embedded.train denoiser --out DIR
    python -m benchmarks.embedded.train classifier --out DIR
    python -m benchmarks.embedded.train plot --out DIR
    python -m benchmarks.embedded.train export --out DIR
    python -m benchmarks.embedded.train noisy --out DIR2
    python -m benchmarks.embedded.train export-noisy --out DIR2

The first three and ``noisy`` resume where they were stopped; a denoiser in training can be exported too. The
classifier is trained on drawings alone and knows nothing of the other two. ``noisy`` goes on from the weights that
``export`` wrote into the package, with captions that are often another picture's, so that guidance matters as it does
on real models.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from tgate_fx import demo
from tgate_fx.demo.scenes import Scene, random_scene, scenes

from . import models
from .data import labels, normalised, pictures
from .judge import CLASSIFIER_WEIGHTS, read, right_answers
from .training import Plan, read_log, train

_out = click.option("--out", type=click.Path(path_type=Path), required=True, help="Where checkpoints and logs go.")

_SEED = 2024
_TRAINING_SCENES = 120_000
_DROPPED = 0.1  # of the captions, for classifier-free guidance
_MISTAKEN = 0.4  # of the captions of ``noisy``: another picture's


@click.group()
def app() -> None:
    """Train the embedded pipeline's parts."""


def _options(steps: int, batch: int) -> Callable[[Any], Any]:
    options = (
        _out,
        click.option("--steps", default=steps, show_default=True, help="How many steps in all."),
        click.option("--batch", default=batch, show_default=True, help="Pictures a step."),
    )
    return lambda command: functools.reduce(lambda wrapped, option: option(wrapped), options, command)


@app.command()
@_options(steps=2000, batch=32)
def autoencoder(out: Path, steps: int, batch: int) -> None:
    """The autoencoder, on drawings of the training scenes."""
    torch.manual_seed(_SEED)
    module = models.autoencoder().to(memory_format=torch.channels_last)
    drawn = pictures(scenes(20_000, seed=_SEED, held_out=False), _SEED, progress=True)

    def loss_of(step: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(step)
        target = normalised(drawn[torch.randint(len(drawn), (batch,), generator=rng)])
        posterior = module.encode(target).latent_dist
        result = module.decode(posterior.sample(generator=rng)).sample
        return F.l1_loss(result, target) + F.mse_loss(result, target) + 1e-6 * posterior.kl().mean()

    trained = train(module, loss_of, Plan(steps, 1e-3, average=0.995), out, "autoencoder")
    with torch.no_grad():
        latents = trained.encode(normalised(drawn[:2000])).latent_dist.mode()
    trained.register_to_config(scaling_factor=1 / latents.std().item())
    trained.save_pretrained(out / "vae")
    held_out = normalised(pictures(scenes(500, seed=_SEED + 1, held_out=True), 1))
    with torch.no_grad():
        error = F.mse_loss(trained(held_out).sample, held_out).item()
    print(f"scaling factor {trained.config.scaling_factor:.4f}; mean squared error on held-out drawings {error:.2e}")


class _TextToLatents(nn.Module):
    """The two parts that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = models.text_encoder()
        self.unet = models.denoiser().to(memory_format=torch.channels_last)


@app.command()
@_options(steps=9000, batch=64)
@click.option("--compile/--no-compile", "compiled", default=True, help="Train through torch.compile.")
def denoiser(out: Path, steps: int, batch: int, compiled: bool) -> None:
    """The denoiser and the text encoder, on the autoencoder's latents of the training scenes."""
    torch.manual_seed(_SEED)
    module = _TextToLatents()
    known = scenes(_TRAINING_SCENES, seed=_SEED, held_out=False)
    error_of = _DenoisingError(module, known, _latents(known, out), compiled=compiled)

    train(module, lambda step: error_of(step, batch), Plan(steps, 8e-4), out, "denoiser")


@app.command()
@_options(steps=1000, batch=64)
@click.option("--scenes", "count", default=40_000, show_default=True, help="Training scenes.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Train through torch.compile.")
def noisy(out: Path, steps: int, batch: int, count: int, compiled: bool) -> None:
    """The package's denoiser and text encoder, on captions of which many are another picture's."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(_SEED)
    pipe = demo.load()
    module = _TextToLatents()
    module.unet.load_state_dict(pipe.unet.state_dict())
    module.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    pipe.vae.save_pretrained(out / "vae")
    known = scenes(count, seed=_SEED, held_out=False)
    error_of = _DenoisingError(module, known, _latents(known, out), compiled=compiled)

    train(module, lambda step: error_of(step, batch, mistaken=_MISTAKEN), Plan(steps, 4e-4), out, "noisy")


class _DenoisingError:
    """The loss of a step: of pictures that its number chooses, and of what is said of each."""

    def __init__(self, module: _TextToLatents, known: list[Scene], latents: torch.Tensor, *, compiled: bool) -> None:
        self._text_encoder, self._known, self._latents = module.text_encoder, known, latents
        self._unet = torch.compile(module.unet, fullgraph=True) if compiled else module.unet
        self._tokenizer = models.tokenizer()
        self._noising = DDPMScheduler.from_config(models.scheduler().config)
        self._snr = self._noising.alphas_cumprod / (1 - self._noising.alphas_cumprod)

    def __call__(self, step: int, batch: int, mistaken: float = 0.0) -> torch.Tensor:
        """The loss where this share of the captions is another picture's."""
        rng = torch.Generator().manual_seed(step)
        words = random.Random(step)
        chosen = torch.randint(len(self._known), (batch,), generator=rng)
        # Without mistakes no number is drawn for them, so that the captions of a step stay what they were.
        said = [
            words.randrange(len(self._known)) if mistaken and words.random() < mistaken else i for i in chosen.tolist()
        ]
        captions = ["" if words.random() < _DROPPED else self._known[i].caption(words) for i in said]
        tokens = self._tokenizer(
            captions, padding="max_length", max_length=models.TOKENS, return_tensors="pt"
        ).input_ids
        clean = self._latents[chosen].float().contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=rng).contiguous(memory_format=torch.channels_last)
        timesteps = torch.randint(1000, (len(chosen),), generator=rng)
        text = self._text_encoder(tokens)[0]
        noised = self._noising.add_noise(clean, noise, timesteps)
        predicted = self._unet(noised, timesteps, text, return_dict=False)[0]
        error = (predicted - self._noising.get_velocity(clean, noise, timesteps)).square().mean((1, 2, 3))
        # min-SNR weighting (Hang et al. 2023, arXiv:2303.09556) with gamma 5, in its form for velocities.
        snr = self._snr[timesteps]
        return (error * (snr.clamp(max=5) / (snr + 1))).mean()


def _latents(known: list[Scene], out: Path) -> torch.Tensor:
    """The scaled latents of a drawing of every training scene, float16 [N, 4, 16, 16]; kept in ``out``."""
    path = out / "latents.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(out / "vae").to(memory_format=torch.channels_last)
        parts = []
        drawn = pictures(known, _SEED, progress=True)
        with torch.no_grad():
            for part in tqdm(drawn.split(200), desc="encoding"):
                parts.append((vae.encode(normalised(part)).latent_dist.mode() * vae.config.scaling_factor).half())
        torch.save(torch.cat(parts), path)
    latents: torch.Tensor = torch.load(path, weights_only=True)
    return latents


@app.command()
@_options(steps=6000, batch=128)
def classifier(out: Path, steps: int, batch: int) -> None:
    """The classifier, on noisy and blurred drawings of all scenes."""
    torch.manual_seed(_SEED)
    module = models.Classifier().to(memory_format=torch.channels_last)
    rng = random.Random(_SEED + 2)
    known = [random_scene(rng) for _ in range(40_000)]
    drawn, answers = pictures(known, _SEED + 2, progress=True), labels(known)

    def loss_of(step: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(known), (batch,), generator=rng)
        logits = module(_degraded(normalised(drawn[chosen]), rng))
        losses = [F.cross_entropy(logits[name], answers[name][chosen]) for name in logits]
        return torch.stack(losses).sum()

    trained = train(module, loss_of, Plan(steps, 2e-3, average=0.99), out, "classifier")
    torch.save(trained.state_dict(), out / "classifier.pt")
    held_out = scenes(5000, seed=_SEED + 3, held_out=True)
    right = right_answers(held_out, read(trained, normalised(pictures(held_out, 3)))[1])
    print("\n".join(f"{name}: {np.nanmean(values):.4f}" for name, values in right.items()))
    print(f"all attributes of held-out drawings: {np.nanmean(np.stack(list(right.values()))):.4f}")


def _degraded(clean: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of the pictures blurred, all with some noise, so that a generated picture is not a strange one."""
    blurred = F.avg_pool2d(F.pad(clean, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand((len(clean), 1, 1, 1), generator=rng) * (torch.rand((len(clean), 1, 1, 1), generator=rng) < 0.5)
    noise = torch.randn(clean.shape, generator=rng) * 0.1 * torch.rand((len(clean), 1, 1, 1), generator=rng)
    return clean + share * (blurred - clean) + noise


@app.command()
@_out
def plot(out: Path) -> None:
    """Plot the losses as loss.png."""
    import matplotlib.pyplot as plt

    parts = [path.name.partition(".")[0] for path in sorted(out.glob("*.loss.jsonl"))]
    figure, axes = plt.subplots(1, len(parts), figsize=(4 * len(parts), 3.5), constrained_layout=True, squeeze=False)
    for axis, name in zip(axes[0], parts, strict=True):
        log = read_log(out / f"{name}.loss.jsonl")
        axis.semilogy(list(log), list(log.values()))
        axis.set(title=name, xlabel="step", ylabel="loss")
    figure.savefig(out / "loss.png", dpi=100)


@app.command()
@_out
def export(out: Path) -> None:
    """Write the weights that the package and the tests use, in half precision."""
    vae = AutoencoderKL.from_pretrained(out / "vae")
    _export_pipeline(out / "denoiser.checkpoint", vae)
    classifier = torch.load(out / "classifier.pt", weights_only=True)
    halved = {name: value.half() if value.is_floating_point() else value for name, value in classifier.items()}
    save_file({name: value.contiguous() for name, value in halved.items()}, CLASSIFIER_WEIGHTS)


@app.command()
@_out
def export_noisy(out: Path) -> None:
    """Write the weights that ``noisy`` trained into the package; the autoencoder and the classifier stay."""
    _export_pipeline(out / "noisy.checkpoint", demo.load().vae)


def _export_pipeline(checkpoint: Path, vae: AutoencoderKL) -> None:
    module = _TextToLatents()
    saved = torch.load(checkpoint, weights_only=True)
    module.load_state_dict(saved["average"])
    autoencoder = models.autoencoder()  # a new one, whose configuration names no path
    autoencoder.load_state_dict(vae.state_dict())
    autoencoder.register_to_config(scaling_factor=vae.config.scaling_factor)
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=module.text_encoder,
        tokenizer=models.tokenizer(),
        unet=module.unet,
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(demo.WEIGHTS)
    size = sum(path.stat().st_size for path in demo.WEIGHTS.rglob("*") if path.is_file())
    print(f"denoiser after {saved['steps']} steps; {size / 1e6:.1f} MB in all")


if __name__ == "__main__":
    app()
