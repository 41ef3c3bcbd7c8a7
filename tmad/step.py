"""One optimisation step of T-MAD (Sec. IV), for either phase; knows no rank, no logger, no file and draws nothing.

What it needs of the other workers is handed in: a differentiable mean of scalars for the relativistic expectations, and
an average of gradients. With the defaults it is the whole of training on one device.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tmad import ema, losses
from tmad.batch import Batch
from tmad.blocks import normalised_once, rounded_once
from tmad.coarse import compose
from tmad.config import TrainingConfig
from tmad.discriminators import GlobalDiscriminator, PatchDiscriminator, gradient_penalty
from tmad.images import to_model
from tmad.model import TMAD, TMADOutput
from tmad.patches import all_cells, cell_corners, cut
from tmad.perceptual import perceptual_loss, style_loss
from tmad.retrieval import intact_share, patch_distances, retrieval_statistics, untrained_retrieval
from tmad.rng import seed_of

Phase = Literal["coarse", "joint"]
ADAM_TENSORS = ("step", "exp_avg", "exp_avg_sq")


class Workers(Protocol):
    """What a step needs of the workers that train together."""

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the workers; its gradient is the mean of theirs."""

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the workers, in place."""


class OneWorker:
    """Training alone."""

    def mean(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing to do."""


class NonFiniteLoss(ArithmeticError):
    """Too many steps in a row had a loss or gradient that is not finite; *terms* are this worker's of the last one."""

    def __init__(self, message: str, terms: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.terms = tuple(terms)


@dataclass(frozen=True)
class BadStep:
    """A step that changed nothing, since a loss or gradient of it was not finite."""

    images_seen: int
    """Images of the run before it."""
    terms: list[str]
    """What was not finite in it on this worker."""
    image_id: list[str]
    """The images of this worker's batch."""


@dataclass
class _Step:
    """A step that the device may still be working on."""

    images_seen: int
    metrics: dict[str, Tensor]
    image_id: list[str]
    finite: Tensor
    done: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.finite.is_cuda:
            here = torch.empty((), dtype=torch.bool, pin_memory=True)
            self.finite = here.copy_(self.finite, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def was_finite(self) -> bool:
        """Waits until the device has done the step."""
        if self.done is not None:
            self.done.synchronize()
        return bool(self.finite)


class TrainingState:
    """Networks, averaged generator, optimizers and counters: all that a run carries from step to step.

    *perceptual* maps images to a list of feature maps (`perceptual.VGG19Features`); without it the perceptual term is
    left out. Raises `ValueError` if it is missing while its weight is above 0.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        perceptual: nn.Module | None = None,
    ) -> None:
        if config.loss.uses_features and perceptual is None:
            raise ValueError(
                f"loss.weight_perceptual is {config.loss.weight_perceptual} and loss.weight_style "
                f"{config.loss.weight_style}, but no feature network was given; give one or set both weights to 0"
            )
        self.config = config
        self.device = torch.device(device)
        self.perceptual = perceptual.to(device) if perceptual is not None and config.loss.uses_features else None
        if self.perceptual is not None and config.precision == "bf16":
            for part in self.perceptual.modules():
                if isinstance(part, nn.Conv2d):
                    part.to(torch.bfloat16)  # frozen: autocast would round the same weights in every call
        self.model = TMAD(config.model, seed=seed).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "init", "critics"))  # the key, an older name, decides the first weights
            self.patch_discriminator = PatchDiscriminator(config.discriminators).to(device)
            self.global_discriminator = GlobalDiscriminator(config.discriminators).to(device)
        self.untrained = untrained_retrieval(config.model.retrieval).to(device)
        self.ema_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        self._penalty: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] = gradient_penalty
        self.images_seen = 0
        self.steps = 0
        self.bad_steps = 0
        self.bad_steps_in_row = 0
        self.bad_step: BadStep | None = None
        self._unread: deque[_Step] = deque()
        self._late = 1 if self.device.type == "cuda" else 0
        optim = config.optim
        self.optimizers = {
            "generator": torch.optim.Adam(
                [
                    {"params": list(self.model.coarse.parameters())},
                    {"params": list(self.model.retrieval.parameters())},
                    {"params": list(self.model.psnet.parameters())},
                ],
                lr=optim.lr,
                betas=optim.betas,
                fused=True,
            ),
            "discriminators": torch.optim.Adam(
                [*self.patch_discriminator.parameters(), *self.global_discriminator.parameters()],
                lr=optim.lr_discriminators or optim.lr,
                betas=optim.betas,
                fused=True,
            ),
        }

    def use_channels_last(self) -> None:
        """Lay the networks' weights out with channels last, which activations and gradients follow; the values stay."""
        for network in (*self._networks().values(), *([self.perceptual] if self.perceptual is not None else [])):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compile(self) -> None:
        """Have PyTorch compile all networks but the averaged model, and the penalty, at their first call, for the
        shapes that they are called with. Weights keep their names."""
        networks = [self.model.coarse, self.model.psnet, self.patch_discriminator, self.global_discriminator]
        for network in (*networks, self.perceptual):
            if network is not None:
                network.compile(dynamic=False)
        self._penalty = torch.compile(gradient_penalty, dynamic=False)

    def step(
        self,
        batch: Batch,
        phase: Phase,
        *,
        global_batch: int,
        progress: float,
        workers: Workers | None = None,
    ) -> dict[str, Tensor]:
        """Train on one batch: the coarse network alone, or everything jointly (Sec. IV); on a batch
        with precomputed coarse results, jointly means everything but the coarse network (Table V).

        *global_batch*: images of this step over all workers; *progress*: share of the phase done, in [0, 1), which
        drives the learning rate. Returns this worker's losses, gradient norms and rates as 0-dim tensors by name.
        A gradient that is not finite changes no weight it belongs to and is counted; if it is the discriminators', the
        generator is not updated either. Gradients are averaged first, so all workers skip alike. Raises `NonFiniteLoss`
        after `optim.max_bad_steps` of them in a row.

        On a GPU the step is queued and not waited for: the counters of bad steps, and the error, are one step behind
        (`settle` waits). What a bad step leaves untouched does not depend on that.
        """
        workers = workers or OneWorker()
        batch = batch.to(self.device)
        factor = cosine_restarts(progress, self.config.optim.cosine_periods)
        for group, lr in self._learning_rates(phase):
            lowest = min(lr, self.config.optim.min_lr)
            group["lr"] = lowest + factor * (lr - lowest)
        train = self._coarse_step if phase == "coarse" else self._joint_step
        before = self.images_seen
        metrics, finite = train(batch, workers)
        self.steps += 1
        self.images_seen += global_batch
        keep = ema.decay(global_batch, self.images_seen, self.config.optim.ema_halflife_images)
        ema.update(self.ema_model, self.model, keep, finite)
        self._unread.append(_Step(before, metrics, batch.image_id, finite))
        self._read(self._late)
        if self.bad_step is not None and self.bad_steps_in_row >= self.config.optim.max_bad_steps:
            end = self.bad_step.images_seen + global_batch
            raise NonFiniteLoss(
                f"{self.bad_steps_in_row} steps in a row were not finite (images "
                f"{end - self.bad_steps_in_row * global_batch} to {end} of the run); not finite in the last one: "
                f"{', '.join(self.bad_step.terms)}; see optim.max_bad_steps, optim.lr",
                self.bad_step.terms,
            )
        metrics["lr"] = torch.tensor(self.optimizers["generator"].param_groups[-1]["lr"])
        metrics["bad_steps"] = torch.tensor(float(self.bad_steps))
        return metrics

    def settle(self) -> None:
        """Wait for the device, so that `bad_step` and the counters of bad steps tell of all steps so far."""
        self._read(0)

    def _read(self, left: int) -> None:
        """Count what came out of all steps but the last *left*."""
        while len(self._unread) > left:
            step = self._unread.popleft()
            if step.was_finite():
                self.bad_steps_in_row = 0
            else:
                self.bad_steps += 1
                self.bad_steps_in_row += 1
                self.bad_step = BadStep(step.images_seen, not_finite(step.metrics), step.image_id)

    def _learning_rates(self, phase: Phase) -> list[tuple[dict[str, Any], float]]:
        """The optimizers' parameter groups and the rate with which each starts a cosine period."""
        optim = self.config.optim
        coarse, retrieval, psnet = self.optimizers["generator"].param_groups
        (discriminators,) = self.optimizers["discriminators"].param_groups
        lr_coarse = optim.lr if phase == "coarse" or optim.lr_coarse_joint is None else optim.lr_coarse_joint
        return [
            (coarse, lr_coarse),
            (retrieval, optim.lr_retrieval or optim.lr),
            (psnet, optim.lr),
            (discriminators, optim.lr_discriminators or optim.lr),
        ]

    def _coarse_step(self, batch: Batch, workers: Workers) -> tuple[dict[str, Tensor], Tensor]:
        image, mask = to_model(batch.image), batch.mask.float()
        with self._rounded(self.model.coarse):
            coarse_raw = self.model.predict_coarse(image, mask)
        terms = self._reconstruction(coarse_raw, image, mask)
        if not terms:
            raise ValueError("the coarse phase has nothing to learn: loss.weight_hole and loss.weight_valid are both 0")
        return self._update_generator(terms, workers)

    def _joint_step(self, batch: Batch, workers: Workers) -> tuple[dict[str, Tensor], Tensor]:
        weights = self.config.loss
        image, mask = to_model(batch.image), batch.mask.float()
        k = self.config.model.patch_size
        with normalised_once(self.model.psnet), self._rounded(self.model):
            filled = None if batch.filled is None else to_model(batch.filled)
            # A coarse network that is not trained is not differentiated either.
            with torch.set_grad_enabled(self._coarse_learns):
                coarse_raw = self.model.predict_coarse(image, mask) if filled is None else filled
            learns = batch.filled is None and self._coarse_learns
            terms = self._reconstruction(coarse_raw, image, mask) if learns else {}
            # From here on the block of drawn cells is the picture; the memory is the whole picture's.
            coarse = compose(coarse_raw, image, mask)
            memory = self.model.read_memory(coarse, batch.pool_yx)
            side = math.isqrt(batch.cells.shape[1])
            block = cell_corners(batch.cells[:, :1], patch_size=k, width=image.shape[-1])
            layers = torch.cat([image, mask, coarse_raw, coarse], dim=1)
            image, mask, coarse_raw, coarse = cut(layers, block, side * k)[:, 0].split([3, 1, 3, 3], dim=1)
            image, mask = image.detach(), mask.detach()  # data, cut beside what is not
            cells = torch.arange(side * side, device=self.device).expand(len(batch), -1)
            out = self.model.fill(image, mask, coarse_raw, coarse, memory, cells)
        target = all_cells(image, k)
        patches = all_cells(out.output, k) if weights.patch_region == "hole" else out.patches
        counted = all_cells(mask, k).flatten(2).amax(-1) > 0
        distances = patch_distances(out.pool, target)

        metrics: dict[str, Tensor] = {}
        discriminators_finite: Tensor | None = None
        discriminators: list[nn.Module] = [self.patch_discriminator] if weights.weight_gan_patch else []
        discriminators += [self.global_discriminator] if weights.weight_gan_global else []
        if discriminators:
            with normalised_once(*discriminators):
                metrics, discriminators_finite = self._update_discriminators(
                    batch, out, image, target, patches, workers
                )

        # [D] The expected distance, beside Eq. 8.
        if weights.weight_retrieval:
            terms["retrieval"] = (weights.weight_retrieval, losses.expected_distance(out.weights, distances, counted))
        # Eq. 8: the losses of synthesized patches; its first term follows below.
        if weights.weight_l1:
            terms["l1"] = (weights.weight_l1, (patches - target).abs().mean())
        if self.perceptual is not None:
            with self._autocast(), torch.no_grad():
                wanted = self.perceptual(target.flatten(0, 1))
            with self._autocast():
                made = self.perceptual(patches.flatten(0, 1))
            if weights.weight_perceptual:
                terms["perceptual"] = (weights.weight_perceptual, perceptual_loss(made, wanted))
            if weights.weight_style:
                terms["style"] = (weights.weight_style, style_loss(made, wanted))
        # Eq. 9: the losses of the tiled result.
        if weights.weight_tv:
            terms["tv"] = (weights.weight_tv, losses.total_variation(out.output, mask))
        # The gradient goes through the discriminators, not into their weights.
        self._freeze_discriminators(True)
        with normalised_once(*discriminators), self._rounded(*discriminators):
            if weights.weight_gan_patch:
                (fake,) = self._score_patches(patches)
                with torch.no_grad():
                    memory, real = self._score_patches(out.pool, self._reals(out, target))
                loss = losses.patch_generator_loss(
                    memory, real, fake, relativistic=weights.relativistic, mean=workers.mean
                )
                terms["gan_patch"] = (weights.weight_gan_patch, loss)
            if weights.weight_gan_global:
                scores = self.global_discriminator(out.output).float()
                terms["gan_global"] = (weights.weight_gan_global, losses.global_generator_loss(scores))
        generator_metrics, finite = self._update_generator(terms, workers, discriminators_finite)
        self._freeze_discriminators(False)
        metrics.update(generator_metrics)
        with torch.no_grad():
            reference = self.untrained(all_cells(out.coarse, k), out.pool, out.pool[..., :1, :1, :1]).index
        found = (out.weights.detach(), out.candidate_index)
        metrics |= retrieval_statistics(found, reference, distances, counted)
        metrics["candidates/intact"] = intact_share(batch.mask, batch.pool_yx, out.candidate_index, k)
        return metrics, finite

    @property
    def _coarse_learns(self) -> bool:
        return self.config.optim.lr_coarse_joint != 0

    def _reconstruction(self, coarse_raw: Tensor, image: Tensor, mask: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Eq. 1."""
        weights, terms = self.config.loss, {}
        if weights.weight_hole:
            terms["coarse_hole"] = (weights.weight_hole, losses.region_l1(coarse_raw, image, mask))
        if weights.weight_valid:
            terms["coarse_valid"] = (weights.weight_valid, losses.region_l1(coarse_raw, image, 1 - mask))
        return terms

    def _update_discriminators(
        self, batch: Batch, out: TMADOutput, image: Tensor, target: Tensor, patches: Tensor, workers: Workers
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Eq. 6 and the discriminator of Eq. 9, each with its gradient penalty, in one backward."""
        weights = self.config.loss
        metrics: dict[str, Tensor] = {}
        total = image.new_zeros(())
        penalised = weights.gradient_penalty > 0 and self.steps % weights.gp_every == 0
        # Computed on every gp_every-th step, with that many times the weight.
        penalty_weight = weights.gradient_penalty * weights.gp_every
        # Eq. 6 trains the discriminators alone: what they judge is data.
        fake_patches, fake_image = patches.detach(), out.output.detach()
        if weights.weight_gan_patch:
            with self._rounded(self.patch_discriminator):
                real, fake = self._score_patches(self._reals(out, target), fake_patches)
            loss = losses.patch_discriminator_loss(real, fake, relativistic=weights.relativistic, mean=workers.mean)
            metrics |= {"loss/discriminator_patch": loss.detach(), "discriminator_patch/real": real.detach().mean()}
            metrics["discriminator_patch/fake"] = fake.detach().mean()
            total = total + loss
            if penalised:
                mix = batch.mix[:, :-1].flatten()
                penalty = self._penalty(self.patch_discriminator, target.flatten(0, 1), fake_patches.flatten(0, 1), mix)
                metrics["penalty/patch"] = penalty.detach()
                total = total + penalty_weight * penalty
        if weights.weight_gan_global:
            with self._rounded(self.global_discriminator):
                real, fake = self.global_discriminator(torch.cat([image, fake_image])).float().chunk(2)
            loss = losses.global_discriminator_loss(real, fake)
            metrics |= {"loss/discriminator_global": loss.detach(), "discriminator_global/real": real.detach().mean()}
            metrics["discriminator_global/fake"] = fake.detach().mean()
            total = total + loss
            if penalised:
                penalty = self._penalty(self.global_discriminator, image, fake_image, batch.mix[:, -1])
                metrics["penalty/global"] = penalty.detach()
                total = total + penalty_weight * penalty
        norms, finite = self._apply(total, "discriminators", workers)
        return metrics | norms, finite

    def _score_patches(self, *patches: Tensor) -> tuple[Tensor, ...]:
        """Raw scores, float32, of each of *patches* (B, N, 3, k, k), in one call: cheaper than one for each."""
        parts = [each.flatten(0, 1) for each in patches]
        scores: Tensor = self.patch_discriminator(torch.cat(parts))
        return scores.float().split([len(part) for part in parts])

    @staticmethod
    def _reals(out: TMADOutput, target: Tensor) -> Tensor:
        """The reals of Eq. 6-7: candidates and true patches together, both as data."""
        # Detached: candidates carry the straight-through gradient (Eq. 5), and these scores must not train retrieval.
        return torch.cat([out.candidates.detach().flatten(1, 2), target], dim=1)

    def _update_generator(
        self, terms: dict[str, tuple[float, Tensor]], workers: Workers, discriminators_finite: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Eq. 10: the weighted sum of the terms, one backward, one Adam step."""
        metrics = {f"loss/{name}": value.detach() for name, (_, value) in terms.items()}
        weights = torch.tensor([weight for weight, _ in terms.values()]).to(self.device, non_blocking=True)
        total = (torch.stack([value for _, value in terms.values()]) * weights).sum()
        metrics["loss/total"] = total.detach()
        norms, finite = self._apply(total, "generator", workers, discriminators_finite)
        return metrics | norms, finite

    def _apply(
        self, loss: Tensor, name: str, workers: Workers, others_finite: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Backward, average over the workers, clip, update; gives the norms before clipping, of all gradients and of
        each network's, and whether they, and *others_finite*, are finite, without which nothing is updated."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        workers.average_gradients(parameters)
        limit = self.config.optim.clip_grad_norm or math.inf
        # One that does not take part has no gradients, whose norm would lie on the CPU whatever the device.
        groups = {
            network: group
            for network, module in self._trained_by(name)
            if (group := [p for p in module.parameters() if p.grad is not None])
        }
        norms = {
            network: nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            for network, group in groups.items()
        }
        norm = torch.linalg.vector_norm(torch.stack([*norms.values()]))
        if name == "discriminators":
            # Each on its own: the patch discriminator's gradient is ten times the global one's, which would stand
            # still.
            for network, group in groups.items():
                nn.utils.clip_grads_with_norm_(group, limit, norms[network])
        else:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        finite = norm.isfinite() if others_finite is None else norm.isfinite() & others_finite
        # As `torch.amp.GradScaler` tells a fused optimizer: it looks on the device, which nobody waits for.
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]  # nothing of a step is held between steps
        optimizer.zero_grad(set_to_none=True)
        return {
            f"grad_norm/{name}": norm,
            **{f"grad_norm/{network}": value for network, value in norms.items()},
        }, finite

    def _freeze_discriminators(self, frozen: bool) -> None:
        self.patch_discriminator.requires_grad_(not frozen)
        self.global_discriminator.requires_grad_(not frozen)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    @contextmanager
    def _rounded(self, *networks: nn.Module) -> Iterator[None]:
        """Inside, *networks* compute in the precision of the settings."""
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        with rounded_once(*networks, dtype=dtype), self._autocast():
            yield

    def _trained_by(self, optimizer: str) -> Iterable[tuple[str, nn.Module]]:
        """The networks of an optimizer, by name."""
        if optimizer == "generator":
            return self.model.named_children()
        return [("patch_discriminator", self.patch_discriminator), ("global_discriminator", self.global_discriminator)]

    def _networks(self) -> dict[str, nn.Module]:
        return {
            "model": self.model,
            "ema": self.ema_model,
            "patch_discriminator": self.patch_discriminator,
            "global_discriminator": self.global_discriminator,
        }

    def _named_optimizer_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        discriminators = self._trained_by("discriminators")
        return {
            "generator": list(self.model.named_parameters()),
            "discriminators": [
                (f"{name}.{key}", p)
                for name, discriminator in discriminators
                for key, p in discriminator.named_parameters()
            ],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, on the CPU: networks and Adam's moments. The keys are stable."""
        named = {
            f"{network}/{key}": value
            for network, module in self._networks().items()
            for key, value in module.state_dict().items()
        }
        for name, parameters in self._named_optimizer_parameters().items():
            for key, parameter in parameters:
                moments = self.optimizers[name].state.get(parameter, {})
                named |= {f"adam/{name}/{key}/{item}": moments[item] for item in ADAM_TENSORS if item in moments}
        return {name: value.detach().cpu().contiguous() for name, value in named.items()}

    def counters(self) -> dict[str, int]:
        """The numbers beside the tensors, of all steps so far."""
        self.settle()
        return {
            "images_seen": self.images_seen,
            "steps": self.steps,
            "bad_steps": self.bad_steps,
            "bad_steps_in_row": self.bad_steps_in_row,
        }

    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin with other weights than the seed's: *tensors* of generator (`model/`) and discriminators, named as
        `tensors` does; what is not among them stays. The average starts from the generator, the optimizers anew."""
        for network, module in self._networks().items():
            own = {key[len(network) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{network}/")}
            module.load_state_dict(own, strict=False)
        self.ema_model.load_state_dict(self.model.state_dict())
        for optimizer in self.optimizers.values():
            optimizer.state.clear()

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Continue from what `tensors` and `counters` gave, bit for bit. Raises `ValueError` on names that differ."""
        for network, module in self._networks().items():
            own = {key[len(network) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{network}/")}
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(f"the saved {network} does not fit this configuration: {error}") from error
        left = {name for name in tensors if name.split("/")[0] not in self._networks()}
        for name, parameters in self._named_optimizer_parameters().items():
            state = self.optimizers[name].state
            state.clear()
            for key, parameter in parameters:
                prefix = f"adam/{name}/{key}/"
                present = [item for item in ADAM_TENSORS if prefix + item in tensors]
                if 0 < len(present) < len(ADAM_TENSORS):
                    raise ValueError(f"the saved {prefix} has {', '.join(present)} and not all of {ADAM_TENSORS}")
                left -= {prefix + item for item in present}
                if present:
                    moments = {item: tensors[prefix + item].clone() for item in ADAM_TENSORS}
                    state[parameter] = {item: value.to(parameter.device) for item, value in moments.items()}
        self._unread.clear()
        self.bad_step = None
        if left or counters.keys() != self.counters().keys():
            odd = sorted(left | (counters.keys() ^ self.counters().keys()))
            raise ValueError(f"the saved state has other parts than this configuration: {', '.join(odd)}")
        for name, value in counters.items():
            setattr(self, name, value)


def not_finite(metrics: Mapping[str, Tensor]) -> list[str]:
    """Names of the terms of a step that are not finite."""
    return [name for name, value in metrics.items() if not value.isfinite()]


def cosine_restarts(progress: float, periods: int) -> float:
    """Cosine schedule with restarts (Sec. IV): 1 at the start of each of *periods* equal periods, falling to 0.

    *progress*: share of the phase done; 1 and beyond give the end of the last period.
    """
    position = progress * periods % 1 if progress < 1 else 1.0
    return (1 + math.cos(math.pi * position)) / 2
