"""One call of a stock pipeline, for one request or for several that are alike."""

from __future__ import annotations

import copy
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from blaze.engines.diffusion.adapters import Adapters
from blaze.engines.diffusion.counter import NonFiniteCounter
from blaze.engines.diffusion.decoding import checked_vae, preview
from blaze.engines.diffusion.images import Pixels, to_image, to_pixels
from blaze.engines.diffusion.job import Job
from blaze.engines.diffusion.parameters import seeds
from blaze.engines.diffusion.pipelines import LoadedPipeline, Task, task_of
from blaze.engines.diffusion.safety import check_safety
from blaze.engines.diffusion.schedulers import make_scheduler
from blaze.engines.diffusion.steps import Step, unwatch, watch
from blaze.engines.diffusion.writer import ImageWriter
from blaze.errors import BlazeError, Cancelled, ContentFlagged, EngineFailure, ReplicaStopping
from blaze.types import Failed, Progress, Started

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Studio:
    """What all drawings of an engine share.

    ``stand_in``: makes a denoiser that waits for company. None: calls run whole, and ``on_step`` is told of
    their steps.
    """

    loaded: LoadedPipeline
    writer: ImageWriter
    stopping: threading.Event
    counter: NonFiniteCounter
    stand_in: Callable[[], nn.Module] | None = None
    on_step: Callable[[], None] = lambda: None


class Drawing:
    """The pipeline gets a shell and a scheduler of its own, for both keep state while they run, and one CPU
    generator per image, so that an image is the same whatever is drawn beside it."""

    def __init__(self, jobs: Sequence[Job], studio: Studio) -> None:
        self._jobs = tuple(jobs)
        self._live = list(jobs)  # the others have left
        ends = list(accumulate(job.images for job in jobs))
        self._rows = {job: slice(end - job.images, end) for job, end in zip(jobs, ends, strict=True)}
        self._studio = studio
        self._task = task_of(jobs[0].request)
        self._steps_done = 0
        self._steps_total = 0
        self._previews: defaultdict[int, list[tuple[Job, int]]] = defaultdict(list)  # step -> (job, number)
        self._shell: DiffusionPipeline | None = None
        self._latents: Tensor | None = None  # after the last step
        self.is_over = False
        self.to_retry: tuple[Job, ...] = ()  # the call failed; one of these may be to blame

    @property
    def images(self) -> int:
        return sum(job.images for job in self._jobs)

    @property
    def wanted(self) -> list[int]:
        """Which of the images somebody waits for. The others keep nobody out, and are computed no further."""
        places = (self._rows[job] for job in self._live)
        return [row for place in places for row in range(place.start, place.stop)]

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def adapters(self) -> Adapters:
        return self._jobs[0].request.adapters

    def unwanted(self) -> BlazeError | None:
        """Ends the jobs that nobody waits for. Not None: there is none left, or the engine is stopping."""
        if self._studio.stopping.is_set():
            return ReplicaStopping("The replica is shutting down.")
        for job in tuple(self._live):
            if (error := job.unwanted()) is not None:
                job.put(Failed(error.info))
                self._live.remove(job)
        return None if self._live else Cancelled("Nobody waits for it.")

    def run(self) -> None:
        """Everything, up to the events of the answers. Raises nothing."""
        try:
            self._raise_if_unwanted()
            for job in self._live:
                if not job.started:
                    job.started = True
                    job.put(Started())
            self._deliver(self._draw())
        except BlazeError as error:
            self.fail(error)
        except Exception as error:
            if len(self._jobs) > 1:
                logger.warning(
                    "%d requests failed as one call, now one by one", len(self._jobs), exc_info=True
                )
                self.to_retry = tuple(self._live)
            else:
                logger.exception("request %s failed", self._jobs[0].request.request_id)
                self.fail(EngineFailure(f"The pipeline failed: {type(error).__name__}."))
        finally:
            self._live = []
            if self._shell is not None:
                unwatch(self._shell.scheduler)
            self._shell = self._latents = None
            self._previews.clear()
            self.is_over = True

    def fail(self, error: BlazeError) -> None:
        """The end of the jobs that are left."""
        for job in self._live:
            job.put(Failed(error.info))

    def _raise_if_unwanted(self) -> None:
        if (error := self.unwanted()) is not None:
            raise error

    # --- The call ----------------------------------------------------------------------------------

    def _draw(self) -> Sequence[Pixels]:
        self._shell = self._make_shell()
        wanted = self._arguments()
        accepted = self._studio.loaded.accepts[self._task]
        given = {name: value for name, value in wanted.items() if value is not None and name in accepted}
        vae = self._studio.loaded.pipelines[self._task].components.get("vae")
        weight = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
        dtype = None if weight is None else weight.dtype
        try:
            images = self._shell(**given).images
        finally:
            # Pipelines may upcast it for their part, and one that fails leaves it so: to everybody.
            if isinstance(vae, nn.Module) and weight is not None and weight.dtype is not dtype:
                vae.to(dtype=dtype)
        if isinstance(images, Tensor):
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return [to_pixels(image) for image in images]

    def _make_shell(self) -> DiffusionPipeline:
        """A copy of the pipeline that shares its weights and nothing that a call changes."""
        loaded = self._studio.loaded
        pipeline = loaded.pipelines[self._task]
        scheduler = make_scheduler(loaded, self._task, self._jobs[0].request.scheduler)
        watch(scheduler, self._after_step)
        own: dict[str, object] = {"scheduler": scheduler}
        if self._studio.stand_in is not None and loaded.denoiser is not None:
            own[loaded.denoiser] = self._studio.stand_in()
        if isinstance(vae := pipeline.components.get("vae"), nn.Module):
            own["vae"] = checked_vae(vae, self._wanted_of, self._studio.counter.decoded_again)
        shell = copy.copy(pipeline)
        shell.__class__ = loaded.shells.get(self._task, type(pipeline))
        vars(shell).update(own)  # not by assignment, with which pipelines rewrite their config
        vars(shell).pop("_num_timesteps", None)
        return shell

    def _arguments(self) -> dict[str, object]:
        """Of the pipeline, by name; None: its own default."""
        request = self._jobs[0].request
        of_images = [job for job in self._jobs for _ in range(job.images)]
        negative = request.negative_prompt
        return {
            "prompt": [job.request.prompt for job in of_images],
            "negative_prompt": None if negative is None else [negative] * len(of_images),
            "image": None if self._task is Task.TEXT else [job.image for job in of_images],
            "mask_image": None if self._task is not Task.INPAINT else [job.mask for job in of_images],
            "strength": request.strength,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "eta": request.eta,
            "clip_skip": request.clip_skip,
            "width": request.width,
            "height": request.height,
            "generator": [
                torch.Generator("cpu").manual_seed(seed) for job in self._jobs for seed in seeds(job.request)
            ],
            "batch_size": None if self._studio.loaded.is_conditional else len(of_images),
            # Unconditional pipelines cannot turn 16-bit numbers into NumPy's themselves.
            "output_type": "np" if self._studio.loaded.is_conditional else "pt",
        }

    # --- Steps -------------------------------------------------------------------------------------

    def _after_step(self, step: Step) -> None:
        self._raise_if_unwanted()
        if self._studio.stand_in is None:
            self._studio.on_step()
        if self._steps_done == 0:
            self._plan(step)
        self._steps_done += 1
        self._steps_total = max(self._steps_total, self._steps_done)
        self._latents = step.latents
        for job in self._live:
            if job.request.progress:
                job.put(Progress(self._steps_done, self._steps_total))
        due = [(job, number) for job, number in self._previews[self._steps_done] if job in self._live]
        if due:
            self._show(due, step)

    def _plan(self, step: Step) -> None:
        """How many steps there are, and after which of them previews are shown."""
        told = vars(self._shell).get("_num_timesteps")  # left by most classes, before their first step
        self._steps_total = told if isinstance(told, int) else step.steps_left()
        for job in self._jobs:
            wanted = job.request.partial_images
            steps = {self._steps_total * (number + 1) // (wanted + 1) for number in range(wanted)}
            for number, at in enumerate(sorted(steps - {0})):
                self._previews[at].append((job, number))

    def _show(self, due: Sequence[tuple[Job, int]], step: Step) -> None:
        """Previews are a courtesy: one that fails is none, and harms nothing."""
        try:
            latents = step.estimate()
            if latents is None or self._shell is None or len(latents) != self.images:
                return
            for job, number in due:
                pixels = preview(self._shell, latents[self._rows[job]], self._size(job))
                if pixels is not None and bool(pixels.isfinite().all()):
                    images = list(pixels.permute(0, 2, 3, 1).cpu().numpy())
                    self._check_safety(images)
                    self._studio.writer.preview(job, number, images)
        except ContentFlagged:
            logger.info("a preview was flagged")
        except Exception:
            logger.warning("no preview of request %s", due[0][0].request.request_id, exc_info=True)

    def _wanted_of(self, latents: int) -> Sequence[int]:
        """Which of so many latents are to be decoded; previews are of one request and not of all."""
        return self.wanted if latents == self.images else range(latents)

    def _size(self, job: Job) -> tuple[int, int]:
        side = self._studio.loaded.default_side
        given = (side, side) if job.image is None else job.image.size
        return job.request.width or given[0], job.request.height or given[1]

    # --- The end -----------------------------------------------------------------------------------

    def _deliver(self, images: Sequence[Pixels]) -> None:
        if len(images) != self.images:
            raise RuntimeError(f"the pipeline gave {len(images)} images and not {self.images}")
        if self._latents is not None and len(self._latents) == len(images):
            for index, latents in enumerate(self._latents):
                if not bool(latents.isfinite().all()):
                    images[index].fill(np.nan)  # clamped, they may look like a picture
        self.unwanted()
        for job in tuple(self._live):
            try:
                self._check_safety(images[self._rows[job]])
            except BlazeError as error:
                self._studio.counter.failed(error)
                job.put(Failed(error.info))
            else:
                self._studio.writer.finish(job, images[self._rows[job]])
            self._live.remove(job)  # it is answered, whatever becomes of the next one

    def _check_safety(self, images: Sequence[Pixels]) -> None:
        """Raises :class:`ContentFlagged`, where the config asks for the checker."""
        loaded = self._studio.loaded
        if loaded.safety_checker is not None and any(check_safety(loaded, [*map(to_image, images)])):
            raise ContentFlagged("The safety checker flagged the image.")
