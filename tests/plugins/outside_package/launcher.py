"""A launcher that does the last job first."""

from __future__ import annotations

from cfsp.components import component
from cfsp.pipeline.base_models import BaseModels
from cfsp.sweep.job import execute


@component
class Backwards:
    def launch(self, jobs, report):
        for job in reversed(jobs):
            report(job, execute(job.config, BaseModels()))
