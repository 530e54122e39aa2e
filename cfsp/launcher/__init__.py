"""Launchers: they start the runs of a sweep in this process, in several processes, or on a Slurm cluster.

The command line builds them from ``conf/launcher``. They import the sweep and the pipeline.
"""
