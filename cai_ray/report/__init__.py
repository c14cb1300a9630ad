"""The report of a run, finished or not: one self-contained HTML file, and the table that the command line prints."""

from cai_ray.report.collect import summary_lines
from cai_ray.report.html import write_report

__all__ = ["summary_lines", "write_report"]
