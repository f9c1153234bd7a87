"""The frozen block: its folded weights, which of its rows are computed, and what is kept for backward."""
