"""Is a training run going well? Live numbers of the student, and a judgement and a picture of `log.jsonl` alone.

Lines of the log are JSON objects of numbers: `step`, `images`, `seconds`, and what was measured there. A line with
`warning` says in plain words what goes wrong.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .arguments import TrainArguments
from .denoiser import Cond
from .features import FashionCNN, load_extractor
from .metrics import diversity, frechet_distance_of_moments, moments, square_root
from .network_calls import execution_device
from .pictures import picture
from .reference import Reference
from .reports import save_figure
from .run_folder import read_log
from .sampler import part_of, shared_inputs
from .teacher import Teacher

Images = Callable[[torch.Tensor, dict[str, Any], torch.Generator | None], torch.Tensor]

WINDOW = 20  # logged updates that the lag is the median of: one batch says little
# where the fake score follows, |lag| stays below 1; but both scores start as one, and a lag that is measured against
# their small difference may be large then: what counts is that it grows
LAG_LIMIT, LAG_GROWTH = 1.5, 1.5
# a fake score that is lost tends to a lag of -1, while the difference of the two scores grows within few updates; that
# of a healthy run starts at 0 and grows steadily until the fake score follows
GAP_WINDOW, GAP_GROWTH = 5, 4
DIVERSITY_LIMIT = 0.5  # of the teacher's
PATIENCE = 5  # validations since the best
RISE_LIMIT = 1.5  # of the best distance
DIVERSITY_SAMPLES = 500
VALIDATION_SEED = 1000  # other noises than those of the evaluation that is reported
BATCH_SIZE = 250
FASHION_LABELS = {"trouser", "pullover", "dress", "sandal", "sneaker", "ankle boot"}  # as all spell them
ABOUT = ("step", "images", "seconds", "warning")


class Watch:
    """Live numbers of a student on a small sample of fixed noises: `distance` (Fréchet), `diversity` (over the
    teacher's) and `saturation` (share of pixels clipped by more than a grey level; the teacher's is
    `teacher_saturation`).

    Args:
        teacher (`Teacher`): sampled once, at the first validation.
        args (`TrainArguments`): `validation_samples`, `validation_extractor`, `validation_reference`, `seed`.
        cond (`dict`, *optional*): conditions to sample with in turn; by default the teacher's labels.
        decode (callable, *optional*): from model space to images `(B, C, H, W)` in [-1, 1], for latents.
        num_inference_steps (`int`, *optional*, defaults to 20): of the teacher.
        guidance_scale (`float`, *optional*, defaults to 1.0): of the teacher.
    """

    def __init__(
        self,
        teacher: Teacher,
        args: TrainArguments,
        *,
        cond: Cond | None = None,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
    ):
        names = {name.casefold() for name in (teacher.id2label or {}).values()}
        of_fashion = teacher.sample_shape == FashionCNN.input_shape and names >= FASHION_LABELS
        own = "fashion" if of_fashion else "effnet-lite0"
        self.extractor = load_extractor(args.validation_extractor or own)
        # latents are decoded too: no more of them than the run itself has room for
        self.batch_size = min(BATCH_SIZE, args.train_batch_size) if teacher.takes_prompts else BATCH_SIZE
        self.teacher, self.decode = teacher, decode
        self.settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        labels = None if cond else teacher.num_labels
        seed = args.seed + VALIDATION_SEED
        self.noise, own = shared_inputs(teacher.sample_shape, labels, args.validation_samples, seed)
        self.cond = cond or own
        self.reference: Reference | None = None  # the teacher's images, where there are no others
        if args.validation_reference or isinstance(self.extractor, FashionCNN):
            self.reference = Reference.load(args.validation_reference, self.extractor)

    def __call__(self, student: Images) -> dict[str, float]:
        self.extractor.to(execution_device(self.teacher.denoiser.network))  # training moves it
        if not hasattr(self, "teacher_diversity"):
            self._sample_teacher()
        features, saturation = self._features(student, len(self.noise))
        expected = self.reference.mean, self.reference.covariance, self.root
        return {
            "distance": frechet_distance_of_moments(*moments(features), *expected),
            "diversity": diversity(features[:DIVERSITY_SAMPLES]) / self.teacher_diversity,
            "saturation": saturation,
            "teacher_saturation": self.teacher_saturation,
        }

    def _sample_teacher(self) -> None:
        def run(noise, cond, generator):
            return self.teacher.sample(noise, cond, **self.settings)

        number = len(self.noise) if self.reference is None else min(DIVERSITY_SAMPLES, len(self.noise))
        features, self.teacher_saturation = self._features(run, number)
        if self.reference is None:
            self.reference = Reference(*moments(features), features, source="the teacher's images")
        self.root = square_root(self.reference.covariance)
        self.teacher_diversity = diversity(features[:DIVERSITY_SAMPLES])

    def _features(self, images: Images, number: int) -> tuple[torch.Tensor, float]:
        """Features of images of the first noises, and the share of pixels beyond [-1, 1]."""
        features, clipped = [], 0.0
        rows = len(next(iter(self.cond.values()))) if self.cond else number
        for places in torch.arange(number).split(self.batch_size):
            generator = torch.Generator().manual_seed(places[0].item())
            x0 = images(self.noise[places], part_of(self.cond, places % rows), generator)
            x0 = self.decode(x0) if self.decode else x0
            clipped += (x0.abs() > 1 + 1 / 127.5).double().mean().item() * len(places)
            features.append(self.extractor(picture(x0))[0])
        return torch.cat(features), clipped / number


def warnings(lines: list[dict[str, Any]], elements: float = math.inf) -> dict[str, str]:
    """What goes wrong at the end of a log, by kind, in plain words; empty if nothing does. `elements` of a sample say
    how far two images in [-1, 1] can be from each other."""
    found = {}
    lags = [abs(line["fake_score_lag"]) for line in lines if "fake_score_lag" in line]
    lag = median(lags[-WINDOW:]) if len(lags) >= 2 * WINDOW else 0.0
    if lag > LAG_LIMIT and lag > LAG_GROWTH * median(lags[:WINDOW]):
        found["fake_score_lag"] = (
            f"The fake score does not follow the student: its lag is {lag:.1f} times the difference of the two scores "
            f"(median of {WINDOW} logged updates; below 1 in healthy runs), so the student learns from a stale score. "
            "Raise `fake_score_learning_rate` or `fake_score_updates`, or lower `learning_rate`."
        )
    gaps = [line["score_gap"] for line in lines if "score_gap" in line]
    if len(gaps) >= GAP_WINDOW:
        windows = [median(gaps[i : i + GAP_WINDOW]) for i in range(len(gaps) - GAP_WINDOW + 1)]
        before, now = max(windows[:-GAP_WINDOW], default=math.inf), windows[-1]
        grown = len(gaps) >= 3 * GAP_WINDOW and now > GAP_GROWTH * before > 0
        if grown or now > 4 * elements:
            than = (
                f"{before:.3g} before" if grown else f"{4 * elements:.3g} between the farthest two images in [-1, 1]"
            )
            found["score_gap"] = (
                f"The two scores part: their squared difference is {now:.3g} (median of {GAP_WINDOW} logged updates), "
                f"against {than}, so the student runs away from the fake score. Lower `learning_rate` and "
                "`fake_score_learning_rate`, and go on from an earlier checkpoint."
            )
    spread = [line["diversity"] for line in lines if "diversity" in line]
    if spread and spread[-1] < DIVERSITY_LIMIT and (max(spread) >= DIVERSITY_LIMIT or len(spread) >= 2 * PATIENCE):
        found["diversity"] = (
            f"The student's images differ from each other {spread[-1]:.0%} as much as the teacher's: it is collapsing "
            "to few images. Go back to an earlier checkpoint with a lower `learning_rate`, or more "
            "`fake_score_updates`."
        )
    distances = [line["distance"] for line in lines if "distance" in line]
    if len(distances) > PATIENCE:
        best = min(distances)
        since = len(distances) - 1 - distances.index(best)
        if since >= PATIENCE and min(distances[-3:]) > RISE_LIMIT * best:
            found["distance"] = (
                f"The distance has been rising: {distances[-1]:.4g} now, against {best:.4g} at its best, {since} "
                "validations ago. The best student is in the folder `best`; go on from there with a lower "
                "`learning_rate`, or stop."
            )
    return found


class Health:
    """The log so far, and which warnings stand; built anew from the log on resume, so that it goes on as it was."""

    def __init__(self, lines: list[dict[str, Any]], elements: float = math.inf):
        self.lines, self.elements = list(lines), elements
        self.standing = warnings(self.lines, elements)

    def add(self, line: dict[str, Any]) -> list[str]:
        """Take up one more line; returns the warnings that it brings and that did not stand before."""
        self.lines.append(line)
        before, self.standing = self.standing, warnings(self.lines, self.elements)
        return [text for kind, text in self.standing.items() if kind not in before]


def draw_health(log: Path, output: Path, columns: int = 4) -> None:
    """Draw every number of a `log.jsonl` against the images seen, warnings as red lines; written beside, then
    renamed."""
    from matplotlib.figure import Figure

    lines = read_log(log)
    names = sorted({name for line in lines for name in line} - set(ABOUT))
    if not names:
        return
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    warned = [line for line in lines if "warning" in line]
    for axes, name in zip(panels, names, strict=False):
        points = [(line["images"] / 1000, line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), linewidth=1, marker="." if len(points) < 30 else None)
        for line in warned:
            axes.axvline(line["images"] / 1000, color="red", linewidth=0.8, linestyle="--")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("thousand images", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        values = [value for _, value in points]
        if min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    if warned:
        last = warned[-1]
        figure.suptitle(f"Step {last['step']}: {last['warning'].split('. ')[0]}.", fontsize=8, color="red", wrap=True)
    figure.tight_layout()
    save_figure(figure, output, dpi=110)
