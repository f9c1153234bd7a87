"""Triton's interpreter, amended so that a kernel which passes in it has little left to fail at on a GPU."""

from interpreter.bfloat16 import compute_bfloat16
from interpreter.memory import check_memory
from interpreter.speed import save_time


def amend_interpreter() -> None:
    """Changes Triton's interpreter for good."""
    save_time()
    compute_bfloat16()
    check_memory()
