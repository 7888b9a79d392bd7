"""DKDM, data-free knowledge distillation (Xiang et al., CVPR 2025, arXiv:2409.03550).

A teacher's reverse chain supplies the noisy states on which a student of any architecture regresses its prediction.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..data import Conditions
from ..denoiser import Cond, Denoiser, GuidedDenoiser, predict_x0, scale_input
from ..files import written_beside
from ..models import shrunk
from ..network_calls import execution_device
from ..schedules import EDMSchedule, VPSchedule, karras_sigma
from .base import Distiller, Generators, Paper, check_same_prediction, normal, uniform

SCHEMES = ("dynamic", "shuffled", "iterative", "synthetic")


def gaussian_kl(mean_a, logvar_a, mean_b, logvar_b) -> torch.Tensor:
    """`KL(N_a || N_b)` per dimension, in nats: `0.5 * (-1 + lv_b - lv_a + exp(lv_a - lv_b) + (m_a - m_b)**2 *
    exp(-lv_b))`."""
    return 0.5 * (
        -1 + logvar_b - logvar_a + torch.exp(logvar_a - logvar_b) + (mean_a - mean_b) ** 2 * torch.exp(-logvar_b)
    )


def dkdm_loss(
    student_output: torch.Tensor,
    teacher_output: torch.Tensor,
    *,
    x_t: torch.Tensor | None = None,
    chain: "Chain | None" = None,
    place: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """`mean (eps_T - eps_S)**2`, and for networks with a learned variance `+ K / 1000 * mean KL(p_T || p_S) / ln 2` on
    a chain of K steps: one weight of the sum over a chain, which makes it 1 on the published chains of 1000.

    The KL reaches the student's variance channels alone: its mean is detached, and clipped as the teacher's is. Raw
    outputs are compared before any clipping.

    Args:
        student_output, teacher_output (`torch.Tensor`): `(B, C, H, W)`, or `(B, 2 C, H, W)` with learned variances.
        x_t, chain, place, offset: with learned variances, the states and where in their chain they are.

    Source: Xiang et al. 2025, Eqs. 17 to 21; the weight of the KL and its base are the released code's, with
    `rescale_learned_sigmas`.
    """
    if chain is None or not chain.learned_variance:
        return ((teacher_output - student_output) ** 2).mean()
    channels = x_t.shape[1]
    eps_s, eps_t = student_output[:, :channels], teacher_output[:, :channels]
    frozen = torch.cat([eps_s.detach(), student_output[:, channels:]], 1)
    moments = [chain.moments(x_t, place, offset, output) for output in (teacher_output, frozen)]
    bits = gaussian_kl(*moments[0], *moments[1]).mean() / math.log(2)
    return ((eps_t - eps_s) ** 2).mean() + chain.num_steps / 1000 * bits


class Chain:
    """The teacher's reverse process, one step for every sample of a batch, each at its own place.

    Place `k` of `K` is the state with `k + 1` steps to go. With `K = T` these are the timesteps themselves; shorter
    chains, and those of EDM and flow teachers, pass through levels that are shifted by an `offset` in [0, 1) of a
    step, drawn anew for each trajectory, so that the student sees all levels. (Flow trajectories all start at pure
    noise; a VP or EDM one starts at its own level, where there is hardly any signal.)

    Args:
        denoiser (`Denoiser` or `GuidedDenoiser`): the teacher.
        num_steps (`int`, *optional*): K; by default the teacher's training timesteps.
        clip (`bool`): clip the predicted `x0` to [-1, 1], as pixel teachers sample.
        stochastic (`bool`, *optional*): ancestral sampling, for VP teachers and by default there; else Euler's method.
        learned_variance (`bool`, *optional*, defaults to `False`): the network's output has variance channels.
        large_variance (`bool`, *optional*, defaults to `False`): a fixed variance is `beta`, not the posterior's.
    """

    def __init__(
        self,
        denoiser: Denoiser | GuidedDenoiser,
        num_steps: int | None = None,
        *,
        clip: bool,
        stochastic: bool | None = None,
        learned_variance: bool = False,
        large_variance: bool = False,
    ):
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        trained = self.schedule.num_train_timesteps
        self.num_steps = num_steps or trained
        vp = isinstance(self.schedule, VPSchedule)
        if not 1 <= self.num_steps <= trained or (vp and trained % self.num_steps):
            raise ValueError(f"`num_steps` must divide {trained}, but is {num_steps}.")
        self.stochastic = vp if stochastic is None else stochastic
        if self.stochastic and not vp:
            raise ValueError("`stochastic` must be False for a teacher that is not variance preserving, but is True.")
        if learned_variance and not self.stochastic:
            raise ValueError("`learned_variance` must be False for a deterministic chain, but is True.")
        self.clip, self.learned_variance, self.large_variance = clip, learned_variance, large_variance

    def timestep(self, place: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The teacher's timestep `(B,)` at a place."""
        if isinstance(self.schedule, VPSchedule):
            stride = self.schedule.num_train_timesteps // self.num_steps
            return place * stride + stride - 1 - (offset * stride).long()
        position = ((place + 1 - offset) / self.num_steps).double()
        if isinstance(self.schedule, EDMSchedule):
            return self.schedule.timestep(karras_sigma(position, self.schedule.sigma_min, self.schedule.sigma_max))
        position = torch.where(place == self.num_steps - 1, torch.ones_like(position), position)
        return (self.schedule.t_max * position).float()

    def levels(self, place: torch.Tensor, offset: torch.Tensor):
        """`alpha, sigma` at the place and at the next one, clean after the last; float32 `(B, 1, 1, 1)`."""
        here = self.schedule.alpha_sigma(self.timestep(place, offset).double())
        alpha, sigma = self.schedule.alpha_sigma(self.timestep((place - 1).clamp(min=0), offset).double())
        last = (place == 0).reshape(-1, 1, 1, 1)
        after = torch.where(last, torch.ones_like(alpha), alpha), torch.where(last, torch.zeros_like(sigma), sigma)
        return tuple(v.float() for v in (*here, *after))

    def start(self, noise: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The states `(B, C, H, W)` at the last place, of unit-variance noise."""
        if not isinstance(self.schedule, EDMSchedule):
            return noise
        last = torch.full((len(noise),), self.num_steps - 1)
        _, sigma = self.schedule.alpha_sigma(self.timestep(last, offset).double())
        return noise * sigma.to(noise.dtype)

    def output(self, network: Denoiser | GuidedDenoiser, x_t, place, offset, cond: Cond | None) -> torch.Tensor:
        """A network's raw output at the states, variance channels included, float32."""
        t = self.timestep(place, offset)
        sample = scale_input(self.schedule, x_t, t)
        return network.call_network(sample, t, cond, all_channels=self.learned_variance)

    def x0(self, x_t, place, offset, output) -> torch.Tensor:
        """The predicted clean sample, clipped if the chain clips."""
        eps, t = output[:, : x_t.shape[1]], self.timestep(place, offset)
        x0 = predict_x0(self.schedule, self.denoiser.prediction_type, x_t, t, eps)
        return x0.clamp(-1, 1) if self.clip else x0

    def moments(self, x_t, place, offset, output) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the ancestral step (Ho et al. 2020, Eqs. 6 and 7; Nichol & Dhariwal 2021, Eq. 15
        for learned variances, which are not clamped)."""
        alpha, sigma, alpha_next, sigma_next = self.levels(place, offset)
        beta = 1 - (alpha / alpha_next) ** 2
        x0 = self.x0(x_t, place, offset, output)
        mean = alpha_next * beta / sigma**2 * x0 + (alpha / alpha_next) * sigma_next**2 / sigma**2 * x_t
        least = beta * sigma_next**2 / sigma**2
        # the last step's posterior variance is 0: the one before stands in, as in the papers' code
        a, s, a_next, s_next = self.levels(place.clamp(min=1), offset)
        before = (1 - (a / a_next) ** 2) * s_next**2 / s**2
        log_least = torch.where(least > 0, least, before).clamp(min=1e-20).log()
        if not self.learned_variance:
            return mean, (beta.log() if self.large_variance else log_least).expand_as(mean)
        share = (output[:, x_t.shape[1] :] + 1) / 2
        return mean, share * beta.log() + (1 - share) * log_least

    def step(self, x_t, place, offset, output, noise: torch.Tensor) -> torch.Tensor:
        """The next state; `noise` is added unless the step is the last or the chain deterministic."""
        if self.stochastic:
            mean, log_variance = self.moments(x_t, place, offset, output)
            more = (place > 0).float().reshape(-1, 1, 1, 1)
            return mean + more * torch.exp(0.5 * log_variance) * noise
        alpha, sigma, alpha_next, sigma_next = self.levels(place, offset)
        x0 = self.x0(x_t, place, offset, output)
        return alpha_next * x0 + sigma_next * (x_t - alpha * x0) / sigma


class Reservoir:
    """States of many trajectories at mixed times (Xiang et al. 2025, Sec. 3.3): per slot a state `x`, the steps
    `r` that are still to do (`num_timesteps`: pure noise; 0: finished), its condition and its offset.

    Args:
        slots (`int`): how many trajectories.
        sample_shape (`tuple`): `(C, H, W)`.
        num_timesteps (`int`): steps of a trajectory.
        cond (`dict` of tensors or `Samples`, *optional*): rows of conditions; each trajectory has one of them.
        start (callable, *optional*): unit-variance noise and offsets to starting states.
        dtype (`torch.dtype`, *optional*, defaults to float32): of the stored states; float16 for large latents.
        pin_memory (`bool`, *optional*, defaults to `False`): keep them in page-locked memory of the CPU.
    """

    def __init__(
        self,
        slots: int,
        sample_shape: tuple[int, ...],
        num_timesteps: int,
        *,
        cond: Any = None,
        start: Any = None,
        dtype: torch.dtype = torch.float32,
        pin_memory: bool = False,
    ):
        if slots < 1 or num_timesteps < 1:
            raise ValueError(f"`slots` and `num_timesteps` must be at least 1, but are {slots} and {num_timesteps}.")
        self.num_timesteps, self.start = num_timesteps, start or (lambda noise, offset: noise)
        self.x = torch.zeros(slots, *sample_shape, dtype=dtype)
        if pin_memory and torch.accelerator.is_available():  # there is nothing to lock pages for otherwise
            self.x = self.x.pin_memory()
        self.r = torch.zeros(slots, dtype=torch.long)  # finished: a slot's first visit draws its noise
        self.row = torch.zeros(slots, dtype=torch.long)
        self.offset = torch.zeros(slots)
        self.cond = cond if hasattr(cond, "batch") else Conditions(cond)
        self.cursor = 0  # of those who take the slots in turn

    def __len__(self) -> int:
        return len(self.r)

    def draw(self, batch_size: int, generator: Generators = None):
        """`(index, x_t, t, cond)` of `batch_size` distinct random slots, `t = r - 1`; finished ones start anew first.

        A list of generators, one per sample, gives each its noise and condition; the first one chooses the slots.
        """
        if batch_size > len(self):
            raise ValueError(f"`batch_size` must be at most the number of slots, {len(self)}, but is {batch_size}.")
        chooser = generator[0] if isinstance(generator, list) else generator
        index = torch.randperm(len(self), generator=chooser)[:batch_size]
        return self.take(index, generator)

    def take(self, index: torch.Tensor, generator: Generators = None):
        """The slots `index` as `draw` returns them."""
        self.reset(index, generator)
        return index, self.x[index].float(), self.r[index] - 1, self.conditions(index)

    def reset(self, index: torch.Tensor, generator: Generators = None) -> None:
        """Start the finished ones of the slots `index` anew: fresh noise, condition and offset."""
        noise = normal((len(index), *self.x.shape[1:]), generator)
        row, offset = uniform(len(index), generator), uniform(len(index), generator)
        done = self.r[index] <= 0
        fresh = index[done]
        self.x[fresh] = self.start(noise[done], offset[done]).to(self.x.dtype)
        self.r[fresh], self.offset[fresh] = self.num_timesteps, offset[done]
        self.row[fresh] = (row[done] * len(self.cond)).long()

    def conditions(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The conditions of the slots `index`."""
        return self.cond.batch(self.row[index].tolist())["cond"]

    def write(self, index: torch.Tensor, x: torch.Tensor) -> None:
        """Store the next states of the slots `index`, one step nearer to their end; what is not finite is dropped (`r`
        is -1 then) and its trajectory started anew."""
        x = x.detach().to("cpu", self.x.dtype)
        sound = x.flatten(1).isfinite().all(1)
        self.x[index[sound]] = x[sound]
        self.r[index] = torch.where(sound, self.r[index] - 1, -1)

    def save(self, path: Path, made_for: dict[str, Any] | None = None) -> None:
        """Write states, times, conditions and offsets as safetensors, beside first, with the settings of the run that
        they were made for."""
        tensors = {"x": self.x, "r": self.r, "row": self.row, "offset": self.offset}
        tensors["cursor"] = torch.tensor(self.cursor)
        about = {"num_timesteps": json.dumps(self.num_timesteps)}
        if made_for is not None:
            about["made_for"] = json.dumps(made_for)
        with written_beside(Path(path)) as beside:
            save_file(tensors, beside, about)

    @staticmethod
    def made_for(path: Path) -> dict[str, Any]:
        """The settings of the run that the slots of a file were made for, as `save` was told."""
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata().get("made_for", "{}"))

    def load(self, paths: list[Path], rank: int = 0, ranks: int = 1) -> None:
        """Read what any number of processes saved, and keep this one's share of it.

        Raises:
            ValueError: if it is that of other trajectories.
        """
        if not paths:
            raise ValueError("`paths` must name the files of a reservoir, but there are none.")
        sizes = {}
        for path in sorted(paths):
            with safe_open(path, "pt") as file:
                steps, (size, *shape) = json.loads(file.metadata()["num_timesteps"]), file.get_slice("x").get_shape()
                self.cursor = file.get_tensor("cursor").item()
            if steps != self.num_timesteps or shape != list(self.x.shape[1:]):
                raise ValueError(
                    f"`path` {str(path)!r} must hold trajectories of {self.num_timesteps} steps of shape "
                    f"{tuple(self.x.shape[1:])}, but holds {steps} steps of {tuple(shape)}."
                )
            sizes[path] = size
        share = torch.arange(sum(sizes.values())).tensor_split(ranks)[rank].tolist()
        for name in ("x", "r", "row", "offset"):
            held = getattr(self, name)
            own = torch.empty(len(share), *held.shape[1:], dtype=held.dtype, pin_memory=held.is_pinned())
            start = 0  # of a file's slots among all
            for path, size in sizes.items():
                low, high = max(share[0], start), min(share[-1] + 1, start + size)
                if low < high:
                    with safe_open(path, "pt") as file:
                        own[low - share[0] : high - share[0]] = file.get_slice(name)[low - start : high - start]
                start += size
            setattr(self, name, own)
        if self.row.max() >= len(self.cond):
            raise ValueError(f"`cond` must have the rows of the saved trajectories, but has {len(self.cond)}.")


class DKDM(Distiller):
    """Compression of a teacher into another network, without data. The student is an ordinary multi-step model.

    Args:
        teacher (`Teacher`, `Denoiser` or `GuidedDenoiser`): stays frozen. A guided one hands its guidance on.
        student (`Denoiser`, *optional*): the network to train, of the teacher's schedule and prediction type; by
            default one of half the teacher's width, which is the ratio of the paper's main student.
        batch_size (`int`, *optional*, defaults to 128): samples per update and process, which sizes the reservoir.
        scheme (`str`, *optional*, defaults to `"dynamic"`): `"dynamic"` random slots of a large reservoir,
            `"shuffled"` one batch at mixed times, `"iterative"` one batch at one time, or `"synthetic"`, the
            baseline: ordinary training on `slots` finished samples of the teacher.
        reservoir_ratio (`float`, *optional*, defaults to 0.4): rho; slots are `round(rho * num_steps) * batch_size`.
        num_steps (`int`, *optional*): steps of the teacher's chain, see `Chain`.
        clip (`bool`, *optional*): clip the teacher's `x0` while it steps; by default as a `Teacher`'s scheduler does.
        stochastic (`bool`, *optional*): see `Chain`.
        learned_variance (`bool`, *optional*): both networks learn their variance channels; by default if the teacher
            has twice as many channels out as in, is not guided, and the scheme is another than the synthetic one.
        cond (`dict` of tensors or `Samples`, *optional*): rows of conditions, of which every trajectory has one
            (`PromptEmbeddings` of many prompts); by default all labels of a `Teacher`, and for one tenth of the
            trajectories its null label, so that the student can be guided. A student of a guided teacher has the
            guidance in it, and no null label to be guided with again.
        dtype, pin_memory: of the reservoir.
        sample_shape (`tuple`, *optional*): `(C, H, W)`, for networks without a diffusers config.
    """

    paper = Paper(
        title="DKDM: Data-Free Knowledge Distillation for Diffusion Models with Any Architecture",
        arxiv_id="2409.03550",
        citation="Xiang, Zhang, Shang, Wu, Yan, Nie, CVPR 2025",
    )

    def __init__(
        self,
        teacher: Any,
        student: Denoiser | None = None,
        *,
        batch_size: int = 128,
        scheme: str = "dynamic",
        reservoir_ratio: float = 0.4,
        num_steps: int | None = None,
        clip: bool | None = None,
        stochastic: bool | None = None,
        learned_variance: bool | None = None,
        cond: Any = None,
        dtype: torch.dtype = torch.float32,
        pin_memory: bool = False,
        sample_shape: tuple[int, int, int] | None = None,
    ):
        if scheme not in SCHEMES:
            raise ValueError(f"`scheme` must be one of {SCHEMES}, but is {scheme!r}.")
        self.take_teacher(teacher, sample_shape)
        origin = self.origin if hasattr(self.origin, "scheduler") else None
        guided = isinstance(self.teacher, GuidedDenoiser)
        if student is None:
            network = shrunk(self.teacher.network, 0.5)
            student = Denoiser(network, self.teacher.schedule, self.teacher.prediction_type)
        check_same_prediction(student, self.teacher)
        channels = [_channels_out(denoiser) for denoiser in (self.teacher, student)]
        single, double = self.sample_shape[0], 2 * self.sample_shape[0]
        if learned_variance is None:
            learned_variance = channels[0] == double and not guided and scheme != "synthetic"
        allowed = (double,) if learned_variance else (single, double)  # of a variance that is not learned nobody asks
        for name, count in zip(("teacher", "student"), channels, strict=True):
            if count is not None and count not in allowed:
                raise ValueError(
                    f"`{name}` must have {' or '.join(map(str, allowed))} channels out with `learned_variance` "
                    f"{learned_variance}, but has {count}."
                )
        if learned_variance and (guided or scheme == "synthetic"):
            raise ValueError(
                "`learned_variance` must be False with a guided teacher and in the synthetic scheme, which has no "
                "variance to learn from, but is True."
            )
        self.student, self.scheme = student, scheme
        settings = {} if origin is None else origin.scheduler.config
        self.chain = Chain(
            self.teacher,
            num_steps,
            clip=bool(settings.get("clip_sample", False)) if clip is None else clip,
            stochastic=stochastic,
            learned_variance=learned_variance,
            large_variance=settings.get("variance_type") == "fixed_large",
        )
        held = round(reservoir_ratio * self.chain.num_steps)
        if held < 1:
            raise ValueError(
                f"`reservoir_ratio` times {self.chain.num_steps} steps must round to at least 1, but "
                f"`reservoir_ratio` is {reservoir_ratio}."
            )
        slots = batch_size * (held if scheme in ("dynamic", "synthetic") else 1)
        if cond is None and origin is not None:
            cond = origin.encode() if guided else self._all_conditions(origin)
        self.reservoir = Reservoir(
            slots,
            self.sample_shape,
            self.chain.num_steps,
            cond=cond,
            start=self.chain.start,
            dtype=dtype,
            pin_memory=pin_memory,
        )
        self.prepared = False
        self._order = None

    @staticmethod
    def _all_conditions(teacher: Any) -> Cond:
        labels, null = teacher.encode(), teacher.null_condition(1)
        if not null:
            return labels
        count = len(next(iter(labels.values())))
        return {k: torch.cat([v.repeat(9), null[k].repeat(count)]) for k, v in labels.items()}

    @property
    def trainable(self):
        return {"student": self.student.network}

    @torch.no_grad()
    def prepare(self, seed: int = 0, batch_size: int = 250, progress_bar: bool = True) -> None:
        """Shuffle denoise: bring every slot to a time that is drawn uniformly from `1 .. K - 1`; for the synthetic
        scheme to its end. The iterative scheme needs none. The first update calls this, unless somebody has."""
        self.prepared = True
        if self.scheme == "iterative":
            return
        reservoir, steps = self.reservoir, self.chain.num_steps
        generator = torch.Generator().manual_seed(seed)
        everything = torch.arange(len(reservoir))
        reservoir.reset(everything, generator)
        goal = torch.zeros(len(reservoir), dtype=torch.long)
        if self.scheme != "synthetic" and steps > 1:
            goal = torch.randint(1, steps, (len(reservoir),), generator=generator)
        order = goal.argsort(stable=True)  # neighbours stop at nearly one time, so that batches stay full
        total = int((steps - goal).sum())
        with tqdm(total=total, desc="shuffle denoise", unit="eval", disable=not progress_bar) as bar:
            lost = 0
            for slots in order.split(batch_size):
                while len(slots := slots[reservoir.r[slots] != goal[slots]]):  # what overflowed begins again
                    self.advance(*reservoir.take(slots, generator), generator)
                    bar.update(len(slots))
                    lost += int((reservoir.r[slots] < 0).sum())
                    if lost > len(reservoir):
                        raise FloatingPointError(
                            f"{lost} trajectories of the teacher were not finite, for {len(reservoir)} samples. Use "
                            "`mixed_precision` 'bf16' or 'no', and a `dtype` of the reservoir that holds its states."
                        )

    def advance(self, index, x_t, place, cond, generator: Generators = None):
        """One teacher step of the slots `index`; returns the teacher's output and what it was computed at."""
        device = execution_device(self.teacher.network)
        x_t, place = x_t.to(device), place.to(device)
        offset = self.reservoir.offset[index].to(device)
        cond = {k: v.to(device) for k, v in cond.items()}
        with torch.no_grad():
            output = self.chain.output(self.teacher, x_t, place, offset, cond)
            noise = normal(x_t.shape, generator, device)
            self.reservoir.write(index, self.chain.step(x_t, place, offset, output, noise))
        return output, x_t, place, offset, cond

    def updates(self, batch, generator=None):
        size = batch["batch_size"]
        if not self.prepared:
            self.prepare(seed=PartialState().process_index)
        if self.scheme == "synthetic":
            yield "student", self.synthetic_loss(size, generator)
            return
        drawn = self.reservoir.take(self.slots(size, batch.get("shared_generator"), generator), generator)
        output, x_t, place, offset, cond = self.advance(*drawn, generator)
        student_output = self.chain.output(self.student, x_t, place, offset, cond)
        # what overflowed in half precision teaches nothing; `write` has started its trajectory anew
        sound = output.flatten(1).isfinite().all(1).reshape(-1, 1, 1, 1)
        output = torch.where(sound, output, student_output.detach())
        loss = dkdm_loss(student_output, output, x_t=x_t, chain=self.chain, place=place, offset=offset)
        self.diagnostics = {"place": place.float().mean()}
        yield "student", loss

    def slots(self, size: int, shared: torch.Generator | None, generator: Generators) -> torch.Tensor:
        """The slots of a batch: the next ones in turn; in the dynamic scheme the next of a random order, which all
        micro-batches of an update share (its generator is the same for them), so that none comes twice."""
        held = len(self.reservoir)
        if size > held:
            raise ValueError(f"`batch_size` must be at most the number of slots, {held}, but is {size}.")
        if self.scheme == "dynamic":
            chooser = shared or (generator[0] if isinstance(generator, list) else generator)
            order = torch.randperm(held, generator=chooser)
            if shared is None or self._order is None or not torch.equal(order, self._order):
                self._order, self.reservoir.cursor = order, 0
            order = self._order
        else:
            order = torch.arange(held)
        places = (self.reservoir.cursor + torch.arange(size)) % held
        self.reservoir.cursor = (self.reservoir.cursor + size) % held
        return order[places]

    def synthetic_loss(self, size: int, generator: Generators = None) -> torch.Tensor:
        """The baseline: denoising of the teacher's finished samples, in the network's own prediction space."""
        chooser = generator[0] if isinstance(generator, list) else generator
        index = torch.randint(len(self.reservoir), (size,), generator=chooser)
        device = next(self.student.network.parameters()).device
        x0 = self.reservoir.x[index].float().to(device)
        cond = {k: v.to(device) for k, v in self.reservoir.conditions(index).items()}
        schedule = self.student.schedule
        t = schedule.grid((uniform(size, generator, device) * schedule.num_train_timesteps).long())
        x_t = self.student.add_noise(x0, normal(x0.shape, generator, device), t)
        return (self.student.weight(t) * (self.student(x_t, t, cond) - x0) ** 2).mean()

    def save_state(self, folder: Path, rank: int, made_for: dict[str, Any] | None = None) -> None:
        """This process's slots, into a checkpoint or, with settings of the run, a folder of their own."""
        self.reservoir.save(Path(folder) / f"reservoir-{rank:05d}.safetensors", made_for)

    def load_state(self, folder: Path, rank: int, ranks: int) -> None:
        """This process's share of the slots that a checkpoint holds."""
        self.prepared = True
        self.reservoir.load(list(Path(folder).glob("reservoir-*.safetensors")), rank, ranks)


def _channels_out(denoiser: Denoiser | GuidedDenoiser) -> int | None:
    """Channels of the network's output, if its config says."""
    return getattr(getattr(denoiser.network, "config", None), "out_channels", None)
