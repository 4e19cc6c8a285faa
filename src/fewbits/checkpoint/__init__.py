"""Checkpoint schemas: how files name and hold quantized weights. One file per schema."""
