"""What a run leaves for people: its table, its page, its summary and the student's model card."""

from distill.report.card import bundle_facts, model_card
from distill.report.diagnostics import diagnostics, save_thumbnails
from distill.report.page import write_pages, write_run_page, write_sweep_page
from distill.report.summary import run_metadata, save_condition, unlabeled_of
from distill.report.table import print_table

__all__ = [
    "bundle_facts",
    "diagnostics",
    "model_card",
    "print_table",
    "run_metadata",
    "save_condition",
    "save_thumbnails",
    "unlabeled_of",
    "write_pages",
    "write_run_page",
    "write_sweep_page",
]
