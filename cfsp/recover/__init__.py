"""Recovery: training a pruned model. Imports plans, models and data; `stage` alone knows the pipeline."""
