"""Tables, figures and reports of experiments, and the summary at the end of a run. All are made from records alone.

It may import sweep and the packages below; benchmark and the packages above may import it. Launcher and tables do not
import each other.
"""
