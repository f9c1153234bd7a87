"""Triton's interpreter, amended so that a kernel which passes in it has little left to fail at on a GPU."""

from interpreter.bfloat16 import compute_bfloat16
from interpreter.functions import call_functions_quickly
from interpreter.memory import check_memory


def amend_interpreter() -> None:
    """Changes Triton's interpreter for good."""
    call_functions_quickly()
    compute_bfloat16()
    check_memory()
