"""What a run leaves for people: its table, its summary and the student's model card."""

from distill.report.card import bundle_facts, model_card
from distill.report.summary import circumstances, parameters, throughput, versions, write_json
from distill.report.table import print_table

__all__ = [
    "bundle_facts",
    "circumstances",
    "model_card",
    "parameters",
    "print_table",
    "throughput",
    "versions",
    "write_json",
]
