"""Fit every distilled solver to a teacher, and compare each with its base solver at equal network evaluations.

    accelerate launch training/compare_solvers.py --pretrained_teacher_model fashion32 --output_dir solvers

writes the fitted schedulers, `metrics.json` (after every row, so that a stopped comparison goes on), `table.md` and
`solvers.png`. All processes share the sampling.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler

from diffusers_onestep import Metrics, Teacher, evaluate, fit_d_ode
from diffusers_onestep.arguments import patient_accelerator, run_script
from diffusers_onestep.files import write_json
from diffusers_onestep.methods.dode import DODEReport, end_of, mean_and_stderr, square_distances, trajectory
from diffusers_onestep.records import command_line, provenance
from diffusers_onestep.sampler import shared_inputs
from diffusers_onestep.schedulers import DODESchedulerMixin, distilled_copy, solver_for

SOLVERS = ["ddim", "pndm", "ipndm", "dpmsolver++", "deis", "euler", "heun"]
EDM_SOLVERS = ["edm-euler", "edm-dpmsolver++"]  # of networks with EDM's preconditioning
RIVAL = "unipc"  # diffusers has none for EDM's preconditioning
FINE_STEPS = 200  # of DPM-Solver++(2M): the trajectory that the RMSE is taken to


@dataclass
class ComparisonArguments:
    pretrained_teacher_model: str = field(metadata={"help": "A Hub id, a folder or a shipped name."})
    output_dir: str = field(metadata={"help": "Where everything goes."})
    solvers: list[str] | None = field(default=None, metadata={"help": "Solvers to compare; all that fit by default."})
    network_evaluations: list[int] = field(
        default_factory=lambda: [3, 4, 5, 6, 8, 10, 20], metadata={"help": "Budgets; a solver takes what fits."}
    )
    num_samples: int = field(default=10_000, metadata={"help": "Of each distance."})
    batch_size: int = field(default=250, metadata={"help": "Samples at a time."})
    fit_samples: int = field(default=100, metadata={"help": "Noises of a fit, and as many held out."})
    scale: int = field(default=10, metadata={"help": "Teacher's steps per step."})
    mixed_precision: str = field(default="no", metadata={"help": "bf16: of the sampled networks, not of the fits."})
    seed: int = field(default=0, metadata={"help": "Of the noises of the distances; the fits have others."})


class Comparison:
    """The rows so far, on disk after each."""

    def __init__(self, args: ComparisonArguments):
        self.args, self.accelerator = args, patient_accelerator()
        self.folder = Path(args.output_dir)
        self.teacher = Teacher.from_pretrained(args.pretrained_teacher_model, device=self.accelerator.device)
        self.is_edm = self.teacher.denoiser.prediction_type == "edm"
        args.solvers = args.solvers or (EDM_SOLVERS if self.is_edm else SOLVERS)
        self.content = {
            "settings": asdict(args) | {"output_dir": None},
            "results": [],
            "errors": [],
            "fits": [],
            "seconds": {},
        }
        path = self.folder / "metrics.json"
        if path.is_file():
            before = json.loads(path.read_text())
            if before["settings"] != self.content["settings"]:
                raise ValueError(f"`output_dir` {args.output_dir!r} holds a comparison with other settings.")
            self.content = {key: before.get(key, empty) for key, empty in self.content.items()}
        self.accelerator.wait_for_everyone()
        noise, cond = shared_inputs(
            self.teacher.sample_shape, self.teacher.num_labels, 2 * args.fit_samples, args.seed + 1
        )
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        own = [torch.arange(i * args.fit_samples, (i + 1) * args.fit_samples)[rank::ranks] for i in (0, 1)]
        device = self.accelerator.device
        self.noise, self.holdout = (noise[places].to(device) for places in own)
        self.cond, self.holdout_cond = ({k: v[places].to(device) for k, v in cond.items()} for places in own)
        self.target: torch.Tensor | None = None

    def keep(self, kind: str, row: dict) -> None:
        self.content[kind].append(row)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "metrics.json", provenance(command_line()) | self.content)

    def distance(self, name: str, scheduler, steps: int) -> None:
        """One row: the distance of a solver's images."""
        scheduler.set_timesteps(steps)
        nfe = len(scheduler.timesteps)
        if any((row["model"], row["nfe"]) == (name, nfe) for row in self.content["results"]):
            return
        args, denoiser = self.args, self.teacher.denoiser
        denoiser.autocast_dtype = torch.bfloat16 if args.mixed_precision == "bf16" else None
        row = evaluate(
            self.teacher,
            name=name,
            num_inference_steps=steps,
            num_samples=args.num_samples,
            batch_size=args.batch_size,
            seed=args.seed,
            scheduler=scheduler,
            all_processes=True,
        )
        denoiser.autocast_dtype = None
        self.keep("results", asdict(row))
        self.accelerator.print(f"{name}, NFE {row.nfe}: {row.metric} {row.value:.3f}", flush=True)

    def fit(self, name: str, scheduler: DODESchedulerMixin, steps: int, folder: Path) -> None:
        """Fit one table, or take it from the folder; `scheduler` keeps it if it is accepted."""
        known = [row for row in self.content["fits"] if (row["solver"], row["steps"]) == (name, steps)]
        if known:
            if known[0]["accepted"]:
                table = type(scheduler).from_pretrained(folder).config.dode_tables[str(steps)]
                scheduler.add_table(steps, table)
            return
        report = self.fit_once(scheduler, steps)
        self.accelerator.print(report, flush=True)
        if self.accelerator.is_main_process and report.accepted:
            scheduler.save_pretrained(folder)
        row = {"solver": name, "steps": steps, "nfe": len(report.lambdas), "accepted": report.accepted}
        row |= {"rmse": report.heldout_mse**0.5, "rmse_base": report.heldout_mse_base**0.5}
        self.keep("fits", row | {"seconds": report.seconds, "network_evaluations": report.network_evaluations})

    def fit_once(self, scheduler: DODESchedulerMixin, steps: int) -> DODEReport:
        return fit_d_ode(
            scheduler,
            self.teacher.denoiser.call_network,
            steps,
            self.noise,
            scale=self.args.scale,
            holdout=self.holdout,
            cond=self.cond,
            holdout_cond=self.holdout_cond,
            progress_bar=self.accelerator.is_main_process,
        )

    def rmse(self, name: str, scheduler, steps: int) -> None:
        """RMSE per pixel of a solver's held-out samples to those of one fine trajectory, the same for all."""
        scheduler.set_timesteps(steps, device=self.accelerator.device)
        nfe = len(scheduler.timesteps)
        if any((row["model"], row["nfe"]) == (name, nfe) for row in self.content["errors"]):
            return
        if self.target is None:
            fine = solver_for("edm-dpmsolver++" if self.is_edm else "dpmsolver++", self.teacher.scheduler)
            self.target = self.end(fine, FINE_STEPS)
        mean, stderr = mean_and_stderr(square_distances(self.end(scheduler, steps), self.target))
        error = stderr and stderr / (2 * mean**0.5)
        self.keep("errors", {"model": name, "nfe": nfe, "rmse": mean**0.5, "error": error})

    @torch.no_grad()
    def end(self, scheduler, steps: int) -> torch.Tensor:
        """Where a solver takes the held-out noises, at unit scale."""
        scheduler.set_timesteps(steps, device=self.accelerator.device)
        predict = self.teacher.denoiser.call_network
        x = self.holdout * scheduler.init_noise_sigma
        return end_of(trajectory(scheduler, x, self.holdout_cond, predict))

    def measure(self, name: str, scheduler, steps: int) -> None:
        self.distance(name, scheduler, steps)
        self.rmse(name, scheduler, steps)

    def times(self) -> None:
        """Seconds of one fit and of what it is held against, side by side."""
        if self.content["seconds"]:
            return
        row = evaluate(self.teacher, num_inference_steps=100, num_samples=1000, all_processes=True)
        scheduler = solver_for(self.args.solvers[0], self.teacher.scheduler)
        steps = steps_within(scheduler, 10)
        report = self.fit_once(scheduler, steps)
        seconds = {"fit": report.seconds, "fit_solver": self.args.solvers[0], "fit_steps": steps}
        self.content["seconds"] = seconds | {"sampling_1000_images_100_steps": 1000 / row.images_per_second}

    def run(self) -> None:
        args = self.args
        self.times()
        # the budgets that the targets name first, should there be no time for all
        for budget in sorted(args.network_evaluations, key=lambda n: (n not in (5, 10), n)):
            if not self.is_edm:
                config = self.teacher.scheduler.config
                self.measure(RIVAL, UniPCMultistepScheduler.from_config(config, timestep_spacing="trailing"), budget)
            for name in args.solvers:
                base, steps, key = solver_at(name, self.teacher.scheduler, budget)
                self.measure(name, base, steps)
                distilled = distilled_copy(base)
                folder = self.folder / key / "scheduler"
                if (folder / distilled.config_name).is_file():
                    distilled = type(distilled).from_pretrained(folder)
                self.accelerator.wait_for_everyone()
                self.fit(name, distilled, steps, folder)
                if steps in distilled.fitted_steps:
                    self.measure(f"distilled {name}", distilled, steps)
        if self.accelerator.is_main_process:
            (self.folder / "table.md").write_text(table(self.content, args.network_evaluations))
            plot(self.content, self.folder / "solvers.png")
            print(table(self.content, args.network_evaluations))


def solver_at(name: str, teacher_scheduler, budget: int) -> tuple[DODESchedulerMixin, int, str]:
    """A solver, its steps within a budget, and the folder of its tables.

    diffusers' DDIM can be distilled only where its steps divide the training timesteps; elsewhere DPM-Solver++ of
    order 1, which is DDIM without clipping, stands in.
    """
    solver, key = solver_for(name, teacher_scheduler), name.replace("+", "p")
    steps = steps_within(solver, budget)
    if name == "ddim" and steps != budget:
        solver = solver_for("dpmsolver++", teacher_scheduler, solver_order=1, dode_space="epsilon")
        steps, key = budget, "ddim-any"
    return solver, steps, key


def steps_within(scheduler: DODESchedulerMixin, budget: int) -> int:
    """The largest number of steps that takes at most `budget` evaluations on a grid that can be distilled."""
    for steps in range(budget, 1, -1):
        scheduler.set_timesteps(steps)
        try:
            scheduler.check_grid()
        except ValueError:
            continue
        if len(scheduler.timesteps) <= budget:
            return steps
    raise ValueError(f"`network_evaluations` must leave room for two steps of every solver, but has {budget}.")


def table(content: dict, budgets: list[int]) -> str:
    """FD, then RMSE per pixel to the end of the teacher's fine trajectory, a column per budget.

    A cell with fewer evaluations than its column says how many in brackets.
    """
    results = [Metrics(**row) for row in content["results"]]
    names = list(dict.fromkeys(row.model.removeprefix("distilled ") for row in results))
    distances = {(row.model, row.nfe): row.value for row in results}
    errors = {(row["model"], row["nfe"]): row["rmse"] for row in content["errors"]}
    refused = {(row["solver"], row["nfe"]) for row in content["fits"] if not row.get("accepted", True)}
    lines = []
    for title, values in ((f"{results[0].metric}, n = {results[0].num_samples:,}", distances), ("RMSE", errors)):
        lines += [f"| {title} | " + " | ".join(map(str, budgets)) + " |", "|---" * (len(budgets) + 1) + "|"]
        for model in [f"{kind}{name}" for name in names for kind in ("", "distilled ")]:
            base = model.removeprefix("distilled ")
            own = {nfe: value for (name, nfe), value in values.items() if name == model}
            cells = []
            for budget in budgets:
                nfe = max((n for m, n in distances if m == base and n <= budget), default=None)
                cell = f"{own[nfe]:.3f}" if nfe in own else "–"
                if (base, nfe) in refused and model != base and values is distances:
                    cell = "refused"
                cells.append(cell + (f" ({nfe})" if nfe not in (None, budget) else ""))
            if own:
                lines.append(f"| {model} | " + " | ".join(cells) + " |")
        lines.append("")
    seconds = content["seconds"]
    shares = [max(row.error / row.value for row in results if row.error)]
    shares += [max((row["error"] / row["rmse"] for row in content["errors"] if row.get("error")), default=math.nan)]
    lines.append("Standard errors are at most {:.1%} of the distances and {:.1%} of the RMSE.".format(*shares))
    lines.append(
        f"Fitting {seconds['fit_solver']} for {seconds['fit_steps']} steps took {seconds['fit']:.0f} s; sampling "
        f"1,000 images with 100 steps {seconds['sampling_1000_images_100_steps']:.0f} s.\n"
    )
    return "\n".join(lines)


def plot(content: dict, path: Path) -> None:
    """Distance against evaluations, a colour per solver, base dashed and distilled solid."""
    from matplotlib.figure import Figure

    results = [Metrics(**row) for row in content["results"]]
    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    names = list(dict.fromkeys(row.model.removeprefix("distilled ") for row in results))
    for i, name in enumerate(names):
        for model, style in ((name, "--"), (f"distilled {name}", "-")):
            own = sorted((row.nfe, row.value) for row in results if row.model == model)
            if own:
                rival = name == RIVAL
                colour = "black" if rival else f"C{i}"
                axes.plot(*zip(*own, strict=True), ":" if rival else style, color=colour, marker=".", label=model)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=results[0].metric)
    ticks = sorted({row.nfe for row in results})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2, handlelength=3.5)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(args: ComparisonArguments) -> None:
    Comparison(args).run()


if __name__ == "__main__":
    run_script(main, ComparisonArguments)
