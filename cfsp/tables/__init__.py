"""Tables, figures and reports of experiments, and the summary at the end of a run. All are made from records alone."""
