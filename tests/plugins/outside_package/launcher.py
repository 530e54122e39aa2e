"""A launcher that does the last job first."""

from __future__ import annotations

from cfsp.components import component
from cfsp.pipeline.base_models import BaseModels
from cfsp.sweep.job import do


@component
class Backwards:
    def launch(self, jobs, report):
        for job in reversed(jobs):
            report(job, do(job.config, BaseModels()))
