"""A roofline of training steps: where low precision pays, time and memory on N chips.

Arithmetic on shapes and data sheets; nothing runs. Manual: docs/planning.md.
"""
